"""The machine room: resume, checkpoints, signals, several processes, use after training."""

import importlib
import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import contrast
import orca
import record
import run
from tasks.sources import words

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [name for name in ("orca", "pare", "proposed") if (ROOT / f"{name}.py").exists()]
BOTH = {"epochs": 3, "batch_size": 24}
SHORT = {
    "orca": BOTH | {"source_size": 64, "align": "mmd", "align_epochs": 2, "align_samples": 40},
    "pare": BOTH | {"source_size": 64},
    "proposed": BOTH | {"contrast_epochs": 2, "contrast_steps_per_epoch": 4, "draws": 12},
}
SAVES = {"orca": 5, "pare": 3, "proposed": 5}  # of last.pt before the last one


def config(script, series, out, **more):
    return importlib.import_module(script).configure(
        task=str(series), out=str(out), **{**SHORT[script], **more}
    )


def flags(script, series, out):
    argv = [x for k, v in SHORT[script].items() for x in ("--" + k.replace("_", "-"), str(v))]
    return [*argv, "--task", str(series), "--out", str(out)]


def main(script, cfg):
    return importlib.import_module(script).main(cfg)


def outcome(out):
    """What must be the same after a resume: weights, logs without times, result without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    weights = {k: w.numpy().tobytes() for k, w in load_file(out / "model.safetensors").items()}
    strip = lambda row: {k: v for k, v in row.items() if k != "time_s"}  # noqa: E731
    return weights, [strip(row) for row in rows], strip(result), (out / "steps.csv").read_text()


@pytest.fixture(scope="module", autouse=True)
def body(small_body):
    """What g is makes no difference to the machine room."""
    for settings in SHORT.values():
        settings["body"] = str(small_body)


@pytest.fixture(scope="module")
def unbroken(series, tmp_path_factory):
    """For each script, a run that nothing disturbed."""
    found = {}
    for script in SCRIPTS:
        out = tmp_path_factory.mktemp(script) / "run"
        main(script, config(script, series, out))
        found[script] = out
    return found


class Killed(BaseException):
    pass


def broken_at(monkeypatch, call):
    """Die in the call-th save of last.pt, after it is written."""
    count, save = [0], run.Record.save

    def saves(self, *args, **kwargs):
        save(self, *args, **kwargs)
        count[0] += self.out is not None
        if count[0] == call:
            raise Killed

    monkeypatch.setattr(run.Record, "save", saves)


BREAKS = [(script, call + 1) for script in SCRIPTS for call in range(SAVES[script])]


@pytest.mark.parametrize(("script", "call"), BREAKS)
def test_a_run_broken_after_any_save_goes_on_to_the_same_end(
    script, call, unbroken, series, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    cfg = config(script, series, out)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        broken_at(patch, call)
        main(script, cfg)
    assert not (out / "result.json").exists()
    main(script, replace(cfg, resume=True))
    assert outcome(out) == outcome(unbroken[script])


# place: the module and the function that a script asks for there, and at which call it is stopped
PLACES = {
    "align": (orca, "separability", 2),
    "contrast": (contrast, "label_weights", 3),
    "train": (run, "sum_gradients", 6),
    "val": (None, "evaluate", 2),
    "test": (None, "evaluate", 1),
}
STOPS = [
    (script, place, signal.SIGTERM) for script in SCRIPTS for place in ("train", "val", "test")
]
STOPS += [("orca", "align", signal.SIGTERM), ("proposed", "contrast", signal.SIGTERM)]
STOPS += [("pare", "train", signal.SIGINT)]  # which one it is makes no difference but to the code


@pytest.mark.parametrize(("script", "place", "signum"), STOPS)
def test_a_signal_stops_the_run_where_it_can_go_on_to_the_same_end(
    script, signum, place, unbroken, series, tmp_path, monkeypatch, capsys
):
    out, module = tmp_path / "run", importlib.import_module(script)
    holder, name, at = PLACES[place]
    holder, calls = holder or module, [0]
    function = getattr(holder, name)

    def interrupted(*args):
        calls[0] += name != "evaluate" or args[1] == place
        if calls[0] == at:
            calls[0] += 1  # once only
            os.kill(os.getpid(), signum)
        return function(*args)

    argv = flags(script, series, out)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, interrupted)
        assert module.cli(argv) == 128 + signum
    assert "interrupted; continue with --resume" in capsys.readouterr().err
    state = record.read_state(out / "last.pt", {})
    if place != "test":
        assert state["stage"] == (place if place in ("align", "contrast") else "finetune")
    assert (state["batch"] > 0) == (place == "train") and not (out / "result.json").exists()
    assert module.cli([*argv, "--resume"]) == 0
    assert outcome(out) == outcome(unbroken[script])


@pytest.mark.parametrize("every", [2, 5])
def test_a_run_that_saves_seldom_goes_on_to_the_same_end(
    every, unbroken, series, tmp_path, monkeypatch
):
    """Epoch 1 is lost with save_every 2, so is the second with 5; the last one is always saved."""
    out, log, epochs = tmp_path / "run", run.Record.log, []
    cfg = config("pare", series, out, save_every=every)

    def killed(self, *args, **values):
        log(self, *args, **values)
        epochs.append(self.epoch + 1)
        if len(epochs) == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run.Record, "log", killed)
        main("pare", cfg)
    state = record.read_state(out / "last.pt", {})
    assert state["epoch"] == (2 if every == 2 else 0) and epochs == [1, 2, 3]
    main("pare", replace(cfg, resume=True, save_every=1))  # how often is no part of the run
    assert outcome(out) == outcome(unbroken["pare"])
    state = record.read_state(out / "last.pt", {})
    assert state["epoch"] == 3


def one_text():
    """A text for sources: the standard library's takes every process 10 s to read."""
    return dict.fromkeys(words.CLASSES, Path(orca.__file__).read_text(encoding="utf-8"))


ONE_TEXT = """
import orca
from tasks.sources import words
words.texts = lambda: dict.fromkeys(words.CLASSES, open(orca.__file__, encoding="utf-8").read())
"""
KILLED_IN_STAGE_2 = """
import os, signal, sys
import orca, record
save = record.Record.save
def saves(self, *args, **kwargs):
    save(self, *args, **kwargs)
    if (self.stage, self.epoch) == ("align", 3):
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv.pop(1) == "killed":
    record.Record.save = saves
sys.exit(orca.cli(sys.argv[1:]))
"""


@pytest.mark.slow
def test_orca_with_two_threads_killed_in_stage_2_ends_the_same(tmp_path):
    """Two threads add up numbers in an order of their own, of which a resume must know nothing."""
    argv = "--task satellite --train-size 96 --epochs 1 --align-epochs 4 --source-size 200"
    argv += " --baselines off"
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}

    def start(how, name, *more):
        command = [sys.executable, "-c", ONE_TEXT + KILLED_IN_STAGE_2, how, *argv.split(), *more]
        out = ["--out", str(tmp_path / name), "--device", "cpu"]
        return subprocess.run([*command, *out], env=env, capture_output=True, text=True)

    assert start("whole", "whole").returncode == 0
    assert start("killed", "run").returncode == -signal.SIGKILL
    state = record.read_state(tmp_path / "run" / "last.pt", {})
    assert (state["stage"], state["epoch"]) == ("align", 3)
    done = start("resumed", "run", "--resume")
    assert done.returncode == 0, done.stderr
    whole, resumed = outcome(tmp_path / "whole"), outcome(tmp_path / "run")
    assert resumed[1] == whole[1]  # first, since it says more when it fails
    assert resumed == whole


def test_resuming_a_finished_run_changes_nothing(unbroken, series, capsys):
    out = unbroken["orca"]
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    result = main("orca", config("orca", series, out, resume=True))
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert result == json.loads((out / "result.json").read_text())
    assert capsys.readouterr().out.startswith("result {")


def test_resume_without_a_run_starts_one(series, tmp_path):
    cfg = config("orca", series, tmp_path / "new", align="none", epochs=1, resume=True)
    assert main("orca", cfg)["epochs"] == 1


def test_a_finished_run_goes_on_with_more_epochs(series, tmp_path, capsys):
    """From its last epoch, at the rates of the longer schedule; its best epoch stays the best."""
    given = {"align": "none"}
    first = main("orca", config("orca", series, tmp_path / "run", epochs=2, **given))
    rows = outcome(tmp_path / "run")[1]
    longer = config("orca", series, tmp_path / "run", epochs=4, **given)
    result = main("orca", replace(longer, resume=True))
    assert "note: 4 epochs instead of 2; the schedules now end there" in capsys.readouterr().out
    whole = main("orca", config("orca", series, tmp_path / "whole", epochs=4, **given))
    assert result["epochs"] == whole["epochs"] == 4 and first["epochs"] == 2
    after, other = outcome(tmp_path / "run")[1], outcome(tmp_path / "whole")[1]
    assert after[:2] == rows and [row["epoch"] for row in after] == [1, 2, 3, 4]
    assert [row["lr"] for row in after[2:]] == [row["lr"] for row in other[2:]]
    assert result["val_error"] == pytest.approx(min(row["val_error"] for row in after), abs=1e-6)


OTHERS = {
    "--seed was 0, not 1": {"seed": 1},
    "--epochs was 3, not 2": {"epochs": 2},
    "--align was mmd, not none": {"align": "none"},
    "--batch-size was 24, not 8": {"batch_size": 8},
}


@pytest.mark.parametrize("message", list(OTHERS))
def test_a_run_of_other_settings_is_refused(message, unbroken, series):
    cfg = config("orca", series, unbroken["orca"], **OTHERS[message])
    with pytest.raises(ValueError, match=message):
        main("orca", replace(cfg, resume=True))


def test_a_run_of_another_method_is_refused(unbroken, series):
    cfg = config("pare", series, unbroken["orca"], resume=True)
    with pytest.raises(ValueError, match="method was orca, not pare"):
        main("pare", cfg)


# ---- damaged checkpoints ----


class Evil:
    def __reduce__(self):
        return (Path("evil").touch, ())


def evil(kind):
    """A state whose seal is right, but which would run code."""
    buffer = io.BytesIO()
    if kind == "pickle":
        pickle.dump({"identity": Evil()}, buffer)
    else:
        torch.save({"identity": Evil()}, buffer)
    return record.sealed(buffer.getvalue())


def damaged(content: bytes) -> list[tuple[str, bytes]]:
    rng = random.Random(0)
    found = [("empty", b""), ("noise", rng.randbytes(3000)), ("html", b"<html>no</html>")]
    found += [(f"cut to {n}/10", content[: len(content) * n // 10]) for n in range(1, 10)]
    for i in range(20):
        at = rng.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        found.append((f"flip {i}", flipped))
    found += [(f"evil {kind}", evil(kind)) for kind in ("pickle", "torch")]
    return [*found, ("no archive", record.sealed(b"{}"))]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(
    unbroken, series, tmp_path, monkeypatch, record_property
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    content, seen = (unbroken["orca"] / "last.pt").read_bytes(), 0
    for name, bad in damaged(content):
        (out / "last.pt").write_bytes(b"".join(bad) if isinstance(bad, tuple) else bad)
        with pytest.raises(ValueError, match="last.pt is (damaged|no state of a run)") as error:
            record.read_state(out / "last.pt", {"method": "orca"})
        assert "\n" not in str(error.value), name
        seen += 1
    record_property("cases", seen + 1)  # and one that is missing
    assert seen == 35 and not (tmp_path / "evil").exists()
    (out / "last.pt").unlink()
    with pytest.raises(ValueError, match="holds no last.pt to resume from"):
        main("orca", config("orca", series, out, resume=True))


# ---- faults while saving ----


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("call", [2, 4])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()], ids=str)
def test_a_fault_while_saving_leaves_the_old_checkpoint(
    script, call, error, unbroken, series, tmp_path, monkeypatch, capsys
):
    """A full disk, or death between the writing of last.pt and its replacement."""
    out, replaced, calls = tmp_path / "run", os.replace, [0]
    module = importlib.import_module(script)

    def faulty(source, target):
        calls[0] += str(target).endswith("last.pt")
        if calls[0] == call:
            raise error
        return replaced(source, target)

    argv = flags(script, series, out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", faulty)
        if isinstance(error, OSError):
            assert module.cli(argv) == 1
            said = capsys.readouterr().err
            assert "No space left" in said and str(out / "last.pt") in said
            assert said.count("\n") == 1 and not list(out.glob("*.tmp"))
        else:
            with pytest.raises(Killed):
                module.cli(argv)
    state = record.read_state(out / "last.pt", {})
    done = len(state["rows"])
    assert done == call - 2  # the first save is before any epoch
    assert module.cli([*argv, "--resume"]) == 0
    assert outcome(out) == outcome(unbroken[script])


@pytest.mark.parametrize("what", ["write", "fsync", "replace"])
def test_write_atomically_is_all_or_nothing(what, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    run.write_atomically(path, b"old")
    if what == "write":
        bad = (x for x in [b"half", None])
        with pytest.raises(TypeError):
            run.write_atomically(path, *bad)
    else:
        monkeypatch.setattr(os, what, lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError):
            run.write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    run.write_atomically(path, b"new", b"er")
    assert path.read_bytes() == b"newer" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("most", "name"), [(2**10, "last.pt"), (2**20, "model.safetensors")])
def test_a_file_for_which_there_is_no_room_is_named(most, name, series, tmp_path, capsys):
    """Of a file system whose files end at so many bytes, which is as good as a full one."""
    import resource  # which not every system has

    out = tmp_path / "run"
    argv = [*flags("orca", series, out), "--align", "none", "--epochs", "0", "--baselines", "off"]
    argv += ["--body", "tiny_roberta"]  # of 3 MB
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        code = orca.cli(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 1 and said.count("\n") == 1, said
    assert said.startswith("orca.py: error: ") and str(out / name) in said
    assert not list(out.glob("*.tmp")) and not (out / "result.json").exists()


def test_a_directory_in_use_is_refused(series, tmp_path):
    out = tmp_path / "run"
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; import record\n"
        "record._lock(Path(sys.argv[2])); print('held', flush=True); time.sleep(60)"
    )
    out.mkdir()
    argv = [sys.executable, "-c", code, str(ROOT), str(out)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match="is in use by another run"):
                main("orca", config("orca", series, out, align="none"))
        finally:
            other.kill()


# ---- divergence ----


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_with_its_step(name, value):
    kept = run.Record(None)
    for batch in range(5):
        kept.batch += 1
        numbers = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}
        kept.step(0.5, **(numbers | ({name: torch.tensor(value)} if batch == 3 else {})))
    words = f"the {name.replace('_', ' ')} is {value} in epoch 1, step 4, learning rate 0.5"
    with pytest.raises(FloatingPointError, match=words):
        kept.means()


def test_fp16_skips_a_step_whose_gradient_overflows_but_no_bad_loss():
    for name in ("grad_norm", "loss"):
        kept = run.Record(None)
        kept.fp16, numbers = True, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}
        kept.step(0.5, **(numbers | {name: torch.tensor(float("inf"))}))
        if name == "grad_norm":
            assert kept.means()["loss"] == 1
        else:
            with pytest.raises(FloatingPointError, match="the loss is inf"):
                kept.means()


def test_numbers_of_the_steps_are_averaged_over_the_epoch():
    kept, most = run.Record(None), record.READ_EVERY
    for batch in range(most + 3):  # more than are read at once
        kept.step(0.1, loss=torch.tensor(float(batch)), grad_norm=torch.tensor(1.0))
    assert kept.means() == {"loss": (most + 2) / 2, "grad_norm": 1.0}


WHERE = [(script, where) for script in SCRIPTS for where in ("loss", "grad norm")]
WHERE += [("orca", "distance"), ("proposed", "contrast")]


@pytest.mark.parametrize(("script", "where"), WHERE)
def test_a_run_that_diverges_stops_and_its_checkpoint_stays(
    script, where, series, tmp_path, monkeypatch, capsys
):
    """A number of a step of stage 2, or the loss or a gradient of fine-tuning, is NaN, once."""
    out, module, calls, kept = tmp_path / "run", importlib.import_module(script), [0], []
    parts, sum_gradients, nan = run.parts, run.sum_gradients, float("nan")
    distance_to, label_weights = orca.distance_to, contrast.label_weights

    def bad(call):
        calls[0] += 1
        if calls[0] == call:
            kept.append((out / "last.pt").read_bytes())
        return calls[0] == call

    def faulty_parts(*args):
        factor = nan if bad(6) else 1
        for x, y, weight, portion in parts(*args):
            yield x, y, weight * factor, portion

    def faulty_gradients(parameters):
        sum_gradients(parameters)
        if bad(6):
            next(p.grad for p in parameters if p.grad is not None).view(-1)[0] = nan

    def faulty_distance(*args):
        D = distance_to(*args)
        return lambda *z: D(*z) * (nan if bad(5) else 1)

    def faulty_weights(*args):
        return label_weights(*args) * (nan if bad(5) else 1)

    if where == "loss":
        monkeypatch.setattr(run, "parts", faulty_parts)
    elif where == "grad norm":
        monkeypatch.setattr(run, "sum_gradients", faulty_gradients)
    elif where == "distance":
        monkeypatch.setattr(orca, "distance_to", faulty_distance)
    else:
        monkeypatch.setattr(contrast, "label_weights", faulty_weights)
    assert module.cli(flags(script, series, out)) == 3
    said = capsys.readouterr().err
    told = rf"the {where} is nan in epoch 2, step \d+, learning rate [\d.e-]+;"
    told = "orca.py: error: diverged: ".replace("orca", script) + told
    assert re.search(told, said) and said.count("\n") == 1, said
    assert (out / "last.pt").read_bytes() == kept[0]
    stage = {"distance": "align", "contrast": "contrast"}.get(where, "finetune")
    assert record.read_state(out / "last.pt", {})["stage"] == stage


def test_nan_is_never_the_best(tmp_path):
    record, model = run.Record(tmp_path), nn.Linear(1, 1)
    for error in (float("nan"), 0.5, float("nan"), 0.7):
        record.end_epoch(error, model)
    assert record.best == 0.5 and (tmp_path / "model.safetensors").exists()


# ---- several processes ----


def torchrun(n, *argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)), *argv]
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


IN_TURN = """
import importlib, json, sys
*first, last = json.loads(sys.argv[1])
for script, argv in first:
    module = importlib.import_module(script)
    module.main(module.parse_args(argv))
script, argv = last
sys.exit(importlib.import_module(script).cli(argv))
"""


def of_processes(script, series, folder):
    """Same global batch: 87 samples by 24 leave 15, and 9 of validation, uneven for both."""
    argv = [*flags(script, series, folder / script), "--accumulate", "2", "--device", "cpu"]
    return [*argv, "--optimizer", "sgd", "--lr", "0.02"]  # Adam makes much of the last bits


@pytest.fixture(scope="module")
def two(series, tmp_path_factory):
    """A run of each script by the same two processes, one run after the other."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "in_turn.py").write_text(ONE_TEXT + IN_TURN)
    lines = [(script, of_processes(script, series, folder)) for script in SCRIPTS]
    done = torchrun(2, str(folder / "in_turn.py"), json.dumps(lines))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("result {") == done.stdout.count(" processes=2 ") == len(SCRIPTS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_give_the_result_of_one(script, two, series, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "texts", one_text)
    main(script, importlib.import_module(script).parse_args(of_processes(script, series, tmp_path)))
    places = (tmp_path / script, two / script)
    one, other = (load_file(place / "model.safetensors") for place in places)
    for name, w in one.items():
        torch.testing.assert_close(w, other[name], rtol=1e-4, atol=1e-5)
    a, b = (json.loads((place / "result.json").read_text()) for place in places)
    assert a["test_error"] == pytest.approx(b["test_error"], abs=1e-5)
    rows = [(place / "metrics.jsonl").read_text().splitlines()[-1] for place in places]
    losses = [json.loads(row)["train_loss"] for row in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


PROCESSES = """
import json, sys, torch
from torch import nn
import record, run, tasks
from torch.utils.data import TensorDataset

cfg = run.Settings(device="cpu")
run.start(cfg)
found, me = {}, run.rank()

# a parameter that both have a gradient for, one of the first process alone, one of none
both, first, none = (nn.Parameter(torch.ones(2)) for _ in range(3))
both.grad = torch.full((2,), 1.0 + me)
first.grad = torch.tensor([5.0, 6.0]) if me == 0 else None
run.sum_gradients([both, first, none])
found["gradients"] = [p.grad if p.grad is None else p.grad.tolist() for p in (both, first, none)]
optimizer = torch.optim.AdamW([both, first, none], lr=0.1, weight_decay=0.5)
optimizer.step()
found["decayed"] = none.tolist()

# samples of a split, of which there are fewer than processes, or not as many for each
for n in (1, 2, 5):
    x = torch.arange(float(n)).view(n, 1, 1)
    data = TensorDataset(x, x[:, 0])
    pairs = [(2 * x[:, 0], y) for x, y in run.split(data)]
    out, y = ([pair[i] for pair in pairs] for i in (0, 1))
    found[f"whole {n}"] = run.whole(out, n).flatten().tolist()
    metric = staticmethod(lambda out, y: float((out - y).sum()))
    task = type("task", (), {"val": data, "metric": metric})
    found[f"error {n}"] = run.error_of(task, "val", out, y)

# a last batch of one sample: the weights of the parts of all processes add up to 1
x, y = torch.ones(1, 3), torch.ones(1)
share = (x, y) if me == 0 else None
pieces = [(weight, portion) for *_, weight, portion in run.parts(share, 2, len)]
found["parts"] = run.summed(torch.tensor(pieces).view(-1, 2).sum(dim=0)).tolist()

weights = nn.Linear(1, 1)
nn.init.constant_(weights.weight, me)
run.synchronise(weights)
found["synchronised"] = weights.weight.item()
with open(sys.argv[1] + str(me), "w") as file:
    json.dump(found, file)
"""


def test_two_processes_with_unequal_shares(tmp_path):
    (tmp_path / "both.py").write_text(PROCESSES)
    done = torchrun(2, str(tmp_path / "both.py"), str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr[-2000:]
    for me in (0, 1):
        found = json.loads((tmp_path / f"found{me}").read_text())
        assert found["gradients"] == [[3.0, 3.0], [5.0, 6.0], None]
        assert found["decayed"] == [1.0, 1.0]  # as with one process, which has no gradient either
        for n in (1, 2, 5):
            assert found[f"whole {n}"] == [2.0 * i for i in range(n)]
            assert found[f"error {n}"] == sum(range(n))
        assert found["parts"] == [1.0, 1.0] and found["synchronised"] == 0


def test_accumulated_parts_are_the_whole_batch(series, tmp_path):
    results = []
    for number in (1, 4):
        how = {"align": "none", "optimizer": "sgd", "lr": 0.02, "accumulate": number}
        cfg = config("orca", series, tmp_path / str(number), **how)
        main("orca", cfg)
        results.append(load_file(tmp_path / str(number) / "model.safetensors"))
    for name, w in results[0].items():
        torch.testing.assert_close(w, results[1][name], rtol=1e-4, atol=1e-5)


def test_recomputed_layers_are_the_same(series, tmp_path):
    weights = []
    for recompute in (False, True):
        out = tmp_path / str(recompute)
        main("orca", config("orca", series, out, align="none", epochs=1, recompute=recompute))
        weights.append(load_file(out / "model.safetensors"))
    for name, w in weights[0].items():
        torch.testing.assert_close(w, weights[1][name])


# ---- settings and use after training ----


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_optimiser_asked_for_is_used(optimizer, unbroken, series, tmp_path):
    out = tmp_path / "run"
    main("orca", config("orca", series, out, optimizer=optimizer))
    assert outcome(out)[0] != outcome(unbroken["orca"])[0]
    w = nn.Parameter(torch.ones(2))
    how = {"momentum": 0.5, "beta2": 0.7}
    made = run.optimizer_of(
        [{"params": [w]}], config("orca", series, out, optimizer=optimizer, **how), 0.1, 0.2
    )
    group = made.param_groups[0]
    assert group["lr"] == 0.1 and group["weight_decay"] == 0.2
    assert group["momentum"] == 0.5 if optimizer == "sgd" else group["betas"] == (0.9, 0.7)


@pytest.mark.parametrize("script", SCRIPTS)
def test_predictions_of_a_finished_run(script, unbroken, series, tmp_path, capsys):
    x = np.load(series)["x_test"]
    np.save(tmp_path / "x.npy", x)
    module, out = importlib.import_module(script), unbroken[script]
    argv = ["--predict", str(tmp_path / "x.npy"), "--run", str(out), "--out"]
    assert module.cli([*argv, str(tmp_path / "y.npy")]) == 0
    y = np.load(tmp_path / "y.npy")
    wrong = float((y != np.load(series)["y_test"]).mean())
    assert round(wrong, 6) == json.loads((out / "result.json").read_text())["test_error"]
    bad = {
        "a shape": (x[:, :-1], "got shape"),
        "NaN": (np.full_like(x, np.nan), "NaN"),
        "text": (np.array(["a"]), "expected an array of numbers"),
    }
    for content, message in bad.values():
        np.save(tmp_path / "x.npy", content)
        assert module.cli([*argv, str(tmp_path / "z.npy")]) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1
    assert not (tmp_path / "z.npy").exists()


def test_predictions_say_which_file_they_are_in(unbroken, series, tmp_path, capsys):
    """numpy.save would add .npy to the name in silence."""
    np.save(tmp_path / "x.npy", np.load(series)["x_test"])
    argv = ["--predict", str(tmp_path / "x.npy"), "--run", str(unbroken["pare"])]
    assert importlib.import_module("pare").cli([*argv, "--out", str(tmp_path / "guess")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("64 predictions, shape (64,), in ")
    path = Path(said.split(" in ")[-1].strip())
    assert path.is_file() and len(np.load(path)) == 64
    assert [p.name for p in tmp_path.iterdir() if p.name != "x.npy"] == [path.name]


def test_a_prediction_is_written_where_it_was_asked_for_or_refused_before(
    unbroken, series, tmp_path, capsys
):
    """Of v1.2, only v1.npy was left; a folder that is not there was found after predicting."""
    np.save(tmp_path / "x.npy", np.load(series)["x_test"])
    np.save(tmp_path / "far.npy", 3e38 * np.sign(np.load(series)["x_test"]))
    module = importlib.import_module("pare")

    def predict(name, out, script=module, of="pare"):
        argv = ["--predict", str(tmp_path / name), "--run", str(unbroken[of]), "--out"]
        code = script.cli([*argv, str(tmp_path / out)])
        return code, capsys.readouterr().err

    assert predict("x.npy", "v1.2")[0] == 0 and (tmp_path / "v1.2.npy").is_file()
    code, said = predict("x.npy", "nowhere/y.npy")
    assert code == 2 and "nowhere/y.npy cannot be written" in said
    code, said = predict("far.npy", "z.npy")  # was class 0
    assert code == 2 and "64 of 64 predictions are not finite" in said
    for script, of in (("proposed", "pare"), ("orca", "proposed")):  # a traceback
        code, said = predict("x.npy", "z.npy", importlib.import_module(script), of)
        assert code == 2 and "is a run of another script" in said and said.count("\n") == 1
    assert not (tmp_path / "z.npy").exists()


def test_a_resumed_run_is_of_the_same_content(series, tmp_path):
    """Another file of the same name was trained on in silence."""
    path = tmp_path / "mine.npz"
    path.write_bytes(Path(series).read_bytes())
    how = {"align": "none", "epochs": 1}
    main("orca", config("orca", path, tmp_path / "run", **how))
    arrays = dict(np.load(series))
    np.savez(path, **arrays | {"x_train": arrays["x_train"] + 1})
    with pytest.raises(ValueError, match="--task was .*mine.npz .*, not .*mine.npz"):
        main("orca", config("orca", path, tmp_path / "run", resume=True, **how))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "mine.npz").write_bytes(Path(series).read_bytes())
    path = tmp_path / "moved" / "mine.npz"
    main("orca", config("orca", path, tmp_path / "run", resume=True, **how))


def test_a_single_sample_is_predicted_too(unbroken, series, tmp_path):
    x = np.load(series)["x_test"]
    argv = ["--run", str(unbroken["orca"]), "--out", str(tmp_path / "y.npy"), "--predict"]
    guesses = []
    for name, given in (("all", x), ("one", x[3]), ("channel", x[3:4])):
        np.save(tmp_path / f"{name}.npy", given)
        assert importlib.import_module("orca").cli([*argv, str(tmp_path / f"{name}.npy")]) == 0
        guesses.append(np.load(tmp_path / "y.npy"))
    assert guesses[1] == guesses[2] == guesses[0][3:4]


def test_baselines_stand_beside_the_result(series, tmp_path):
    cfg = config("pare", series, tmp_path / "run", epochs=1, baselines="on")
    result = main("pare", cfg)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    found = result["baselines"]
    assert {"majority class", "1-NN"} <= set(found)
    assert found["1-NN"] < found["majority class"] <= 1


# ---- methods compose through files ----


@pytest.fixture(scope="module")
def aligned(series, tmp_path_factory):
    """Stages 1 and 2 of ORCA alone."""
    out = tmp_path_factory.mktemp("aligned") / "run"
    main("orca", config("orca", series, out, epochs=0))
    return out


def test_epochs_0_stops_before_fine_tuning(aligned, unbroken, series):
    rows = [json.loads(row) for row in (aligned / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["align"] * 2
    f_t = load_file(aligned / "f_t.safetensors")
    of_whole_run = load_file(unbroken["orca"] / "f_t.safetensors")
    for name, w in f_t.items():
        assert torch.equal(w, of_whole_run[name]), name
    result = json.loads(
        (aligned / "result.json").read_text(), parse_constant=lambda word: pytest.fail(word)
    )  # Infinity and NaN are no JSON
    assert result["epochs"] == 0 and 0 <= result["test_error"] <= 1
    cfg = config("orca", series, "", align="none", epochs=0)
    _, _, _, _, model, _ = orca.build(cfg)
    assert not torch.equal(model.f_t.conv.weight, f_t["conv.weight"])  # stage 2 did train it


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "orca"])
def test_a_run_starts_from_the_f_t_of_another(script, aligned, series, tmp_path):
    more = {"contrast": "none"} if script == "proposed" else {}
    cfg = config(script, series, tmp_path / "run", f_t=str(aligned), epochs=0, **more)
    main(script, cfg)
    started = load_file(tmp_path / "run" / "model.safetensors")
    f_t = load_file(aligned / "f_t.safetensors")
    assert {name.removeprefix("f_t.") for name in started if name.startswith("f_t.")} == set(f_t)
    for name, w in f_t.items():
        assert torch.equal(w, started[f"f_t.{name}"]), name


NO_F_T = {
    "another shape": (["--patches", "10"], "f_t.safetensors does not fit this model"),
    "no such folder": (["--f-t", "nowhere"], "no file nowhere/f_t.safetensors"),
    "no f_t in it": (["--f-t", "UNALIGNED"], "f_t.safetensors"),
}


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "orca"])
@pytest.mark.parametrize("case", list(NO_F_T))
def test_an_f_t_that_does_not_fit_is_one_line_and_code_2(
    script, case, aligned, unbroken, series, tmp_path, capsys
):
    more, message = NO_F_T[case]
    more = [str(unbroken["pare"]) if word == "UNALIGNED" else word for word in more]
    argv = [*flags(script, series, tmp_path / "run"), "--f-t", str(aligned), *more]
    assert importlib.import_module(script).cli(argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


# ---- while it runs ----


def test_progress_counts_the_steps_of_the_stage_and_is_quiet_off_a_terminal(
    series, tmp_path, monkeypatch, capsys
):
    bars, tqdm = [], record.tqdm

    def watched(rows, title, total, **how):
        bars.append((title, how["initial"], total, how["disable"]))
        return tqdm(rows, title, total, **how)

    monkeypatch.setattr(record, "tqdm", watched)
    main("orca", config("orca", series, tmp_path / "run", align="none"))
    steps = len((tmp_path / "run" / "steps.csv").read_text().splitlines()) - 1
    assert bars == [
        (f"epoch {e + 1}/3", e * steps // 3, steps, None) for e in range(3)
    ]  # None: tqdm asks whether it is on a terminal
    assert "\r" not in capsys.readouterr().err


def test_settings_of_the_device_are_set_and_set_back(series, tmp_path):
    for on in (True, False):
        cfg = config("orca", series, tmp_path, tf32=on, deterministic=on, device="cpu", seed=3)
        assert run.start(cfg) == torch.device("cpu") and torch.initial_seed() == 3
        tf32 = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        assert tf32 == (on, on) and torch.are_deterministic_algorithms_enabled() == on
    loader = run.batches(range(10), config("orca", series, tmp_path, workers=2), seed=0)
    assert loader.num_workers == 2


def test_a_compiled_body_is_asked_for(series, tmp_path, monkeypatch):
    """Compiling itself takes a minute; that g is compiled is what the flag does."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    main("orca", config("orca", series, tmp_path / "run", align="none", epochs=1, compile=True))
    assert compiled == ["SeriesBody"]


def test_a_path_that_the_terminal_cannot_show(series, tmp_path):
    (tmp_path / "m\u00fcnze.npz").write_bytes(Path(series).read_bytes())
    argv = ["--task", "m\u00fcnze.npz", "--out", "l\u00e4ufe", "--epochs", "0", "--align", "none"]
    argv += ["--baselines", "off"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(ROOT / "orca.py"), *argv]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"task=m\\xfcnze.npz" in done.stdout and b"result {" in done.stdout
    assert (tmp_path / "l\u00e4ufe" / "result.json").is_file()


def test_all_settings_can_be_printed(capsys):
    assert importlib.import_module("orca").cli(["--paper", "--print-config"]) == 0
    cfg = json.loads(capsys.readouterr().out)
    assert cfg["task"] == "satellite" and cfg["lr"] == 3e-5 and cfg["data"] == "real"


def test_tracking_that_is_not_installed_is_one_line(series, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    argv = ["--task", str(series), "--align", "none", "--track", "wandb", "--epochs", "1"]
    assert importlib.import_module("orca").cli([*argv, "--out", str(tmp_path / "run")]) == 2
    assert "--track wandb: wandb is missing; pip install wandb" in capsys.readouterr().err


def test_tracking_gets_every_epoch(series, tmp_path, monkeypatch):
    import types

    seen = []
    logs = types.SimpleNamespace(log=lambda values: seen.append(values))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: logs))
    main("orca", config("orca", series, tmp_path / "run", track="wandb"))
    assert [v["epoch"] for v in seen] == [1, 2, 1, 2, 3] and "finetune/val_error" in seen[-1]


# ---- killed at random times ----


def killed_and_resumed(script, series, out, rng, whole_s, processes, most):
    """Start, kill at random times (`most` of them), resume, until it is done; how many kills."""
    argv = [*flags(script, series, out), "--body", "tiny_roberta", "--resume"]
    launch = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node"), str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / f"{script}.py")]
    threads = "2" if processes == 1 else "1"  # two are what users have by default
    how = {"env": {**os.environ, "OMP_NUM_THREADS": threads}, "start_new_session": True}
    kills = 0
    while True:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        job = subprocess.Popen([*command, *argv, "--device", "cpu"], **how, **pipes)
        try:
            limit = rng.uniform(0.4, 0.9) * whole_s if kills < most else None
            _, errors = job.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
            kills += 1
            continue
        assert job.returncode == 0, errors
        return kills


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_times_a_run_ends_the_same(
    script, processes, series, tmp_path, record_property
):
    """KILLS=20, as faults.sh sets it: 20 kills a script, 5 with two processes."""
    if "KILLS" not in os.environ:
        pytest.skip("random kills take long; set KILLS to their number, as results/faults.sh does")
    rng, kills, start = random.Random(0), 0, time.time()
    killed_and_resumed(script, series, tmp_path / "whole", rng, 0, processes, 0)
    whole_s, number = time.time() - start, int(os.environ["KILLS"])
    number = number if processes == 1 else max(1, number // 4)
    for attempt in itertools.count():  # a run may end before it is killed
        if kills >= number:
            break
        out, most = tmp_path / f"run-{attempt}", min(3, number - kills)
        kills += killed_and_resumed(script, series, out, rng, whole_s, processes, most)
        assert outcome(out) == outcome(tmp_path / "whole")
    record_property("cases", kills)  # for results/faults.sh


def test_spikes_and_convergence_are_read_from_the_epochs():
    record = run.Record(None)
    losses, errors = [3.0, 1.0, 1.5, 0.9, 1.2], [0.9, 0.5, 0.4, 0.3, 0.299]
    stage = {"stage": "finetune"}
    record.rows = [
        {**stage, "train_loss": a, "val_error": b} for a, b in zip(losses, errors, strict=True)
    ]
    assert record.spikes() == 2 and record.converged()
    record.rows[-1]["val_error"] = 0.2
    assert not record.converged()

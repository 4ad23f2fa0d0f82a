"""The machine room: resume, checkpoints, signals, several processes, use after training."""

import importlib
import io
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

import orca
import run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [name for name in ("orca", "pare", "proposed") if (ROOT / f"{name}.py").exists()]
SHORT = {"epochs": 3, "source_size": 64, "align_epochs": 2, "align_samples": 40, "batch_size": 24}


def config(script, series, out, **more):
    return importlib.import_module(script).configure(
        task=str(series), out=str(out), **{**SHORT, **more}
    )


def main(script, cfg):
    return importlib.import_module(script).main(cfg)


def outcome(out):
    """What must be the same after a resume: weights, logs without times, result without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    weights = {k: w.numpy().tobytes() for k, w in load_file(out / "model.safetensors").items()}
    strip = lambda row: {k: v for k, v in row.items() if k != "time_s"}  # noqa: E731
    return weights, [strip(row) for row in rows], strip(result), (out / "steps.csv").read_text()


@pytest.fixture(scope="module")
def unbroken(series, tmp_path_factory):
    """For each script, a run that nothing disturbed."""
    found = {}
    for script in SCRIPTS:
        out = tmp_path_factory.mktemp(script) / "run"
        more = {"align": "mmd"}
        main(script, config(script, series, out, **more))
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


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_run_broken_after_any_save_goes_on_to_the_same_end(
    script, call, unbroken, series, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    cfg = config(script, series, out, align="mmd")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        broken_at(patch, call)
        main(script, cfg)
    assert not (out / "result.json").exists()
    main(script, replace(cfg, resume=True))
    assert outcome(out) == outcome(unbroken[script])


PLACES = {"align": "separability", "train": "update", "validate": "evaluate", "test": "evaluate"}
STOPS = [(script, place) for place in PLACES for script in SCRIPTS] + [("proposed", "contrast")]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("script", "place"), STOPS)
def test_a_signal_stops_the_run_where_it_can_go_on_to_the_same_end(
    script, signum, place, unbroken, series, tmp_path, monkeypatch, capsys
):
    out, module = tmp_path / "run", importlib.import_module(script)
    name = PLACES.get(place, "label_weights")  # which stage "contrast" asks for at every step
    holder = next(m for m in (run, module, orca) if hasattr(m, name))  # who is asked for it
    function, calls = getattr(holder, name), [0]

    def interrupted(*args):
        calls[0] += place not in ("validate", "test") or args[1] == place.replace("validate", "val")
        if calls[0] == {"align": 2, "contrast": 3, "train": 6, "validate": 2, "test": 1}[place]:
            calls[0] += 1  # once only
            os.kill(os.getpid(), signum)
        return function(*args)

    argv = [x for k, v in SHORT.items() for x in ("--" + k.replace("_", "-"), str(v))]
    argv += ["--task", str(series), "--align", "mmd", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, interrupted)
        assert module.cli(argv) == 128 + signum
    assert "interrupted; --resume goes on" in capsys.readouterr().err
    state = run._read_state(out / "last.pt", {})
    if place != "test":
        assert state["stage"] == (place if place in ("align", "contrast") else "finetune")
    assert (state["batch"] > 0) == (place == "train") and not (out / "result.json").exists()
    assert module.cli([*argv, "--resume"]) == 0
    assert outcome(out) == outcome(unbroken[script])


def test_resuming_a_finished_run_changes_nothing(unbroken, series, capsys):
    out = unbroken["orca"]
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    result = main("orca", config("orca", series, out, align="mmd", resume=True))
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert result == json.loads((out / "result.json").read_text())
    assert capsys.readouterr().out.startswith("result {")


def test_resume_without_a_run_starts_one(series, tmp_path):
    cfg = config("orca", series, tmp_path / "new", align="none", epochs=1, resume=True)
    assert main("orca", cfg)["epochs"] == 1


OTHERS = {
    "--seed was 0, not 1": {"seed": 1},
    "--epochs was 3, not 4": {"epochs": 4},
    "--align was mmd, not none": {"align": "none"},
    "--batch-size was 24, not 8": {"batch_size": 8},
}


@pytest.mark.parametrize("message", list(OTHERS))
def test_a_run_of_other_settings_is_refused(message, unbroken, series):
    cfg = config("orca", series, unbroken["orca"], **{"align": "mmd", **OTHERS[message]})
    with pytest.raises(ValueError, match=message):
        main("orca", replace(cfg, resume=True))


def test_a_run_of_another_method_is_refused(unbroken, series):
    cfg = config("pare", series, unbroken["orca"], align="mmd", resume=True)
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
    return run.sealed(buffer.getvalue())


def damaged(content: bytes) -> list[tuple[str, bytes]]:
    rng = random.Random(0)
    found = [("empty", b""), ("noise", rng.randbytes(3000)), ("html", b"<html>no</html>")]
    found += [(f"cut to {n}/10", content[: len(content) * n // 10]) for n in range(1, 10)]
    for i in range(20):
        at = rng.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        found.append((f"flip {i}", flipped))
    found += [(f"evil {kind}", evil(kind)) for kind in ("pickle", "torch")]
    return [*found, ("no archive", run.sealed(b"{}"))]


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
            run._read_state(out / "last.pt", {"method": "orca"})
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

    argv = [x for k, v in SHORT.items() for x in ("--" + k.replace("_", "-"), str(v))]
    argv += ["--task", str(series), "--align", "mmd", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", faulty)
        if isinstance(error, OSError):
            assert module.cli(argv) == 1
            assert "No space left" in capsys.readouterr().err
        else:
            with pytest.raises(Killed):
                module.cli(argv)
    state = run._read_state(out / "last.pt", {})
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


def test_a_directory_in_use_is_refused(series, tmp_path):
    out = tmp_path / "run"
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import run; from pathlib import Path\n"
        "run._lock(Path(sys.argv[2])); print('held', flush=True); time.sleep(60)"
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


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_changes_no_weight(where):
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model.weight.grad = torch.full_like(model.weight, float("nan") if where == "gradient" else 1)
    loss = float("inf") if where == "loss" else 1.0
    words = f"the {'gradient norm' if where == 'gradient' else 'loss'} is (inf|nan) at step 0"
    with pytest.raises(FloatingPointError, match=words):
        run.update(list(model.parameters()), optimizer, schedule, scaler, loss, 1.0)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("where", ["distance", "loss", "gradient norm"])
def test_a_run_that_diverges_stops_and_its_checkpoint_stays(
    script, where, series, tmp_path, monkeypatch, capsys
):
    """The distance of the alignment, the loss or a gradient of fine-tuning is NaN, once."""
    out, module, calls, kept = tmp_path / "run", importlib.import_module(script), [0], []
    update, distance_to = run.update, orca.distance_to

    def bad(call):
        calls[0] += 1
        if calls[0] == call:
            kept.append((out / "last.pt").read_bytes())
        return calls[0] == call

    def faulty_update(parameters, optimizer, schedule, scaler, loss, clip):
        if bad(12):
            if where == "loss":
                loss = float("nan")
            else:
                next(p.grad for p in parameters if p.grad is not None).view(-1)[0] = float("nan")
        return update(parameters, optimizer, schedule, scaler, loss, clip)

    def faulty_distance(*args):
        D = distance_to(*args)
        return lambda *z: D(*z) * (float("nan") if bad(5) else 1)

    argv = [x for k, v in SHORT.items() for x in ("--" + k.replace("_", "-"), str(v))]
    argv += ["--task", str(series), "--align", "mmd", "--out", str(out)]
    if where == "distance":
        monkeypatch.setattr(orca, "distance_to", faulty_distance)
    else:
        monkeypatch.setattr(run, "update", faulty_update)
    assert module.cli(argv) == 3
    said = capsys.readouterr().err
    told = rf"error: diverged: the {where} is nan at step \d+, learning rate [\d.e-]+;"
    assert re.search(told, said) and said.count("\n") == 1, said
    assert (out / "last.pt").read_bytes() == kept[0]
    state = run._read_state(out / "last.pt", {})
    assert state["stage"] == ("align" if where == "distance" else "finetune")


def test_nan_is_never_the_best(tmp_path):
    record, model = run.Record(tmp_path), nn.Linear(1, 1)
    for error in (float("nan"), 0.5, float("nan"), 0.7):
        record.end_epoch(error, model)
    assert record.best == 0.5 and (tmp_path / "model.safetensors").exists()


# ---- several processes ----


def torchrun(n, script, argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)), *argv]
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_give_the_result_of_one(script, series, tmp_path):
    """Same global batch: 87 samples by 24 leave 15, and 9 of validation, uneven for both."""
    argv = [x for k, v in SHORT.items() for x in ("--" + k.replace("_", "-"), str(v))]
    argv += ["--task", str(series), "--align", "mmd", "--accumulate", "2", "--device", "cpu"]
    argv += ["--optimizer", "sgd", "--lr", "0.02"]  # Adam makes much of the last bits
    done = torchrun(2, script, [f"{script}.py", *argv, "--out", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("result {") == 1 and "processes=2" in done.stdout
    module = importlib.import_module(script)
    module.main(module.parse_args([*argv, "--out", str(tmp_path / "one")]))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, w in one.items():
        torch.testing.assert_close(w, two[name], rtol=1e-4, atol=1e-5)
    a, b = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert a["test_error"] == pytest.approx(b["test_error"], abs=1e-5)
    rows = [(tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1] for n in ("one", "two")]
    losses = [json.loads(row)["train_loss"] for row in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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
    main("orca", config("orca", series, out, align="mmd", optimizer=optimizer))
    assert outcome(out)[0] != outcome(unbroken["orca"])[0]
    w = nn.Parameter(torch.ones(2))
    how = {"momentum": 0.5, "beta2": 0.7}
    made = run.optimizer_of([w], config("orca", series, out, optimizer=optimizer, **how), 0.1, 0.2)
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


def test_progress_counts_the_steps_of_the_stage_and_is_quiet_off_a_terminal(
    series, tmp_path, monkeypatch, capsys
):
    bars, tqdm = [], run.tqdm

    def watched(rows, title, total, **how):
        bars.append((title, how["initial"], total, how["disable"]))
        return tqdm(rows, title, total, **how)

    monkeypatch.setattr(run, "tqdm", watched)
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
    main("orca", config("orca", series, tmp_path / "run", align="mmd", track="wandb"))
    assert [v["epoch"] for v in seen] == [1, 2, 1, 2, 3] and "finetune/val_error" in seen[-1]


# ---- killed at random times ----


def killed_and_resumed(script, series, out, rng, whole_s, processes, most):
    """Start, kill at random times (`most` of them), resume, until it is done; how many kills."""
    argv = [x for k, v in SHORT.items() for x in ("--" + k.replace("_", "-"), str(v))]
    argv += ["--task", str(series), "--align", "mmd", "--out", str(out), "--resume"]
    launch = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node"), str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / f"{script}.py")]
    how = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "start_new_session": True}
    kills = 0
    while True:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        job = subprocess.Popen([*command, *argv, "--device", "cpu"], **how, **pipes)
        try:
            limit = rng.uniform(0.5, 1.2) * whole_s if kills < most else None
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
    """KILLS=20: 20 kills a script, 5 with two processes, instead of 2, and 1 with two of PaRe."""
    if processes == 2 and script != "pare" and "KILLS" not in os.environ:
        pytest.skip("two processes of one script, unless KILLS is set")
    rng, kills, start = random.Random(0), 0, time.time()
    killed_and_resumed(script, series, tmp_path / "whole", rng, 0, processes, 0)
    whole_s, number = time.time() - start, int(os.environ.get("KILLS", 2))
    number = number if processes == 1 else max(1, number // 4)
    while kills < number:
        out, most = tmp_path / f"run-{kills}", min(3, number - kills)
        kills += killed_and_resumed(script, series, out, rng, whole_s, processes, most)
        assert outcome(out) == outcome(tmp_path / "whole")
    record_property("cases", kills)  # for results/faults.sh

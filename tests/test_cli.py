"""The command line: bad input is one line and exit code 2, before anything is written."""

import importlib
import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["orca", "pare", "proposed"]
GOOD = {
    "x_train": np.zeros((8, 20), np.float32),
    "y_train": np.array([0, 1] * 4),
    "x_test": np.zeros((4, 20), np.float32),
    "y_test": np.array([0, 1] * 2),
}


def shell(*argv, cwd=ROOT):
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_the_shell(script, series, tmp_path):
    """From another directory, quiet on standard error, the result on the last line."""
    argv = ["--task", str(series), "--epochs", "1", "--source-size", "64", "--out", "run"]
    done = shell(str(ROOT / f"{script}.py"), *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{script} | task={series} data=file")
    assert [line for line in lines if line.startswith("epoch 1/1 stage=finetune")]
    assert lines[-2].startswith(("simple learners: majority class", "note: "))
    word, result = lines[-1].split(" ", 1)
    assert word == "result" and json.loads(result)["method"] == script
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(result)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_the_fields_of_config(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for f in fields(module.Config):
        assert f"--{f.name.replace('_', '-')}" in shown and f.metadata["help"], f.name
        value = {bool: [], str: [f.metadata["choices"][-1] if f.metadata["choices"] else "x"]}
        value = value.get(f.type, ["1" if f.metadata["high"] < 3 else "3"])
        if f.name == "paper":
            continue  # changes other fields; tested with the presets
        cfg = module.parse_args([f"--{f.name.replace('_', '-')}", *value])
        others = {g.name: getattr(cfg, g.name) for g in fields(cfg) if g.name != f.name}
        assert others == {name: getattr(module.Config(), name) for name in others}
        assert getattr(cfg, f.name) == (f.type(value[0]) if value else True)


GROUPS = ["method", "data and parts", "training", "machine and run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_four_groups_the_method_s_first(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    shown = capsys.readouterr().out.split("\n")
    titles = [line[:-1] for line in shown if line.endswith(":") and line[:-1] in GROUPS]
    assert titles == GROUPS
    begin = {title: shown.index(f"{title}:") for title in titles}
    flags = [i for i, line in enumerate(shown) if line.startswith("  --")]
    listed = {title: [] for title in titles}
    for i in flags:
        title = max((title for title in titles if begin[title] < i), key=begin.get)
        listed[title].append(shown[i].split()[0][2:].replace("-", "_"))
    common = {f.name for f in fields(run.Settings)}
    assert set(listed["method"]) == {f.name for f in fields(module.Config)} - common
    assert {"task", "body", "source"} <= set(listed["data and parts"])
    assert {"epochs", "lr", "clip"} <= set(listed["training"])
    assert {"device", "seed", "resume", "out"} <= set(listed["machine and run"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_method_has_at_most_15_flags_of_its_own(script):
    common = {f.name for f in fields(run.Settings)}
    own = [f.name for f in fields(importlib.import_module(script).Config) if f.name not in common]
    assert 0 < len(own) <= 15, own


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_help_text_stands_alone(script):
    """A noun phrase: it goes on from no other text, and is no sentence or condition."""
    for f in fields(importlib.import_module(script).Config):
        text = f.metadata["help"]
        assert not re.match(r"(of|and|or|in|to|if|whether|is|are|the same)\b|(on|off):", text), text
        assert text and not text.endswith(".") and (len(text) < 100 or f.name == "task"), text


def test_fields_of_one_name_mean_the_same_everywhere():
    found = {}
    for script in SCRIPTS:
        for f in fields(importlib.import_module(script).Config):
            meaning = (f.type, f.default, dict(f.metadata))
            assert found.setdefault(f.name, meaning) == meaning, f"--{f.name} of {script}"


BAD_FLAGS = [
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("--epochs -2", "--epochs -2 is out of range; give a number of at least -1"),
    ("--warmup 5", "--warmup 5.0 is out of range; give a number of at least 0 and at most 1"),
    ("--epochs three", "invalid int value: 'three'"),
    ("--lr nan", "--lr nan is out of range"),
    ("--seed -1", "--seed -1 is out of range"),
    ("--source wrods", "invalid choice: 'wrods'"),
    ("--data fake", "invalid choice: 'fake'"),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS)
def test_bad_flags_are_one_line_and_code_2(script, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args(argv.split())
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and message in shown and shown.count("\n") == 1


BAD_RUNS = {
    "unknown task": (
        "--task satelite",
        "no task 'satelite'; choose one of cifar100, spherical, darcy",
    ),
    "missing file": ("--task nothing.npz", "nothing.npz"),
    "no real data": ("--data real --data-dir nowhere", "satellite_train.npy"),
    "no body": ("--body tiny_bert", "no folder bodies/tiny_bert or tiny_bert; give tiny_roberta"),
    "no random body": ("--body random:nothing", "no folder bodies/nothing"),
    "no body's folder": ("--body tests", "--body tests cannot be loaded (it holds no config.json"),
    "odd device": ("--device gpu", "--device gpu is not available"),
    "no train size": ("--task FILE --train-size 999", "train_size=999 exceeds"),
}
if not torch.cuda.is_available():
    BAD_RUNS["no cuda"] = ("--device cuda", "--device cuda is not available")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", list(BAD_RUNS))
def test_bad_input_is_one_line_and_code_2(script, case, series, tmp_path, capsys):
    argv, message = BAD_RUNS[case]
    argv = argv.replace("FILE", str(series)).split() + ["--out", str(tmp_path / "run")]
    assert importlib.import_module(script).cli(argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert not (tmp_path / "run").exists()


def ragged():
    rows = np.empty(8, dtype=object)
    rows[:] = [np.zeros(20 + i) for i in range(8)]
    return rows


BAD_FILES = {
    "no arrays": ({"x_train": None}, "x_train"),
    "ragged": ({"x_train": ragged()}, "x_train holds Python objects"),
    "empty": ({"x_test": np.zeros((0, 20)), "y_test": np.zeros(0, int)}, "empty"),
    "NaN": ({"x_train": np.full((8, 20), np.nan)}, "x_train"),
    "mismatch": ({"y_train": np.array([0, 1, 0])}, "x_train has 8 samples but y_train has 3"),
    "unseen": ({"y_test": np.array([0, 1, 2, 3])}, "y_test holds the class 2, which y_train lacks"),
    "one class": (
        {"x_train": np.zeros((20, 20)), "y_train": np.zeros(20, int), "y_test": np.zeros(4, int)},
        "y_train holds a single class, 0",
    ),
    "float labels": (
        {"y_train": np.array([0.5, 1.0] * 4)},
        "y holds floats in one split and whole numbers in another",
    ),
    "other length": ({"x_test": np.zeros((4, 19))}, "x differs in shape between the splits"),
    "a film": (
        {"x_train": np.zeros((8, 3, 5, 20, 20))},
        "expected series, (n, L) or (n, C, L), or",
    ),
    "half a validation set": ({"x_val": np.zeros((4, 20))}, "x_val and y_val go together"),
    "too few": ({"x_train": np.zeros((2, 20)), "y_train": np.array([0, 1])}, "too few to hold"),
}


# A file ends in one place for all scripts, tasks.load_task, so that two of the cases do for each.
FILES = [("orca", case) for case in BAD_FILES]
FILES += [(s, case) for s in ("pare", "proposed") for case in ("NaN", "mismatch")]


@pytest.mark.parametrize(("script", "case"), FILES)
def test_bad_files_are_one_line_and_code_2(script, case, tmp_path, capsys):
    change, message = BAD_FILES[case]
    arrays = {name: a for name, a in {**GOOD, **change}.items() if a is not None}
    file = tmp_path / "mine.npz"
    np.savez(file, **arrays)
    argv = ["--task", str(file), "--out", str(tmp_path / "run")]
    assert importlib.import_module(script).cli(argv) == 2
    shown = capsys.readouterr().err
    assert message in shown and "mine.npz" in shown and shown.count("\n") == 1, shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"<html>not found</html>"])
def test_a_file_that_is_no_npz(content, tmp_path, capsys):
    (tmp_path / "mine.npz").write_bytes(content)
    argv = ["--task", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "run")]
    assert importlib.import_module("pare").cli(argv) == 2
    shown = capsys.readouterr().err
    assert "mine.npz" in shown and shown.count("\n") == 1, shown


def test_importing_a_script_does_nothing_and_loads_little():
    heavy = "transformers timm ot matplotlib scipy torchvision tokenizers"
    code = f"import sys, orca, pare, proposed; heavy = '{heavy}'.split()"
    code += "; print([m for m in heavy if m in sys.modules])"
    done = shell("-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def seconds(*argv):
    start = time.perf_counter()
    shell(*argv)
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def torch_s():
    """What importing torch takes."""
    return min(seconds("-c", "import torch") for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", ["--help", "--epochs -2"])
def test_help_and_bad_usage_cost_little_more_than_torch(script, flags, torch_s):
    """In one of three tries: other work may slow one down."""
    command = (f"{script}.py", *flags.split())
    assert any(seconds(*command) < 1.5 * torch_s for _ in range(3))

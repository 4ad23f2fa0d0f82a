"""Each command of the README: all are parsed, and run where they need no data, GPU or network."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = ("orca", "pare", "proposed")
SHORT = "--epochs 1 --train-size 24 --source-size 32 --align-epochs 1 --align-samples 24"
# What needs files, a GPU, the network or a run: parsed here, run on small files by other tests.
ELSEWHERE = ("--data real", "--paper", "conll2003", "cuda", "--predict", "torchrun", "--track")
ELSEWHERE += ("crop.npz", "--resume")


def commands() -> list[str]:
    """Every line of a block of commands, and every command within the text."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", TEXT, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    rest = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    lines += re.findall(r"`((?:python|torchrun|pytest|pip|ruff) [^`]+)`", rest)
    return list(dict.fromkeys(line.split(" #")[0].strip() for line in lines if line.strip()))


def of_methods() -> list[str]:
    """The lines that start a method, without what is before and after."""
    found = (re.search(rf"\b({'|'.join(METHODS)})\.py [^&]*", line) for line in commands())
    return list(dict.fromkeys(match[0].strip() for match in found if match))


def test_the_two_commands_are_there():
    assert "pip install -r requirements.txt && python pare.py --task satellite" in commands()
    assert "pip install -r requirements.txt && pytest" in commands()


@pytest.mark.parametrize("line", of_methods())
def test_the_line_parses(line):
    script, *argv = shlex.split(line)
    importlib.import_module(script.removesuffix(".py")).parse_args(argv)


@pytest.mark.parametrize("line", [x for x in of_methods() if not any(e in x for e in ELSEWHERE)])
def test_the_line_runs(line, series, tmp_path, monkeypatch, capsys):
    """Shortened: one epoch on a few samples, of four classes where the task is satellite."""
    monkeypatch.chdir(tmp_path)
    Path("mine.npz").write_bytes(series.read_bytes())
    script, *argv = shlex.split(line.replace("--task satellite", "--task mine.npz"))
    out = [] if "--out" in argv else ["--out", "run"]
    code = importlib.import_module(script[:-3]).cli(
        [*argv, *SHORT.split(), "--device", "cpu", *out]
    )
    shown = capsys.readouterr()
    assert code == 0 and ("result {" in shown.out or "rank" in line), shown.err


def test_other_commands_have_the_options_that_are_named():
    """Of results/ and of python -m tasks.TASK: what --help lists."""
    seen = 0
    for line in commands():
        if match := re.match(r"python (results/\w+\.py|-m tasks\.[a-z_0-9]+)( .*)?$", line):
            argv = [*match[1].split(), "--help"]
            done = subprocess.run(
                [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=True
            )
            for flag in re.findall(r"--[a-z-]+", match[2] or ""):
                assert flag in done.stdout, line
            seen += 1
    assert seen >= 4


def test_a_pde_file_is_made_as_the_readme_says(tmp_path):
    (line,) = (x for x in commands() if x.startswith("python -m tasks.advection"))
    argv = shlex.split(line)[1:]
    argv[argv.index("--n") + 1], argv[argv.index("--out") + 1] = "11", str(tmp_path / "file.hdf5")
    subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "file.hdf5").stat().st_size > 1000


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """One's own file, a run from Python, its model."""
    monkeypatch.chdir(tmp_path)
    rng, names = np.random.default_rng(0), {}
    for part, n in (("train", 40), ("test", 10)):
        names |= {f"x_{part}": rng.normal(size=(n, 30)), f"y_{part}": rng.integers(3, size=n)}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("epochs=30", "epochs=1, source_size=32"), names)
    assert names["result"]["task"] == "mine.npz"
    assert Path("runs/pare-mine-0/model.safetensors").exists() and callable(names["model"])


def test_links_within_the_page_lead_to_a_heading():
    headings = re.findall(r"(?m)^##+ (.*)$", TEXT)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    missing = set(links) - anchors
    assert links and not missing, missing

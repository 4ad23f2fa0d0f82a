"""What holds for the repository as a whole: labels, safety, files."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import pare

ROOT = Path(__file__).resolve().parents[1]
LABELLED = {"otdd": "D", "mmd": "M", "orca": "O", "pare": "P", "contrast": "N", "proposed": "N"}
FILES = {"proposed": ("proposed", "contrast")}  # where not only those of the same name
PYTHON = [
    file
    for file in sorted(ROOT.rglob("*.py"))
    if not {"data", "runs", ".venv", "venv"} & set(file.relative_to(ROOT).parts)
]


def labels(text: str, letter: str) -> set[str]:
    return set(re.findall(rf"\(({letter}\d+)\)", text))


@pytest.mark.parametrize("name", list(LABELLED))
def test_every_equation_is_stated_implemented_and_tested(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    letter, doc = LABELLED[name], ast.get_docstring(ast.parse(source))
    stated = labels(doc, letter)
    parts = FILES.get(name, [name])
    code = "".join((ROOT / f"{part}.py").read_text(encoding="utf-8") for part in parts)
    comments = "\n".join(re.findall(r"#.*", code))
    files = [ROOT / "tests" / f"test_{part}.py" for part in parts]
    tests = re.findall(r"def test_\w+", "".join(f.read_text(encoding="utf-8") for f in files))
    tested = set(re.findall(rf"{letter}\d+", "\n".join(tests)))
    assert stated and stated == labels(source, letter), "a label that the docstring does not state"
    assert stated <= labels(comments, letter), "stated, but at no line of code"
    assert stated == tested, "stated, but in no test's name (or the other way round)"


def test_nothing_from_outside_is_executed_and_no_device_is_assumed():
    bad = re.compile(r"allow_pickle\s*=\s*True|weights_only\s*=\s*False|\.cuda\(\)|except\s*:")
    for file in PYTHON:
        if file.parent.name != "tests":
            assert not bad.search(file.read_text(encoding="utf-8")), file


def test_sizes_that_keep_a_file_readable():
    limits = {"orca": 460, "pare": 510, "proposed": 640, "run": 470, "record": 575}
    limits |= {"otdd": 405, "contrast": 250, "mmd": 140}
    for name, most in limits.items():
        assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= most, name


def functions(file):
    """(lines, name) of every function of a file, those of classes and of functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.end_lineno - node.lineno + 1, f"{file.relative_to(ROOT)}: {node.name}"


def test_no_function_has_more_than_60_lines():
    code = [file for file in PYTHON if file.parent == ROOT or file.parent.name in OURS]
    assert len(code) > 25
    assert [found for file in code for found in functions(file) if found[0] > 60] == []


# ---- what imports what, and what can be copied ----

OURS = {file.stem for file in ROOT.glob("*.py")} | {"tasks", "bodies"}
MAY = {name: {"run", "tasks", "bodies"} for name in ("orca", "pare", "proposed")}
MAY["orca"] = MAY["orca"] | {"otdd", "mmd"}
MAY["proposed"] = MAY["proposed"] | {"contrast"}
MAY |= {"otdd": set(), "mmd": set(), "contrast": set()}
MAY |= {"run": {"record", "tasks", "bodies"}, "record": set(), "tasks": {"tasks"}}
MAY["bodies"] = {"bodies", "tasks"}  # of which it takes the downloads, and texts to learn from


def imported(source: str) -> set[str]:
    """Names of the modules of this project that a source imports, inside functions as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module.split(".")[0]} if not node.level else {"."}
    return found & (OURS | {"."})


@pytest.mark.parametrize("name", list(MAY))
def test_modules_import_only_what_they_may(name):
    """No method imports another, and nobody imports a method."""
    assert set(MAY) == OURS
    files = sorted((ROOT / name).rglob("*.py")) if name in ("tasks", "bodies") else []
    for file in files or [ROOT / f"{name}.py"]:
        assert imported(file.read_text(encoding="utf-8")) <= MAY[name], file


def test_the_check_of_imports_sees_them():
    source = "import torch\nfrom tasks import own\ndef f():\n    import orca.parts as o\n"
    assert imported(source) == {"tasks", "orca"} and imported("from . import x") == {"."}


def elsewhere(folder, *argv):
    """Run python in a folder, with nothing of this project but what is there."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True
    )


def test_pare_runs_where_only_what_it_imports_is(tmp_path):
    for name in ("pare.py", "run.py", "record.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("bodies", "tasks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    argv = "pare.py --task satellite --train-size 64 --epochs 1 --source-size 64 --device cpu"
    done = elsewhere(tmp_path, *argv.split())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "pare-satellite-0" / "result.json").is_file()


def test_the_mathematics_needs_nothing_of_ours(tmp_path):
    for name in ("otdd.py", "mmd.py", "contrast.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = """
import torch
import contrast, mmd, otdd
x, y = torch.randn(12, 3), torch.arange(12) % 2
print(float(otdd.otdd(x, y, x + 1, y)) > 0, float(mmd.mmd2(x, x + 1)) > 0)
print(float(contrast.inner(x, y, torch.ones(12, 12), torch.ones(12), 0.2)[0]) > 0)
"""
    done = elsewhere(tmp_path, "-c", code)
    assert (done.stdout, done.stderr) == ("True True\nTrue\n", "")


def test_gate_and_replacement_can_be_copied_by_themselves():
    """The text of these blocks of pare.py, and torch, is all that they need."""
    source = (ROOT / "pare.py").read_text(encoding="utf-8")
    names = ("Gate", "straight_through", "sampled", "replace_patches")
    blocks = [node for node in ast.parse(source).body if getattr(node, "name", "") in names]
    copied = {"torch": torch, "Tensor": torch.Tensor, "nn": nn}
    for block in blocks:
        exec(ast.get_source_segment(source, block), copied)  # noqa: S102
    z_t, z_s = torch.randn(3, 7, 5), torch.randn(3, 9, 5)
    for kind in pare.GATES:
        for select in ("top", "gumbel"):
            torch.manual_seed(0)
            gate = copied["Gate"](5, kind)
            mine = copied["replace_patches"](z_t, z_s, gate(z_t), gate(z_s, True), 4, select)
            torch.manual_seed(0)
            gate = pare.Gate(5, kind)
            theirs = pare.replace_patches(z_t, z_s, gate(z_t), gate(z_s, True), 4, select)
            assert torch.equal(mine, theirs)


PAGES = sorted(set(ROOT.glob("*.md")) | set(ROOT.glob("*/README.md")) | set(ROOT.glob("*/*/*.md")))


def test_pages_name_no_path_of_one_machine():
    assert len(PAGES) > 8
    for page in PAGES:
        found = re.search(
            r"(?<![\w.])/(home|root|tmp|work|Users)/", page.read_text(encoding="utf-8")
        )
        assert not found, page


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, date = re.search(r"^## ([\d.]+), (.*)$", changes, re.M).groups()
    assert f"\nversion: {newest}\n" in cited and f"\ndate-released: {date}\n" in cited
    assert project["version"] == newest


WORKS = {"2302.05738": "Shen et al. 2023", "2406.09003": "Cai et al. 2024"}
WORKS |= {"2403.13537": "García-de-Herreros et al. 2024", "A Kernel": "Gretton et al. 2012"}
WORKS |= {"2002.02923": "Alvarez-Melis and Fusi 2020", "2110.05668": "Tu et al. 2022"}
WORKS |= {"2210.07182": "Takamoto et al. 2022"}
WORKS |= {"2004.11362": "Khosla et al. 2020"}


@pytest.mark.parametrize(("work", "name"), WORKS.items())
def test_what_is_implemented_is_cited(work, name):
    assert work in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert name in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_git_holds_nothing_large():
    try:
        files = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 8_000_000, name

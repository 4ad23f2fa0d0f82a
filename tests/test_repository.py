"""What holds for the repository as a whole: labels, notebooks, safety, files."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LABELLED = {"otdd": "D", "mmd": "M", "orca": "O", "pare": "P", "contrast": "N", "proposed": "N"}
TESTS = {"proposed": ("proposed", "contrast")}  # files, where not only that of the same name
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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
    code = source.replace('"""' + doc, "")
    comments = "\n".join(re.findall(r"#.*", code))
    files = [ROOT / "tests" / f"test_{part}.py" for part in TESTS.get(name, [name])]
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
    limits = dict.fromkeys(("orca", "pare", "proposed"), 700)
    limits |= {"run": 800, "otdd": 320, "contrast": 240, "mmd": 120}
    for name, most in limits.items():
        assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= most, name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_were_run_from_top_to_bottom(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    text = json.dumps([o for o in outputs if o["output_type"] == "stream"])
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of one machine"
    assert path.stat().st_size < 1_500_000


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


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

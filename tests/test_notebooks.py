"""Notebooks: run from top to bottom, of one form, and showing the code as it is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind=None):
    """The cells of a notebook, their sources joined to one text each."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = [cell | {"source": "".join(cell["source"])} for cell in found]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def printed(path):
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


@every
def test_notebook_was_run_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a warning"
    assert not re.search(r"/(home|root|tmp|work|Users)/", printed(path)), "a path of one machine"
    assert not [cell for cell in code if "execution" in cell["metadata"]], "times of a run"
    assert path.stat().st_size < 1_500_000


@every
def test_notebook_has_the_form_of_the_others(path):
    everything, text = cells(path), "\n".join(cell["source"] for cell in cells(path, "markdown"))
    assert len(everything) <= 40
    for cell in cells(path, "code"):
        assert len([line for line in cell["source"].splitlines() if line.strip()]) <= 12
    first, last = everything[0]["source"], everything[-1]["source"]
    assert first.startswith("# ") and re.search(r"(?i)\|[^|\n]*slide.*\n\|-", first), (
        "no table of slides"
    )
    assert re.search(r"(?i)goal|you can|you will", first), "no goals"
    assert re.search(r"(?i)prerequisite|you need", first), "no prerequisites"
    assert text.count("<details>") == text.count("</details>") == 3, "three solutions, collapsed"
    assert re.search(r"(?i)previous:? *\[", last) and re.search(r"(?i)next:? *\[", last)
    for target in re.findall(r"\]\(([^):#]+)[^):]*\)", text):
        assert (path.parent / target).exists(), target
    numbers = [other.stem[:2] for other in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)


@every
def test_link_to_a_heading_leads_to_one(path):
    text = "\n".join(cell["source"] for cell in cells(path, "markdown"))
    for target, anchor in re.findall(r"\]\(([^):#]+\.md)#([^)]+)\)", text):
        page = (path.parent / target).read_text(encoding="utf-8")
        headings = [line.lstrip("# ").lower() for line in page.splitlines() if line.startswith("#")]
        anchors = {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{target} has no heading {anchor}"


@every
def test_shipped_code_that_a_notebook_shows_is_still_that_of_the_file(path):
    for file, shown in re.findall(r"(?m)^# ([\w/]+\.py), .*\n((?:.+\n)*)", printed(path)):
        code = {line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()}
        for line in shown.splitlines():
            assert line.strip() in code | {"..."}, f"{path.name} shows an old {file}: run it again"


def test_label_is_shown_with_its_function_and_an_unknown_one_is_an_error(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import show

    show.lines("otdd", "D1", before=0, within="otdd_naive")
    assert capsys.readouterr().out == (
        "# otdd.py, otdd_naive\nd_Z[pair] = cost[pair] + W  # (D1)\n\n"
    )
    with pytest.raises(ValueError, match="D99.*otdd.py"):
        show.lines("otdd", "D99")


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_notebook_runs_from_both_folders_and_leaves_no_file(folder, tmp_path):
    before = {file for file in ROOT.rglob("*") if "__pycache__" not in file.parts}
    notebook = (ROOT / "notebooks/02_mmd.ipynb").relative_to(ROOT / folder)
    code = "import nbformat; from nbclient import NotebookClient; "  # which nbval brings along
    code += f"NotebookClient(nbformat.read({str(notebook)!r}, 4), timeout=300).execute()"
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=ROOT / folder, env=environment, check=True, timeout=600)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    after = {file for file in ROOT.rglob("*") if "__pycache__" not in file.parts}
    assert after == before

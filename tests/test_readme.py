"""The pages: their commands run or parse, their links lead somewhere, their code runs.

`python tests/test_readme.py` writes what changes with the code and the rows: the line numbers in
links to functions, and the means in the front page's table of results.
"""

import ast
import csv
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"README.md": 200, "RUNNING.md": 250, "CHANGELOG.md": 250, "tasks/README.md": 250}
SIZES |= {"bodies/README.md": 250, "results/README.md": 350}  # lines at most
METHODS = ("orca", "pare", "proposed")
SHORT = "--epochs 1 --train-size 24 --source-size 32 --device cpu --baselines off"
# What needs files, a GPU, the network or a run: parsed here, run on small files by other tests.
ELSEWHERE = ("--data real", "--paper", "conll2003", "cuda", "--predict", "--track")
ELSEWHERE += ("--resume", "--f-t", "--epochs 0", "bert-", "vit_", "--device cpu")
# Flags of programs that are not ours.
OTHERS = {"--nproc-per-node", "--logdir"}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The blocks of a page that are marked as one of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text(page), re.S | re.M)
    return [block for language, block in found if language in languages]


def commands(page: str) -> list[str]:
    """Every line of a block of commands, and every command within the text."""
    lines = "\n".join(blocks(page, "sh", "bash", "")).replace("\\\n", " ").splitlines()
    rest = re.sub(r"^```.*?^```", "", text(page), flags=re.S | re.M)
    lines += re.findall(r"`([^`\n]+)`", rest)
    lines = (line.split(" #")[0].strip() for line in lines)
    known = re.compile(r"(python|torchrun|pytest|pip|ruff|bash) ")
    return list(dict.fromkeys(line for line in lines if known.match(line)))


def of_methods(*pages: str) -> list[str]:
    """The lines that start a method, without what is before and after."""
    lines = [line for page in pages if (ROOT / page).exists() for line in commands(page)]
    found = (re.search(rf"\b({'|'.join(METHODS)})\.py( [^&|]*|$)", line) for line in lines)
    return list(dict.fromkeys(match[0].strip() for match in found if match))


def run(line: str, *more: str) -> int:
    script, *argv = shlex.split(line)
    return importlib.import_module(script[:-3]).cli([*argv, *more])


def test_the_two_commands_are_lines_of_the_front_page():
    """.ci/run looks for the second."""
    lines = text("README.md").splitlines()
    assert "pip install -r requirements.txt && python pare.py --task satellite" in lines
    assert "pip install -r requirements.txt && pytest" in lines


@pytest.mark.parametrize("line", of_methods(*SIZES))
def test_the_line_parses(line):
    script, *argv = shlex.split(line)
    module = importlib.import_module(script.removesuffix(".py"))
    if {"--help", "--print-config"} & set(argv):
        return  # they end the program
    module.parse_args(argv)


RUN = of_methods("README.md", "RUNNING.md", "bodies/README.md")
RUN = [line for line in RUN if " -" in line and not any(e in line for e in ELSEWHERE)]
RUN = [line for line in RUN if not line.endswith(("--help", "--print-config"))]


@pytest.mark.parametrize("line", RUN)
def test_the_line_runs(line, series, tmp_path, monkeypatch, capsys):
    """Shortened: one epoch on a few samples, of four classes where the task is satellite."""
    for name in importlib.import_module("tasks").NAMES:
        record = importlib.import_module(f"tasks.{name}").TASK
        monkeypatch.setitem(record, "sizes", {"train": 24, "val": 24, "test": 24})
    monkeypatch.chdir(tmp_path)
    Path("mine.npz").write_bytes(series.read_bytes())
    line = line.replace("--task satellite", "--task mine.npz")
    short = [*SHORT.split(), *(["--align-epochs", "1"] if line.startswith("orca") else [])]
    code, shown = run(line, *short), capsys.readouterr()
    assert code == 0 and "result {" in shown.out, shown.err


def test_alignment_then_another_method(series, tmp_path, monkeypatch, capsys):
    """The lines of RUNNING.md in their order."""
    monkeypatch.chdir(tmp_path)
    Path("mine.npz").write_bytes(series.read_bytes())
    (block,) = (b for b in blocks("RUNNING.md", "sh") if "--f-t" in b)
    lines = [line.removeprefix("python ") for line in block.splitlines()]
    assert [line.split(".")[0] for line in lines] == list(METHODS)
    for line in lines:
        epochs = [] if "--epochs" in line else ["--epochs", "1"]
        task = line.replace("--task satellite", "--task mine.npz")
        more = [*epochs, *(["--align-epochs", "2"] if line.startswith("orca") else [])]
        assert run(task, *more, "--source-size", "32", "--device", "cpu") == 0
    assert Path("runs/aligned/f_t.safetensors").is_file()


def programs() -> list[tuple[str, str]]:
    """Commands of results/ and of python -m tasks.TASK, and the flags that are given to them."""
    lines = [line for page in SIZES if (ROOT / page).exists() for line in commands(page)]
    found = (
        re.match(r"python ((?:results|bodies)/\w+\.py|-m tasks\.[a-z_0-9]+)\b(.*)", line)
        for line in lines
    )
    flags: dict[str, set] = {}
    for match in filter(None, found):
        flags.setdefault(match[1], set()).update(re.findall(r"--[a-z-]+", match[2]))
    return [(program, " ".join(sorted(given))) for program, given in flags.items()]


@pytest.mark.parametrize(("program", "flags"), programs())
def test_other_programs_have_the_options_that_are_named(program, flags):
    if not flags:
        assert (ROOT / program).is_file()
        return
    done = subprocess.run(
        [sys.executable, *program.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(flags.split()) <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_shell_scripts_that_are_named_exist():
    named = [n for page in SIZES for n in re.findall(r"\bresults/\w+\.sh", text(page))]
    assert named and all((ROOT / name).is_file() for name in named), named


def settings() -> set[str]:
    return {
        "--" + field.name.replace("_", "-")
        for method in METHODS
        for field in fields(importlib.import_module(method).Config)
    }


def test_running_md_has_every_setting_and_no_other():
    """But for the table of earlier flags, and those of programs that are not ours."""
    page = text("RUNNING.md")
    table = page[page.index("### Where earlier") : page.index("## The recipe")]
    named = set(re.findall(r"--[a-z0-9][a-z0-9-]*", page.replace(table, "")))
    assert settings() <= named, settings() - named
    assert named <= settings() | OTHERS | {"--help"}, named - settings() - OTHERS
    gone = set(re.findall(r"^\| `(--[a-z-]+)", table, re.M)) - {"--align"}
    assert len(gone) == 8 and not gone & settings()


def test_running_md_has_the_defaults():
    """A cell holds those of all flags of its row, or of those that take a value, or one for all."""
    defaults = {}
    for method in METHODS:
        for field in fields(importlib.import_module(method).Config):
            defaults["--" + field.name.replace("_", "-")] = field.default
    seen, switches = set(), {flag for flag, value in defaults.items() if isinstance(value, bool)}
    page, _, _ = text("RUNNING.md").partition("### Where earlier")
    for names, cell in re.findall(r"^\| (`--[^|]*)\|([^|]*)\|", page, re.M):
        flags = re.findall(r"--[a-z0-9-]+", names)
        shown = [v.strip(" `") for v in cell.split(";" if ";" in cell else ", ")]
        if len(shown) != len(flags):
            flags = [flag for flag in flags if flag not in switches]
        shown = shown * len(flags) if len(shown) == 1 else shown
        for flag, value in zip(flags, shown, strict=True):
            default = defaults[flag]
            if flag in switches or isinstance(default, str):
                assert value == ("" if flag in switches else default), flag
            else:
                assert float(value) == default, flag
        seen |= set(flags)
    assert seen | switches == set(defaults), set(defaults) - seen - switches


def test_a_pde_file_is_made_as_the_page_says(tmp_path):
    lines = commands("tasks/README.md")
    (line,) = (x for x in lines if x.startswith("python -m tasks.advection"))
    argv = shlex.split(line)[1:]
    argv[argv.index("--n") + 1], argv[argv.index("--out") + 1] = "11", str(tmp_path / "file.hdf5")
    subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "file.hdf5").stat().st_size > 1000


def test_the_python_of_the_front_page_runs(tmp_path, monkeypatch, capsys):
    """One's own file, a run from Python, its model, and a prediction from the command line."""
    monkeypatch.chdir(tmp_path)
    rng, names = np.random.default_rng(0), {}
    for part, n in (("train", 40), ("test", 10)):
        labels = np.array(["corn", "rice", "wheat"])[rng.integers(3, size=n)]
        names |= {f"x_{part}": rng.normal(size=(n, 30)), f"y_{part}": labels}
    code = blocks("README.md", "python")
    assert len(code) == 2
    for block in code:
        exec(block.replace("steps=1500", "epochs=1, source_size=32"), names)
    assert names["result"]["task"] == "mine.npz" and callable(names["model"])
    assert Path("runs/pare-mine-0/model.safetensors").exists()
    np.save("x.npy", names["x_test"])
    (line,) = (x for x in of_methods("README.md") if "--predict" in x)
    assert run(line) == 0, capsys.readouterr().err
    assert set(np.load("y.npy")) <= {"corn", "rice", "wheat"}


@pytest.mark.parametrize("page", ["tasks/README.md", "bodies/README.md"])
def test_the_python_of_other_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, names = np.random.default_rng(0), {}
    for part in ("train", "test"):
        names |= {f"x_{part}": rng.normal(size=(20, 9)), f"y_{part}": rng.integers(3, size=20)}
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        exec(block, names)


# ---- links ----


def anchors(page: Path) -> set[str]:
    """What a code host makes of the headings of a page, its blocks of code left out."""
    rest = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", rest, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links(page: str) -> list[str]:
    rest = re.sub(r"^```.*?^```", "", text(page), flags=re.S | re.M)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", rest) if "://" not in link]


@pytest.mark.parametrize("page", SIZES)
def test_links_lead_to_a_file_and_a_heading(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def lines_of(file: Path) -> dict[str, int]:
    """The line of every class and function, methods as Class.method."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
            for part in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef):
                    found[f"{node.name}.{part.name}"] = part.lineno
    return found


def with_lines(page: str) -> str:
    """The text of a page in which links such as [`pare.Gate`](pare.py#L1) have the right line."""

    def mended(match: re.Match) -> str:
        name, file = match[1], (ROOT / page).parent / match[2]
        name = name.removeprefix(f"{file.stem}.")
        return f"[`{match[1]}`]({match[2]}#L{lines_of(file)[name]})"

    return re.sub(r"\[`([\w.]+)`\]\(([\w/.]+\.py)#L\d+\)", mended, text(page))


@pytest.mark.parametrize("page", [page for page in SIZES if (ROOT / page).exists()])
def test_links_to_functions_lead_to_their_lines(page):
    assert with_lines(page) == text(page), "run: python tests/test_readme.py"


IDEAS = "otdd_naive align freeze Gate patches_to_replace replace_patches Mixer.losses chain literal"
IDEAS += " label_weights preserved_by_slope predict_perturbed mmd2_naive wasserstein Model"


def test_every_idea_of_the_slides_is_one_hop_from_the_front_page():
    named = re.findall(r"\[`([\w.]+)`\]\(\w+\.py#L\d+\)", text("README.md"))
    missing = set(IDEAS.split()) - set(named) - {name.split(".")[-1] for name in named}
    assert not missing, missing


# ---- numbers ----

ROW = r"^\| (`[\w.]+`: [^|]*) \|.*\|$"  # of the table of results: a task and what it is
PLAIN = {"NFT": "orca.py", "ORCA": "orca.py", "PaRe": "pare.py", "proposed": "proposed.py"}


def rows(name: str) -> list[dict]:
    with (ROOT / "results" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_means(page: str) -> str:
    """The front page with the means over the seeds of results/all_tasks.csv in its table."""

    def line(match: re.Match) -> str:
        task, about = re.match(r"`([\w.]+)`: (.*)", match[1]).groups()
        size = re.match(r"\d+", about if task.endswith(".npz") else "")
        cells = []
        for method, script in PLAIN.items():
            want = f"python {script} --task {task} --seed SEED"
            want += " --align none" if method == "NFT" else ""
            want += f" --train-size {size[0]}" if size else ""
            errors = [
                float(row["test_error"])
                for row in rows("all_tasks.csv")
                if row["command"] == want.replace("SEED", row["seed"])
            ]
            mean = sum(errors) / max(1, len(errors))
            cells.append(f"{mean:.3f} ({len(errors)})" if errors else "-")
        return f"| {match[1]} | {' | '.join(cells)} |"

    return re.sub(ROW, line, page, flags=re.M)


def test_the_results_are_means_of_rows():
    page = text("README.md")
    assert len(re.findall(ROW, page, re.M)) >= 4
    assert with_means(page) == page, "run: python tests/test_readme.py"


def test_what_is_said_of_the_gpu_is_in_the_rows():
    tests = rows("gpu_tests.csv")
    front, page = " ".join(text("README.md").split()), text("RUNNING.md")
    assert f" {sum(int(row['passed']) for row in tests)} tests passed" in front
    assert not any(int(row["failed"]) for row in tests)
    for row in rows("gpu_steps.csv"):
        if row["task"] != "satellite" or row["variant"] not in ("fp32", "tf32"):
            continue
        assert row["device"].endswith("H200") and row["batch"] == "64"
        assert f" {float(row['step_s']):.3f} s " in page
        assert f" {float(row['peak_gb']):.1f} GB " in page
        if row["method"] == "pare":
            assert f" {float(row['step_s']):.3f} s" in front


def test_what_is_said_of_the_body_s_rate_is_in_the_rows():
    page = " ".join(text("RUNNING.md").split())
    for task in ("satellite", "semg.npz", "crop.npz", "advection"):
        found = {}
        for row in rows("recipe.csv"):
            lr, body_lr = re.search(r"--lr (\S+) --body-lr (\S+)", row["command"]).groups()
            default_batch = "--batch-size" not in row["command"]
            if row["task"] == task and lr == "0.002" and default_batch:
                found[body_lr] = float(row["val_error"])
        digits = 4 if task == "advection" else 3
        low, high = (f"{found[rate]:.{digits}f}" for rate in ("0.0002", "0.0006"))
        assert re.search(rf"{low}( with a tenth)? and (of )?{high}", page), (task, low, high)


def test_what_is_said_of_fields_is_the_answer_of_the_rows():
    answers, front = text("results/README.md"), " ".join(text("README.md").split())
    no_difference = "pretraining, ORCA and the proposal make no difference beyond chance, and PaRe"
    assert no_difference + " raises the error" in front
    for name in ("Pretraining", "Alignment", "The proposal"):
        assert re.search(rf"\*\*{name}\*\* .*no difference beyond chance on .*fields", answers)
    assert re.search(r"\*\*Patch replacement\*\* .*raises the error on .*fields", answers)


# ---- sizes, figure ----


@pytest.mark.parametrize(("page", "most"), SIZES.items())
def test_a_page_is_no_longer_than_can_be_read(page, most):
    assert len(text(page).splitlines()) <= most


def test_nothing_is_left_to_fill_in():
    for page in ("README.md", "RUNNING.md"):
        assert not re.search(r"TODO|FIXME|XXX|<!--", text(page)), page


def test_the_figure_is_drawn_by_its_script(tmp_path):
    import matplotlib.image

    assert "(results/overview.png)" in text("README.md")
    place = ROOT / "results" / "overview.py"
    spec = importlib.util.spec_from_file_location("overview", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.draw(tmp_path / "drawn.png")
    drawn = matplotlib.image.imread(tmp_path / "drawn.png")
    kept = matplotlib.image.imread(place.with_suffix(".png"))
    assert drawn.shape == kept.shape and abs(drawn - kept).mean() < 0.02


if __name__ == "__main__":
    for name in SIZES:
        if (ROOT / name).exists():
            (ROOT / name).write_text(with_lines(name), encoding="utf-8")
    (ROOT / "README.md").write_text(with_means(text("README.md")), encoding="utf-8")

"""The numbers: rows with commands that repeat them, a page that agrees with them."""

import csv
import importlib
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tasks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))
import all_tasks  # noqa: E402 (results/ has to be on the path first)
import collect  # noqa: E402
import faults  # noqa: E402
import peers  # noqa: E402
import table  # noqa: E402


def config_of(command):
    """The settings that a command line means."""
    name, *argv = shlex.split(command)[1:]
    return importlib.import_module(name.removesuffix(".py")).parse_args(argv)


def job(*flags, method="NFT", script="orca.py", seed=0):
    line = shlex.join(["python", script, "--task", "satellite", "--seed", str(seed), *flags])
    return collect.Job(
        method, "satellite", seed, line, extra=("--train-size", "24", "--epochs", "2")
    )


# ---- the rows ----


def test_every_row_is_of_a_run_with_default_settings_that_its_command_repeats():
    rows, seen = table.all_rows(), set()
    for row in rows:
        assert row["device"] and row["torch"] and row["command"]
        if row["method"] in table.SIMPLE:
            continue
        assert row["command"] not in seen and row["commit"]
        seen.add(row["command"])
        cfg = config_of(row["command"])
        assert (cfg.task, str(cfg.seed)) == (row["task"], row["seed"])
        assert (cfg.epochs, cfg.steps, cfg.batch_size, cfg.body_lr) == (-1, 0, 0, 0)
        assert int(row["steps"]) >= 1500 and int(row["epochs"]) >= 15
        if not row["task"].endswith(".npz"):
            task, seed = row["task"], int(row["seed"])
            known = {j.command for s in all_tasks.STUDIES for j in jobs(s, task, seed)}
            assert row["command"] in known


def jobs(study, task, seed):
    if study == "large" or task in all_tasks.STUDIED:
        return all_tasks.jobs_of(study, task, seed, {}, False)
    return []


def test_all_methods_of_a_task_have_the_same_epochs():
    epochs = {}
    for row in table.all_rows():
        if row["method"] not in table.SIMPLE:
            epochs.setdefault((row["task"], row["train_size"]), set()).add(row["epochs"])
    assert all(len(found) == 1 for found in epochs.values())


# ---- the page ----


def test_the_page_is_what_the_rows_say():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert text == table.page(), "run python results/table.py"
    assert len(text.splitlines()) <= 350


def invented(effects, seeds=3):
    """Rows of all methods on all tasks: {method: error over NFT's}, a little off in each run."""
    rows = []
    for task in tasks.NAMES:
        for seed in range(seeds):
            for i, made in enumerate(all_tasks.jobs_of("large", task, seed, {}, False)):
                off = 0.01 * math.sin(17 * len(rows) + i)
                row = {"method": made.method, "task": task, "seed": str(seed), "metric": "error"}
                row |= {"test_error": 0.2 * effects.get(made.method, 1.0) * (1 + off)}
                row |= {"val_error": 0.2, "epochs": "20", "train_size": "99", "time_s": "10"}
                row |= {"before_s": "2", "spikes": "0", "converged": "True", "curve": "0.4 0.2"}
                row |= {"test_error_perturbed": row["test_error"], "device": "CPU", "torch": "2"}
                rows.append(row | {"commit": "abc", "command": made.command})
    return rows


def test_words_follow_the_numbers(monkeypatch, tmp_path):
    """The same page from rows in which PaRe is better and from rows in which it is worse."""
    for factor, verb in ((0.8, "lowers"), (1.25, "raises")):
        rows = invented({"PaRe": factor, "scratch": 1.5, "FPT": 2.0})
        monkeypatch.setattr(table, "all_rows", lambda rows=rows: rows)
        text = table.page()
        assert (
            f"**Patch replacement** (PaRe against NFT) {verb} the error on series, images" in text
        )
        assert "**Alignment** (ORCA against NFT) makes no difference beyond chance" in text
        assert (
            "**Pretraining** (plain fine-tuning (NFT) against the same body untrained) lowers"
            in text
        )
        assert f"`pare.py` {verb} the error beside ORCA" in text
        assert "324 of 324 runs" in text and len(text.splitlines()) <= 350
    rows = {row["command"]: row for row in invented({"PaRe": 0.8})}
    table.figure(rows, tmp_path / "figure.png")
    assert 20_000 < (tmp_path / "figure.png").stat().st_size < 200_000


def test_nothing_is_said_of_fewer_than_six_runs(monkeypatch):
    monkeypatch.setattr(table, "all_rows", lambda: invented({"PaRe": 0.5}, seeds=1))
    rows = {row["command"]: row for row in table.all_rows() if row["task"] == "satellite"}
    assert table.answers(rows) == "" and table.ranks(rows) == "" and table.claims(rows) == ""
    few = [-1.0, -1.1, -0.9, -1.2, -0.8]
    assert table.sign(few) == 0 and table.sign([*few, -1.0]) == -1


def test_errors_are_paired_by_seed():
    runs, base = (
        {s: {"test_error": e} for s, e in d.items()} for d in ({0: 1, 1: 4}, {1: 2, 2: 9})
    )
    assert table.log_ratios(runs, base) == [pytest.approx(math.log(2))]


def test_ranks_are_wilcoxon_s_with_holm_s_correction():
    from scipy import stats

    effects = {"PaRe": 0.8, "scratch": 1.5, "FPT": 2.0}
    found = {row["command"]: row for row in invented(effects)}
    lines = [line.strip("| ").split(" | ") for line in table.ranks(found).splitlines()[2:]]
    assert [lines[0][0], lines[-2][0], lines[-1][0]] == ["PaRe", "scratch", "FPT"]
    assert lines[0][1] == "1.00" and lines[-1][1] == "6.00"
    p = stats.wilcoxon([-1.0 - i for i in range(18)]).pvalue
    assert lines[0][-1] == f"{5 * p:.2g}"  # the smallest of five
    assert float(lines[0][2]) == pytest.approx(0.8, abs=0.01)


def test_time_to_a_target_counts_what_came_before():
    row = {"curve": "0.5 0.3 0.3 0.1", "time_s": "50", "before_s": "10"}
    assert table.time_to(row, 0.3) == 30 and table.time_to(row, 0.1) == 50
    assert table.time_to(row, 0.05) == math.inf


def test_numbers_are_readable():
    assert table.percent(math.log(0.93)) == "-7 %" and table.percent(-1e-4) == "0 %"
    assert table.listed(["a", "b", "c"]) == "a, b and c" and table.listed(["a"]) == "a"
    assert table.spread([0.1, 0.3]) == "0.200 (0.1)" and table.spread([]) == "-"
    assert table.bold_least(["a", "b", "c"], [2.0, math.nan, 1.0]) == ["a", "b", "**c**"]


# ---- the commands ----


def test_all_tasks_is_every_method_on_every_task_with_every_seed():
    groups = all_tasks.groups_of(all_tasks.parse_args([]), {}, set())
    commands = [made.command for group in groups for made in group]
    assert len(set(commands)) == len(commands) == 18 * 6 * 3
    assert {made.task for group in groups[:18] for made in group} == set(tasks.NAMES)
    assert all(made.seed == 0 for group in groups[:18] for made in group)
    for group in groups:  # all methods of a task and seed
        assert [made.method for made in group] == list(all_tasks.METHODS)


@pytest.mark.parametrize("study", all_tasks.STUDIES)
def test_every_command_of_every_study_is_understood_and_new(study):
    task_names = tasks.NAMES if study == "large" else all_tasks.STUDIED
    made = [j for task in task_names for j in all_tasks.jobs_of(study, task, 1, {}, False)]
    settings = [config_of(j.command) for j in made]
    assert len(set(settings)) == len(made)
    assert all(cfg.seed == 1 and cfg.task == j.task for cfg, j in zip(settings, made, strict=True))
    default = {config_of(j.command) for t in task_names for j in jobs("large", t, 1)}
    assert study == "large" or not default & set(settings)


def test_a_third_of_the_patches_is_what_the_tasks_have():
    import bodies
    import orca
    import pare
    import run

    for name in all_tasks.STUDIED:
        task = tasks.load_task(name, train_size=100)
        axes = len(task.x_shape)
        cfg = pare.configure(task=name, gate="random")
        cfg = run.resolve(cfg, task, bodies.TINY[axes], bodies.PATCHES[axes])
        net, _ = bodies.load_body(cfg.body, task.x_shape, cfg.patches)
        shape = {"x_shape": task.x_shape, "out_shape": task.out_shape, "patches": cfg.patches}
        N = math.prod(orca.Model(net, **shape).f_t.grid)
        assert all_tasks.K0[name] == round(0.35 * N), N
        assert task.num_classes == all_tasks.CLASSES[name]


def test_a_file_of_ones_own_is_found_and_its_command_is_short(series, capsys):
    all_tasks.main(["--npz", f"{series}:40", "--seeds", "3", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and str(series.parent) not in lines[0]
    want = f"python orca.py --task {series.name} --seed 3 --align none --train-size 40"
    assert lines[0] == want and "random:tiny_roberta" in lines[4]


def test_tiny_runs_are_no_results(capsys):
    with pytest.raises(SystemExit):
        all_tasks.main(["--tiny"])
    assert "give another --csv" in capsys.readouterr().err


# ---- the runner ----


def test_a_group_that_was_begun_comes_before_a_new_one_and_a_new_one_has_to_fit():
    first, second = [job(seed=0), job(seed=1)], [job(seed=2), job(seed=3)]

    def free(group=None):
        return type("Free", (), {"group": group})()

    seconds = {0: 10, 1: 10, 2: 30, 3: 30}

    def choose(worker, waiting, open_groups, left, idle=1):
        estimate = lambda j: seconds[j.seed]  # noqa: E731
        return collect.choose(worker, waiting, open_groups, left, estimate, idle)

    waiting, open_groups = [second], [first]
    assert choose(free(first), waiting, open_groups, 100) is first  # its own
    assert choose(free(), waiting, open_groups, 59) is first  # 60 s do not fit: it helps
    assert choose(free(), waiting, open_groups, 59, idle=2) is second  # two workers make it
    assert waiting == [] and open_groups == [first, second]
    assert choose(free(), [], [first, second], 20) is first  # the longer one would not end
    assert choose(free(), [], [first, second], 5) is None


def test_rows_are_added_below_one_header(tmp_path):
    for error in (0.1, 0.2):
        collect.append(tmp_path / "rows.csv", [{"method": "NFT", "test_error": error}])
    rows = collect.read(tmp_path / "rows.csv")
    assert [row["test_error"] for row in rows] == ["0.1", "0.2"]
    assert tuple(rows[0]) == collect.COLUMNS


def test_what_a_worker_keeps_is_of_the_same_settings():
    calls = []
    kept, load = {}, lambda cfg, size: calls.append((cfg.a, size)) or len(calls)
    cfg = {a: type("Config", (), {"a": a})() for a in (1, 2)}
    asked = [(1, 8), (1, 8), (1, 9), (2, 9), (1, 9)]
    found = [collect._kept(kept, ("a",), load, cfg[a], size) for a, size in asked]
    assert calls == [(1, 8), (2, 9), (1, 9)] or calls == [(1, 8), (1, 9), (2, 9), (1, 9)]
    assert found[0] == found[1] and len(set(found)) == len(calls)


@pytest.mark.slow
def test_a_run_in_a_worker_is_the_run_of_its_command(tmp_path, capfd):
    """Two seeds in one worker, and a run that fails; each as it is alone."""
    import orca

    kinds = [("--align", "none"), ("--align", "none", "--lr", "-1")]
    groups = [[job(*flags, seed=seed) for flags in kinds[: 1 + seed]] for seed in (0, 1)]
    file = tmp_path / "rows.csv"
    assert collect.run_all(groups, file, 1, "cpu", 300, "abc") == 1
    out, err = capfd.readouterr()
    assert "FAILED" in err and "--lr -1.0 is out of range" in err and "2/3" in out
    rows = {row["command"]: row for row in collect.read(file)}
    assert len(rows) == 2
    torch.set_num_threads(1)
    for line, row in rows.items():
        argv = [*shlex.split(line)[2:], *groups[0][0].extra, "--out", str(tmp_path / row["seed"])]
        result = orca.main(orca.parse_args([*argv, "--overwrite", "--device", "cpu"]))
        assert float(row["test_error"]) == pytest.approx(result["test_error"], abs=2e-3)
        assert row["epochs"] == str(result["epochs"]) and row["steps"] == row["epochs"]
        assert len(row["curve"].split()) == collect.POINTS and row["commit"] == "abc"
        assert float(row["curve"].split()[-1]) == pytest.approx(float(row["val_error"]), abs=1e-3)


def test_simple_learners_have_a_row_each(monkeypatch):
    sizes = {"train": 60, "val": 30, "test": 40}
    monkeypatch.setitem(importlib.import_module("tasks.satellite").TASK, "sizes", sizes)
    rows = collect.simple(all_tasks.simple_job("satellite", 0))
    assert [row["method"] for row in rows] == ["majority class", "1-NN", "logistic regression"]
    assert rows[0]["command"] == (
        "python results/all_tasks.py --simple --tasks satellite --seeds 0"
    )
    assert all(0 < row["test_error"] <= 1 for row in rows)


def test_finished_runs_become_rows_that_carry_their_command(tmp_path):
    file = tmp_path / "rows.csv"
    for name, error in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        made = {"command": ["/somewhere/pare.py", "--seed", name], "versions": {"torch": "2"}}
        (tmp_path / name / "config.json").write_text(json.dumps(made))
        (tmp_path / name / "result.json").write_text(json.dumps({"test_error": error}))
    (tmp_path / "unfinished").mkdir()
    arguments = ["--csv", str(file), *(str(tmp_path / n) for n in ("a", "b", "unfinished"))]
    collect.main(arguments)
    collect.main(arguments)  # the same runs again: no second rows
    want = (
        "test_error,torch,command\n0.1,2,python pare.py --seed a\n0.2,2,python pare.py --seed b\n"
    )
    assert file.read_text() == want


# ---- the report of the faults ----


def test_the_report_of_the_faults_counts_cases(tmp_path):
    tests = [
        '<testcase name="test_bad_lines_a[x]"/>',
        '<testcase name="test_bad_lines_a[y]"><failure/></testcase>',
        '<testcase name="test_bad_lines_b[z]"><skipped/></testcase>',
        '<testcase name="test_mutated_pickles_never[5000]"><properties>'
        '<property name="cases" value="5000"/></properties></testcase>',
    ]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(tests)}</testsuite></testsuites>")
    found = {row["fault"]: (row["cases"], row["passed"]) for row in faults.count([report])}
    assert found["bad command lines"] == (2, 1)
    assert found["mutated pickled arrays"] == (5000, 5000)


def test_the_kinds_of_faults_name_tests_that_exist():
    import re

    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for pattern, _ in faults.FAULTS.values():
        for name in re.findall(r"_\w+_", pattern):
            assert re.search(r"^def \w*" + name, text, re.M), name


def test_every_file_of_results_is_used():
    """By the page, by another file of results, by a page or by a test."""
    folder = ROOT / "results"
    texts = [p.read_text(encoding="utf-8") for p in (*ROOT.glob("*.md"), *folder.glob("*.[psm]*"))
             if p.suffix in (".py", ".sh", ".md")]  # fmt: skip
    texts += [p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py")]
    for path in folder.iterdir():
        if path.suffix in (".csv", ".png", ".sh", ".txt"):
            assert any(path.name in text for text in texts), path.name


def test_csv_files_are_regular():
    for path in (ROOT / "results").glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        assert rows and all(len(row) == len(head) for row in rows), path.name


# ---- other networks ----


@pytest.mark.parametrize("name, x_shape, out_shape", [
    ("convolutions", (3, 20), (5,)), ("convolutions", (2, 9, 12), (5,)),
    ("Perceiver IO", (3, 20), (5,)), ("Perceiver IO", (2, 6, 4), (5,)),
    ("U-Net", (3, 21), (2, 21)), ("U-Net", (2, 10, 13), (1, 20, 26)),
    ("FNO", (3, 20), (2, 10)), ("FNO", (2, 10, 12), (1, 10, 12)),
])  # fmt: skip
def test_another_network_predicts_what_is_asked_for_and_learns(name, x_shape, out_shape):
    if name == "FNO":
        pytest.importorskip("neuralop")
    torch.manual_seed(0)
    model = peers.PEERS[name](x_shape, out_shape)
    x, y = torch.randn(4, *x_shape), torch.randn(4, *out_shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        out = model(x)
        assert out.shape == y.shape
        losses.append(F.mse_loss(out, y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_another_network_has_a_row_for_each_rate(tmp_path, monkeypatch):
    """tasks.load_task is the scripts'; here it makes few samples."""
    load = peers.tasks.load_task
    small = lambda name, seed: load(name, seed=seed, train_size=40)  # noqa: E731
    monkeypatch.setattr(peers.tasks, "load_task", small)
    line = ["--tasks", "satellite", "--seconds", "0.2", "--csv", str(tmp_path / "rows.csv")]
    peers.main(line)
    peers.main(line)  # nothing is left to do
    found = collect.read(tmp_path / "rows.csv")
    assert [row["method"] for row in found] == ["convolutions"] * 2 + ["Perceiver IO"] * 2
    assert {row["command"].split()[-1] for row in found} == {"0.001", "0.003"}
    assert all(0 < float(row["test_error"]) <= 1 and int(row["steps"]) > 0 for row in found)

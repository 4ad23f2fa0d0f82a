"""The numbers: baselines that are right, rows with their commands, a README that agrees."""

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import tasks

ROOT = Path(__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_baselines_of_a_file_of_ones_own(series, tmp_path):
    csv = tmp_path / "b.csv"
    found = script("baselines").main(["--task", str(series), "--csv", str(csv)])
    assert list(found) == ["majority class", "1-NN", "logistic regression"]
    labels = [int(y) for _, y in tasks.load_task(str(series)).train]
    common = max(range(4), key=labels.count)
    wrong = (np.load(series)["y_test"] != common).mean()
    assert found["majority class"] == pytest.approx(wrong)
    assert found["1-NN"] < 0.5 and found["logistic regression"] < 0.5
    assert len(csv.read_text().splitlines()) == 4


def test_collected_rows_carry_their_command(tmp_path):
    collect, file = script("collect"), tmp_path / "rows.csv"
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


def test_the_readme_s_tables_are_the_rows_in_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = script("table")
    assert table.satellite() in text and table.crop() in text and table.nas_bench() in text
    assert table.published(tasks.NAMES[:10]) in text
    assert table.published(tasks.NAMES[10:], table.COMPARABLE) in text
    assert table.fno() in text and table.faults() in text
    assert table.all_tasks() in text and table.ranks() in text and table.real() in text
    assert table.lost() in text and table.align_lr() in text
    assert table.pdebench() in text and table.pde_long() in text and table.study() in text
    assert table.pare_ablation() in text and table.unrest() in text and table.proposed() in text


def test_what_the_readme_says_of_alignment_in_1d_is_what_the_rows_say():
    table, numbers = script("table"), []
    for line in table.lost().splitlines()[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        numbers.append((float(cells[3]), float(cells[-1])))
    assert stats.spearmanr(*zip(*numbers, strict=True))[0] == pytest.approx(0.95, abs=0.02)
    first = [row for row in table.rows("lost.csv") if row["task"] in table.LR_TASKS]
    for when, low, high in (("before", 0.49, 0.51), ("after", 0.23, 0.30)):
        for task in table.LR_TASKS:
            moved = [float(row[f"doubled_{when}"]) for row in first if row["task"] == task]
            assert low < sum(moved) / len(moved) < high
    text = table.align_lr()
    assert text.count("8 of 8") == 3 and sum(map(int, re.findall(r"(\d) of 8 \|", text))) == 24 + 17


def test_the_readme_s_tables_of_cost_are_the_rows_in_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    bench = script("bench_cost")
    rows = bench.read(ROOT / "results" / "cost.csv")
    for part in bench.PARTS:
        assert bench.table(rows, part) in text, part


def test_pde_errors_are_far_below_the_trivial_predictors():
    table = script("table")
    found = table.pde_errors()
    assert set(found) == set(tasks.PDES) == set(table.COMPARABLE)
    for task, errors in found.items():
        trivial = min(errors["copy"], errors["mean field"])
        for method in ("NFT", "ORCA", "PaRe"):
            assert errors[method] < 0.3 * trivial, (task, method)
    assert all(float(row["time_s"]) < 180 for row in table.rows("pdebench.csv"))
    long = {row["task"]: float(row["test_error"]) for row in table.rows("pde_long.csv")}
    assert long["advection"] < 2e-2 and long["darcy_2d"] < 5e-2


def test_the_methods_beat_the_simple_baselines_in_every_recorded_seed():
    table = script("table")
    errors = {}
    for row in [*table.rows("satellite.csv"), *table.rows("baselines.csv")]:
        if row["task"] == "satellite":
            errors[table.label(row), row["seed"]] = float(row["test_error"])
    for seed in "012":
        simple = min(errors["1-NN", seed], errors["logistic regression", seed])
        assert errors["PaRe", seed] < simple and errors["ORCA (OTDD)", seed] < simple


def test_every_method_is_clearly_better_than_the_trivial_predictor_on_every_task():
    import tasks

    errors = script("table").nas_errors()
    assert set(errors) == set(tasks.NAMES[:10])
    for task, row in errors.items():
        for method in ("NFT (naive fine-tuning)", "ORCA (OTDD)", "PaRe"):
            assert row[method] < 0.95 * row["trivial"], (task, method)


def test_the_linear_filter_finds_a_convolution():
    torch.manual_seed(0)
    kernel, x = torch.randn(1, 2, 7, 7), torch.randn(8, 2, 20, 20)
    pad = torch.nn.functional.pad(x, [3] * 4, mode="replicate")
    y = torch.nn.functional.conv2d(pad, kernel) + 2
    y[0, 0, :5] = float("nan")
    (got,) = script("baselines").linear_filter(list(zip(x, y, strict=True)), [x[1:]], (1, 20, 20))
    torch.testing.assert_close(got, y[1:], rtol=1e-3, atol=1e-3)


def test_relaxed_selection_of_the_release_is_a_mask_with_a_gradient():
    bench = script("bench_pare")
    s = torch.rand(4, 9, requires_grad=True)
    mask = bench.relaxed_top_k(s, 3)
    assert torch.equal(mask.detach().round(), mask.detach().round().clamp(0, 1))
    assert (mask.detach().round().sum(dim=1) == 3).all()
    (slope,) = torch.autograd.grad((mask * torch.arange(9.0)).sum(), s)
    assert slope.norm() > 0
    z_t, z_s = torch.randn(4, 9, 5), torch.randn(4, 9, 5)
    for mix in (bench.released_sampling, bench.released_loop):
        z_mix = mix(z_t, z_s, s, torch.rand(4, 9), 3)
        assert ((z_mix - z_t).abs().amax(dim=2) > 1e-6).sum(dim=1).tolist() == [3] * 4
    highest = bench.released_loop(z_t, z_s, s, torch.rand(4, 9), 3)
    replaced = (highest != z_t).any(dim=2)
    assert torch.equal(replaced.nonzero()[:, 1].view(4, 3), s.topk(3).indices.sort(dim=1).values)


def test_replacement_is_faster_than_the_released_loops(capsys, tmp_path):
    """At a small shape; results/bench_pare.csv has the full one."""
    bench = script("bench_pare")
    found = bench.of_selection(8, 512, 64, 300, "cpu", slow=True)
    assert found["ours"] < 3 * found["loop"] and 20 * found["ours"] < found["release"]


def test_the_rows_on_the_cost_of_pare_are_what_the_readme_says():
    rows = script("table").rows("bench_pare.csv")
    time_s = {(row["case"].split(",")[0], row["what"]): float(row["time_s"]) for row in rows}
    ours = time_s["(32", "ours"]
    assert time_s["(32", "release"] > 100 * ours and time_s["(32", "loop"] > ours
    for task in ("satellite", "ninapro"):
        case = f"step of {task}"
        assert time_s[case, "pare"] < 2.1 * time_s[case, "plain"]
        assert time_s[case, "pare"] <= time_s[case, "pare, two passes"]


def test_landscape_is_flat_where_the_loss_is_and_gives_the_weights_back(series, tmp_path):
    import orca

    out = tmp_path / "run"
    orca.main(orca.Config(task=str(series), align="none", epochs=2, out=str(out)))
    landscape = script("landscape")
    model, task, some, result = landscape.load(out, 40)
    assert set(some) == {"train", "test"} and result["method"] == "orca"
    assert torch.equal(some["train"][0][7], task.train[7][0])
    x, y = some["test"]
    assert len(x) == 40 and torch.equal(x[7], task.test[7][0])
    before = {name: w.clone() for name, w in model.state_dict().items()}
    d = landscape.direction(model, torch.Generator().manual_seed(0))
    for name, w in model.named_parameters():
        assert (name in d) == (w.ndim > 1)
        if name in d:
            norms = w.detach().flatten(1).norm(dim=1), d[name].flatten(1).norm(dim=1)
            torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-6)
    base = landscape.loss_at(model, task, x, y, [])
    assert base == pytest.approx(task.loss(model(x), y).item(), rel=1e-5)
    far = landscape.loss_at(model, task, x, y, [(1.0, d)])
    assert far != pytest.approx(base, rel=1e-2)
    for name, w in model.state_dict().items():
        assert torch.equal(w, before[name]), name


def test_landscape_of_a_known_loss():
    """Squares of the outputs of W at the unit vectors: L(W + a d + b e) = |W + a d + b e|^2."""
    landscape, torch_rng = script("landscape"), torch.Generator().manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=False).double()

    class Task:
        loss = staticmethod(lambda out, y: out.square().sum(dim=1).mean())

    d, e = (
        {name: v.double() for name, v in landscape.direction(model, torch_rng).items()}
        for _ in range(2)
    )
    W, x = model.weight.detach().clone(), torch.eye(4, dtype=torch.double)
    got = landscape.loss_at(model, Task, x, x, [(0.3, d), (-0.2, e)])
    want = (W + 0.3 * d["weight"] - 0.2 * e["weight"]).square().sum() / 4
    assert got == pytest.approx(float(want), rel=1e-9)


def test_landscape_draws_a_plane_of_one_seed_and_measures_all(series, tmp_path):
    import orca

    landscape, file = script("landscape"), tmp_path / "rows.csv"
    runs = [tmp_path / f"nft-{seed}" for seed in (0, 1)]
    for seed, out in enumerate(runs):
        setting = {"task": str(series), "align": "none", "epochs": 1, "seed": seed}
        orca.main(orca.Config(**setting, out=str(out)))
    flags = "--points 3 --directions 3 --samples 40 --csv"
    rows = landscape.main([*map(str, runs), *flags.split(), str(file)])
    assert len(file.read_text().splitlines()) == 1 + len(rows)
    planes = [row for row in rows if row["what"] == "plane"]
    assert len(planes) == 9 and {row["run"] for row in planes} == {"nft-0"}
    losses = {(r["run"], r["split"]): r["value"] for r in rows if r["what"] == "loss"}
    assert set(losses) == {(run.name, split) for run in runs for split in ("train", "test")}
    (centre,) = (row for row in planes if row["a"] == row["b"] == 0)
    assert centre["value"] == pytest.approx(losses["nft-0", "train"], rel=1e-5)
    rises = [row for row in rows if row["what"] == "rise"]
    assert len(rises) == 2 * 2 * len(landscape.RADII) and all(row["error"] > 0 for row in rises)


def test_all_tasks_is_every_method_on_every_task_with_every_seed():
    found = script("all_tasks").commands(list(tasks.NAMES), [0, 1, 2])
    assert len(set(found)) == len(found) == 18 * (8 + 1) * 3
    outs = set()
    for line in found:
        name, *argv = shlex.split(line)[1:]
        if name != "results/baselines.py":
            cfg = importlib.import_module(name.removesuffix(".py")).parse_args(argv)
            outs.add((cfg.out, cfg.task, cfg.seed, cfg.train_size))
    assert len(outs) == 18 * 8 * 3


@pytest.mark.slow
def test_all_tasks_goes_on_where_it_was(tmp_path):
    """One run and the baselines of one task; then nothing is left; then the other seed alone."""
    file, lines = tmp_path / "rows.csv", []
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "results")!r})
import all_tasks
all_tasks.METHODS = {{"nft": ("orca", 0.1, "--align none")}}
all_tasks.SIZE["satellite"] = 48
all_tasks.main(["--tasks", "satellite", "--csv", {str(file)!r}, "--seeds", *sys.argv[1:]])
"""
    for seeds in ("0", "0", "01"):
        argv = [sys.executable, "-c", code, *seeds]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines.append(file.read_text().splitlines())
    methods = ["majority class", "1-NN", "logistic regression", "orca"]
    assert [line.split(",")[0] for line in lines[0][1:]] == methods
    assert lines[1] == lines[0]
    assert [line.split(",")[0] for line in lines[2][1:]] == 2 * methods


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
    found = {
        row["fault"]: (row["cases"], row["passed"]) for row in script("faults").count([report])
    }
    assert found["bad command lines"] == (2, 1)
    assert found["mutated pickled arrays"] == (5000, 5000)


def test_the_kinds_of_faults_name_tests_that_exist():
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for pattern, _ in script("faults").FAULTS.values():
        for name in re.findall(r"_\w+_", pattern):
            assert re.search(r"^def \w*" + name, text, re.M), name

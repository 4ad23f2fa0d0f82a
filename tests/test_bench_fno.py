"""The FNO beside ours: which rows it is trained for, for how long, and what comes of it."""

import csv
import itertools
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_results import script

import tasks

ROW = {"method": "orca", "align": "otdd", "task": "diffusion_reaction_1d", "data": "simulated"}
ROW |= {"seed": "0", "train_size": "64", "device": "cpu", "time_s": "6.0", "test_error": "0.01"}


@pytest.fixture
def ours(tmp_path):
    """A file with a row of ORCA's."""
    path = tmp_path / "ours.csv"
    script("collect").write(path, [ROW])
    return path


def local(**channels):
    """In the place of an FNO: each point by itself."""
    return torch.nn.Conv1d(channels["in_channels"], channels["out_channels"], 1)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_orca_with_otdd_are_chosen_and_those_done_are_not():
    others = ({"method": "pare"}, {"align": "none"}, {"align": "otdd-classwise"})
    others += ({"task": "burgers"}, {"seed": "3"}, {"data": "real"}, {"device": "cuda"})
    more = [ROW | {"seed": "1"}, ROW | {"train_size": "1000"}, ROW | {"task": "darcy_2d"}]
    baseline = {"method": "ridge regression", "task": "advection", "seed": "0"}
    rows = [baseline, ROW, *(ROW | other for other in others), *more, ROW]
    bench = script("bench_fno")
    assert bench.chosen(rows, bench.TASKS, [0, 1, 2], []) == [ROW, *more]
    done = [{"task": ROW["task"], "seed": 1, "train_size": 64}]  # as they are before they are read
    assert bench.chosen(rows, bench.TASKS, [0, 1, 2], done) == [ROW, *more[1:]]
    assert bench.chosen(rows, ["darcy_2d"], [0], []) == more[2:]


def test_the_rows_of_the_readme_s_table_are_found():
    bench = script("bench_fno")
    found = bench.chosen(bench.collect.read(bench.ORCA[0]), bench.TASKS, [0], [])
    assert sorted(row["task"] for row in found) == sorted(bench.TASKS)


def test_without_the_package_one_line_says_what_to_install(ours, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "neuralop", None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script("bench_fno").main(["--csv", str(tmp_path / "fno.csv"), "--from", str(ours)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "pip install neuraloperator" in said
    assert not (tmp_path / "fno.csv").exists()


def test_learning_rate_rises_and_falls_to_zero():
    rate = script("bench_fno").rate
    factors = [rate(i / 200) for i in range(201)]
    top = factors.index(max(factors))
    assert 0 < factors[0] < 0.2 and 10 <= top <= 20 and factors[top] > 0.95
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=1e-9)


def test_an_output_of_zeros_is_the_mean_of_the_targets():
    bench = script("bench_fno")
    task = tasks.load_task("darcy_2d", train_size=8)
    x, y = bench.arrays(task.train)
    assert x.shape == y.shape == (8, 1, 64, 64)
    out = bench.predict(torch.zeros_like, tasks.statistics(task), x)
    torch.testing.assert_close(out, y.mean(dim=0).expand(y.shape), rtol=1e-4, atol=1e-6)
    inputs = bench.predict(lambda z: z, (x.mean(), x.std(), 0.0, 1.0), x)
    torch.testing.assert_close(inputs, (x - x.mean()) / x.std())


@pytest.fixture
def clock(monkeypatch):
    """Time as it would pass on a steady machine: 10 ms from one look at it to the next."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 0.01 * next(ticks))


def test_the_best_epoch_is_kept_and_the_time_too(clock):
    bench = script("bench_fno")
    task = tasks.load_task(ROW["task"], train_size=64)
    scales, net = tasks.statistics(task), local(in_channels=1, out_channels=1)
    start = time.time()
    best, epochs = bench.train(net, scales, task, 0, start + 2)
    assert time.time() - start == pytest.approx(2, abs=0.1) and epochs > 10
    assert bench.error(net, scales, task, *bench.arrays(task.val)) == pytest.approx(best, rel=1e-5)


def test_no_time_for_a_step_is_an_error():
    with pytest.raises(ValueError, match="no time for a step; give a larger --budget-scale"):
        script("bench_fno").measure(ROW, local, 1e-3)


def test_a_second_call_adds_nothing(ours, tmp_path, monkeypatch, clock):
    fake = SimpleNamespace(__version__="0", models=SimpleNamespace(FNO=local))
    monkeypatch.setitem(sys.modules, "neuralop", fake)
    monkeypatch.setitem(sys.modules, "neuralop.models", fake.models)
    bench, file = script("bench_fno"), tmp_path / "fno.csv"
    argv = ["--csv", str(file), "--from", str(ours), "--budget-scale", "0.25"]
    bench.main(argv)
    (row,) = read(file)
    assert (row["method"], row["task"], row["seed"]) == ("fno", ROW["task"], "0")
    assert row["budget_s"] == "1.5" and row["params_m"] == "0.0" and row["device"] == "cpu"
    before = file.read_bytes()
    bench.main(argv)
    assert file.read_bytes() == before


def test_an_fno_beats_the_trivial_predictor_in_seconds(ours, tmp_path):
    pytest.importorskip("neuralop")
    bench, file = script("bench_fno"), tmp_path / "fno.csv"
    argv = ["--csv", str(file), "--from", str(ours)]
    bench.main(argv)
    bench.main(argv)
    (row,) = read(file)
    task = tasks.load_task(ROW["task"], train_size=64)
    y = bench.arrays(task.test)[1]
    trivial = task.metric(bench.arrays(task.train)[1].mean(dim=0).expand(y.shape), y)
    assert 0 < float(row["test_error"]) < 0.9 * trivial and row["neuralop"]
    assert float(row["time_s"]) == pytest.approx(float(row["budget_s"]), rel=0.5)

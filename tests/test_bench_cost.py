"""results/bench_cost.py: its account of a run, its rows, its tables."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "results"
sys.path.insert(0, str(RESULTS))
import bench_cost  # noqa: E402 (results/ has to be on the path first)


def test_seconds_go_to_the_innermost_stage_and_steps_do_not_span_validation():
    starts = {"build": (0, 2), "align": (2, 7), "balanced_rows": (3, 4), "separability": (4, 5)}
    events = [(t, name, not i) for name, times in starts.items() for i, t in enumerate(times)]
    events += [(5.5, "balanced_rows", True), (5.6, "balanced_rows", False)]
    events += [(6.0, "separability", True), (6.5, "separability", False)]
    events = sorted(events, key=lambda event: event[0])
    events += [(10, "finetune", True)]
    for epoch in (10, 20):  # updates end after 1, 2, 4 and 7 s, validation takes 0.5 s
        events += [(epoch + t, "update", False) for t in (1, 2, 4, 7)]
        events += [(epoch + 8, "evaluate", True), (epoch + 8.5, "evaluate", False)]
    events += [(29, "finetune", False), (30, "evaluate", True), (31, "evaluate", False)]
    seconds, steps = bench_cost.account(events)
    want = {("setup",): 2, ("align",): 5, (): 4, ("evaluate",): 1}
    want |= {("finetune",): 18, ("finetune", "evaluate"): 1}
    assert seconds == want and seconds.total() == 31
    assert steps["align step"] == 1.0  # the second one alone
    assert steps["finetune step"] == 2.0  # median of 2, 3, 1, 2, 3: the first is left out


def test_a_table_has_a_line_for_each_value_and_a_column_for_each_number():
    blank = dict.fromkeys(bench_cost.COLUMNS, "")
    case = {**blank, "part": "distances", "what": "forward", "quantity": "n", "memory_mb": "12.3"}
    rows = [
        {**case, "value": n, "method": method, "seconds": seconds}
        for n, method, seconds in (("9", "MMD", "0.5"), ("9", "OTDD", "0.0123"), ("5", "MMD", "2"))
    ]
    head, _, *lines = bench_cost.table(rows, "distances").splitlines()
    names = ["quantity", "value", "MMD forward, ms", "OTDD forward, ms"]
    assert head.strip("| ").split(" | ") == [*names, "MMD memory, MB", "OTDD memory, MB"]
    assert lines == ["| n | 9 | 500 | 12.3 | 12.3 | 12.3 |", "| n | 5 | 2000 | - | 12.3 | - |"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of the quick form of all parts, in two calls on one file."""
    file = tmp_path_factory.mktemp("cost") / "cost.csv"
    script = [sys.executable, str(RESULTS / "bench_cost.py"), "--quick", "--csv", str(file)]
    for parts in (["distances"], ["stages", "growth"]):
        done = subprocess.run([*script, "--only", *parts], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.slow
def test_every_part_has_rows_with_seconds_and_memory(rows):
    assert {row["part"] for row in rows} == set(bench_cost.PARTS)  # those of the first call stay
    for row in rows:
        if row["method"] != "imports alone":
            assert 0 < float(row["seconds"]) < math.inf, row
        assert float(row["memory_mb"]) >= 0 and row["cpu"] and row["torch"], row
        assert row["threads"] == "1" and row["command"].startswith("python results/bench_cost.py")
    whats = {row["what"] for row in rows if row["part"] != "distances"}
    steps = {"finetune step", "align step", "contrast step"}
    assert whats == {"run", "features", "labels", *steps}
    pairs = {(row["method"], row["what"]) for row in rows if row["part"] == "distances"}
    assert {what for _, what in pairs} == {"forward", "forward and backward"} and len(pairs) == 4


@pytest.mark.slow
def test_shares_of_the_stages_are_a_whole_and_those_of_the_method(rows):
    runs = {row["method"]: row for row in rows if row["what"] == "run"}
    imports = float(runs.pop("imports alone")["memory_mb"])
    assert set(runs) == set(bench_cost.METHODS)
    for method, row in runs.items():
        shares = {stage: float(row[f"share_{stage}"]) for stage in bench_cost.STAGES}
        assert sum(shares.values()) == pytest.approx(1, abs=2e-3)
        own = {"ORCA": {"align"}, "proposal": {"features", "contrast"}}.get(method, set())
        want = {"setup", "finetune", "evaluate", "rest"} | own
        assert {stage for stage, share in shares.items() if share > 0} == want, method
        assert imports < float(row["memory_mb"]) < imports + 2000


@pytest.mark.slow
@pytest.mark.parametrize("part", bench_cost.PARTS)
def test_the_tables_hold_the_rows(rows, part):
    table = bench_cost.table(rows, part)
    index = ("task", "method") if part == "stages" else ("quantity", "value")
    keys = {tuple(row[name] or "-" for name in index) for row in rows if row["part"] == part}
    assert len(table.splitlines()) == 2 + len(keys) and len(keys) > 1
    for key in keys:
        assert f"| {' | '.join(key)} |" in table
    for row in rows:
        if row["part"] == part and row["what"] == "forward":
            value = 1e3 * float(row["seconds"])
            assert (f"{value:.0f}" if value >= 100 else f"{value:.3g}") in table

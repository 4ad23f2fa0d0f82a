"""Count what the fault tests survived.

    python results/faults.py runs/kills.xml runs/faults.xml --csv results/faults.csv

Reads the reports of results/faults.sh. A test counts as one case, or as the number of cases that it
reports; a fault is survived if all its tests pass.
"""

import argparse
import csv
import re
import xml.etree.ElementTree as ET
from pathlib import Path

FAULTS = {  # fault: its tests, what passing means
    "SIGKILL at random times, one process": (
        r"test_killed_at_random_times_.*-1\]",
        "weights, metrics and every step bit-identical to the unbroken run",
    ),
    "SIGKILL at random times, two processes": (
        r"test_killed_at_random_times_.*-2\]",
        "the same",
    ),
    "a full disk, or death, while saving": (
        r"test_a_fault_while_saving_|test_write_atomically_",
        "the checkpoint before it loads, and goes on to the same end",
    ),
    "damaged, foreign and evil checkpoints": (
        r"test_damaged_and_foreign_|test_a_run_of_other_settings_|test_a_run_of_another_method_",
        "refused in one line, nothing executed",
    ),
    "SIGINT and SIGTERM in every stage": (
        r"test_a_signal_stops_",
        "exit code 130 or 143, and --resume goes on to the same end",
    ),
    "NaN or inf in distance, loss, gradient, input": (
        r"test_a_run_that_diverges_|test_what_is_not_finite_|test_nan_is_never_the_best"
        r"|\[(NaN|inf) in x_.\]",
        "exit code 3 (an input: 2) and one line; the checkpoint before it stays",
    ),
    "damaged data files, every task": (r"test_damaged_files_", "one line that names the file"),
    "mutated pickled arrays": (r"test_mutated_pickles_", "an array or a ValueError, no crash"),
    "bad command lines": (r"test_bad_lines_", "exit code 2 and one line before any work"),
    "otdd and mmd of random inputs": (r"_properties_of_many_random_", "properties hold"),
}


def count(reports: list[Path]) -> list[dict]:
    """A row for each fault: how many cases, and how many of them passed."""
    tests = [test for report in reports for test in ET.parse(report).iter("testcase")]
    rows = []
    for fault, (pattern, means) in FAULTS.items():
        row = {"fault": fault, "cases": 0, "passed": 0, "pass_means": means}
        for test in (t for t in tests if re.search(pattern, t.get("name"))):
            if test.find("skipped") is None:
                said = test.find("properties/property[@name='cases']")
                cases = 1 if said is None else int(said.get("value"))
                good = test.find("failure") is None and test.find("error") is None
                row["cases"] += cases
                row["passed"] += cases * good
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("reports", nargs="+", type=Path, help="what pytest --junit-xml wrote")
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = [{**row, "command": "results/faults.sh"} for row in count(args.reports)]
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['passed']:5} of {row['cases']:5}  {row['fault']}")
    return rows


if __name__ == "__main__":
    main()

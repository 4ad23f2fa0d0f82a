"""Turn finished runs into CSV rows: python results/collect.py --csv results/satellite.csv runs/*

One row a run: its result, the version of torch and the command that made it. Rows that the file
holds already stay; a run of the same command replaces its own. --curves FILE takes over what the
runs logged each epoch, --steps FILE what they logged each step, with the run's name in front; these
files are written anew.
"""

import argparse
import csv
import json
import shlex
from pathlib import Path


def row(run: Path) -> dict:
    """The result of a run and the command that repeats it."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    made = json.loads((run / "config.json").read_text(encoding="utf-8"))
    script, *flags = made["command"]
    command = shlex.join(["python", Path(script).name, *flags])
    return {**result, "torch": made["versions"]["torch"], "command": command}


def epochs(run: Path) -> list[dict]:
    """What a run logged in metrics.jsonl, four digits of each number."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    short = lambda value: f"{value:.4g}" if isinstance(value, float) else value  # noqa: E731
    return [{k: short(v) for k, v in json.loads(line).items()} for line in lines]


def steps(run: Path) -> list[dict]:
    """What a run logged in steps.csv."""
    with (run / "steps.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> list[dict]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    """A CSV file with a column for every key of any row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows in {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--csv", required=True, type=Path)
    parser.add_argument("--curves", type=Path, help="a row for every epoch of every run")
    parser.add_argument("--steps", type=Path, help="a row for every step of every run")
    args = parser.parse_args(argv)
    rows = {old["command"]: old for old in read(args.csv)}
    finished = [run for run in args.runs if (run / "result.json").exists()]
    for run in finished:
        new = row(run)
        rows[new["command"]] = new
    write(args.csv, list(rows.values()))
    for path, logged in ((args.curves, epochs), (args.steps, steps)):
        if path:
            write(path, [{"run": run.name, **line} for run in finished for line in logged(run)])


if __name__ == "__main__":
    main()

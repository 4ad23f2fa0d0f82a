"""Turn finished runs into CSV rows: python results/collect.py --csv results/satellite.csv runs/*

One row a run: its result, the version of torch and the command that made it. Rows that the file
holds already stay; a run of the same command replaces its own.
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--csv", required=True, type=Path)
    args = parser.parse_args(argv)
    rows = {}
    if args.csv.exists():
        with args.csv.open(newline="", encoding="utf-8") as file:
            rows = {old["command"]: old for old in csv.DictReader(file)}
    for run in args.runs:
        if (run / "result.json").exists():
            new = row(run)
            rows[new["command"]] = new
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    print(f"{len(rows)} rows in {args.csv}")


if __name__ == "__main__":
    main()

"""Print the README's tables from the rows in results/: python results/table.py"""

import csv
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent


def rows(name: str) -> list[dict]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def label(row: dict) -> str:
    """What the README calls the setting of a row."""
    if row["method"] == "pare":
        return "PaRe"
    if row["method"] != "orca":
        return row["method"]  # a baseline
    if row["body"].startswith("random:"):
        return "from scratch (random body)"
    names = {"none": "NFT (naive fine-tuning)", "otdd": "ORCA (OTDD)"}
    return names.get(row["align"], f"ORCA ({row['align'].upper()})")


def satellite() -> str:
    """The default task: mean and standard deviation over the seeds, best first."""
    groups: dict[str, list[dict]] = {}
    for row in [*rows("satellite.csv"), *rows("baselines.csv")]:
        if row["task"] == "satellite":
            groups.setdefault(label(row), []).append(row)
    lines = []
    for name, group in groups.items():
        errors = [float(row["test_error"]) for row in group]
        times = [float(row["time_s"]) for row in group if "time_s" in row]
        spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
        time = f"{statistics.mean(times):.0f} s" if times else "-"
        lines.append(
            (statistics.mean(errors), f"| {name} | ± {spread:.4f} | {len(errors)} | {time} |")
        )
    head = "| | test error | seeds | time of a run |\n|---|---|---|---|\n"
    return head + "\n".join(
        line.replace("| ±", f"| {mean:.4f} ±") for mean, line in sorted(lines, key=lambda m: m[0])
    )


def crop() -> str:
    """The real series: one seed."""
    found = [*rows("crop.csv"), *(r for r in rows("baselines.csv") if r["task"] == "crop.npz")]
    lines = [
        f"| {label(row)} | {float(row['test_error']):.4f} | "
        f"{float(row['time_s']) / 60:.0f} min | `{row['command']}` |"
        if "time_s" in row
        else f"| {label(row)} | {float(row['test_error']):.4f} | - | `{row['command']}` |"
        for row in sorted(found, key=lambda row: float(row["test_error"]))
    ]
    return "| | test error | time | command |\n|---|---|---|---|\n" + "\n".join(lines)


TRIVIAL = ("majority class", "constant score", "mean of the targets")
LINEAR = ("logistic regression", "ridge regression", "linear filter")
COLUMNS = ("trivial", "linear", "from scratch (random body)", "NFT (naive fine-tuning)")
COLUMNS += ("ORCA (OTDD)", "PaRe")


def nas_errors() -> dict[str, dict[str, float]]:
    """{task: {column: test error}} of the ten tasks; "linear" is the better linear model."""
    found: dict[str, dict[str, float]] = {}
    for row in [*rows("nas_baselines.csv"), *rows("nas_bench.csv")]:
        name, errors = label(row), found.setdefault(row["task"], {})
        name = "trivial" if name in TRIVIAL else "linear" if name in LINEAR else name
        if name in COLUMNS:
            errors[name] = min(float(row["test_error"]), errors.get(name, float("inf")))
    return found


def nas_bench() -> str:
    """The ten tasks of NAS-Bench-360, simulated: one seed, a row each, the best in bold."""
    metrics = {row["task"]: row["metric"] for row in rows("nas_bench.csv")}
    lines = ["| task | metric | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for task, errors in sorted(nas_errors().items()):
        cells = [f"{errors[c]:.3f}" if errors[c] > 0.1 else f"{errors[c]:.4f}" for c in COLUMNS]
        best = min(COLUMNS, key=lambda c: errors[c])
        cells = [f"**{x}**" if c == best else x for x, c in zip(cells, COLUMNS, strict=True)]
        lines.append(f"| {task} | {metrics[task]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(satellite(), crop(), nas_bench(), sep="\n\n")

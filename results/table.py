"""Print the README's tables from the rows in results/: python results/table.py"""

import csv
import importlib
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))


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


# What may be compared with the papers' numbers, whose models are pretrained on the web, have 9000
# samples (2D but Darcy: 900) and finer grids in all cases.
COMPARABLE = {
    "advection": "same problem; ORCA's file moved twice as far",
    "burgers": "no: t = 0.01, theirs is a constant",
    "diffusion_reaction_1d": "no: t = 0.03, theirs is nearly flat",
    "diffusion_sorption": "no: plumes and soils, theirs has one parameter",
    "navier_stokes_1d": "no: t = 0.1; theirs in standardised units",
    "darcy_2d": "no: steady, theirs is not yet",
    "shallow_water": "no: dams differ in more than the radius",
    "diffusion_reaction_2d": "no: both fields are shown, theirs hides one",
}
SHORT = {"NFT (naive fine-tuning)": "NFT", "ORCA (OTDD)": "ORCA", "PaRe": "PaRe"}
SHORT |= {"copy of the input": "copy", "mean of the targets": "mean field"}
PDE_COLUMNS = ("copy", "mean field", "linear", "NFT", "ORCA", "PaRe")
PUBLISHED = ("PINN", "FNO", "U-Net", "ORCA", "PaRe")


def digits(error: float) -> str:
    """Three of them."""
    return f"{error:#.3g}".rstrip(".")


def pde_errors() -> dict[str, dict[str, float]]:
    """{task: {column: test nRMSE}} of the eight PDE tasks; "linear" is the better linear model."""
    found: dict[str, dict[str, float]] = {}
    for row in [*rows("pde_baselines.csv"), *rows("pdebench.csv")]:
        name, errors = label(row), found.setdefault(row["task"], {})
        name = "linear" if name in LINEAR else SHORT.get(name, name)
        errors[name] = min(float(row["test_error"]), errors.get(name, float("inf")))
    return found


def pdebench() -> str:
    """The eight tasks of PDEBench, solved on the spot, beside the numbers of the slides."""
    names = [*PDE_COLUMNS, *(f"{name} (slides)" for name in PUBLISHED), "comparable?"]
    lines = ["| task | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for task, errors in pde_errors().items():
        best = min(PDE_COLUMNS, key=lambda c: errors[c])
        cells = [
            f"**{digits(errors[c])}**" if c == best else digits(errors[c]) for c in PDE_COLUMNS
        ]
        published = importlib.import_module(f"tasks.{task}").TASK["published"]
        cells += [f"{published[name]:g}" if name in published else "-" for name in PUBLISHED]
        lines.append(f"| {task} | " + " | ".join([*cells, COMPARABLE[task]]) + " |")
    return "\n".join(lines)


def pde_long() -> str:
    """The longer runs on three of them, with the command of each."""
    lines = ["| task | nRMSE | time | command |", "|---|---|---|---|"]
    for row in rows("pde_long.csv"):
        error, minutes = digits(float(row["test_error"])), float(row["time_s"]) / 60
        lines.append(f"| {row['task']} | {error} | {minutes:.0f} min | `{row['command']}` |")
    return "\n".join(lines)


STUDY = {
    "none": "NFT: no alignment",
    "otdd": "ORCA as it comes",
    "classwise": "`--align otdd-classwise`",
    "source-noise": "`--source noise`",
    "align-60": "`--align-epochs 60`",
    "freeze-embedder": "`--freeze embedder`",
    "freeze-body": "`--freeze body`",
    "freeze-both": "`--freeze both`",
    "body-random": "`--body random:...`",
    "body-tiny_roberta_10pct": "`--body tiny_roberta_10pct`",
    "pare": "PaRe, two thirds of the epochs",
}


def study() -> str:
    """What explains ORCA: some settings of results/study.sh, both tasks, mean and spread."""
    errors: dict[tuple[str, str], list[float]] = {}
    for row in rows("study.csv"):
        name = row["command"].split("--out runs/study/")[1].split()[0]
        setting = name.removeprefix(row["task"] + "-").rsplit("-", 1)[0]
        setting = "body-random" if setting.startswith("body-random") else setting
        errors.setdefault((setting, row["task"]), []).append(float(row["test_error"]))
    lines = ["| setting | satellite (1D) | ninapro (2D) |", "|---|---|---|"]
    for setting, name in STUDY.items():
        found = [errors.get((setting, task)) for task in ("satellite", "ninapro")]
        cells = [
            f"{statistics.mean(e):.3f} ± {statistics.stdev(e):.3f}" if e else "-" for e in found
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(satellite(), crop(), nas_bench(), study(), pdebench(), pde_long(), sep="\n\n")

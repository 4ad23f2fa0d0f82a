"""Print the README's tables from the rows in results/: python results/table.py"""

import csv
import importlib
import math
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


PARE = {
    "nft": "NFT: no source at all",
    "orca": "ORCA (OTDD)",
    "default": "PaRe as it comes",
    "full-epochs": "PaRe, as many epochs as NFT",
    "gumbel": "`--select gumbel`",
    "gate-random": "`--gate random`",
    "gate-none": "`--gate none`",
    "highest": "`--replace highest`",
    "lam": "`--lam k/N`",
    "k0-few": "`--k0`: 35 % of the patches",
    "k0-all": "`--k0`: all patches",
    "w-0.1": "`--mix-weight 0.1`",
    "w-1": "`--mix-weight 1`",
    "no-labels": "`--source-labels off`",
    "mix-alone": "`--plain-target-loss off`",
}
TRIPLE = ("satellite", "ninapro", "darcy")


def pare_rows() -> dict[tuple[str, str], dict[str, float]]:
    """{(setting, task): {seed: error}}, of results/pare_ablation.sh and of results/study.sh."""
    errors: dict[tuple[str, str], dict[str, float]] = {}
    names = {"none": "nft", "otdd": "orca", "pare": "default"}
    for row in [*rows("study.csv"), *rows("pare_ablation.csv")]:
        folder, name = row["command"].split("--out runs/")[1].split()[0].split("/")
        setting = name.removeprefix(row["task"] + "-").rsplit("-", 1)[0]
        setting = names.get(setting) if folder == "study" else setting
        if setting:
            errors.setdefault((setting, row["task"]), {})[row["seed"]] = float(row["test_error"])
    return errors


def spread(errors: list[float]) -> str:
    """Mean and standard deviation; the number of seeds where it is not three."""
    if not errors:
        return "-"
    if len(errors) == 1:
        return f"{errors[0]:.3f} (1 seed)"
    more = "" if len(errors) == 3 else f" ({len(errors)} seeds)"
    return f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}{more}"


def pare_ablation() -> str:
    """What each choice of PaRe is worth."""
    errors = pare_rows()
    lines = [
        "| setting | satellite (series) | ninapro (image) | darcy (field) |",
        "|---|---|---|---|",
    ]
    for setting, name in PARE.items():
        cells = [spread(list(errors.get((setting, task), {}).values())) for task in TRIPLE]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PROPOSED = {
    "nft": "NFT",
    "orca": "ORCA (OTDD)",
    "pare": "PaRe",
    "default": "the proposal as it comes",
    "no-contrast": "`--contrast none`: without stage 2",
    "no-noise": "`--sigmas 0`: without stage 1's noise",
    "outer": "`--contrast outer`",
    "literal": "`--contrast literal`: the slide's formula",
    "at-output": "`--contrast-at output`",
    "no-preserve": "`--preserve none`",
    "jacobian": "`--preserve jacobian`: the slide's form",
    "frozen-embedder": "`--finetune frozen-embedder`",
    "projection": "`--finetune projection`",
    "encoder": "`--encoder frozen`",
    "align-otdd": "`--align otdd` before (slide 38)",
    "align-mmd": "`--align mmd` before (slide 38)",
}
FOUR = ("satellite", "advection", "ninapro", "darcy")


def proposed() -> str:
    """What each choice of the proposal is worth: errors, and steps of stage 3."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows("proposed_ablation.csv"):
        name = row["command"].split("--out runs/proposed-ablation/")[1].split()[0]
        setting = name.removeprefix(row["task"] + "-").rsplit("-", 1)[0]
        found.setdefault((setting, row["task"]), []).append(row)
    lines = [f"| setting | {' | '.join(FOUR)} | steps |", "|---|---|---|---|---|---|"]
    for setting, name in PROPOSED.items():
        groups = [found.get((setting, task), []) for task in FOUR]
        cells = [spread([float(row["test_error"]) for row in group]) for group in groups]
        made = [row for group in groups for row in group]
        size = [int(r["epochs"]) * math.ceil(int(r["train_size"]) / 32) for r in made]
        cells.append(f"{min(size)} to {max(size)}" if made else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def unrest() -> str:
    """Gradient norms over the epochs of fine-tuning, of NFT, ORCA and PaRe: level and jumps.

    The level is the mean of the logarithm of an epoch's mean norm, the jumps the mean change of
    that from one epoch to the next.
    """
    names = {"none": "nft", "otdd": "orca", "pare": "default"}
    runs: dict[tuple[str, str, str], list[float]] = {}
    for file in ("study_curves.csv", "pare_curves.csv"):
        for row in rows(file):
            task, _, rest = row["run"].partition("-")
            setting, _, seed = rest.rpartition("-")
            setting = names.get(setting, "") if file == "study_curves.csv" else setting
            if row["stage"] == "finetune" and setting in ("nft", "orca", "default"):
                if task in TRIPLE:
                    runs.setdefault((task, setting, seed), []).append(float(row["grad_norm"]))
    lines = ["| gradient norm, log10: level; jumps | NFT | ORCA | PaRe |", "|---|---|---|---|"]
    for task in TRIPLE:
        cells = []
        for setting in ("nft", "orca", "default"):
            level, jumps = [], []
            for (t, s, _), norms in runs.items():
                if (t, s) == (task, setting):
                    logs = [math.log10(n) for n in norms]
                    level.append(statistics.mean(logs))
                    jumps.append(
                        statistics.mean(abs(b - a) for a, b in zip(logs, logs[1:], strict=False))
                    )
            cells.append(f"{spread(level)}; {spread(jumps)}")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(satellite(), crop(), nas_bench(), study(), pdebench(), pde_long(), sep="\n\n")
    print("", pare_ablation(), unrest(), proposed(), sep="\n\n")

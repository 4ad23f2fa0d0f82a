"""Print the README's tables from the rows in results/: python results/table.py"""

import csv
import importlib
import math
import re
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))


def rows(name: str) -> list[dict]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_of(row: dict) -> tuple[str, str]:
    """Folder and setting of a row's run, which lies in runs/FOLDER/TASK-SETTING-SEED."""
    folder, name = row["command"].split("--out runs/")[1].split()[0].split("/")
    return folder, name.removeprefix(row["task"].removesuffix(".npz") + "-").rsplit("-", 1)[0]


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table: a line of heads, a rule, a line for each of lines."""
    text = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


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
    lines = []
    for task, errors in sorted(nas_errors().items()):
        cells = [f"{errors[c]:.3f}" if errors[c] > 0.1 else f"{errors[c]:.4f}" for c in COLUMNS]
        best = min(COLUMNS, key=lambda c: errors[c])
        cells = [f"**{x}**" if c == best else x for x, c in zip(cells, COLUMNS, strict=True)]
        lines.append([task, metrics[task], *cells])
    return markdown(["task", "metric", *COLUMNS], lines)


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
    """The eight tasks of PDEBench, solved on the spot: one seed, a row each, the best in bold."""
    lines = []
    for task, errors in pde_errors().items():
        best = min(PDE_COLUMNS, key=lambda c: errors[c])
        cells = [
            f"**{digits(errors[c])}**" if c == best else digits(errors[c]) for c in PDE_COLUMNS
        ]
        lines.append([task, *cells])
    return markdown(["task", *PDE_COLUMNS], lines)


def published(names: tuple[str, ...], comparable: dict[str, str] | None = None) -> str:
    """The numbers on the slides, a task a row, the best in bold; none of them is ours."""
    records = {name: importlib.import_module(f"tasks.{name}").TASK for name in names}
    columns = list(dict.fromkeys(c for record in records.values() for c in record["published"]))
    head = ["task", "metric", *columns, *(["same problem as ours?"] if comparable else [])]
    lines = []
    for name, record in records.items():
        errors = record["published"]
        cells = [f"{errors[c]:g}" if c in errors else "-" for c in columns]
        best = min(errors.values())
        cells = [
            f"**{x}**" if errors.get(c) == best else x for x, c in zip(cells, columns, strict=True)
        ]
        cells += [comparable[name]] if comparable else []
        lines.append([name, record["metric_name"], *cells])
    return markdown(head, lines)


def pde_long() -> str:
    """The longer runs on three of them, with the command of each."""
    lines = []
    for row in rows("pde_long.csv"):
        error, minutes = digits(float(row["test_error"])), float(row["time_s"]) / 60
        lines.append([row["task"], error, f"{minutes:.0f} min", f"`{row['command']}`"])
    return markdown(["task", "nRMSE", "time", "command"], lines)


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
        _, setting = run_of(row)
        setting = "body-random" if setting.startswith("body-random") else setting
        errors.setdefault((setting, row["task"]), []).append(float(row["test_error"]))
    lines = []
    for setting, name in STUDY.items():
        found = [errors.get((setting, task)) for task in ("satellite", "ninapro")]
        cells = [
            f"{statistics.mean(e):.3f} ± {statistics.stdev(e):.3f}" if e else "-" for e in found
        ]
        lines.append([name, *cells])
    return markdown(["setting", "satellite (1D)", "ninapro (2D)"], lines)


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
        folder, setting = run_of(row)
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
    lines = []
    for setting, name in PARE.items():
        cells = [spread(list(errors.get((setting, task), {}).values())) for task in TRIPLE]
        lines.append([name, *cells])
    return markdown(["setting", "satellite (series)", "ninapro (image)", "darcy (field)"], lines)


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
    """What each choice of the proposal is worth: errors, steps of stage 3, time over NFT's.

    Times are those of seeds 3 and 4, whose runs had a core to themselves.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows("proposed_ablation.csv"):
        found.setdefault((run_of(row)[1], row["task"]), []).append(row)
    lines = []
    quiet = {
        (setting, task, row["seed"]): float(row["time_s"])
        for (setting, task), group in found.items()
        for row in group
        if row["seed"] in "34"
    }
    for setting, name in PROPOSED.items():
        groups = [found.get((setting, task), []) for task in FOUR]
        cells = [spread([float(row["test_error"]) for row in group]) for group in groups]
        made = [row for group in groups for row in group]
        size = [int(r["epochs"]) * math.ceil(int(r["train_size"]) / 32) for r in made]
        cells.append(f"{min(size)} to {max(size)}" if made else "-")
        times = [t / quiet["nft", *run] for (s, *run), t in quiet.items() if s == setting]
        cells.append(f"{statistics.mean(times):.2f}" if times else "-")
        lines.append([name, *cells])
    return markdown(["setting", *FOUR, "steps", "time"], lines)


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
    lines = []
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
        lines.append([task, *cells])
    return markdown(["gradient norm, log10: level; jumps", "NFT", "ORCA", "PaRe"], lines)


def faults() -> str:
    """What runs survived: the report of results/faults.sh."""
    keys = ("fault", "cases", "passed", "pass_means")
    lines = [[row[key] for key in keys] for row in rows("faults.csv")]
    return markdown(["fault", "cases", "passed", "passing means"], lines)


def fno() -> str:
    """An FNO that was trained for as long as ORCA took, beside ours: nRMSE, mean over seeds."""
    errors: dict[tuple[str, int], dict[str, list[float]]] = {}
    made = {(row["task"], int(row["train_size"]), row["seed"]): row for row in rows("fno.csv")}
    for row in [*made.values(), *rows("pdebench.csv"), *rows("all_tasks.csv")]:
        case = row["task"], int(row["train_size"])
        usual = "random:" not in row.get("body", "") and "freeze" not in row["command"]
        names = {("orca", "none"): "NFT", ("orca", "otdd"): "ORCA", ("pare", "none"): "PaRe"}
        name = names.get((row["method"], row.get("align")), row["method"])
        if (*case, row["seed"]) in made and usual and name in ("fno", "NFT", "ORCA", "PaRe"):
            errors.setdefault(case, {}).setdefault(name, []).append(float(row["test_error"]))
    lines = []
    for (task, size), found in sorted(errors.items(), key=lambda item: (-item[0][1], item[0][0])):
        times = [float(row["time_s"]) for (t, n, _), row in made.items() if (t, n) == (task, size)]
        mean = {name: statistics.mean(values) for name, values in found.items()}
        best = min(mean, key=mean.get)
        cells = [digits(mean[c]) if c in mean else "-" for c in ("fno", "NFT", "ORCA", "PaRe")]
        cells = [f"**{x}**" if x == digits(mean[best]) else x for x in cells]
        seconds = f"{statistics.mean(times):.0f} s"
        lines.append([task, str(size), str(len(times)), seconds, *cells])
    head = ["task", "fields", "seeds", "time", "FNO", "NFT", "ORCA", "PaRe"]
    return markdown(head, lines)


REAL = {
    "scratch": "from scratch (random body)",
    "nft": "NFT",
    "orca": "ORCA (OTDD)",
    "pare": "PaRe, two thirds of the epochs",
    "proposed": "the proposal, nine tenths of the epochs",
}


def real() -> str:
    """The two real data sets: mean and standard deviation over the seeds."""
    errors: dict[str, dict[str, list[float]]] = {}
    for row in [*rows("real_baselines.csv"), *rows("real.csv")]:
        name, task = row["method"], row["task"].removesuffix(".npz")
        if "--out" in row["command"]:
            name = REAL[run_of(row)[1]]
        errors.setdefault(name, {}).setdefault(task, []).append(float(row["test_error"]))
    lines = []
    for name, found in errors.items():
        cells = [spread(found.get(task, [])) for task in ("crop", "darcy16")]
        lines.append([name, *cells])
    return markdown(["method", "crop", "darcy16"], lines)


# ---- every method on every task ----

ALL = {  # the name of a run in results/all_tasks.py: what the table calls it
    "scratch": "scratch",
    "fpt": "FPT",
    "nft": "NFT",
    "orca-otdd": "ORCA (otdd)",
    "orca-otdd-classwise": "ORCA (classwise)",
    "orca-mmd": "ORCA (mmd)",
    "pare": "PaRe",
    "proposed": "proposed",
}
SIMPLE = ("trivial", "linear, 1-NN")
LR_TASKS = ("diffusion_reaction_1d", "burgers", "advection")  # of results/align_lr.sh


def all_errors(name: str = "all_tasks.csv") -> dict[str, dict[str, dict[str, float]]]:
    """{task: {method: {seed: test error}}}; of the simple predictors the best of each kind."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows(name):
        method = row["method"]
        if "--out" in row["command"]:
            method = ALL[run_of(row)[1]]
        else:
            method = SIMPLE[method in (*LINEAR, "1-NN")]
        errors = found.setdefault(row["task"], {}).setdefault(method, {})
        errors[row["seed"]] = min(float(row["test_error"]), errors.get(row["seed"], math.inf))
    return found


def all_tasks() -> str:
    """Mean over the seeds, standard deviation in brackets; the best method of a row in bold."""
    columns = [*SIMPLE, *ALL.values()]
    lines = []
    for task, errors in all_errors().items():
        means = {c: statistics.mean(errors[c].values()) for c in columns if c in errors}
        best, cells = min(means, key=means.get), []
        for c in columns:
            values = list(errors.get(c, {}).values())
            text = digits(means[c]) if values else "-"
            text = f"**{text}**" if c == best else text
            if len(values) > 1:
                text += f" ({statistics.stdev(values):.1g})"
            cells.append(text)
        lines.append([task, *cells])
    return markdown(["task", *columns], lines)


def against_nft() -> dict[str, list[float]]:
    """{method: log of its mean error over NFT's, for each task}."""
    found: dict[str, list[float]] = {}
    for errors in all_errors().values():
        seeds = set.intersection(*(set(errors.get(m, {})) for m in ALL.values()))
        mean = {m: statistics.mean(errors[m][s] for s in seeds) for m in ALL.values() if seeds}
        for method, error in mean.items():
            found.setdefault(method, []).append(math.log(error / mean["NFT"]))
    return found


def ranks() -> str:
    """Average rank over the tasks, error over NFT's, and Wilcoxon's signed-rank test of that.

    The ranks are those of the mean errors over the seeds that all methods have. p is two-sided,
    over tasks, and corrected for the number of comparisons (Holm).
    """
    from scipy import stats

    logs = against_nft()
    columns = list(zip(*logs.values(), strict=True))  # of each task, in the order of the methods
    order = [stats.rankdata(column) for column in columns]
    mean = {m: statistics.mean(r[i] for r in order) for i, m in enumerate(logs)}
    p = {m: stats.wilcoxon(values).pvalue for m, values in logs.items() if any(values)}
    holm, largest = {}, 0.0
    for i, m in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - i) * p[m]))
        holm[m] = largest
    lines = []
    for m in sorted(logs, key=mean.get):
        ratio, wins = math.exp(statistics.mean(logs[m])), sum(v < 0 for v in logs[m])
        p_text = f"{holm[m]:.2g}" if m in holm else "-"
        better = f"{wins} of {len(columns)}" if m != "NFT" else "-"
        lines.append([m, f"{mean[m]:.2f}", f"{ratio:.3f}", better, p_text])
    head = ["method", f"average rank of {len(logs)}", "error / NFT's, geometric mean"]
    return markdown([*head, "better than NFT on", "p (Holm)"], lines)


def lost() -> str:
    """The PDE tasks: what alignment takes out of f^t(x), beside what it does to the error."""
    import tasks

    measures = ("lost_before", "lost_after", "gain_before", "gain_after")
    found: dict[str, list[list[float]]] = {}
    for row in rows("lost.csv"):
        found.setdefault(row["task"], []).append([float(row[name]) for name in measures])
    errors, lines = all_errors(), []
    for task in tasks.PDES:
        before, after, *gains = map(statistics.mean, zip(*found[task], strict=True))
        nft, orca = (statistics.mean(errors[task][m].values()) for m in ("NFT", "ORCA (otdd)"))
        cells = [f"{before:.1%}", f"{after:.1%}", f"{after / before:.1f}"]
        cells += [*(f"{gain:.2f}" for gain in gains), f"{orca / nft:.2f}"]
        lines.append((after / before, [task, *cells]))
    head = ["task", "not read, before", "after", "factor", "product / bias, before", "after"]
    lines = [cells for _, cells in sorted(lines, reverse=True)]
    return markdown([*head, "error of ORCA (otdd) / NFT's"], lines)


def align_lr() -> str:
    """NFT and ORCA with steps of several lengths in the alignment: the errors, and who wins."""
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for row in [*rows("all_tasks.csv"), *rows("align_lr.csv")]:
        other = re.search("freeze|random:|classwise|mmd", row["command"])
        if row["task"] in LR_TASKS and row["method"] == "orca" and not other:
            lr = re.search(r"--align-lr (\S+)", row["command"])
            setting = "NFT" if row["align"] == "none" else lr.group(1) if lr else "1e-3"
            found = errors.setdefault(row["task"], {}).setdefault(setting, {})
            found[row["seed"]] = float(row["test_error"])
    lines = []
    for task in LR_TASKS:
        nft, cells = errors[task]["NFT"], []
        for setting in ("NFT", "1e-3", "1e-4", "1e-9"):
            found = errors[task][setting]
            mean, deviation = statistics.mean(found.values()), statistics.stdev(found.values())
            text = f"{digits(mean)} ({deviation:.1g})"
            worse = sum(error > nft[seed] for seed, error in found.items())
            cells.append(text if setting == "NFT" else f"{text}; {worse} of {len(found)}")
        lines.append([task, *cells])
    return markdown(["task", "NFT", "ORCA, steps of 1e-3", "of 1e-4", "of 1e-9"], lines)


def figure(path: Path) -> None:
    """Errors over the mean error of NFT, a row a task: mean and range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = all_errors()
    shown = [m for m in ALL.values() if m != "NFT"]
    fig, ax = plt.subplots(figsize=(9, 0.55 * len(found) + 1.5), layout="constrained")
    for i, errors in enumerate(found.values()):
        base = statistics.mean(errors["NFT"].values())
        for j, method in enumerate(shown):
            values = [e / base for e in errors.get(method, {}).values()]
            if values:
                y, mean = i + 0.8 * (j + 0.5) / len(shown) - 0.4, statistics.mean(values)
                ax.plot([min(values), max(values)], [y, y], color=f"C{j}", lw=1.2, alpha=0.6)
                ax.plot(mean, y, "o", color=f"C{j}", ms=4, label=method if i == 0 else None)
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="0.95", zorder=0)
    ax.axvline(1, color="black", lw=1)
    ax.set(xscale="log", ylim=(len(found) - 0.5, -0.5), xlabel="test error / mean error of NFT")
    ax.set_yticks(range(len(found)), list(found))
    ticks = [0.5, 0.7, 1, 1.5, 2, 3, 5]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    fig.legend(loc="outside upper center", ncols=4, frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    print(satellite(), crop(), nas_bench(), study(), pdebench(), pde_long(), sep="\n\n")
    print("", pare_ablation(), unrest(), proposed(), all_tasks(), ranks(), sep="\n\n")
    print("", lost(), align_lr(), sep="\n\n")
    figure(RESULTS / "all_tasks.png")

"""Write results/README.md and its figure from the rows in results/: python results/table.py

Words that judge a method are chosen by the numbers, so that they cannot contradict the rows. A part
without rows is left out.
"""

import csv
import importlib
import math
import statistics
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
from all_tasks import METHODS, STUDIED, STUDIES, command, is_series  # noqa: E402

import tasks  # noqa: E402

KINDS = {
    "series": ("satellite", "ecg", "deepsea"),
    "images": ("cifar100", "spherical", "ninapro", "fsd50k"),
    "fields": ("darcy", "psicov", "cosmic", *tasks.PDES),
}
SHOWN = ("scratch", "FPT", "NFT", "ORCA", "PaRe", "proposed")
SIMPLE = {
    "majority class": "trivial",
    "constant score": "trivial",
    "mean of the targets": "trivial",
}
SIMPLE |= {"copy of the input": "trivial", "1-NN": "1-NN"}
SIMPLE |= {"logistic regression": "linear", "ridge regression": "linear"}
LABELS = (2, 5, 10, 50)  # a class
RATES = ("1e-3", "4e-3")  # beside the default
FEWEST = 6  # pairs of runs from which a sentence says something
LEAST = 1e-4  # an error below it counts as this, since the logarithm of 0 is none
FIGURE = RESULTS / "all_tasks.png"
Rows = dict[str, dict]  # by command


# ---- rows, errors, ratios ------------------------------------------------------------------------


def rows(name: str) -> list[dict]:
    """The rows of a CSV file in results/; none if it is not there."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def all_rows() -> list[dict]:
    """What results/all_tasks.py wrote here and, by results/gpu.sh, on a machine with a GPU."""
    found = [*rows("gpu_all_tasks.csv"), *rows("all_tasks.csv")]
    return list({(row["command"], row["method"]): row for row in found}.values())


def runs_of(found: Rows, flags: str, task: str, size: int = 0) -> dict[int, dict]:
    """The rows of a setting on a task, by seed."""
    series = task in ("crop.npz", "semg.npz") or (not task.endswith(".npz") and is_series(task, {}))
    lines = {seed: command(task, seed, flags, size, series) for seed in range(10)}
    return {seed: found[line] for seed, line in lines.items() if line in found}


def error(row: dict) -> float:
    return float(row["test_error"])


def mean(runs: dict[int, dict]) -> float:
    return statistics.mean(map(error, runs.values()))


def log_ratios(runs: dict[int, dict], base: dict[int, dict]) -> list[float]:
    """The logarithm of error over the base's error, for each seed that both have."""
    floor = lambda row: max(error(row), LEAST)  # noqa: E731
    return [math.log(floor(runs[s]) / floor(base[s])) for s in runs if s in base]


def effect(found: Rows, flags: str, base: str, names) -> dict[str, list[float]]:
    """For each task, the logarithms of error over the base's error, one a seed."""
    logs = {t: log_ratios(runs_of(found, flags, t), runs_of(found, base, t)) for t in names}
    return {task: values for task, values in logs.items() if values}


def flat(logs: dict[str, list[float]]) -> list[float]:
    """All of them, whatever the task."""
    return [value for values in logs.values() for value in values]


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


# ---- how numbers look ----------------------------------------------------------------------------


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table: a line of heads, a rule, a line for each of lines."""
    text = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:#.3g}".rstrip(".") if value else "0"


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation in brackets."""
    if not values:
        return "-"
    text = digits(statistics.mean(values))
    return f"{text} ({statistics.stdev(values):.1g})" if len(values) > 1 else text


def percent(log: float) -> str:
    """A log ratio as a change in percent."""
    text = f"{100 * (math.exp(log) - 1):+.0f}"
    return "0 %" if text in ("+0", "-0") else f"{text} %"


def bold_least(cells: list[str], values: list[float]) -> list[str]:
    """The cells, the one with the least value in bold; NaN is no value."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return cells
    best = min(known)
    return [f"**{c}**" if v == best else c for c, v in zip(cells, values, strict=True)]


def listed(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def sign(values: list[float]) -> int:
    """-1 or 1 if the interval of the mean lies below or above 0; else 0."""
    low, high = interval(values)
    return (low > 0) - (high < 0) if len(values) >= FEWEST else 0


def summary(values: list[float]) -> str:
    """The change in percent, its interval, and in how many runs the error is lower."""
    low, high = interval(values)
    wins = f"{sum(v < 0 for v in values)} of {len(values)}"
    change = percent(statistics.mean(values))
    return f"{change} ({percent(low)} to {percent(high)}; {wins})"


VERBS = {-1: "lowers the error", 0: "makes no difference beyond chance", 1: "raises the error"}


# ---- the answers ---------------------------------------------------------------------------------

QUESTIONS = {  # what is asked: the two methods whose errors are compared
    "Pretraining": ("NFT", "scratch", "plain fine-tuning (NFT) against the same body untrained"),
    "Alignment": ("ORCA", "NFT", "ORCA against NFT"),
    "Patch replacement": ("PaRe", "NFT", "PaRe against NFT"),
    "The proposal": ("proposed", "NFT", "the proposal against NFT"),
    "Training the body": ("NFT", "FPT", "NFT against FPT, which trains its LayerNorms alone"),
}


def answers(found: Rows) -> str:
    """What each idea is worth on each kind of data: a sentence each, and a table."""
    words, lines = [], []
    for name, (method, base, what) in QUESTIONS.items():
        logs = {k: flat(effect(found, METHODS[method], METHODS[base], v)) for k, v in KINDS.items()}
        words.append(sentence(name, what, logs))
        cells = [summary(v) if len(v) >= FEWEST else "-" for v in logs.values()]
        lines.append([f"{method} against {base}", *cells])
    for labels in LABELS:
        ours, base = (STUDIES["few"][f"{m}, {labels}"] for m in ("proposed", "NFT"))
        logs = {
            kind: flat(effect(found, ours, base, set(STUDIED) & set(KINDS[kind]))) for kind in KINDS
        }
        if any(logs.values()):
            cells = [summary(v) if len(v) >= FEWEST else "-" for v in logs.values()]
            lines.append([f"proposed against NFT, {labels} labels a class", *cells])
            title = f"The proposal with {labels} labels a class"
            words.append(sentence(title, "against NFT", logs))
    words = [f"- {text}" for text in words if text]
    return "\n".join(words) + "\n\n" + markdown(["error", *KINDS], lines) if words else ""


def sentence(name: str, what: str, logs: dict[str, list[float]]) -> str:
    """Where something lowers the error, where it raises it, and where nothing can be said."""
    parts = []
    for direction, verb in VERBS.items():
        kinds = [k for k, v in logs.items() if len(v) >= FEWEST and sign(v) == direction]
        if kinds:
            parts.append(f"{verb} on {listed(kinds)}")
    return f"**{name}** ({what}) {'; it '.join(parts)}." if parts else ""


def ranks(found: Rows) -> str:
    """Ranks over the tasks that all methods have, and each method's error over NFT's.

    p is of Wilcoxon's signed-rank test over the tasks, two-sided, corrected by Holm.
    """
    from scipy import stats

    names = [t for t in tasks.NAMES if all(common(found, t))]
    if len(names) < 5:
        return ""
    logs = {m: effect(found, METHODS[m], METHODS["NFT"], names) for m in SHOWN}
    logs = {m: {t: statistics.mean(v) for t, v in found.items()} for m, found in logs.items()}
    places = [stats.rankdata([logs[m][t] for m in SHOWN]) for t in names]
    average = {m: statistics.mean(p[i] for p in places) for i, m in enumerate(SHOWN)}
    p = {m: stats.wilcoxon(list(logs[m].values())).pvalue for m in SHOWN if m != "NFT"}
    holm, largest = {}, 0.0
    for i, m in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - i) * p[m]))
        holm[m] = f"{largest:.2g}"
    lines = []
    for m in sorted(SHOWN, key=average.get):
        values = list(logs[m].values())
        low, high = interval(values)
        cells = [m, f"{average[m]:.2f}", f"{math.exp(statistics.mean(values)):.3f}"]
        cells += [f"{math.exp(low):.3f} to {math.exp(high):.3f}" if m != "NFT" else "-"]
        cells += [f"{sum(v < 0 for v in values)} of {len(names)}" if m != "NFT" else "-"]
        lines.append([*cells, holm.get(m, "-")])
    head = ["method", f"mean rank of {len(SHOWN)}", "error / NFT's", "95 % interval"]
    return markdown([*head, f"better than NFT on, of {len(names)} tasks", "p (Holm)"], lines)


def common(found: Rows, task: str) -> list[dict]:
    """The rows of every method on a task, those of the seeds that all of them have."""
    runs = [runs_of(found, METHODS[m], task) for m in SHOWN]
    seeds = set.intersection(*(set(r) for r in runs))
    return [{s: r[s] for s in sorted(seeds)} for r in runs]


# ---- the tables ----------------------------------------------------------------------------------


def large(found: Rows, simple: dict) -> str:
    """Every method on every task: mean over the seeds, standard deviation in brackets."""
    columns = ("trivial", "1-NN", "linear", *SHOWN)
    lines = []
    for kind, names in KINDS.items():
        for task in names:
            runs = [runs_of(found, METHODS[m], task) for m in SHOWN]
            errors = [simple.get((task, c), []) for c in columns[:3]]
            errors += [list(map(error, r.values())) for r in runs]
            if not any(errors):
                continue
            means = [statistics.mean(e) if e else math.nan for e in errors]
            metric = importlib.import_module(f"tasks.{task}").TASK["metric_name"]
            cells = bold_least([spread(e) for e in errors], means)
            lines.append([kind, task, metric, str(max(map(len, errors))), *cells])
    return markdown(["", "task", "metric", "seeds", *columns], lines) if lines else ""


def simple_errors() -> dict[tuple[str, str], list[float]]:
    """{(task, kind of learner): the errors over seeds}; of the trivial ones the best of a seed."""
    best: dict[tuple, float] = {}
    for row in all_rows():
        if row["method"] in SIMPLE:
            key = row["task"], SIMPLE[row["method"]], row["seed"]
            best[key] = min(error(row), best.get(key, math.inf))
    found: dict[tuple[str, str], list[float]] = {}
    for (task, kind, _), value in best.items():
        found.setdefault((task, kind), []).append(value)
    return found


def costs(found: Rows) -> str:
    """Time beside NFT's on the same hardware, when NFT's final error was reached, and stability."""
    lines = []
    for method in SHOWN:
        ratios, reached, runs = [], [], []
        for task in tasks.NAMES:
            ours, base = (runs_of(found, METHODS[m], task) for m in (method, "NFT"))
            runs += ours.values()
            for seed in set(ours) & set(base):
                same = ours[seed]["device"] == base[seed]["device"]
                if same and ours[seed]["time_s"] and base[seed]["time_s"]:
                    ratios.append(float(ours[seed]["time_s"]) / float(base[seed]["time_s"]))
                    when = time_to(ours[seed], float(base[seed]["curve"].split()[-1]))
                    reached.append(when / float(base[seed]["time_s"]))
        if not ratios:
            continue
        spikes = sum(int(row["spikes"]) > 0 for row in runs)
        ended = sum(row["converged"] == "True" for row in runs)
        share = sum(math.isfinite(r) for r in reached) / len(reached)
        median = statistics.median(reached)
        lines.append(
            [
                method,
                f"{math.exp(statistics.mean(map(math.log, ratios))):.2f}",
                f"{median:.2f}" if math.isfinite(median) else "not reached",
                f"{share:.0%}",
                f"{spikes} of {len(runs)}",
                f"{ended} of {len(runs)}",
            ]
        )
    head = ["method", "time / NFT's", "time until NFT's final error / NFT's time, median"]
    head += ["runs that reach it", "runs with a spike", "runs that converged"]
    return markdown(head, lines) if lines else ""


def time_to(row: dict, target: float) -> float:
    """Seconds until the validation error was at most the target; infinite if it never was."""
    curve = [float(value) for value in row["curve"].split()]
    total, before = float(row["time_s"]), float(row["before_s"] or 0)
    for i, value in enumerate(curve):
        if value <= target * (1 + 1e-9):
            return before + (i + 1) / len(curve) * (total - before)
    return math.inf


def study(found: Rows, name: str, base: str, also: tuple = ()) -> str:
    """The settings of a study beside a method as it comes: errors, and the change over tasks."""
    settings = {base: METHODS[base]} | {m: METHODS[m] for m in also} | STUDIES[name]
    lines = []
    for setting, flags in settings.items():
        runs = {task: runs_of(found, flags, task) for task in STUDIED}
        if not any(runs.values()):
            continue
        cells = [spread(list(map(error, runs[task].values()))) for task in STUDIED]
        values = flat(effect(found, flags, METHODS[base], STUDIED))
        seeds = sorted({len(r) for r in runs.values() if r})
        change = "-" if setting == base or not values else percent(statistics.mean(values))
        lines.append([setting, *cells, change, "-".join(map(str, {seeds[0], seeds[-1]}))])
    head = ["setting", *STUDIED, f"error, {base} being 0", "seeds"]
    return markdown(head, lines) if len(lines) > 1 + len(also) else ""


def few(found: Rows) -> str:
    """Few labels: a line for each task and number of labels a class."""
    names = [m for m in SHOWN if m != "FPT"]
    lines, logs = [], {}
    for task in STUDIED:
        for labels in LABELS:
            runs = [runs_of(found, STUDIES["few"][f"{m}, {labels}"], task) for m in names]
            if not all(runs):
                continue
            errors = [list(map(error, r.values())) for r in runs]
            means = [statistics.mean(e) for e in errors]
            cells = bold_least([spread(e) for e in errors], means)
            lines.append([task, str(labels), *cells])
            for m, r in zip(names, runs, strict=True):
                values = log_ratios(r, runs[names.index("NFT")])
                logs.setdefault((m, labels), []).append(statistics.mean(values))
    for labels in sorted({labels for _, labels in logs}):
        cells = [percent(statistics.mean(logs[m, labels])) if m != "NFT" else "0" for m in names]
        lines.append(["error, NFT being 0", str(labels), *cells])
    return markdown(["task", "labels a class", *names], lines) if lines else ""


def real(found: Rows, best: bool) -> str:
    """Real data: errors with the default rate, or with the best of three on validation."""
    names, lines = [m for m in SHOWN if not best or m != "FPT"], []
    sets = {(r["task"], given_size(r["command"])): r["train_size"] for r in found.values()}
    for (task, size), samples in sorted(sets.items()):
        if not task.endswith(".npz"):
            continue
        errors = []
        for m in names:
            rates = [STUDIES["lr"][f"{m}, {lr}"] for lr in RATES] if best else []
            runs = [runs_of(found, flags, task, size) for flags in (METHODS[m], *rates)]
            chosen = min(runs, key=val_error) if all(runs) else {}
            errors.append(list(map(error, chosen.values())))
        if any(errors):
            means = [statistics.mean(e) if e else math.nan for e in errors]
            cells = bold_least([spread(e) for e in errors], means)
            seeds = str(max(map(len, errors)))
            lines.append([task.removesuffix(".npz"), samples, seeds, *cells])
    return markdown(["data", "training samples", "seeds", *names], lines) if lines else ""


def val_error(runs: dict[int, dict]) -> float:
    return statistics.mean(float(row["val_error"]) for row in runs.values())


def given_size(line: str) -> int:
    """The number of training samples that a command line asks for; 0 for all."""
    words = line.split()
    return int(words[words.index("--train-size") + 1]) if "--train-size" in words else 0


def recipe() -> str:
    """Validation errors of NFT with several learning rates, of the new parts and g, and batches."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows("recipe.csv"):
        words = row["command"].split()
        lr = words[words.index("--lr") + 1]
        body_lr = words[words.index("--body-lr") + 1]
        batch = words[words.index("--batch-size") + 1] if "--batch-size" in words else "default"
        errors = found.setdefault((batch, lr, body_lr), {})
        errors[row["task"]] = digits(float(row["val_error"]))
    names = list(dict.fromkeys(task for errors in found.values() for task in errors))
    ordered = sorted(found.items(), reverse=True)
    lines = [[*setting, *(errors.get(t, "-") for t in names)] for setting, errors in ordered]
    return markdown(["batch", "lr", "body lr", *names], lines) if lines else ""


def peers(found: Rows) -> str:
    """Other networks in NFT's time beside NFT, ORCA and PaRe, each at its better rate."""
    made: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows("peers.csv"):
        rate = row["command"].split("--rates ")[1]
        made.setdefault((row["task"], row["method"], rate), []).append(row)
    shown, lines = ("NFT", "ORCA", "PaRe"), []
    names = list(dict.fromkeys(name for _, name, _ in made))
    for task in dict.fromkeys(task for task, _, _ in made):
        errors = [list(map(error, runs_of(found, METHODS[m], task).values())) for m in shown]
        for name in names:
            tried = [runs for (t, n, _), runs in made.items() if (t, n) == (task, name)]
            chosen = min(tried, key=lambda runs: val_error(dict(enumerate(runs))), default=[])
            errors.append(list(map(error, chosen)))
        means = [statistics.mean(values) if values else math.nan for values in errors]
        lines.append([task, *bold_least([spread(values) for values in errors], means)])
    return markdown(["task", *shown, *names], lines) if lines else ""


def plain(name: str, columns: dict[str, str]) -> str:
    """Some columns of a CSV file as they are: {column: head}."""
    lines = [[row[column] or "-" for column in columns] for row in rows(name)]
    return markdown(list(columns.values()), lines) if lines else ""


COMPARABLE = {  # which of the papers' PDE problems are ours
    "advection": "same problem; ORCA's file moved twice as far",
    "burgers": "no: t = 0.01, theirs is a constant",
    "diffusion_reaction_1d": "no: t = 0.03, theirs is nearly flat",
    "diffusion_sorption": "no: plumes and soils, theirs has one parameter",
    "navier_stokes_1d": "no: t = 0.1; theirs in standardised units",
    "darcy_2d": "no: steady, theirs is not yet",
    "shallow_water": "no: dams differ in more than the radius",
    "diffusion_reaction_2d": "no: both fields are shown, theirs hides one",
}


def published(names: tuple[str, ...], comparable: dict[str, str] | None = None) -> str:
    """The numbers on the slides, a task a row, the best in bold; none of them is ours."""
    records = {name: importlib.import_module(f"tasks.{name}").TASK for name in names}
    columns = list(dict.fromkeys(c for record in records.values() for c in record["published"]))
    lines = []
    for name, record in records.items():
        errors = record["published"]
        cells = [f"{errors[c]:g}" if c in errors else "-" for c in columns]
        cells = bold_least(cells, [errors.get(c, math.nan) for c in columns])
        lines.append(
            [name, record["metric_name"], *cells, *([comparable[name]] if comparable else [])]
        )
    head = ["task", "metric", *columns, *(["same problem as ours?"] if comparable else [])]
    return markdown(head, lines)


# ---- what the sources claim ----------------------------------------------------------------------


IN_1D = (*KINDS["series"], *tasks.PDES[:5])
IN_2D = tuple(name for name in tasks.NAMES if name not in IN_1D)
ORCA = STUDIES["orca"]
CLAIMS = (  # slide, what it says; what is compared: flags, with what, on which tasks
    ("29, 30", "PaRe is better than ORCA on all tasks", METHODS["PaRe"], "ORCA", tasks.NAMES),
    ("29", "ORCA is better than NFT", METHODS["ORCA"], "NFT", tasks.NAMES),
    ("15", "alignment plays a role in 1D", METHODS["ORCA"], "NFT", IN_1D),
    ("15", "alignment does not matter in 2D", METHODS["ORCA"], "NFT", IN_2D),
    ("16", "more alignment can do harm", ORCA["60 epochs of alignment"], "ORCA", STUDIED),
    ("18", "the body has to be fine-tuned", ORCA["body frozen"], "ORCA", STUDIED),
    ("18", "the embedder need not be", ORCA["embedder frozen"], "ORCA", STUDIED),
    ("19", "pretraining is not necessary in 1D", METHODS["scratch"], "NFT", IN_1D),
)


def claims(found: Rows) -> str:
    """What the slides say, beside what the rows say."""
    lines = []
    for slide, claim, flags, base, names in CLAIMS:
        values = flat(effect(found, flags, METHODS[base], names))
        if len(values) >= FEWEST:
            text = f"`{flags}` {VERBS[sign(values)]} beside {base}: {summary(values)}"
            lines.append([slide, claim, text.replace("BODY", "...")])
    return markdown(["slide", "claim", "found"], lines) if lines else ""


# ---- the page ------------------------------------------------------------------------------------


def page() -> str:
    """The text of results/README.md."""
    made = all_rows()
    found = {row["command"]: row for row in made if row["method"] not in SIMPLE}
    simple = simple_errors()
    of_large = [r for r in found.values() if r["method"] in SHOWN and r["task"] in tasks.NAMES]
    parts = [
        "# Results",
        INTRO,
        setting(of_large),
        "## Answers",
        f"{answers(found)}\n\n{BOOTSTRAP}" if answers(found) else TOO_FEW,
        "![Error of each method over that of plain fine-tuning, task by task](all_tasks.png)"
        if answers(found)
        else "",
    ]
    sections = {
        "What the sources claim": (claims(found), "all_tasks.py --study large orca", ""),
        "Every method on every task": (large(found, simple), "all_tasks.py", LARGE),
        "Ranks": (ranks(found), "all_tasks.py", RANKS),
        "Cost and stability": (costs(found), "all_tasks.py", COSTS),
        "Few labels": (few(found), "all_tasks.py --study few", FEW),
        "Choices of PaRe": (
            study(found, "pare", "PaRe", ("NFT",)),
            "all_tasks.py --study large pare",
            "",
        ),
        "Does PaRe's gate find the patches that carry the label?": (
            plain("gate.csv", GATE),
            "gate.py",
            GATE_TEXT,
        ),
        "What explains ORCA": (
            study(found, "orca", "ORCA", ("NFT", "scratch")),
            "all_tasks.py --study large orca",
            "",
        ),
        "Choices of the proposal": (
            study(found, "proposed", "proposed", ("NFT",)),
            "all_tasks.py --study large proposed",
            perturbed(found),
        ),
        "Real data": (
            real(found, best=False),
            "all_tasks.py --npz crop.npz:1200 crop.npz semg.npz darcy16.npz --seeds 0 1 2 3",
            REAL_TEXT,
        ),
        "Real data, each method with its own learning rate": (
            real(found, best=True),
            "all_tasks.py --study large lr --npz crop.npz:1200 crop.npz semg.npz darcy16.npz "
            "--seeds 0 1 2 3",
            "Of 1e-3, 2e-3 (the default) and 4e-3, the rate with the least mean validation error.",
        ),
        "Beside other networks": (peers(found), "peers.py", PEERS_TEXT),
        "Learning rates and batch size": (recipe(), "", RECIPE),
        "Tests on a GPU": (plain("gpu_tests.csv", TESTS), "gpu.sh --part 1", ""),
        "Steps at the papers' sizes": (
            plain("gpu_steps.csv", STEPS) or plain("paper_step.csv", STEPS),
            "bench_gpu.py",
            STEPS_TEXT,
        ),
        "OTDD": (plain("bench_otdd.csv", OTDD), "bench_otdd.py --peers", OTDD_TEXT),
        "MMD": (plain("bench_mmd.csv", MMD), "bench_mmd.py", MMD_TEXT),
        "Faults that runs survived": (plain("faults.csv", FAULTS), "faults.sh", ""),
    }
    for title, (table, line, text) in sections.items():
        if table:
            start = "bash" if ".sh" in line else "python"
            parts += [f"## {title}", text, table, f"`{start} results/{line}`" if line else ""]
    parts += [
        "## The papers' numbers",
        "From slides 29 and 30, on the real data, with large pretrained models: not ours.",
        published(tasks.NAMES[:10]),
        published(tasks.NAMES[10:], COMPARABLE),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def setting(made: list[dict]) -> str:
    """On what the rows of the large table were made."""
    if not made:
        return ""
    devices = sorted({row["device"] for row in made})
    commits = sorted({row["commit"] for row in made})
    seeds = sorted({int(row["seed"]) for row in made})
    return (
        f"The table of all tasks holds {len(made)} of {len(tasks.NAMES) * len(METHODS) * 3} runs "
        "(18 tasks, 6 methods, 3 seeds) with the scripts' default settings and the same number of "
        "epochs for every method; "
        f"seeds {', '.join(map(str, seeds))}; on {' and '.join(devices)}; made by commit "
        f"{', '.join(commits)}."
    )


def perturbed(found: Rows) -> str:
    """What prediction by the mean over perturbed features does, from the runs as they come."""
    logs = []
    for task in tasks.NAMES:
        runs = runs_of(found, METHODS["proposed"], task)
        other = {s: {"test_error": r["test_error_perturbed"]} for s, r in runs.items()}
        if runs:
            logs.append(statistics.mean(log_ratios(other, runs)))
    if not logs:
        return ""
    return (
        "Prediction by the mean over perturbed features, E[h(d~)], instead of h(d): "
        f"{percent(statistics.mean(logs))} over {len(logs)} tasks."
    )


INTRO = (
    "Generated from the rows in this folder by `python results/table.py`; the command under a "
    "table makes its rows. All errors are test errors, each the task's own; lower is better. The "
    "best epoch was chosen on validation data. The data are simulated and the bodies tiny unless a "
    "table says otherwise: these numbers compare methods. The papers' numbers stand apart at the "
    "end."
)
BOOTSTRAP = (
    "Change of the error, a geometric mean of ratios paired by task and seed. In brackets: a 95 % "
    "bootstrap interval over these pairs, which speaks of these tasks and not of others, and in "
    "how many pairs the error is lower. Below six pairs nothing is said."
)
TOO_FEW = (
    "There are too few rows with the present default settings for an answer: each needs six "
    "pairs of runs with the same task and seed. `python results/all_tasks.py` adds them."
)
LARGE = (
    "Mean over the seeds, standard deviation in brackets, the least error of a row in bold. "
    "*trivial*: majority class, mean of the targets or copy of the input; *linear*: logistic or "
    "ridge regression on the raw arrays, its regularisation chosen on validation data."
)
RANKS = (
    "Over the tasks and seeds that all methods have; p is of Wilcoxon's signed-rank test over the "
    "tasks against NFT, two-sided, corrected by Holm; the interval is a bootstrap over the tasks."
)
COSTS = (
    "A run is timed from its start to the test error, beside NFT's run of the same task and seed "
    "on the same hardware. A spike is an epoch whose training loss exceeds 1.2 times its running "
    "minimum. Converged: the validation error fell by less than 2 % in the last tenth of the run. "
    "Runs that shared their core with other work have no time."
)
FEW = (
    "So many training samples a class on average (at least one of each class); validation and test "
    "sets and steps as usual, the same for all methods."
)
REAL_TEXT = (
    "Files that are not part of this project: `crop` (satellite series, UCR archive), `semg` "
    "(muscle signals, MyoArmbandDataset), `darcy16` (Darcy flow, neuraloperator)."
)
PEERS_TEXT = (
    "Test errors of networks that are not pretrained, trained as long as NFT on the same data: a "
    "plain convolutional network, Perceiver IO, the Fourier neural operator (FNO), a U-Net. Each "
    "has the better of the learning rates 1e-3 and 3e-3 by validation error."
)
GATE = {"task": "task", "seed": "seed", "flags": "flags", "auc_start": "AUC at the start"}
GATE |= {"auc_best": "best epoch", "auc_end": "last epoch", "val_error": "validation error"}
GATE_TEXT = (
    "Planted tasks: one patch of a sample carries its class, at a place that varies or is fixed. "
    "AUC of the gate's scores on held-out samples: 1 if that patch always ranks first, 0.5 by "
    "chance."
)
RECIPE = (
    "What the default rates were chosen by: validation errors of NFT, seed 0. The default batch is "
    "32, and 8 for fields; batches of 16 have as many epochs, and so twice the steps. The "
    "commands stand in `recipe.csv`: "
    "`python orca.py --task satellite --align none --lr 2e-3 --body-lr 6e-4`."
)
TESTS = {"test": "test", "passed": "passed", "failed": "failed", "device": "device"}
STEPS = {"task": "task", "method": "method", "variant": "variant", "batch": "batch"}
STEPS |= {"step_s": "step, s", "samples_s": "samples a second", "peak_gb": "peak memory, GB"}
STEPS |= {"device": "device"}
STEPS_TEXT = "One step of fine-tuning with the bodies and batch sizes of the papers' setting."
OTDD = {"case": "case", "n": "n", "m": "m", "D": "D", "classes": "classes"}
OTDD |= {"forward_backward_ms": "forward and backward, ms", "error": "relative error"}
OTDD |= {"memory_mb": "memory, MB"}
OTDD |= {"pot_ms": "POT, ms", "geomloss_ms": "geomloss, ms"}
OTDD_TEXT = (
    "n source and m target samples of D features, float32, one CPU core. The error is relative "
    "to the value in double precision; in the rows with eps 1e-3, to the exact value."
)
MMD = {"n": "n", "D": "D", "forward_backward_ms": "exact, forward and backward, ms"}
MMD |= {"linear_ms": "linear time, ms", "features_ms": "random features, ms"}
MMD_TEXT = "n samples a side of D features, one CPU core."
FAULTS = {"fault": "fault", "cases": "cases", "passed": "passed", "pass_means": "passing means"}


# ---- the figure ----------------------------------------------------------------------------------

BRIEF = {"diffusion_reaction_1d": "reaction 1D", "diffusion_reaction_2d": "reaction 2D"}
BRIEF |= {"diffusion_sorption": "sorption", "navier_stokes_1d": "flow 1D", "darcy_2d": "darcy 2D"}
BRIEF |= {"shallow_water": "shallow water"}
PANELS = {"scratch": "untrained", "ORCA": "ORCA", "PaRe": "PaRe", "proposed": "proposal"}
BETTER, WORSE, EVEN = "#0b6e99", "#c8501e", "#8a8a8a"
EDGE = math.log(2.2)  # where the axes end


def figure(found: Rows, path: Path) -> None:
    """Error over NFT's, a panel a method, a line a task: mean and range over the seeds.

    Each kind of data ends with its mean, a bar. Blue is better than NFT in all seeds, orange worse
    in all, if there are several; of means, those whose bootstrap interval leaves out 1.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines, place, spans = [], 0.0, {}
    for kind, names in KINDS.items():
        here = [t for t in names if runs_of(found, METHODS["NFT"], t)]
        if here:
            lines += [(place + i, task) for i, task in enumerate(here)]
            spans[kind] = (here, place + len(here))
            place += len(here) + 2.0
    plt.rcParams.update({"font.size": 22})
    fig, axes = plt.subplots(
        1, len(PANELS), figsize=(12, 0.52 * place + 2.2), sharey=True, layout="constrained"
    )
    for ax, (method, title) in zip(axes, PANELS.items(), strict=True):
        ax.axvline(0, color="black", lw=1.5, zorder=1)
        for y, task in lines:
            logs = log_ratios(*(runs_of(found, METHODS[m], task) for m in (method, "NFT")))
            if logs:
                draw(ax, y, statistics.mean(logs), min(logs), max(logs), "o", 10)
        for _, (names, y) in spans.items():
            values = flat(effect(found, METHODS[method], METHODS["NFT"], names))
            if values:
                ax.axhspan(y - 0.5, y + 0.5, color="0.92", zorder=0)
                at = statistics.mean(values)
                ends = interval(values) if len(values) >= FEWEST else (at, at)  # in grey
                draw(ax, y, at, *ends, "D", 15)
        ax.set_title(title, fontsize=23, fontweight="bold")
        ax.set(xlim=(-EDGE, EDGE), ylim=(place - 1.2, -0.8))
        ax.set_xticks([-math.log(2), 0, math.log(2)], ["half", "NFT", "twice"], fontsize=17)
        ax.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    ticks = {y: BRIEF.get(task, task) for y, task in lines}
    ticks |= {y: f"{kind}: mean" for kind, (_, y) in spans.items()}
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if "mean" in label.get_text() else "normal")
    fig.suptitle("Error beside plain fine-tuning (NFT): blue is better, orange worse", fontsize=23)
    fig.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(fig)


def draw(ax, y: float, at: float, low: float, high: float, marker: str, size: float) -> None:
    """A mean and its range; an arrow at the edge if the mean lies beyond."""
    color = BETTER if low < high < 0 else WORSE if 0 < low < high else EVEN
    inside = lambda v: max(-EDGE * 0.94, min(EDGE * 0.94, v))  # noqa: E731
    ax.plot([inside(low), inside(high)], [y, y], color=color, lw=3, alpha=0.55, zorder=2)
    if abs(at) > EDGE * 0.94:
        marker, size = ("<" if at < 0 else ">"), 13
    ax.plot(inside(at), y, marker, color=color, ms=size, zorder=3)


def main() -> None:
    found = {row["command"]: row for row in all_rows() if row["method"] not in SIMPLE}
    if answers(found):
        figure(found, FIGURE)
    (RESULTS / "README.md").write_text(page(), encoding="utf-8")  # shows the figure if it is there


if __name__ == "__main__":
    main()

"""What the methods cost and how that grows: python results/bench_cost.py --csv results/cost.csv

    stages      per method and task: seconds a step, peak memory, the share of each stage in a run;
                "setup" makes data, model and source, "rest" is checkpoints, curves, loading weights
    growth      the same against sizes of data of one's own, which are made here, an epoch each;
                "features" is the proposal's pass over all samples, "labels" finds classes (of
                fields, by k-means)
    distances   exact OTDD and MMD of two clouds of n points in d dimensions, forward and backward

--only PART ... runs some of them: rows of the others in the CSV stay. --quick: tiny sizes, does it
run? A full run takes about eleven minutes on one core.

Seconds are those of a processor core (process_time) on the one thread used: what a step takes where
nothing else runs. They are medians over steps, without the first. A step of fine-tuning is from one
update to the next, loading of data included; NFT's is ORCA's. memory_mb is the peak of a process of
its own (ru_maxrss, 10^6 bytes) with torch and all that is imported, whose row is "imports alone";
that of distances is the rise of the peak.

The run of "stages" has the default settings but EPOCHS epochs a stage, whose seconds are multiplied
up to the default epochs; imports are not counted. metrics.jsonl cannot tell: its time_s, since the
start, is read once an epoch, after validation. PaRe replaces at least one patch in all epochs here;
by default the last one is plain, at half the cost.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
from bench_gpu import peak_gb, shrink  # noqa: E402
from bench_otdd import data  # noqa: E402
from collect import read, write  # noqa: E402

import orca  # noqa: E402 (the repository's root has to be on the path first)
import run  # noqa: E402
import tasks  # noqa: E402
from mmd import mmd2  # noqa: E402
from otdd import otdd  # noqa: E402

IMPORTS = ["timm", "ot", "scipy.cluster.vq", "matplotlib.pyplot"]  # once, for all measurements
IMPORTS += ["transformers.models.roberta.modeling_roberta", "transformers"]
METHODS = {"NFT": ("orca", {"align": "none"}), "ORCA": ("orca", {"align": "otdd"})}
METHODS |= {"PaRe": ("pare", {"k_end": 1}), "proposal": ("proposed", {})}  # script, settings
OURS = ("ORCA", "PaRe", "proposal")  # of growth: NFT has the steps of ORCA
TASKS = ("ninapro", "satellite")  # an image, a series
EPOCHS = 3  # of each stage, in a run of which the shares are taken
COUNTS = {"finetune": "epochs", "align": "align_epochs", "contrast": "contrast_epochs"}
STAGES = ("setup", "align", "features", "contrast", "finetune", "evaluate", "rest")
CALLS = {stage: stage for stage in STAGES[1:-1]} | {"evaluate_both": "evaluate"}  # what is timed
CALLS |= dict.fromkeys(("build", "load_source", "source_features", "labelled"), "setup")
CALLS |= {"some_classes": "setup", **dict.fromkeys(("save", "save_weights", "finish"), "rest")}
BASE = {"shape": (1, 64), "patches": 16, "classes": 16, "samples": 384, "source_size": 2000}
BASE |= {"epochs": 1, "align_epochs": 2, "contrast_epochs": 2, "contrast_steps_per_epoch": 5}
FIELDS = {"shape": (1, 32, 32), "patches": 64, "classes": 0}
GROWTH = {  # quantity: {value: what is not as in BASE}
    "length = 4 N": {L: {"shape": (1, L), "patches": L // 4} for L in (64, 256, 1024)},
    "patches, series": {N: {"shape": (1, 512), "patches": N} for N in (16, 64, 256)},
    "patches, image": {N: {"shape": (3, 32, 32), "patches": N} for N in (64, 256, 576)},
    "classes": {K: {"classes": K} for K in (4, 16, 64)},
    "samples, fields": {n: {**FIELDS, "samples": n} for n in (500, 2000, 5000)},
    "samples": {n: {"samples": n} for n in (384, 1536, 6144)},
    "source samples": {n: {"source_size": n} for n in (500, 2000, 8000)},
}
ALIGN = ("samples, fields", "source samples")  # matter for the alignment alone
PARTS = ("stages", "growth", "distances")
COLUMNS = ("part", "what", "method", "task", "quantity", "value", "seconds", "memory_mb")
COLUMNS += tuple(f"share_{stage}" for stage in STAGES)
CLOUD = {"n": 1000, "d": 128, "classes": 10}
CLOUDS = {"n": (250, 500, 1000, 2000), "d": (32, 128, 768), "classes": (2, 10, 50)}


def logged(owner, name: str, events: list) -> None:
    """Let a function write down when it starts and ends: (seconds, name, starts)."""
    function = getattr(owner, name)

    def call(*given, **named):
        events.append((time.process_time(), name, True))
        done = function(*given, **named)
        events.append((time.process_time(), name, False))
        return done

    setattr(owner, name, call)


def account(events: list) -> tuple[Counter, dict[str, float]]:
    """Seconds by path, which are the stages that contain each other; the median step of a stage."""
    path, last, since, seconds, steps = (), events[0][0], None, Counter(), defaultdict(list)
    for now, name, starts in events:
        seconds[path] += now - last
        last = now
        if name in CALLS:
            path, since = (*path, CALLS[name]) if starts else path[:-1], None
        elif name == "balanced_rows" and starts:  # a step of align or contrast starts
            since = now
        elif name in ("separability", "update") and not starts:  # one ends; the next of finetune
            if since is not None:
                steps[path[0]].append(now - since)
            since = now
    return seconds, {f"{stage} step": statistics.median(s[1:]) for stage, s in steps.items()}


def watched(method: str, given: dict) -> tuple[Counter, dict[str, float]]:
    """account() of a run with those of the given settings that the method has."""
    (script, own), events = METHODS[method], []
    module = importlib.import_module(script)
    owners = {"save": run.Record, "some_classes": tasks}
    owners |= dict.fromkeys(("save_weights", "finish", "update"), run)
    for name in (*CALLS, "balanced_rows", "separability", "update"):
        for owner in {owners.get(name, module), orca}:  # from which the others take some
            if hasattr(owner, name):
                logged(owner, name, events)
    given = {key: value for key, value in given.items() if hasattr(module.Config, key)}
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(None):
        module.main(module.configure(**given, **own, device="cpu", out=out))
    return account(events)


def whole_run(method: str, task: str, quick: bool) -> list[dict]:
    """Rows of steps, and one with the shares of the stages in a run of all default epochs."""
    epochs = 1 if quick else EPOCHS
    given = {"task": task, **dict.fromkeys(COUNTS.values(), epochs)}
    if quick:
        given |= {"train_size": 96, "source_size": 64, "align_samples": 64}
        shrink(task, 96)
    seconds, steps = watched(method, given)
    usual, whole = importlib.import_module(METHODS[method][0]).configure(task=task), Counter()
    for path, s in seconds.items():  # (), ("evaluate",), ("finetune", "evaluate"), ...
        first, last = (path or ("rest",))[0], (path or ("rest",))[-1]
        again = first in COUNTS and last not in ("features", "setup")  # those are made once
        whole[last] += s * (getattr(usual, COUNTS[first]) / epochs if again else 1)
    shares = {f"share_{stage}": whole[stage] / whole.total() for stage in STAGES}
    rows = [{"what": what, "seconds": s} for what, s in steps.items()]
    return [*rows, {"what": "run", "seconds": whole.total(), **shares}]


def short_run(method: str, given: dict) -> list[dict]:
    """Rows of steps on class prototypes plus noise; without classes, x is its own target."""
    rng, arrays = np.random.default_rng(0), {}
    prototypes = rng.normal(size=(max(1, given["classes"]), *given["shape"]))
    for split, n in (("train", given["samples"]), ("val", 32), ("test", 32)):
        y = np.arange(n) % len(prototypes)
        x = (prototypes[y] + rng.normal(size=(n, *given["shape"]))).astype(np.float32)
        arrays |= {f"x_{split}": x, f"y_{split}": y if given["classes"] else x}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/own.npz", **arrays)
        seconds, found = watched(method, {"task": f"{folder}/own.npz", **given})
    names = {("contrast", "features"): "features", ("align", "setup"): "labels"}
    found |= {name: seconds[path] for path, name in names.items() if path in seconds}
    return [{"what": what, "seconds": s} for what, s in found.items()]


def distance(method: str, n: int, d: int, classes: int) -> list[dict]:
    """Rows of OTDD or MMD: median seconds of five calls after the first, rise of the peak."""
    of = {"OTDD": otdd, "MMD": lambda x_s, y_s, x_t, y_t: mmd2(x_s, x_t)}[method]
    of(*data(20, 20, d, 2, 2))  # loads what it needs
    x_s, y_s, x_t, y_t = data(n, n, d, classes, classes)
    z, before, rows = x_t.clone().requires_grad_(), peak_gb("cpu"), []
    works = {"forward": lambda: of(x_s, y_s, x_t, y_t)}
    works["forward and backward"] = lambda: of(x_s, y_s, z, y_t).backward()
    for what, work in works.items():
        ends = []
        for _ in range(6):
            work()
            ends.append(time.process_time())
        s = statistics.median(b - a for a, b in pairwise(ends))
        rows.append({"what": what, "seconds": s, "memory_mb": 1e3 * (peak_gb("cpu") - before)})
    return rows


def alone(function: Callable, given: tuple) -> list[dict]:
    """The rows of a job, on one thread, with the peak of memory where they say none."""
    torch.set_num_threads(1)
    rows = function(*given)
    return [{"memory_mb": 1e3 * peak_gb("cpu"), **row} for row in rows]


def jobs(part: str, quick: bool) -> Iterator[tuple[dict, Callable, tuple]]:
    """What a part measures: columns of its rows, the function that makes the rows, its input."""
    if part == "stages":
        yield {"method": "imports alone"}, list, ([{"what": "run"}],)
        for task, method in product(TASKS[: 1 if quick else None], METHODS):
            yield {"method": method, "task": task}, whole_run, (method, task, quick)
        return
    sizes, methods = (GROWTH, OURS) if part == "growth" else (CLOUDS, ("OTDD", "MMD"))
    for quantity in list(sizes)[:: 2 if quick else 1]:
        some = methods[:1] if quantity in ALIGN else methods
        for value, method in product(list(sizes[quantity])[: 1 if quick else None], some):
            case = {"method": method, "quantity": quantity, "value": value}
            if part == "growth":
                given = BASE | GROWTH[quantity][value]
                given |= {"samples": 96, "source_size": 64} if quick else {}
                yield {"task": "own", **case}, short_run, (method, given)
            else:
                yield case, distance, (method, *{**CLOUD, quantity: value}.values())


def table(rows: list[dict], part: str) -> str:
    """The table of a part in Markdown, three digits of each number, from the rows of the CSV."""
    index = ("task", "method") if part == "stages" else ("quantity", "value")
    lines = {}  # {what the line is for: {head: number}}
    for row in (row for row in rows if row["part"] == part):
        line = lines.setdefault(tuple(row[name] or "-" for name in index), {})
        name = "" if part == "stages" else row["method"] + " "
        if row["seconds"]:
            unit, factor = ("s", 1) if row["what"] == "run" else ("ms", 1e3)
            line[f"{name}{row['what']}, {unit}"] = factor * float(row["seconds"])
        line[f"{name}memory, MB"] = float(row["memory_mb"])  # of several rows the last
        shares = [(stage, row[f"share_{stage}"]) for stage in STAGES]
        line |= {f"{stage}, %": 100 * float(share) for stage, share in shares if share}
    heads = dict.fromkeys(head for line in lines.values() for head in line)
    heads = sorted(heads, key=lambda head: head[-2:], reverse=True)  # ms, MB, s, %
    short = lambda v: "-" if v is None else f"{v:.{'0f' if v >= 100 else '3g'}}"  # noqa: E731
    cells = [[*index, *heads], ["---"] * (len(index) + len(heads))]
    cells += [[*key, *(short(line.get(head)) for head in heads)] for key, line in lines.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def cpu_name() -> str:
    """As Linux calls it, else as Python does."""
    info = Path("/proc/cpuinfo")
    names = re.findall("model name\t*: (.*)", info.read_text()) if info.exists() else []
    return (*names, platform.processor())[0]


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and few of them")
    parser.add_argument("--csv", type=Path, help="file of rows, of which the other parts' stay")
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    machine = {"threads": 1, "cpu": cpu_name(), "torch": torch.__version__}
    machine["command"] = shlex.join(["python", "results/bench_cost.py", *given])
    server = multiprocessing.get_context("forkserver")  # a process that does nothing but fork
    server.set_forkserver_preload(IMPORTS)
    rows = read(args.csv) if args.csv else []
    for part in args.only:
        rows = [row for row in rows if row["part"] != part]
        for case, function, given in jobs(part, args.quick):
            with ProcessPoolExecutor(1, mp_context=server) as pool:  # its own peak of memory
                found = pool.submit(alone, function, given).result()
            for numbers in found:
                row = {"part": part, **case, **numbers}
                row = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
                rows.append({**dict.fromkeys(COLUMNS, ""), **row, **machine})
            print(part, *case.values(), flush=True)
        print(table(rows, part), flush=True)
        if args.csv:
            write(args.csv, rows)
    return rows


if __name__ == "__main__":
    main()

"""Run commands of the method scripts in worker processes, and keep one row of each.

Used by the scripts beside this file. A worker imports the libraries once and keeps the data of the
task that it works on. A row is appended to the CSV file as soon as its run has ended, so that an
interruption loses only the runs that have not ended.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import functools
import importlib
import io
import json
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import connection
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
COLUMNS = ("method", "task", "seed", "test_error", "val_error", "metric", "epochs", "steps")
COLUMNS += ("train_size", "time_s", "before_s", "spikes", "converged", "test_error_perturbed")
COLUMNS += ("curve", "device", "torch", "commit", "command")
DATA = ("task", "data", "data_dir", "seed", "train_size", "published", "kind", "paper")
SOURCE = ("source", "source_size", "body", "seed", "data_dir")  # what it depends on, and its sizes
POINTS = 20  # of a validation curve
CODE = (":(glob)*.py", ":(glob)tasks/**/*.py", ":(glob)bodies/**", ":(exclude)bodies/README.md")


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that makes a row (or several), and how it is run here."""

    method: str
    task: str
    seed: int
    command: str  # as the row shows it
    file: str = ""  # of one's own data: where it lies on this machine
    extra: tuple = ()  # flags that the row does not show, for tests
    guess: float = 1.0  # of its time, in any unit


# ---- rows ----------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a lock, so that several programs can write to it."""
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerows(rows)


def write(path: Path, rows: list[dict]) -> None:
    """A CSV file with a column for every key of any row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows in {path}")


def finished(run: Path) -> dict:
    """The row of a run that stands in a folder: its result and the command that repeats it."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    made = json.loads((run / "config.json").read_text(encoding="utf-8"))
    script, *flags = made["command"]
    command = shlex.join(["python", Path(script).name, *flags])
    return {**result, "torch": made["versions"]["torch"], "command": command}


def commit() -> str:
    """The last commit that changed what a run executes (CODE); "" outside a repository."""
    argv = ["git", "log", "-1", "--no-merges", "--format=%h", "--", *CODE]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


# ---- in a worker ---------------------------------------------------------------------------------


def work(pipe, device: str) -> None:
    """Run jobs that come through the pipe; send back their rows, or the text of what failed."""
    import matplotlib
    import torch

    import run

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    run.draw_curves = lambda *args: None  # nobody looks at them
    run.load_task = functools.partial(_kept, {}, DATA, run.load_task)
    run.load_source = functools.partial(_kept, {}, SOURCE, run.load_source)
    while (job := pipe.recv()) is not None:
        with open(os.devnull, "w") as nowhere, io.StringIO() as said:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(said):
                try:
                    answer = rows_of(job, device)
                except BaseException:  # also SystemExit of a wrong flag
                    answer = said.getvalue() + traceback.format_exc()
        pipe.send(answer)


def _kept(kept: dict, names: tuple, load, cfg, *args, **flags):
    """load(cfg, ...), or what it gave last time if the named settings are those of last time."""
    key = (*(getattr(cfg, name) for name in names), *args[1:], *flags.items())
    if key not in kept:
        kept.clear()
        kept[key] = load(cfg, *args, **flags)
    return kept[key]


def rows_of(job: Job, device: str) -> list[dict]:
    """Run a job in this process. Returns its rows, without the commit."""
    script, *argv = shlex.split(job.command)[1:]
    if script == "results/all_tasks.py":
        return simple(job)
    module = importlib.import_module(script.removesuffix(".py"))
    with tempfile.TemporaryDirectory() as out:
        given = {"out": out, "device": device, "baselines": "off", "save_every": 10**6}
        given |= {"task": job.file} if job.file else {}
        cfg = dataclasses.replace(module.parse_args([*argv, *job.extra]), **given)
        result = module.main(cfg)
        return [row(job, result, Path(out), device)]


def row(job: Job, result: dict, out: Path, device: str) -> dict:
    """What is kept of a run."""
    import torch

    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [line for line in map(json.loads, lines) if line["stage"] == "finetune"]
    made = dict.fromkeys(COLUMNS, "") | {k: result[k] for k in COLUMNS if k in result}
    made |= {"method": job.method, "task": job.task, "command": job.command}
    if epochs:
        with (out / "steps.csv").open(encoding="utf-8") as file:
            made["steps"] = sum(1 for _ in file) - 1
        best = [min(line["val_error"] for line in epochs[: i + 1]) for i in range(len(epochs))]
        places = [round((i + 1) / POINTS * len(best)) for i in range(POINTS)]
        made["curve"] = " ".join(f"{best[max(place, 1) - 1]:.4g}" for place in places)
        first, last = epochs[0]["time_s"], epochs[-1]["time_s"]
        made["before_s"] = round(max(0.0, first - (last - first) / max(1, len(epochs) - 1)), 1)
    return made | {"device": hardware(device), "torch": torch.__version__}


def simple(job: Job) -> list[dict]:
    """The rows of the simple learners of a task."""
    import sklearn

    import tasks
    from tasks import baselines

    task = tasks.load_task(job.task, seed=job.seed)
    start = time.time()
    errors = baselines.simple_learners(task, job.seed)
    same = {"task": job.task, "seed": job.seed, "command": job.command, "metric": task.metric_name}
    same |= {"train_size": len(task.train), "time_s": round(time.time() - start, 1)}
    same |= {"device": hardware("cpu"), "torch": f"scikit-learn {sklearn.__version__}"}
    return [
        {"method": name, "test_error": round(error, 6), **same} for name, error in errors.items()
    ]


@functools.cache
def hardware(device: str) -> str:
    """The name of the processor that a run used."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, 1 thread"


# ---- the workers and their jobs ------------------------------------------------------------------


class Worker:
    """A process, the job that it has, and the group of jobs that it works on."""

    def __init__(self, device: str):
        self.device, self.job, self.group, self.since = device, None, None, 0.0
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, device), daemon=True)
        self.process.start()
        other.close()

    def begin(self, group: list[Job], index: int = 0) -> None:
        self.group, self.job, self.since = group, group.pop(index), time.monotonic()
        self.pipe.send(self.job)


def choose(
    worker: Worker, waiting: list, open_groups: list, left: float, seconds, idle: int
) -> list[Job] | None:
    """The group from which a free worker takes its next job; None if no job ends in time.

    Its own group first, since the data are there. Then a group that nobody has begun, if the
    workers that are free can finish it. Then the open group with most to do. A group that was
    begun is thus finished, and a comparison of methods is complete.

    Args:
        waiting: groups that nobody has begun, the most important first; the one that is chosen is
            moved to open_groups.
        left: seconds until the end.
        seconds: of a job, an estimate.
        idle: number of free workers, this one included.
    """
    if worker.group and worker.group in open_groups and seconds(worker.group[0]) <= left:
        return worker.group
    for group in waiting:
        times = [seconds(job) for job in group]
        if max(times) <= left and sum(times) / idle <= left:
            waiting.remove(group)
            open_groups.append(group)
            return group
    fits = [group for group in open_groups if group and seconds(group[0]) <= left]
    return max(fits, key=lambda group: sum(map(seconds, group)), default=None)


def run_all(
    groups: list[list[Job]], path: Path, jobs: int, device: str, limit: float, name: str = ""
) -> int:
    """Run all groups of jobs with so many workers, until done or `limit` seconds have passed.

    A row of each is appended to the CSV file. Returns: how many jobs failed.
    """
    end, failed, done, ratios = time.monotonic() + limit, 0, 0, [1.0]
    known = {(r["command"], r["device"]): float(r["time_s"]) for r in read(path) if r["time_s"]}
    measured = {command: time_s for (command, _), time_s in known.items()}
    waiting, open_groups = [list(group) for group in groups if group], []
    total = sum(map(len, waiting))
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the workers, too
    workers = [Worker(device) for _ in range(min(jobs, total))]

    def seconds(job: Job) -> float:
        return measured.get(job.command, job.guess * statistics.median(ratios[-100:]))

    while True:
        open_groups[:] = [group for group in open_groups if group]
        left = end - time.monotonic()
        free = [worker for worker in workers if worker.job is None]
        for i, worker in enumerate(free):
            group = choose(worker, waiting, open_groups, left, seconds, len(free) - i)
            if group:
                worker.begin(group)
                open_groups[:] = [group for group in open_groups if group]
        busy = {worker.pipe: worker for worker in workers if worker.job}
        if not busy or left <= 0:
            break
        for pipe in connection.wait(list(busy), timeout=max(0.0, min(left, 5.0))):
            worker, job = busy[pipe], busy[pipe].job
            try:
                answer = pipe.recv()
            except (EOFError, ConnectionResetError):  # the process has died
                worker.process.join()
                answer = f"the worker ended with code {worker.process.exitcode}"
                workers[workers.index(worker)] = Worker(device)
            worker.job, done, taken = None, done + 1, time.monotonic() - worker.since
            if isinstance(answer, str):
                failed += 1
                print(f"FAILED {job.command}\n{answer}", file=sys.stderr, flush=True)
                continue
            append(path, [{**row, "commit": name or commit()} for row in answer])
            ratios[:1] = [] if len(ratios) == 1 and ratios == [1.0] else ratios[:1]
            ratios.append(taken / job.guess)
            errors = ", ".join(f"{row['method']} {row['test_error']:.4g}" for row in answer)
            print(f"{done}/{total} {job.task} {job.seed}: {errors} ({taken:.0f} s)", flush=True)
    for worker in workers:
        if worker.job is None:
            worker.pipe.send(None)
        else:
            print(f"stopped: {worker.job.command}", flush=True)
            worker.process.kill()
        worker.process.join()
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Turn finished runs into rows of a CSV file.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--csv", required=True, type=Path, help="a run of a row there replaces it")
    args = parser.parse_args(argv)
    rows = {row["command"]: row for row in read(args.csv)}
    new = [finished(run) for run in args.runs if (run / "result.json").exists()]
    write(args.csv, list((rows | {row["command"]: row for row in new}).values()))


if __name__ == "__main__":
    main()

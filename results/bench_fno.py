"""Train a Fourier neural operator for as long as ORCA took: python results/bench_fno.py --csv FILE

The FNO of the package neuraloperator (pip install neuraloperator), which nothing else here needs,
on four simulated PDE tasks. For each row of ORCA (OTDD, CPU) in results/pdebench.csv and, if it is
there, results/all_tasks.csv: the same samples, and the wall time of that row, time_s. As in ours,
that is all from loading the data to the test error, but not the import of libraries. Run it on a
machine, and with a number of threads (OMP_NUM_THREADS), as the rows were. A row is written as soon
as it is there; what the file holds (task, seed, number of samples) is not run again.

As in our runs: x is standardised per channel and y per point, the loss is the task's relative L2
norm, and the epoch that is best on validation is tested. AdamW, a learning rate that rises for a
tenth of the time and falls along a cosine to 0 at its end. epochs may end in a part of one;
params_m counts a complex weight as two numbers.

Four layers with coordinates, as they come with the package, whose n_modes counts both signs: 64 are
the frequencies 0 to 32. Chosen on validation, seed 0, with 200 samples of advection (12 s of one
core) and 160 of darcy_2d (24 s); errors in brackets. What counts in so short a time is the number
of steps.
- learning rate 3e-3 (advection 0.029, darcy_2d 0.37), not 1e-3 (0.074, 0.50); batches of 32
- batches of 8 samples (0.013, 0.21), not 32 (0.025, 0.37), 16 (-, 0.26) or 4 (0.018, 0.20)
- advection: 64 modes (0.025), not 32 (0.029); relative L2 loss (0.029), not MSE of standardised y
  (0.071)
- darcy_2d: width 16 (0.19), which is twice as fast, not 32 (0.21), both with 16 x 16 modes
"""

import argparse
import copy
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
import collect  # noqa: E402 (the repository's root has to be on the path first)

import tasks  # noqa: E402
from tasks import shallow_water  # noqa: E402

# n or B samples, C channels, L points or H x W cells
TASKS = ("advection", "diffusion_reaction_1d", "darcy_2d", "shallow_water")
ORCA = [RESULTS / "pdebench.csv", RESULTS / "all_tasks.csv"]
MODEL = {  # by the length of x_shape: 1D, 2D
    2: {"n_modes": (64,), "hidden_channels": 64},
    3: {"n_modes": (16, 16), "hidden_channels": 16},
}
LR, BATCH = 3e-3, 8  # highest learning rate; samples a step
SHOWN = ("task", "seed", "train_size", "epochs", "time_s", "val_error", "test_error")
WARMUP = 0.1  # share of the time in which the learning rate rises


def key(row: dict) -> tuple:
    """What tells a row: task, seed, samples to train on."""
    return row["task"], int(row["seed"]), int(row["train_size"])


def chosen(rows: list[dict], names: list[str], seeds: list[int], done: list[dict]) -> list[dict]:
    """ORCA's rows (OTDD, simulated data, CPU) of these tasks and seeds; none that is done."""
    wanted = {"method": "orca", "align": "otdd", "data": "simulated", "device": "cpu"}
    found, seen = [], {key(row) for row in done}
    for row in rows:
        fits = all(row.get(name) == value for name, value in wanted.items())
        if fits and row["task"] in names and int(row["seed"]) in seeds and key(row) not in seen:
            seen.add(key(row))
            found.append(row)
    return found


def arrays(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """All samples: x and y, (n, C, L) or (n, C, H, W) each."""
    return next(iter(DataLoader(dataset, len(dataset))))


def predict(net: nn.Module, scales: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """x (B, C, L) or (B, C, H, W) to y, in its units. scales: what tasks.statistics() returns."""
    x_mean, x_std, y_mean, y_std = scales
    return y_mean + y_std * net((x - x_mean) / x_std)


@torch.no_grad()
def error(net: nn.Module, scales: tuple, task: tasks.Task, x: Tensor, y: Tensor) -> float:
    """The task's own error on all samples (n, ...) together."""
    return task.metric(torch.cat([predict(net, scales, part) for part in x.split(32)]), y)


def rate(share: float) -> float:
    """Factor of the learning rate after this share of the time: a rise, then half a cosine."""
    return min(1.0, 0.1 + share / WARMUP) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def train(net: nn.Module, scales: tuple, task: tasks.Task, seed: int, end: float) -> tuple:
    """Train until it is time for the last validation and the test, which are to be over at `end`.

    Leaves the weights of the best epoch (the last may be a part of one) in net.
    Returns: the error of that epoch on validation data; epochs done.
    """
    (x, y), val, rng = arrays(task.train), arrays(task.val), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    error(net, scales, task, *(part[:BATCH] for part in val))  # the first time takes longer
    begin = time.time()
    error(net, scales, task, *val)  # how long, the loop has to know
    now = time.time()
    end -= (now - begin) * (1 + len(task.test) / len(task.val))
    begin, best, weights, seen = now, math.inf, {}, 0
    while time.time() < end:
        for rows in torch.randperm(len(x), generator=rng).split(BATCH):
            share = (time.time() - begin) / (end - begin)
            if share >= 1:
                break
            optimizer.param_groups[0]["lr"] = LR * rate(share)
            loss = task.loss(predict(net, scales, x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(rows)
        found = error(net, scales, task, *val)
        if found < best:
            best, weights = found, copy.deepcopy(net.state_dict())
    if not seen:
        raise ValueError(f"{task.name}: no time for a step; give a larger --budget-scale")
    net.load_state_dict(weights)
    return best, seen / len(x)


def measure(row: dict, FNO: Callable, budget_s: float) -> dict:
    """Load the data of a row of ORCA's, train for budget_s in all, test. Returns a row."""
    name, seed, size = key(row)
    shallow_water.history.cache_clear()  # each row pays for its own data, as a run does
    start = time.time()
    torch.manual_seed(seed)
    task = tasks.load_task(name, "simulated", seed=seed, train_size=size)
    scales = tasks.statistics(task)
    channels = {"in_channels": task.x_shape[0], "out_channels": task.y_shape[0]}
    net = FNO(**channels, **MODEL[len(task.x_shape)])
    val_error, epochs = train(net, scales, task, seed, start + budget_s)
    test_error = error(net, scales, task, *arrays(task.test))
    time_s = time.time() - start
    numbers = sum(p.numel() * (1 + p.is_complex()) for p in net.parameters())
    return {
        "method": "fno",
        **{"task": name, "data": task.data, "seed": seed, "metric": task.metric_name},
        **{"test_error": round(test_error, 6), "val_error": round(val_error, 6)},
        **{"train_size": size, "epochs": round(epochs, 1)},
        **{"budget_s": round(budget_s, 1), "time_s": round(time_s, 1)},
        **{"params_m": round(numbers / 1e6, 3), "device": str(next(net.parameters()).device)},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--csv", required=True, type=Path, help="add the rows to this file")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--from", nargs="+", type=Path, default=ORCA, help="ORCA's rows", dest="of")
    parser.add_argument("--budget-scale", type=float, default=1.0, help="factor on ORCA's time")
    args = parser.parse_args(argv)
    try:
        import neuralop
        from neuralop.models import FNO
    except ImportError as missing:
        line = f"{missing.name} is missing; pip install neuraloperator"
        parser.exit(2, f"{parser.prog}: error: {line}\n")
    made = {"torch": torch.__version__, "neuralop": neuralop.__version__}
    flags = sys.argv[1:] if argv is None else argv
    made["command"] = shlex.join(["python", "results/bench_fno.py", *flags])
    rows, ours = collect.read(args.csv), [row for file in args.of for row in collect.read(file)]
    todo = chosen(ours, args.tasks, args.seeds, rows)
    print(f"{len(todo)} rows to add", flush=True)
    for row in todo:
        new = measure(row, FNO, args.budget_scale * float(row["time_s"]))
        print("fno", *(f"{k}={new[k]}" for k in SHOWN), f"orca={row['test_error']}", flush=True)
        rows.append(new | made)
        collect.write(args.csv, rows)


if __name__ == "__main__":
    main()

"""The loss around the solutions of finished runs (slide 23): planes, and numbers for sharpness.

    bash results/landscape.sh               makes the runs and calls this
    python results/landscape.py runs/landscape/*/ --csv results/landscape.csv

Runs of the same task and seed start from the same weights. Around each solution theta, which is the
epoch that was best on validation data, two random directions span a plane of losses,
L(theta + a d + b d'). Each filter (row of a weight) of a direction has the norm of that filter of
theta, biases and LayerNorms stay: without that, a net whose weights are large would look flat (Li
et al. 2018, Visualizing the Loss Landscape of Neural Nets). Sharpness is the mean over many
directions of L(theta + r d) - L(theta), with its standard error, so that nobody argues from a
picture. L is the task's own loss, of training samples (where optima are found) and of test samples.
Runs of the same seed get the same random numbers, so that they can be compared seed by seed.
"""

import argparse
import csv
import importlib
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tasks  # noqa: E402 (the repository's root has to be on the path first)

RADII = (0.1, 0.2, 0.35, 0.5)  # of sharpness, in norms of the filters


def direction(model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
    """A random direction whose filters have the norms of the model's: {name: like the weight}."""
    found = {}
    for name, w in model.named_parameters():
        if w.ndim > 1:
            d = torch.randn(w.shape, generator=rng)
            norms = w.detach().flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1).clamp(min=1e-12)
            found[name] = d * norms.view(-1, *[1] * (w.ndim - 1))
    return found


@torch.no_grad()
def loss_at(model: nn.Module, task: tasks.Task, x: Tensor, y: Tensor, steps: list[tuple]) -> float:
    """The task's loss with weights theta + sum of a d, for steps (a, d); the weights come back."""
    weights, theta = dict(model.named_parameters()), {}
    for a, d in steps:
        for name in d:
            theta.setdefault(name, weights[name].clone())
            weights[name] += a * d[name]
    parts = [task.loss(model(x[i : i + 256]), y[i : i + 256]) for i in range(0, len(x), 256)]
    sizes = [len(x[i : i + 256]) for i in range(0, len(x), 256)]
    for name, w in theta.items():
        weights[name].copy_(w)
    return sum(float(p) * n for p, n in zip(parts, sizes, strict=True)) / len(x)


def load(run: Path, samples: int) -> tuple[nn.Module, tasks.Task, dict, dict]:
    """The model of a run, its task, {split: (x, y)} of some samples, and the run's result."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    cfg = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    which = (cfg["task"], cfg["data"], cfg["data_dir"], cfg["seed"], cfg["train_size"] or None)
    task = tasks.load_task(*which, cfg["published"])
    model = importlib.import_module(result["method"]).load(run)
    some = {
        split: default_collate([data[i] for i in range(min(samples, len(data)))])
        for split, data in (("train", task.train), ("test", task.test))
    }
    return model, task, some, result


def around(run: Path, points: int, reach: float, directions: int, samples: int) -> list[dict]:
    """The rows of one run: its losses, their rise for each radius, and with points > 0 a plane."""
    model, task, some, result = load(run, samples)
    rng = torch.Generator().manual_seed(result["seed"])
    name = {key: result[key] for key in ("method", "align", "task", "seed")}
    name = {"run": run.name, **name}
    d, other = direction(model, rng), direction(model, rng)
    ways, rows = [direction(model, rng) for _ in range(directions)], []
    for split, (x, y) in some.items():
        base = loss_at(model, task, x, y, [])
        rows.append({**name, "split": split, "what": "loss", "a": 0.0, "value": base})
        for r in RADII:
            rises = [loss_at(model, task, x, y, [(r, way)]) - base for way in ways]
            error = statistics.stdev(rises) / math.sqrt(len(rises))
            row = {"what": "rise", "a": r, "value": statistics.mean(rises), "error": error}
            rows.append({**name, "split": split, **row})
        print(f"{run.name:12} {split:5} {base:.4f} + {row['value']:.4f} +/- {error:.4f} at r = {r}")
    x, y = some["train"]
    for a in torch.linspace(-reach, reach, points).tolist():
        for b in torch.linspace(-reach, reach, points).tolist():
            loss = loss_at(model, task, x, y, [(a, d), (b, other)])
            row = {"split": "train", "what": "plane", "a": a, "b": b, "value": loss}
            rows.append({**name, **row})
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--plane-seed", type=int, default=0, help="runs of this seed get a plane")
    parser.add_argument("--points", type=int, default=11, help="of a plane, along each side")
    parser.add_argument("--reach", type=float, default=0.5, help="of a plane, to each side")
    parser.add_argument("--directions", type=int, default=20, help="for the rise, 2 at least")
    parser.add_argument("--samples", type=int, default=300, help="of each split, at most")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    rows = []
    for run in args.runs:
        seed = json.loads((run / "result.json").read_text(encoding="utf-8"))["seed"]
        points = args.points if seed == args.plane_seed else 0
        rows += around(run, points, args.reach, args.directions, args.samples)
    if args.csv:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, keys, lineterminator="\n")
            writer.writeheader()
            short = lambda v: f"{v:.5g}" if isinstance(v, float) else v  # noqa: E731
            writer.writerows({k: short(v) for k, v in row.items()} for row in rows)
    return rows


if __name__ == "__main__":
    main()

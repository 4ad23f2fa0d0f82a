"""The loss around the solutions of finished runs (slide 23): a plane, and a number for sharpness.

    python orca.py --task satellite --align none --out runs/landscape/nft
    python pare.py --task satellite --out runs/landscape/pare
    python results/landscape.py runs/landscape/nft runs/landscape/pare --csv results/landscape.csv

Runs of the same task and seed start from the same weights. Around each solution theta two random
directions span a plane of losses, L(theta + a d + b d'). Each filter (row of a weight) of a
direction has the norm of that filter of theta, biases and LayerNorms stay: without that, a net
whose weights are large would look flat (Li et al. 2018, Visualizing the Loss Landscape of Neural
Nets). Sharpness is the mean over many directions of L(theta + r d) - L(theta), with its standard
error, so that nobody argues from a picture. All on the same samples of the test set, by the task's
own loss.
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

RADII = (0.1, 0.2, 0.4)  # of sharpness, in norms of the filters


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


def load(run: Path, samples: int) -> tuple[nn.Module, tasks.Task, Tensor, Tensor, dict]:
    """The model of a run, its task, some test samples and the run's result."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    cfg = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    which = (cfg["task"], cfg["data"], cfg["data_dir"], cfg["seed"], cfg["train_size"] or None)
    task = tasks.load_task(*which, cfg["published"])
    model = importlib.import_module(result["method"]).load(run)
    x, y = default_collate([task.test[i] for i in range(min(samples, len(task.test)))])
    return model, task, x, y, result


def around(run: Path, points: int, reach: float, directions: int, samples: int) -> list[dict]:
    """The rows of one run: its plane, and its sharpness for each radius."""
    model, task, x, y, result = load(run, samples)
    rng = torch.Generator().manual_seed(result["seed"])
    name = {"run": run.name, "method": result["method"], "task": result["task"]}
    base, rows = loss_at(model, task, x, y, []), []
    d, other = direction(model, rng), direction(model, rng)
    for a in torch.linspace(-reach, reach, points).tolist():
        for b in torch.linspace(-reach, reach, points).tolist():
            loss = loss_at(model, task, x, y, [(a, d), (b, other)])
            rows.append({**name, "what": "plane", "a": a, "b": b, "value": loss})
    ways = [direction(model, rng) for _ in range(directions)]
    for r in RADII:
        rises = [loss_at(model, task, x, y, [(r, way)]) - base for way in ways]
        error = statistics.stdev(rises) / math.sqrt(len(rises))
        row = {"what": "sharpness", "a": r, "value": statistics.mean(rises), "error": error}
        rows.append({**name, **row})
        print(f"{run.name:12} r = {r:.1f}: loss {base:.4f} + {row['value']:.4f} +/- {error:.4f}")
    return rows


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--points", type=int, default=11, help="of the plane, along each side")
    parser.add_argument("--reach", type=float, default=0.5, help="of the plane, to each side")
    parser.add_argument("--directions", type=int, default=20, help="for the sharpness")
    parser.add_argument("--samples", type=int, default=500, help="of the test set")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    how = (args.points, args.reach, args.directions, args.samples)
    rows = [row for run in args.runs for row in around(run, *how)]
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

"""What the methods have to beat: the simple learners of tasks/baselines.py, as rows.

    python results/baselines.py --task satellite --seed 0

The same data and splits as the method scripts use with the same --task, --data and --seed. Prints
the test errors, and with --csv FILE adds a row for each. For images with a target for every pixel
there is a linear filter beside them: 7 x 7 pixels, 3 x 3 with more than four channels.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tasks  # noqa: E402 (the repository's root has to be on the path first)
from tasks import baselines  # noqa: E402


def linear_filter(train, x_new: list[Tensor], y_shape: tuple) -> list[Tensor]:
    """Each pixel's target from the window of pixels around it, by least squares: (., C, H, W)."""
    width = 7 if train[0][0].shape[0] <= 4 else 3

    def windows(x: Tensor) -> Tensor:  # (C, H, W) -> (H * W, C * width^2 + 1), a one at the end
        x = F.unfold(F.pad(x[None], [width // 2] * 4, mode="replicate"), width)[0].T
        return F.pad(x, (0, 1), value=1.0).double()

    gram = right = 0.0
    for x, y in train:
        known, target = ~y.flatten(1).T.isnan(), y.flatten(1).T.double().nan_to_num()
        inputs = windows(x) * known.all(dim=1, keepdim=True)
        gram, right = gram + inputs.T @ inputs, right + inputs.T @ target
    size = gram.diagonal().mean()
    weights = torch.linalg.solve(gram + 1e-6 * size * torch.eye(len(gram)).double(), right)
    return [
        torch.stack([(windows(x) @ weights).T.reshape(y_shape).float() for x in new])
        for new in x_new
    ]


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", default="satellite", help="a task's name, or FILE.npz")
    parser.add_argument("--data", default="simulated", choices=("simulated", "real"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-size", type=int, help="default: all there are")
    parser.add_argument("--kind", default="", choices=("", *tasks.own.KINDS))
    parser.add_argument("--csv", type=Path, help="add the rows to this file")
    args = parser.parse_args(argv)
    which = (args.task, args.data, args.data_dir, args.seed, args.train_size)
    task = tasks.load_task(*which, kind=args.kind)
    found = baselines.simple_learners(task, args.seed)
    if len(task.x_shape) == len(task.y_shape) == 3:
        test = [part for part, _ in task.test]
        (out,) = linear_filter(task.train, [test], task.y_shape)
        found["linear filter"] = task.metric(out, torch.stack([y for _, y in task.test]))
    for name, error in found.items():
        print(f"{name:20} {task.metric_name} {error:.4f}")
    if args.csv:
        size = f" --train-size {args.train_size}" if args.train_size else ""
        command = f"python results/baselines.py --task {args.task}{size} --seed {args.seed}"
        rows = [
            [name, args.task, args.seed, f"{error:.6f}", command] for name, error in found.items()
        ]
        new = not args.csv.exists()
        with args.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([["method", "task", "seed", "test_error", "command"]] * new + rows)
    return found


if __name__ == "__main__":
    main()

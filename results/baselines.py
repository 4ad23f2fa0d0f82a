"""What the methods have to beat: the majority class, 1-nearest-neighbour, logistic regression.

    python results/baselines.py --task satellite --seed 0

The same data and splits as the method scripts use with the same --task, --data and --seed. Prints
the test errors, and with --csv FILE adds a row for each. The ridge of the logistic regression is
chosen on validation; 1-nearest-neighbour has nothing to choose.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tasks  # noqa: E402 (the repository's root has to be on the path first)

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2)


def arrays(dataset) -> tuple[Tensor, Tensor]:
    """All samples, flattened, and their labels: (n, C * L), (n,)."""
    x, y = zip(*DataLoader(dataset, 1024), strict=True)
    return torch.cat(x).flatten(1), torch.cat(y)


def nearest(x: Tensor, y: Tensor, x_new: Tensor) -> Tensor:
    """The label of the nearest training sample, (m,)."""
    return torch.cat([y[torch.cdist(part, x).argmin(dim=1)] for part in x_new.split(500)])


def logistic(x: Tensor, y: Tensor, num_classes: int, ridge: float) -> torch.nn.Linear:
    """Multinomial logistic regression, fitted to convergence."""
    head = torch.nn.Linear(x.shape[1], num_classes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(head(x), y) + ridge * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head


def errors(task: tasks.Task) -> dict[str, float]:
    """Test error of each baseline, by the task's own metric."""
    (x, y), (x_val, y_val), (x_test, y_test) = map(arrays, (task.train, task.val, task.test))
    K = task.num_classes
    votes = lambda guess: F.one_hot(guess, K).float()  # noqa: E731 (a class as certain logits)
    majority = y.bincount().argmax().expand(len(y_test))
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    z, z_val, z_test = ((part - mean) / std for part in (x, x_val, x_test))
    heads = [logistic(z, y, K, ridge) for ridge in RIDGES]
    with torch.no_grad():
        best = min(heads, key=lambda head: task.metric(head(z_val), y_val))
        return {
            "majority class": task.metric(votes(majority), y_test),
            "1-NN": task.metric(votes(nearest(x, y, x_test)), y_test),
            "logistic regression": task.metric(best(z_test), y_test),
        }


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", default="satellite", help="a task's name, or FILE.npz")
    parser.add_argument("--data", default="simulated", choices=("simulated", "real"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="add the rows to this file")
    args = parser.parse_args(argv)
    task = tasks.load_task(args.task, args.data, args.data_dir, args.seed)
    found = errors(task)
    for name, error in found.items():
        print(f"{name:20} {task.metric_name} {error:.4f}")
    if args.csv:
        command = f"python results/baselines.py --task {args.task} --seed {args.seed}"
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

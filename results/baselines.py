"""What the methods have to beat: a trivial predictor, 1-nearest-neighbour, linear models.

    python results/baselines.py --task satellite --seed 0

The same data and splits as the method scripts use with the same --task, --data and --seed. Prints
the test errors, and with --csv FILE adds a row for each. Trivial is the majority class, or a
constant score, or the mean of the training targets; for a PDE also a copy of the first field. The
linear model of classes is logistic regression, or, with more than 200 inputs or for other kinds,
ridge regression of the whole target on the whole input; for images with a target for every pixel
there is a linear filter beside it: 7 x 7 pixels, 3 x 3 with more than four channels. Ridges are
chosen on validation.
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
RIDGES_OF_SERIES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)  # a series from a series may be quite exact


def arrays(dataset) -> tuple[Tensor, Tensor]:
    """All samples, flattened, (n, d), and their labels, (n, ...)."""
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


def ridge_regression(x: Tensor, y: Tensor, x_new: list[Tensor], ridge: float) -> list[Tensor]:
    """Least squares with a penalty on the weights, solved in the space of samples.

    Args: x (n, d), standardised; y (n, m); x_new: inputs to predict for, (., d) each.
    Returns: the predictions, (., m) each.
    """
    mean = y.mean(dim=0)
    kernel = x @ x.T / x.shape[1]
    weights = torch.linalg.solve(kernel + ridge * torch.eye(len(x)).to(x), y - mean)
    return [new @ (x.T @ weights) / x.shape[1] + mean for new in x_new]


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


def chosen(task: tasks.Task, guesses: list[tuple], y_val: Tensor) -> Tensor:
    """The test predictions whose companions on validation have the smallest error."""
    return min(guesses, key=lambda pair: task.metric(pair[0], y_val))[1]


def errors(task: tasks.Task) -> dict[str, float]:
    """Test error of each baseline, by the task's own metric."""
    torch.manual_seed(0)
    (x, y), (x_val, y_val), (x_test, y_test) = map(arrays, (task.train, task.val, task.test))
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    z, z_val, z_test = ((part - mean) / std for part in (x, x_val, x_test))
    found, K = {}, task.num_classes
    target = F.one_hot(y, K).float() if task.kind == "classes" else y
    if task.kind == "classes":
        votes = lambda guess: F.one_hot(guess, K).float()  # noqa: E731 (certain logits)
        found["majority class"] = votes(y.bincount().argmax().expand(len(y_test)))
        found["1-NN"] = votes(nearest(x, y, x_test))
    elif task.kind == "regression":
        found["mean of the targets"] = y.nanmean(dim=0).nan_to_num().expand(y_test.shape)
        if task.name in tasks.PDES:
            fields = x_test.reshape(-1, *task.x_shape)
            found["copy of the input"] = fields[:, : task.y_shape[0]]
    else:
        found["constant score"] = torch.zeros(y_test.shape)
    if task.kind == "classes" and x.shape[1] <= 200:
        heads = [logistic(z, y, K, ridge) for ridge in RIDGES]
        pairs = [(head(z_val).detach(), head(z_test).detach()) for head in heads]
        found["logistic regression"] = chosen(task, pairs, y_val)
    else:
        flat = torch.where(target.isnan(), target.nanmean(dim=0).nan_to_num(), target).flatten(1)
        pairs, more = [], RIDGES_OF_SERIES if len(task.y_shape) == 2 else ()
        for ridge in (*more, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0):
            guess = ridge_regression(z, flat, [z_val, z_test], ridge)
            pairs.append([g.reshape(-1, *target.shape[1:]) for g in guess])
        found["ridge regression"] = chosen(task, pairs, y_val)
    if len(task.y_shape) == 3:
        shape = lambda part: part.reshape(-1, *task.x_shape)  # noqa: E731
        images = [shape(part) for part in (z_val, z_test)]
        pairs = zip(shape(z), y, strict=True)
        found["linear filter"] = linear_filter(list(pairs), images, task.y_shape)[1]
    return {name: task.metric(guess, y_test) for name, guess in found.items()}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", default="satellite", help="a task's name, or FILE.npz")
    parser.add_argument("--data", default="simulated", choices=("simulated", "real"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-size", type=int, help="default: all there are")
    parser.add_argument("--csv", type=Path, help="add the rows to this file")
    args = parser.parse_args(argv)
    task = tasks.load_task(args.task, args.data, args.data_dir, args.seed, args.train_size)
    found = errors(task)
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

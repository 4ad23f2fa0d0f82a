"""What simple learners make of a task: the errors that fine-tuning has to beat.

A trivial prediction, the nearest neighbour, and a linear model, from scikit-learn, on the raw
arrays: flattened, every input standardised by the training set. The regularisation of the linear
model is chosen on the validation set; each error is the task's own, on the test set.
"""

import math
import time
import warnings

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tasks

RIDGES = tuple(10.0**power for power in range(-8, 4))  # times the number of training samples
CS = (1e-2, 1e-1, 1.0, 10.0)  # inverse regularisation of logistic regression, in rising order
STEPS = 300  # of its solver, at most
LOGISTIC = 1e7  # samples * inputs * classes beyond which ridge regression is taken instead
SPEED = 2e9  # multiplications a second that a slow core makes, for estimates


def cheap(task: "tasks.Task", seconds: float = 5.0) -> bool:
    """Whether simple_learners(task) is expected to take less than so many seconds on a CPU."""
    return cost(task) < seconds


def cost(task: "tasks.Task") -> float:
    """About how many seconds simple_learners(task) takes on one slow core."""
    n, m = len(task.train), len(task.val) + len(task.test)
    d, outputs = math.prod(task.x_shape), math.prod(task.out_shape)
    neighbours = n * m * d
    if _is_logistic(task):
        linear = len(CS) * STEPS * 2 * n * d * outputs
    else:
        side = min(n, d)
        linear = n * d * side + 10 * side**3 + len(RIDGES) * (side + m) * max(d, n) * outputs
    read = 100 * (n + m) * (d + outputs)
    return (neighbours + linear + read) / SPEED


def simple_learners(
    task: "tasks.Task", seed: int = 0, budget_s: float = math.inf
) -> dict[str, float]:
    """The test errors of simple learners by name, the best of each kind on validation.

    "majority class", "mean of the targets" or "constant score"; "copy of the input" where x and y
    have one shape; "1-NN"; "logistic regression" of classes or, where that is slow, "ridge
    regression", which is also for labels, masks and quantities.

    Args:
        seed: of the solver.
        budget_s: seconds; a learner that has not begun by then is left out.
    Raises: ValueError if the task's metric is not defined on its test set.
    """
    start, found = time.monotonic(), {}
    sets = [_arrays(dataset) for dataset in (task.train, task.val, task.test)]
    for learner in (_trivial, _copy, _nearest, _linear):
        if time.monotonic() - start >= budget_s:
            break
        named = learner(task, sets, seed)
        if named:
            name, out = named
            found[name] = _error(task, task.test, out, sets[2][1])
    return found


def compared(errors: dict[str, float], test_error: float | None) -> list[str]:
    """The errors of simple learners in a line; another one if the best of them beats a run.

    test_error: of the run, None where it is not defined.
    """
    shown = ", ".join(f"{name} {error:.4g}" for name, error in errors.items())
    lines, best = [f"simple learners: {shown}"], min(errors, key=errors.get)
    if test_error is not None and errors[best] < test_error:
        lines += [f"note: {best} is better than this run; more --steps or another --lr may help"]
    return lines


# ---- the learners: each gives its name and its predictions for the test set ----


def _trivial(task, sets, seed):
    (_, y), _, (x_new, _) = sets
    shape = (len(x_new), *task.out_shape)
    if task.kind == "classes":
        return "majority class", _votes(y.bincount().argmax().expand(len(x_new)), task)
    if task.kind == "regression":
        return "mean of the targets", y.nanmean(dim=0).nan_to_num().expand(shape)
    return "constant score", torch.zeros(shape)


def _copy(task, sets, seed):
    if task.kind != "regression" or len(task.y_shape) < 2 or task.x_shape != task.y_shape:
        return None
    return "copy of the input", sets[2][0].view(-1, *task.y_shape)


def _nearest(task, sets, seed):
    from sklearn.neighbors import NearestNeighbors

    (x, y), _, (x_new, _) = sets
    mean, std = _statistics(x)
    known = NearestNeighbors(n_neighbors=1).fit((x - mean) / std)
    row = torch.from_numpy(known.kneighbors((x_new - mean) / std, return_distance=False)[:, 0])
    return "1-NN", _votes(y[row], task) if task.kind == "classes" else _filled(y)[row]


def _linear(task, sets, seed):
    """The linear model whose regularisation has the least validation error."""
    (x, y), (x_val, y_val), (x_new, _) = sets
    mean, std = _statistics(x)
    z, z_val, z_new = ((part - mean) / std for part in (x, x_val, x_new))
    fit = _logistic if _is_logistic(task) else _ridge
    best = min(
        fit(task, z, y, (z_val, z_new), seed),
        key=lambda outs: _error(task, task.val, outs[0], y_val),
    )
    return ("logistic" if _is_logistic(task) else "ridge") + " regression", best[1]


def _logistic(task, z, y, new, seed):
    """For each strength: the logits for each of new. A class that z lacks has the lowest."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=STEPS, warm_start=True, random_state=seed)
    for C in CS:
        with warnings.catch_warnings():  # a weak one need not converge: validation decides
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=C).fit(z.double().numpy(), y.numpy())
        outs = []
        for part in new:
            logits = torch.from_numpy(model.decision_function(part.double().numpy()))
            if logits.ndim == 1:  # of two classes, that of the second
                logits = torch.stack([-logits, logits], dim=1)
            out = torch.full((len(part), task.num_classes), float(logits.min()) - 1).double()
            out[:, model.classes_] = logits
            outs.append(out)
        yield outs


def _ridge(task, z, y, new, seed):
    """For each strength: the predictions for each of new. Classes are zeros and ones."""
    from sklearn.linear_model import Ridge

    target = _votes(y, task) if task.kind == "classes" else _filled(y)
    for ridge in RIDGES:
        model = Ridge(alpha=ridge * len(z), random_state=seed)
        model.fit(z.double().numpy(), target.flatten(1).double().numpy())
        outs = [torch.from_numpy(model.predict(part.double().numpy())) for part in new]
        yield [out.view(-1, *task.out_shape) for out in outs]


# ---- what they share ----


def _is_logistic(task: "tasks.Task") -> bool:
    size = len(task.train) * math.prod(task.x_shape) * task.num_classes
    return task.kind == "classes" and size < LOGISTIC


def _arrays(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """All samples, flattened, (n, d) float32, and their labels, (n, ...)."""
    dataset = getattr(dataset, "plain", dataset)  # images as they are, not cropped or mirrored
    x, y = zip(*DataLoader(dataset, 1024), strict=True)
    return torch.cat(x).flatten(1), torch.cat(y)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every input, (d,); 1 for the deviation of a constant one."""
    std, mean = torch.std_mean(x.double(), dim=0, correction=0)
    return mean.float(), torch.where(x.amax(dim=0) > x.amin(dim=0), std, 1.0).float()


def _votes(y: Tensor, task: "tasks.Task") -> Tensor:
    """Certain logits of classes, (n,) -> (n, K)."""
    return torch.nn.functional.one_hot(y, task.num_classes).double()


def _filled(y: Tensor) -> Tensor:
    """y with the mean of the known samples where it is unknown."""
    return torch.where(y.isnan(), y.nanmean(dim=0).nan_to_num(), y)


def _error(task: "tasks.Task", dataset: Dataset, out: Tensor, y: Tensor) -> float:
    return task.metric(*tasks.pooled(dataset, out.float(), y))

"""Data of your own: what kind of task a FILE.npz is follows from its arrays.

x_train, y_train, x_test, y_test and, optionally, x_val, y_val. x is a series, (n, L) or (n, C, L),
or an image, (n, C, H, W). y is one of

    whole numbers (n,)                         classes 0..K-1
    zeros and ones (n, K)                      multi-label
    zeros and ones (n, H, W) or (n, C, H, W)   masks; (n, C, L) for series
    floats (n,) or (n, K)                      regression, K numbers a sample
    floats (n, C, L) or (n, [C,] H, W)         dense regression

where zeros and ones are stored as whole numbers or booleans. An array of floats is a regression
even if all its values are whole.
"""

from functools import partial
from pathlib import Path

import numpy as np

from tasks import files, metrics

MEASURES = {  # kind: (loss, metric, name of the metric)
    "classes": (metrics.cross_entropy, metrics.zero_one, "0-1 error"),
    "labels": (metrics.bce, metrics.mean_ap, "1 - mAP"),
    "mask": (metrics.bce, metrics.auroc, "1 - AUROC"),
    "regression": (metrics.mse, metrics.relative_rmse, "RMSE / deviation"),
}


def read(path: Path) -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The record of a task, and its splits (x, y): x float32; y int64 for classes, else float32.

    Raises: ValueError, one line that names the file, the array and what was expected.
    """
    required = ("x_train", "y_train", "x_test", "y_test")
    arrays = files.read_npz(path, required, optional=("x_val", "y_val"))
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise ValueError(f"{path}: x_val and y_val go together; give both or neither")
    names = [split for split in ("train", "val", "test") if f"x_{split}" in arrays]
    splits = {s: _split(path, s, arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in names}
    for i, name in enumerate("xy"):
        shapes = {split: pair[i].shape[1:] for split, pair in splits.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{path}: {name} differs in shape between the splits: {shapes}")
    (x, y), labels = splits["train"], {split: pair[1] for split, pair in splits.items()}
    kind = _kind(path, labels)
    loss, metric, metric_name = MEASURES[kind]
    if kind == "regression":
        loss = partial(loss, scale=float(y.std()) or 1.0)
    series = {"embedded": "words", "paper": "conll2003"}
    dense = "voc" if y.ndim > 2 else "cifar10"
    record = {
        "title": f"your data: {path.name}",
        "x_shape": x.shape[1:],
        "y_shape": y.shape[1:],
        "kind": kind,
        "num_classes": _classes(path, labels) if kind == "classes" else y.shape[1],
        "loss": loss,
        "metric": metric,
        "metric_name": metric_name,
        "sources": series if x.ndim == 3 else {"embedded": "shapes", "paper": dense},
        "published": {},
    }
    form = np.int64 if kind == "classes" else np.float32
    return record, {split: (x, y.astype(form)) for split, (x, y) in splits.items()}


def _split(path: Path, split: str, x: np.ndarray, y: np.ndarray) -> tuple:
    """One split with its channels in place: x float32 (n, C, ...), y as it is or (n, C, ...)."""
    if x.ndim not in (2, 3, 4):
        raise ValueError(
            f"{path}: x_{split} has shape {x.shape}, expected series, (n, L) or (n, C, L), or "
            "images, (n, C, H, W)"
        )
    x = x[:, None] if x.ndim == 2 else x
    if len(x) != len(y):
        raise ValueError(f"{path}: x_{split} has {len(x)} samples but y_{split} has {len(y)}")
    if y.ndim == 3 and x.ndim == 4:
        y = y[:, None]  # (n, H, W) -> (n, 1, H, W)
    if y.ndim == 1 and y.dtype.kind == "f":
        y = y[:, None]  # (n,) -> (n, 1)
    if y.ndim not in (1, 2, x.ndim):
        raise ValueError(
            f"{path}: y_{split} has shape {y.shape}, expected (n,), (n, K), or for every point of "
            f"x {'(n, C, L)' if x.ndim == 3 else '(n, H, W) or (n, C, H, W)'}"
        )
    return np.ascontiguousarray(x, dtype=np.float32), y


def _kind(path: Path, labels: dict[str, np.ndarray]) -> str:
    """What a task is, by the type and the shape of y in all splits."""
    if len({y.dtype.kind == "f" for y in labels.values()}) > 1:
        raise ValueError(f"{path}: y holds floats in one split and whole numbers in another")
    y = labels["train"]
    if y.dtype.kind == "f":
        return "regression"
    if y.ndim == 1:
        return "classes"
    for split, part in labels.items():
        if not np.isin(part, (0, 1)).all():
            raise ValueError(
                f"{path}: y_{split} of shape {part.shape} holds whole numbers besides 0 and 1; "
                "give zeros and ones (labels or masks), or floats (regression)"
            )
    return "labels" if y.ndim == 2 else "mask"


def _classes(path: Path, labels: dict[str, np.ndarray]) -> int:
    """How many classes there are."""
    low = min(int(y.min()) for y in labels.values())
    high = max(int(y.max()) for y in labels.values())
    found = np.unique(labels["train"])
    if low < 0 or high < 1 or not np.array_equal(found, np.arange(high + 1)):
        some = ", ".join(map(str, found[:5])) + (f", ..., {found[-1]}" if len(found) > 5 else "")
        raise ValueError(
            f"{path}: y_train holds the labels {some}, expected all of 0..C-1 with C >= 2 (the "
            f"labels of all splits are in {low}..{high}); number the classes from 0"
        )
    return high + 1

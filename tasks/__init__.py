"""The only door to data: load_task() for targets, load_source() for sources (proxy data sets).

A target task is a name in NAMES, on simulated or real data, or a FILE.npz of your own:
arrays x_train, y_train, x_test, y_test and, optionally, x_val, y_val, where x is (n, L) or
(n, C, L) and y is (n,) with the classes 0..C-1.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from tasks import files, metrics

NAMES = ("satellite",)
SOURCES = ("words", "conll2003")
HOLD_OUT = 10  # where no validation set comes with the data: one training sample in so many


@dataclass(frozen=True)
class Task:
    """A target data set (x^t, y^t) with everything that a method needs to know about it."""

    name: str
    title: str
    data: str  # "simulated", "real" or "file"
    x_shape: tuple[int, ...]  # of one sample: (C, L)
    y_shape: tuple[int, ...]  # of one label: () for classes
    kind: str  # "classes"
    num_classes: int
    loss: Callable[[Tensor, Tensor], Tensor]  # of a batch of outputs and labels, a scalar
    metric: Callable[[Tensor, Tensor], float]  # of all outputs and labels at once; lower is better
    metric_name: str
    sources: dict[str, str]  # {"embedded": ..., "paper": ...}
    published: dict[str, float]  # errors on the slides, on the real data
    train: Dataset  # of (x float32, y)
    val: Dataset
    test: Dataset


@dataclass(frozen=True)
class Source:
    """A source (proxy) data set: what f^s takes, with labels."""

    name: str
    x: Tensor  # token ids, (n, L) int64
    y: Tensor  # classes, (n,) int64
    classes: list[str]


def load_task(
    name: str,
    data: str = "simulated",
    root: str | Path = "data",
    seed: int = 0,
    train_size: int | None = None,
) -> Task:
    """Load a target task.

    Args:
        name: one of NAMES, or the path of an npz file of your own.
        data: "simulated" or "real" (files under root); without effect on a file of your own.
        root: the directory with the real data.
        seed: of the simulation, and of what is held out or left out.
        train_size: how many training samples; default: the task's own number, or all there are.
    Raises: ValueError or FileNotFoundError, one line that says what to do.
    """
    if train_size is not None and train_size < 1:
        raise ValueError(f"train_size={train_size} is no number of samples; give 1 or more")
    if name.endswith(".npz"):
        record, arrays = _own(Path(name), seed)
        data = "file"
    elif name not in NAMES:
        raise ValueError(f"no task '{name}'; choose one of {', '.join(NAMES)}, or your FILE.npz")
    elif data == "simulated":
        record, arrays = _simulated(name, seed, train_size)
    elif data == "real":
        record, arrays = _real(name, Path(root), seed)
    else:
        raise ValueError(f"no data '{data}'; choose simulated or real")
    sets = {
        split: TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        for split, (x, y) in arrays.items()
    }
    if train_size is not None and train_size != len(sets["train"]):
        sets["train"] = _subset(sets["train"], train_size, seed)
    record["loss"] = getattr(metrics, record["loss"])
    record["metric"] = getattr(metrics, record["metric"])
    return Task(name=name, data=data, **record, **sets)


def _subset(dataset: Dataset, size: int, seed: int) -> Subset:
    if size > len(dataset):
        raise ValueError(f"train_size={size} exceeds the {len(dataset)} training samples")
    order = np.random.default_rng(seed).permutation(len(dataset))
    return Subset(dataset, order[:size].tolist())


def _record(module) -> dict:
    return {key: value for key, value in module.TASK.items() if key != "sizes"}


def _simulated(name: str, seed: int, train_size: int | None) -> tuple[dict, dict]:
    module = importlib.import_module(f"tasks.{name}")
    sizes = dict(module.TASK["sizes"])
    sizes["train"] = train_size or sizes["train"]
    splits = {s: module.simulate(n, [seed, i]) for i, (s, n) in enumerate(sizes.items())}
    return _record(module), splits


def _real(name: str, root: Path, seed: int) -> tuple[dict, dict]:
    module = importlib.import_module(f"tasks.{name}")
    splits = {split: module.read(root, split) for split in ("train", "test")}
    splits["train"], splits["val"] = hold_out(*splits["train"], seed)
    return _record(module), splits


def hold_out(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[tuple, tuple]:
    """Split off every tenth sample, in the order of the classes: as good as a tenth of each class.

    Returns: ((x_train, y_train), (x_val, y_val)); every class keeps a sample to train on.
    Raises: ValueError if there are too few samples.
    """
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]  # by class, at random within a class
    _, first = np.unique(y[order], return_index=True)
    held = np.zeros(len(y), dtype=bool)
    held[order[HOLD_OUT - 1 :: HOLD_OUT]] = True
    held[order[first]] = False
    if not held.any():
        raise ValueError(
            f"{len(y)} training samples are too few to hold some out for validation; "
            f"give x_val and y_val, or at least {HOLD_OUT} samples"
        )
    return (x[~held], y[~held]), (x[held], y[held])


def _own(path: Path, seed: int) -> tuple[dict, dict]:
    """A task from a file of the user's own: what it is follows from the arrays."""
    required = ("x_train", "y_train", "x_test", "y_test")
    arrays = files.read_npz(path, required, optional=("x_val", "y_val"))
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise ValueError(f"{path}: x_val and y_val go together; give both or neither")
    splits = {}
    for split in ("train", "val", "test"):
        if f"x_{split}" in arrays:
            splits[split] = _own_split(path, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
    shapes = {split: x.shape[1:] for split, (x, _) in splits.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{path}: samples differ in shape between the splits: {shapes}")
    labels = np.unique(splits["train"][1])
    num_classes = int(max(y.max() for _, y in splits.values())) + 1
    if not np.array_equal(labels, np.arange(num_classes)) or num_classes < 2:
        raise ValueError(
            f"{path}: y_train holds the labels {_shown(labels)}, expected all of 0..C-1 with "
            f"C >= 2 (the largest label anywhere is {num_classes - 1}); number the classes from 0"
        )
    if "val" not in splits:
        try:
            splits["train"], splits["val"] = hold_out(*splits["train"], seed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    record = {
        "title": f"your data: {path.name}",
        "x_shape": shapes["train"],
        "y_shape": (),
        "kind": "classes",
        "num_classes": num_classes,
        "loss": "cross_entropy",
        "metric": "zero_one",
        "metric_name": "0-1 error",
        "sources": {"embedded": "words", "paper": "conll2003"},
        "published": {},
    }
    return record, splits


def _own_split(path: Path, split: str, x: np.ndarray, y: np.ndarray) -> tuple:
    """Check one split: x to float32 (n, C, L), y to int64 (n,)."""
    if x.ndim not in (2, 3):
        raise ValueError(
            f"{path}: x_{split} has shape {x.shape}, expected (n, L) or (n, C, L): series of "
            "length L, of C channels"
        )
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{path}: y_{split} has shape {y.shape} and type {y.dtype}, expected whole-number "
            "class labels of shape (n,)"
        )
    if len(x) != len(y):
        raise ValueError(f"{path}: x_{split} has {len(x)} samples but y_{split} has {len(y)}")
    if y.min() < 0:
        raise ValueError(f"{path}: y_{split} holds the label {y.min()}, expected 0..C-1")
    x = x[:, None] if x.ndim == 2 else x
    return np.ascontiguousarray(x, dtype=np.float32), y.astype(np.int64)


def _shown(labels: np.ndarray) -> str:
    some = [str(label) for label in labels[:5]]
    return ", ".join(some) + (f", ..., {labels[-1]}" if len(labels) > 5 else "")


def load_source(
    name: str,
    tokenize: Callable[[list[str]], list[list[int]]],
    n: int = 2000,
    length: int = 64,
    seed: int = 0,
    root: str | Path = "data",
) -> Source:
    """Load n windows of `length` tokens of a text source.

    Args:
        name: one of SOURCES.
        tokenize: texts to lists of token ids, without special tokens; the body's tokenizer.
        root: the directory with the real data.
    Raises: ValueError or FileNotFoundError, one line that says what to do.
    """
    if name not in SOURCES:
        raise ValueError(f"no source '{name}'; choose one of {', '.join(SOURCES)}")
    module = importlib.import_module(f"tasks.sources.{name}")
    extra = {"root": root} if name == "conll2003" else {}
    x, y, classes = module.load(tokenize, n, length, seed, **extra)
    return Source(name, torch.from_numpy(x), torch.from_numpy(y), classes)

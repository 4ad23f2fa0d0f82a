"""The only door to data: load_task() for targets, load_source() for sources (proxy data sets).

A target task is a name in NAMES, on simulated or real data, or a FILE.npz of your own (own.py says
what it holds). What every task has in common is the record Task below.
"""

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from tasks import download, metrics, own
from tasks.augment import Augmented

NAMES = ("cifar100", "spherical", "darcy", "psicov", "cosmic", "ninapro", "fsd50k", "ecg")
NAMES += ("satellite", "deepsea")  # NAS-Bench-360
PDES = ("advection", "burgers", "diffusion_reaction_1d", "diffusion_sorption", "navier_stokes_1d")
PDES += ("darcy_2d", "shallow_water", "diffusion_reaction_2d")  # PDEBench
NAMES += PDES
TEXTS = ("words", "code", "conll2003", "noise")
IMAGES = ("shapes", "textures", "cifar10", "tiny_imagenet", "voc", "noise")
SOURCES = tuple(dict.fromkeys(TEXTS + IMAGES))  # noise is in both
HOLD_OUT = 10  # where no validation set comes with the data: one training sample in so many
ENOUGH = 5000  # training samples that statistics and alignment are content with
MOST, MEMORY = 2**31, 2**26  # numbers that they read in all, and that are in memory at once
CLUSTERS = 10  # classes made of targets that have none


@dataclass(frozen=True)
class Task:
    """A target data set (x^t, y^t) with everything that a method needs to know about it."""

    name: str
    title: str
    data: str  # "simulated", "real" or "file"
    x_shape: tuple[int, ...]  # of one sample: (C, L) or (C, H, W)
    y_shape: tuple[int, ...]  # of one label: () for classes, (K,), (C, L) or (C, H, W)
    kind: str  # "classes", "labels" (several at once), "mask" or "regression"
    num_classes: int  # K of classes or labels; else the channels of y
    loss: Callable[[Tensor, Tensor], Tensor]  # of a batch of outputs and labels, a scalar
    metric: Callable[[Tensor, Tensor], float]  # of all outputs and labels at once; lower is better
    metric_name: str
    sources: dict[str, str]  # {"embedded": ..., "paper": ...}
    published: dict[str, float]  # errors on the slides, on the real data
    train: Dataset  # of (x float32, y)
    val: Dataset
    test: Dataset
    settings: dict = field(default_factory=dict)  # of a script's Config, on the embedded data
    encoding: dict = field(default_factory=dict)  # of own data: see own.py; JSON holds it
    notices: tuple[str, ...] = ()  # what the user should know of how the data were taken

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of the prediction for one sample: (K,), (C, L) or (C, H, W)."""
        return (self.num_classes,) if self.kind == "classes" else self.y_shape

    def weight(self, y: Tensor) -> int:
        """How many terms the loss of a part of a batch is the mean of: see metrics.terms()."""
        return metrics.terms(self.loss, y)


@dataclass(frozen=True)
class Source:
    """A source (proxy) data set: what f^s takes, with labels."""

    name: str
    x: Tensor  # token ids, (n, L) int64, or images, (n, 3, S, S) float32 in 0..1
    y: Tensor  # classes, (n,) int64, or masks, (n, 1, S, S) float32
    classes: list[str]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of the prediction for one sample: (K,) or (1, S, S)."""
        return (len(self.classes),) if self.y.ndim == 1 else tuple(self.y.shape[1:])

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Of h^s, for a batch: cross-entropy of classes, or of the pixels of masks."""
        return metrics.cross_entropy if self.y.ndim == 1 else metrics.bce

    def weight(self, y: Tensor) -> int:
        """How many terms the loss of a part of a batch is the mean of: see metrics.terms()."""
        return metrics.terms(self.loss, y)


def load_task(
    name: str,
    data: str = "simulated",
    root: str | Path = "data",
    seed: int = 0,
    train_size: int | None = None,
    published: bool = False,
    kind: str = "",
    augment: bool = False,
) -> Task:
    """Load a target task, and check what can be known of it before training: see check().

    Args:
        name: one of NAMES, or the path of an npz file of your own.
        data: "simulated" or "real" (files under root, downloaded if they are not there); without
            effect on a file of your own.
        root: the directory with the real data.
        seed: of the simulation, and of what is held out or left out.
        train_size: how many training samples; default: the task's own number, or all there are.
        published: of PDES, the papers' grid, times and inputs where the task's own are others.
        kind: of a file of your own, "classes" or "regression"; default: as the type of y says.
        augment: crop and mirror the training images at random, where they have classes.
    Raises: ValueError or FileNotFoundError, one line that says what to do.
    """
    if train_size is not None and train_size < 1:
        raise ValueError(f"train_size={train_size} is no number of samples; give 1 or more")
    if published and name not in PDES:
        raise ValueError(f"'{name}' has no other published problem; those are {', '.join(PDES)}")
    if kind and not name.endswith(".npz"):
        raise ValueError(f"kind '{kind}' is for a FILE.npz of your own; '{name}' has its own kind")
    if name.endswith(".npz"):
        record, sets = _own(Path(name), seed, kind)
        data = "file"
    elif name not in NAMES:
        raise ValueError(f"no task '{name}'; choose one of {', '.join(NAMES)}, or your FILE.npz")
    elif data == "simulated":
        record, sets = _simulated(name, seed, train_size, {"published": True} if published else {})
    elif data == "real":
        record, sets = _real(name, Path(root), seed, {"published": True} if published else {})
    else:
        raise ValueError(f"no data '{data}'; choose simulated or real")
    if train_size is not None and train_size != len(sets["train"]):
        sets["train"] = _subset(sets["train"], train_size, seed)
    x, y = sets["train"][0]  # real samples can be larger than simulated ones (PSICOV)
    record |= {"x_shape": tuple(x.shape), "y_shape": tuple(y.shape)}
    task = Task(name=name, data=data, **record, **sets)
    task = replace(task, notices=(*task.notices, *check(task)))
    if augment and (task.kind != "classes" or len(task.x_shape) != 3):
        raise ValueError(
            f"'{name}' is not images with classes; only those are cropped and mirrored"
        )
    return replace(task, train=Augmented(task.train)) if augment else task


def settings(name: str) -> dict:
    """What a task changes of a script's defaults on the embedded data: fields of its Config."""
    if name not in NAMES:
        return {}
    return importlib.import_module(f"tasks.{name}").TASK.get("settings", {})


def _subset(dataset: Dataset, size: int, seed: int) -> Subset:
    """Random samples of a data set, a sample of every class among them if size allows it."""
    n = len(dataset)
    if size > n:
        raise ValueError(f"train_size={size} exceeds the {n} training samples")
    order = np.random.default_rng(seed).permutation(n)
    place = np.arange(n)
    y = _targets(dataset)
    if y is not None and y.ndim == 1:
        _, first = np.unique(y.numpy()[order], return_index=True)  # of each class
        place[first] -= n
    chosen = np.sort(np.argsort(place)[:size])
    return Subset(dataset, order[chosen].tolist())


def _record(module, how: dict) -> dict:
    record = module.TASK | (module.PUBLISHED if how else {})
    return {key: value for key, value in record.items() if key not in ("sizes", "splits")}


def _dataset(data: tuple | Dataset) -> Dataset:
    return data if isinstance(data, Dataset) else TensorDataset(*map(torch.from_numpy, data))


def _simulated(name: str, seed: int, train_size: int | None, how: dict) -> tuple[dict, dict]:
    module = importlib.import_module(f"tasks.{name}")
    sizes = dict(module.TASK["sizes"])
    sizes["train"] = train_size or sizes["train"]
    draw = lambda i, n: _dataset(module.simulate(n, [seed, i], **how))  # noqa: E731
    return _record(module, how), {s: draw(i, n) for i, (s, n) in enumerate(sizes.items())}


def _real(name: str, root: Path, seed: int, how: dict) -> tuple[dict, dict]:
    module = importlib.import_module(f"tasks.{name}")
    try:
        sets = {split: _dataset(module.read(root, split, **how)) for split in module.TASK["splits"]}
    except FileNotFoundError as error:
        if not str(error).endswith(download.SIMULATE):
            raise
        raise FileNotFoundError(f"{error}: python orca.py --task {name}") from None
    if "val" not in sets:
        sets["train"], sets["val"] = _held_out(sets["train"], seed)
    return _record(module, how), sets


def _targets(dataset: Dataset) -> Tensor | None:
    """All labels of a data set, (n, ...), if they are in memory."""
    if isinstance(dataset, Subset):
        y = _targets(dataset.dataset)
        return None if y is None else y[dataset.indices]
    tensors = getattr(dataset, "tensors", None)
    return None if tensors is None else tensors[1]


def _held_out(train: Dataset, seed: int) -> tuple[Subset, Subset]:
    """Split a validation set off the training set."""
    y = _targets(train)
    classes = y is not None and y.ndim == 1
    kept, held = hold_out(y.numpy() if classes else np.zeros(len(train), dtype=np.int64), seed)
    still = copy.copy(train)
    if hasattr(still, "fixed"):  # a data set that varies its samples: not those of validation
        still.fixed = True
    return Subset(train, kept.tolist()), Subset(still, held.tolist())


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose every tenth sample, in the order of the classes: as good as a tenth of each class.

    Args:
        labels: the class of each sample, (n,); all equal where there are no classes.
    Returns: the rows to train on, and those held out; every class keeps a sample to train on.
    Raises: ValueError if there are too few samples.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within a class
    _, first = np.unique(labels[order], return_index=True)
    spare = np.setdiff1d(np.arange(len(labels)), first)  # every class keeps its first sample
    tenth = np.intersect1d(spare, np.arange(HOLD_OUT - 1, len(labels), HOLD_OUT))
    if not len(tenth):  # all of them are the only samples of their classes
        tenth = spare[: len(labels) // HOLD_OUT]
    if not len(tenth):
        of = f" of {len(first)} classes" if len(first) > 1 else ""
        raise ValueError(
            f"{len(labels)} training samples{of} are too few to hold some out for validation; "
            f"give x_val and y_val, or at least {HOLD_OUT} samples and more than one of a class"
        )
    held = np.zeros(len(labels), dtype=bool)
    held[order[tenth]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _own(path: Path, seed: int, kind: str) -> tuple[dict, dict]:
    record, splits = own.read(path, kind)
    sets = {split: _dataset(pair) for split, pair in splits.items()}
    if "val" not in sets:
        try:
            sets["train"], sets["val"] = _held_out(sets["train"], seed)
        except ValueError as error:
            raise ValueError("; ".join([f"{path}: {error}", *record["notices"]])) from None
    return record, sets


# ---- what can be said of a task before training ----


def describe(task: Task) -> str:
    """What the data were taken for, such as "x=series 1x64 y=field 1x64" or "... y=2 classes"."""
    sizes = "x".join(map(str, task.x_shape))
    shape = "x".join(map(str, task.y_shape))
    if task.kind in ("classes", "labels"):
        y = f"{task.num_classes} {task.kind}"
    elif len(task.y_shape) == 1:
        y = f"{shape} number{'s' * (task.y_shape != (1,))}"
    else:
        y = f"{'mask' if task.kind == 'mask' else 'field'} {shape}"
    return f"x={'series' if len(task.x_shape) == 2 else 'image'} {sizes} y={y}"


def check(task: Task) -> list[str]:
    """Look for what would end a run only after training, in those splits that are in memory.

    Returns: notices: what is no reason not to train, but that there will be no test error.
    Raises: ValueError, naming file, array and split, if there is nothing to learn, or no validation
        error to choose the best epoch by.
    """
    name, notices = task.name, []
    y = _targets(task.train)
    if y is not None:
        reason = _nothing_to_learn(task, y)
        if reason:
            raise ValueError(f"{name}: y_train {reason}")
        if task.kind == "classes" and len(y.unique()) < task.num_classes:
            some = f"{len(y.unique())} of the {task.num_classes} classes"
            notices.append(f"{len(y)} training samples hold {some}; the others cannot be learnt")
    held_out = "the part of y_train that validates" if isinstance(task.val, Subset) else "y_val"
    for split, what in (("val", held_out), ("test", "y_test")):
        y = _targets(getattr(task, split))
        try:
            if y is not None:
                task.metric(torch.zeros(len(y), *task.out_shape), y)
        except ValueError as error:
            if split == "val":
                raise ValueError(
                    f"{name}: {what} ({len(y)} samples) has no {task.metric_name}: {error}"
                ) from None
            notices.append(f"{what} ({len(y)} samples) has no {task.metric_name}: {error}")
    return notices


def _nothing_to_learn(task: Task, y: Tensor) -> str:
    """Why the training targets y, (n, ...), teach nothing; "" if they do."""
    if task.kind == "classes":
        return "" if len(y.unique()) > 1 else f"holds a single class, {y[0]}"
    if task.loss is metrics.relative_l2_loss:
        try:
            metrics.relative_l2(y.nan_to_num(), y)
        except ValueError as error:
            return f"holds samples whose error is not defined: {error}"
    if task.kind == "mask":
        y = y.movedim(1, 0).flatten(1).T  # (points, C): a mask varies if any of its points does
    if metrics.varies(y):
        return ""
    return f"is constant over its {len(y)} samples" if task.kind != "mask" else "is constant"


# ---- what the methods compute of a task ----


def statistics(task: Task, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and standard deviations: of x for each channel, of y for each entry.

    Returns: x_mean, x_std, (C, 1) or (C, 1, 1), with 1 for the deviation of a constant channel;
        y_mean, y_std, of the shape of the prediction: of regression targets where they are known,
        else 0 and 1.
    From the training set, or random samples of it where it is large (ENOUGH, MOST), a part at a
    time: 3356 real proteins of PSICOV are 200 GB.
    """
    numbers = math.prod(task.x_shape) + math.prod(task.y_shape)
    of_x = of_y = None
    for x, y in DataLoader(_some(task, seed), max(1, MEMORY // numbers)):
        x = x.double()  # (n, C, L) or (n, C, H, W)
        axes = (0, *range(2, x.ndim))
        var, mean = torch.var_mean(x, dim=axes, keepdim=True, correction=0)
        count = torch.tensor(x.numel() // x.shape[1])
        of_x = _merged(of_x, (count, mean[0], count * var[0]))
        if task.kind == "regression":
            y = y.double()
            known = ~y.isnan()
            count, y = known.sum(dim=0), torch.nan_to_num(y)
            mean = y.sum(dim=0) / count.clamp(min=1)
            of_y = _merged(of_y, (count, mean, ((y - mean) * known).square().sum(dim=0)))
    count, mean, squares = of_x
    std = torch.where(squares > 0, (squares / count).sqrt(), 1.0)
    y_mean, y_std = torch.zeros(task.out_shape), torch.ones(task.out_shape)
    if of_y is not None:
        count, y_mean, squares = of_y
        y_std = (squares / count.clamp(min=1)).sqrt()
    return mean.float(), std.float(), y_mean.float(), y_std.float()


def _merged(a: tuple | None, b: tuple) -> tuple:
    """Count, mean and summed squared deviation of two parts taken together."""
    if a is None:
        return b
    count = (a[0] + b[0]).clamp(min=1)
    gap = b[1] - a[1]
    squares = a[2] + b[2] + gap.square() * a[0] * b[0] / count
    return a[0] + b[0], a[1] + gap * b[0] / count, squares


def pooled(dataset: Dataset, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and labels as the metric counts them: samples of one group become one, on average.

    Only FSD50K has groups: a clip is cut into chunks, which share its labels.
    """
    groups = getattr(dataset, "groups", None)
    if groups is None:
        return out, y
    _, group = torch.as_tensor(groups).unique(return_inverse=True)
    n = int(group.max()) + 1
    count = torch.bincount(group, minlength=n).unsqueeze(1)
    mean = torch.zeros(n, out.shape[1]).index_add(0, group, out) / count
    return mean, torch.zeros(n, *y.shape[1:], dtype=y.dtype).index_copy(0, group, y)


def some_classes(task: Task, seed: int = 0) -> tuple[list[int], Tensor]:
    """Training samples and classes of theirs, for distances that need labels (OTDD).

    Targets that are no classes are put into CLUSTERS clusters by k-means, on targets that were
    averaged down to at most 1024 numbers, so that memory stays small.

    Returns: rows of the training set, as many as are enough; the class of each, (m,) int64.
    """
    rows = _some(task, seed).indices
    y = torch.stack([torch.as_tensor(task.train[row][1]) for row in rows])
    if task.kind == "classes":
        return rows, y
    from scipy.cluster.vq import kmeans2

    y = torch.nan_to_num(y.float())
    if y.ndim == 4:
        y = F.adaptive_avg_pool2d(y, 32 // round(y.shape[1] ** 0.5))
    elif y.ndim == 3:
        y = F.adaptive_avg_pool1d(y, 1024 // y.shape[1])
    y = y.flatten(1).double().numpy()
    clusters = min(CLUSTERS, len(np.unique(y, axis=0)))
    _, label = kmeans2(y, clusters, iter=30, minit="++", missing="warn", rng=seed)
    return rows, torch.from_numpy(label).long()


def balanced_rows(labels: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Rows of about `size` random samples: equally many of each class, or all where it has fewer.

    labels: (n,), classes of all samples. Each class gives at least 2 samples if it has them.
    """
    per_class = max(2, size // len(labels.unique()))
    order = torch.randperm(len(labels), generator=rng)
    return torch.cat([order[labels[order] == c][:per_class] for c in labels.unique()])


def _some(task: Task, seed: int) -> Subset:
    """Random training samples, in their order, ENOUGH but MOST numbers in all; or all samples.

    Of images as they are, not cropped or mirrored.
    """
    rows = np.arange(len(task.train))
    enough = max(1, min(ENOUGH, MOST // math.prod(task.x_shape)))
    if len(rows) > enough:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:enough])
    return Subset(getattr(task.train, "plain", task.train), rows.tolist())


def load_source(
    name: str,
    n: int = 2000,
    seed: int = 0,
    root: str | Path = "data",
    *,
    tokenize: Callable[[list[str]], list[list[int]]] | None = None,
    length: int = 64,
    size: int = 64,
    masks: bool = False,
) -> Source:
    """Load n samples of a source: windows of a text, or images.

    Args:
        name: one of SOURCES: of TEXTS if there is tokenize, else of IMAGES.
        root: the directory with the real data.
        tokenize, length: of a text: texts to lists of token ids, without special tokens (the
            body's tokenizer); tokens in a window.
        size, masks: of images: height and width in pixels; whether y is where the objects are, or
            where the texture is another.
    Raises: ValueError or FileNotFoundError, one line that says what to do.
    """
    if name not in SOURCES:
        raise ValueError(f"no source '{name}'; choose one of {', '.join(SOURCES)}")
    takes, fit = ("images", IMAGES) if tokenize is None else ("text", TEXTS)
    if name not in fit:
        raise ValueError(
            f"source '{name}' does not suit this task, whose body takes {takes}; choose one of "
            f"{', '.join(fit)}"
        )
    module = importlib.import_module(f"tasks.sources.{name}")
    if tokenize is None:
        load = module.load_images if name == "noise" else module.load
        x, y, classes = load(n, size, seed, root=root, masks=masks)
    else:
        load = module.load_text if name == "noise" else module.load
        extra = {"root": root} if name == "conll2003" else {}
        x, y, classes = load(tokenize, n, length, seed, **extra)
    return Source(name, torch.from_numpy(x), torch.from_numpy(y), classes)

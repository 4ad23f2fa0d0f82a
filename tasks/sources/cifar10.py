"""CIFAR-10: the papers' 2D source for classification. Small photographs of ten kinds of thing.

Krizhevsky 2009, Learning multiple layers of features from tiny images. 50,000 training images (the
split "train") and 10,000 test images ("val"), 32 x 32 pixels. torchvision reads them, from
cifar-10-python.tar.gz or its folder cifar-10-batches-py in data/, and downloads them (170 MB) if
there are neither.

The files are pickles, and to unpickle is to run a program: torchvision does it, but only with files
whose md5 is that of the published ones.
"""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

SPLITS = ("train", "val")


def verified(
    dataset: type[datasets.CIFAR10], folder: Path, train: bool, download: bool
) -> datasets.CIFAR10:
    """A CIFAR data set in folder, unpacked if need be; all its files are the published ones.

    Args:
        dataset: torchvision's CIFAR10 or CIFAR100.
        download: whether to download the archive if it is not there; it is never overwritten.
    Raises: FileNotFoundError if there is nothing to read; ValueError if a file is not the published
        one.
    """
    archive, unpacked = folder / dataset.filename, folder / dataset.base_folder
    damaged = (
        f"{folder}: {dataset.filename} or a file of {dataset.base_folder} is damaged, its md5 is "
        f"not that of the published one; delete both and get {dataset.url} again"
    )
    missing = f"no file {archive}; get {dataset.url} (170 MB) and put it there"
    if unpacked.is_dir():
        download = False  # torchvision's download would cover up a damaged folder
    elif archive.exists():
        if not check_integrity(archive, dataset.tgz_md5):
            raise ValueError(damaged)
        download = True  # no more than to unpack
    elif not download:
        raise FileNotFoundError(missing)
    try:
        with contextlib.redirect_stdout(None):  # the last line printed is the run's result
            return dataset(folder, train=train, download=download)
    except RuntimeError:
        raise ValueError(damaged) from None
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{missing} (the download failed: {reason})") from None


def balanced(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n different rows of labels in random order, as many of each class as of any other.

    A class that has too few rows gives all it has. Raises: ValueError if n exceeds the rows.
    """
    if n > len(labels):
        raise ValueError(f"{n} images asked for, but there are {len(labels)}; ask for fewer")
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within a class
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    nth = np.arange(len(labels)) - np.repeat(first, counts)  # of its class: 0, 1, ...
    return rng.permutation(order[np.argsort(nth, kind="stable")[:n]])


def pixels(image: Image.Image, size: int) -> np.ndarray:
    """An image as float32 (3, size, size) in 0..1; bilinear, antialiased where it gets smaller."""
    scaled = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(scaled, dtype=np.float32).transpose(2, 0, 1) / 255


def load(
    n: int,
    size: int,
    seed: int = 0,
    split: str = "train",
    root: Path | str = "data",
    masks: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n images, as many of each class as of any other.

    Args:
        size: height and width in pixels, to which the images are scaled.
        seed, split: which images ("train" or "val").
        root: the data folder; the archive or its folder is in it.
        masks: must be False: nobody has outlined these objects.
    Returns: images, float32 (n, 3, size, size) in 0..1; classes, int64 (n,); their names.
    Raises: FileNotFoundError if the data cannot be had; ValueError if a file is damaged.
    """
    if masks:
        raise ValueError("source 'cifar10' has no masks; choose shapes or voc")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    data = verified(datasets.CIFAR10, Path(root), train=split == "train", download=True)
    labels = np.array(data.targets, dtype=np.int64)
    rows = balanced(labels, n, rng)
    return np.stack([pixels(data[row][0], size) for row in rows]), labels[rows], data.classes

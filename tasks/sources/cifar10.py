"""CIFAR-10: the papers' 2D source for classification. Small photographs of ten kinds of thing.

Krizhevsky 2009, Learning multiple layers of features from tiny images. 50,000 training images (the
split "train") and 10,000 test images ("val"), 32 x 32 pixels. torchvision reads them, from
cifar-10-python.tar.gz (170 MB, downloaded if need be) or its folder cifar-10-batches-py in data/.

The files are pickles, and to unpickle is to run a program: torchvision does it, but only with files
whose md5 is that of the published ones.
"""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from tasks.download import SIMULATE, Remote, fetch

NAME = "cifar-10-python.tar.gz"
FILES = {
    NAME: Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        170_498_071,
        "not stated",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "c58f30108f718f92721af3b95e74349a",
    )
}
EMBEDDED = "choose --source shapes, which needs no download"
SPLITS = ("train", "val")


def verified(
    dataset: type[datasets.CIFAR10],
    root: Path,
    name: str,
    remote: Remote,
    train: bool,
    instead: str = SIMULATE,
) -> datasets.CIFAR10:
    """A CIFAR data set beside root/name, unpacked if need be; all its files are the published ones.

    Args:
        dataset: torchvision's CIFAR10 or CIFAR100.
        name, remote, instead: of the archive, which is downloaded if neither it nor its folder is
            there (download.fetch); it is never overwritten.
    Raises: FileNotFoundError if there is nothing to read; ValueError if a file is not the published
        one.
    """
    folder = (Path(root) / name).parent
    unpacked = folder / dataset.base_folder
    damaged = (
        f"{folder}: {dataset.filename} or a file of {dataset.base_folder} is damaged, its md5 is "
        f"not that of the published one; delete both and run again, or get {remote.url}"
    )
    unpack = not unpacked.is_dir()  # torchvision's download would cover up a damaged folder
    if unpack and not check_integrity(fetch(root, name, remote, instead), dataset.tgz_md5):
        raise ValueError(damaged)
    try:
        with contextlib.redirect_stdout(None):  # the last line printed is the run's result
            return dataset(folder, train=train, download=unpack)
    except RuntimeError:
        raise ValueError(damaged) from None
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: {dataset.filename} cannot be unpacked ({reason})") from None


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
    data = verified(datasets.CIFAR10, root, NAME, FILES[NAME], split == "train", EMBEDDED)
    labels = np.array(data.targets, dtype=np.int64)
    rows = balanced(labels, n, rng)
    return np.stack([pixels(data[row][0], size) for row in rows]), labels[rows], data.classes

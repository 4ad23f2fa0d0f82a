"""Tiny ImageNet: PaRe's source for Spherical CIFAR-100. Photographs of 200 kinds of thing, 64 x 64.

A course of Stanford University (CS231n) made it from ImageNet (Deng et al. 2009). 500 training
images a class (the split "train") and 50 to validate on ("val"). It is read from its folder
tiny-imagenet-200 in data/, or else from tiny-imagenet-200.zip as it is (248 MB, downloaded if need
be). A class is called by its WordNet number; the data set's words.txt says what that means.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.utils import check_integrity

from tasks.download import Remote, fetch
from tasks.sources.cifar10 import EMBEDDED, balanced, pixels

FOLDER = "tiny-imagenet-200"
URL = "https://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
NAME = f"{FOLDER}.zip"
FILES = {NAME: Remote(URL, 248_100_043, "not stated", "http://cs231n.stanford.edu", MD5)}
NUM_CLASSES = 200
SPLITS = ("train", "val")


def opened(root: Path) -> Path | zipfile.ZipFile:
    """The unpacked folder, or else the zip file once its md5 is known to be the published one.

    Raises: FileNotFoundError if neither can be had; ValueError if the zip file is damaged.
    """
    folder = root / FOLDER
    if folder.is_dir():
        return folder
    archive = fetch(root, NAME, FILES[NAME], EMBEDDED)
    if not check_integrity(archive, MD5):
        raise ValueError(f"{archive}: not {URL}, whose md5 is {MD5}; delete it and get it again")
    return zipfile.ZipFile(archive)


def content(place: Path | zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a file of the data set. Raises: ValueError if there is none."""
    try:
        if isinstance(place, Path):
            return (place / name).read_bytes()
        return place.read(f"{FOLDER}/{name}")
    except (OSError, KeyError):
        raise ValueError(f"no file {name} in {FOLDER}; unpack {URL} again") from None


def listed(place: Path | zipfile.ZipFile, split: str) -> tuple[list[str], np.ndarray, list[str]]:
    """All images of a split: their files, the numbers of their classes, the names of the classes.

    Raises: ValueError if the classes are not 200, or a line of the annotations is not readable.
    """
    if isinstance(place, Path):
        found = [path.relative_to(place).as_posix() for path in place.glob("train/*/images/*.JPEG")]
    else:
        found = [name.removeprefix(f"{FOLDER}/") for name in place.namelist()]
        found = [name for name in found if name.startswith("train/") and name.endswith(".JPEG")]
    classes = sorted({name.split("/")[1] for name in found})
    if len(classes) != NUM_CLASSES:
        raise ValueError(
            f"{FOLDER}: {len(classes)} classes have images train/*/images/*.JPEG, expected "
            f"{NUM_CLASSES}; unpack {URL} again"
        )
    number = {name: i for i, name in enumerate(classes)}
    if split == "train":
        names = sorted(found)
        return names, np.array([number[name.split("/")[1]] for name in names]), classes
    lines = content(place, "val/val_annotations.txt").decode("utf-8", "replace").splitlines()
    fields = [line.split() for line in lines if line.strip()]
    if not fields or not all(len(row) == 6 and row[1] in number for row in fields):
        raise ValueError(
            f"{FOLDER}: val/val_annotations.txt is not lines of 'file class x y x y'; "
            f"unpack {URL} again"
        )
    labels = np.array([number[row[1]] for row in fields])
    return [f"val/images/{row[0]}" for row in fields], labels, classes


def decoded(data: bytes, name: str) -> Image.Image:
    """The image in a file with the content data. Raises: ValueError if it is damaged."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()  # careful: open() reads no further than the header
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: not a readable image ({reason}); get it again") from None
    return image


def load(
    n: int,
    size: int,
    seed: int = 0,
    split: str = "train",
    root: Path | str = "data",
    masks: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n images, as many of each class as of any other; only these are read.

    Args:
        size: height and width in pixels, to which the images are scaled.
        seed, split: which images ("train" or "val").
        root: the data folder; the zip file or its folder is in it.
        masks: must be False: nobody has outlined these objects.
    Returns: images, float32 (n, 3, size, size) in 0..1; classes, int64 (n,); their names.
    Raises: FileNotFoundError if there is no data; ValueError if it is damaged.
    """
    if masks:
        raise ValueError("source 'tiny_imagenet' has no masks; choose shapes or voc")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    place = opened(Path(root))
    names, labels, classes = listed(place, split)
    rows = balanced(labels, n, rng)
    images = [pixels(decoded(content(place, names[row]), names[row]), size) for row in rows]
    return np.stack(images), labels[rows], classes

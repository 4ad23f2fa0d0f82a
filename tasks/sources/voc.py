"""PASCAL VOC 2012: PaRe's source for dense tasks. Photographs of 20 kinds of thing, outlined.

Everingham et al. 2010, The PASCAL visual object classes challenge, IJCV 88:303. The images of the
segmentation challenge, 1,464 to train on (the split "train") and 1,449 to validate on ("val"). They
are in data/VOCdevkit; VOCtrainval_11-May-2012.tar (2.0 GB) is downloaded and unpacked if it is not
there. An outline is a PNG file whose pixels are 0 for the background, 1..20 for the classes, and
255 along the edges of objects and where nobody could tell: unknown, NaN in the masks made here.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from tasks.download import Remote, unpacked
from tasks.sources.cifar10 import EMBEDDED, pixels
from tasks.sources.tiny_imagenet import decoded

URL = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
NAME = "VOCtrainval_11-May-2012.tar"
FILES = {NAME: Remote(URL, 2.0e9, "not stated", "PASCAL VOC 2012", MD5)}
CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"]
CLASSES += ["dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa"]
CLASSES += ["train", "monitor"]
UNKNOWN = 255
SPLITS = ("train", "val")


def listed(folder: Path, split: str) -> list[str]:
    """The names of a split's images. Raises: FileNotFoundError, ValueError if there are none."""
    path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; unpack {URL} ({FILES[NAME]}) in {folder.parents[1]}, or {EMBEDDED}"
        )
    names = path.read_text(encoding="utf-8", errors="replace").split()
    if not names:
        raise ValueError(f"{path}: expected the names of images, got none; unpack {URL} again")
    return names


def picture(path: Path) -> Image.Image:
    """The image in a file. Raises: ValueError if there is none or it is damaged."""
    if not path.is_file():
        raise ValueError(f"no file {path}, though it is in the list; unpack {URL} again")
    return decoded(path.read_bytes(), str(path))


def outlined(folder: Path, name: str) -> tuple[Image.Image, Image.Image]:
    """An image and the classes of its pixels. Raises: ValueError if the files are damaged."""
    image = picture(folder / "JPEGImages" / f"{name}.jpg")
    path = folder / "SegmentationClass" / f"{name}.png"
    mask = picture(path)
    values = np.unique(np.asarray(mask))
    if mask.mode not in ("P", "L") or mask.size != image.size:
        raise ValueError(
            f"{path}: expected numbers for {image.size} pixels, got mode {mask.mode} and "
            f"{mask.size}; unpack {URL} again"
        )
    if not np.isin(values, [*range(len(CLASSES) + 1), UNKNOWN]).all():
        raise ValueError(f"{path}: expected 0..{len(CLASSES)} and {UNKNOWN}, got {values.max()}")
    return image, mask


def load(
    n: int,
    size: int,
    seed: int = 0,
    split: str = "train",
    root: Path | str = "data",
    masks: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n different images at random; only these are read.

    Args:
        size: height and width in pixels, to which the images are scaled, whatever their shape.
        seed, split: which images ("train" or "val").
        root: the data folder; the archive or its folder VOCdevkit is in it.
        masks: whether y says where objects are rather than what the largest one is.
    Returns: images, float32 (n, 3, size, size) in 0..1; classes, int64 (n,): that with the most
        pixels in the image, or masks, float32 (n, 1, size, size): 1 on objects, 0 elsewhere,
        NaN where unknown; the names of the classes.
    Raises: FileNotFoundError if there is no data; ValueError if it is damaged or n is too large.
    """
    folder = unpacked(root, "VOCdevkit/VOC2012", NAME, FILES[NAME], EMBEDDED)
    names = listed(folder, split)
    if n > len(names):
        raise ValueError(f"{n} images asked for, but VOC has {len(names)}; ask for fewer")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    x, y = [], []
    for row in rng.permutation(len(names))[:n]:
        image, mask = outlined(folder, names[row])
        x.append(pixels(image, size))
        if masks:
            small = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST))
            y.append(np.where(small == UNKNOWN, np.nan, small > 0)[None])
            continue
        counts = np.bincount(np.asarray(mask).ravel(), minlength=256)[1 : len(CLASSES) + 1]
        if not counts.any():
            raise ValueError(f"{names[row]}: no object is outlined in it; unpack {URL} again")
        y.append(counts.argmax())
    return np.stack(x), np.array(y, dtype=np.float32 if masks else np.int64), list(CLASSES)

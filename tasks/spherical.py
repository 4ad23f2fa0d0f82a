"""Spherical CIFAR-100: photographs thrown onto a sphere that is turned. NAS-Bench-360, 2D.

Real data: CIFAR-100 (Krizhevsky 2009) projected as in Cohen et al. 2018, Spherical CNNs;
NAS-Bench-360, Tu et al. 2022. 50,000 training and 10,000 test images, 100 classes, on 60 x 60
points: row j is the polar angle pi (2 j + 1) / 120, column k the azimuth pi k / 30.
`s2_cifar100.gz` is a gzip of a pickled dict {"train": {...}, "test": {...}}, each
{"images": (n, 3, 60, 60) uint8, "labels": (n,) in 0..99}.

Simulated data: the simulated images of tasks/cifar100.py, projected in the same way, each with a
random rotation of its own that keeps it on one side of the sphere, near the equator. The real
images may lie anywhere, and 500 consecutive ones share a rotation.
"""

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tasks import cifar100, download, files, metrics

SIZE, NUM_CLASSES = 60, cifar100.NUM_CLASSES
EYE = 1.001  # height of the point projected from: just above the north pole, which is at 1
AZIMUTH, LATITUDE, SPIN = np.pi / 4, np.pi / 9, 0.2  # of simulated images, in radians
HALF = 1.5  # half the width of the image, which lies on the plane that touches the south pole
NAME = "spherical/s2_cifar100.gz"
FILES = {NAME: download.nas_bench(NAME, 272e6, "CC BY-SA")}
WANT = (
    "a gzip of a pickled dict {'train': ..., 'test': ...}, each "
    f"{{'images': (n, 3, {SIZE}, {SIZE}) uint8, 'labels': (n,) integers 0..{NUM_CLASSES - 1}}}"
)


def grid() -> np.ndarray:
    """The points of the grid as unit vectors, (60 * 60, 3)."""
    theta = np.pi * (2 * np.arange(SIZE)[:, None] + 1) / (2 * SIZE)
    phi = 2 * np.pi * np.arange(SIZE) / SIZE
    xyz = np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta) + 0 * phi
    return np.stack(xyz, axis=-1).reshape(-1, 3)


def rotations(n: int, rng: np.random.Generator) -> np.ndarray:
    """n rotations that put an image's middle near azimuth pi on the equator, a little askew.

    The middle lies within AZIMUTH of pi and within LATITUDE of the equator, and the image is spun
    about it with deviation SPIN: rotations of any kind leave next to nothing to learn from 1200
    images.
    """
    azimuth = np.pi + rng.uniform(-AZIMUTH, AZIMUTH, n)
    latitude = rng.uniform(-LATITUDE, LATITUDE, n)
    spin = about(2, rng.normal(0, SPIN, n))
    return spin @ about(1, latitude + np.pi / 2) @ about(2, -azimuth)  # (n, 3, 3)


def about(axis: int, angle: np.ndarray) -> np.ndarray:
    """Rotation matrices about an axis, (n,) in radians -> (n, 3, 3)."""
    a, b = [i for i in range(3) if i != axis]
    sign = -1 if axis == 1 else 1  # keeps all three right-handed
    r = np.tile(np.eye(3), (len(angle), 1, 1))
    r[:, a, a] = r[:, b, b] = np.cos(angle)
    r[:, b, a] = sign * np.sin(angle)
    r[:, a, b] = -r[:, b, a]
    return r


def project(images: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Throw images onto the sphere: what each point of the grid sees of the image, turned.

    A ray from the eye through a point of the sphere meets the plane at (x, y) (1 + EYE) / (EYE - z)
    and reads the image there, bilinearly; it is 0 beyond the image's edge.

    Args:
        images: float32 (n, C, H, W).
        rotation: (n, 3, 3), applied to the points of the grid.
    Returns: float32 (n, C, 60, 60).
    """
    point = grid() @ rotation.transpose(0, 2, 1)  # (n, 60 * 60, 3)
    xy = point[..., :2] * ((1 + EYE) / (EYE - point[..., 2:])) / HALF  # -1..1 on the image
    where = torch.from_numpy(xy.astype(np.float32)).view(-1, SIZE, SIZE, 2)
    return F.grid_sample(torch.from_numpy(images), where, align_corners=False).numpy()


def simulate(n: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """n images, every class as often as any other: x, float32 (n, 3, 60, 60); y, int64 (n,).

    Every image is stretched to 0..1, as the real ones are to 0..255.
    """
    images, y = cifar100.simulate(n, seed)
    rng = np.random.default_rng([*np.atleast_1d(seed), SIZE])
    x = project(images, rotations(n, rng))
    low, high = (edge(axis=(1, 2, 3), keepdims=True) for edge in (x.min, x.max))
    return (x - low) / (high - low), y


def read(root: Path, split: str) -> cifar100.Images:
    """The real images of a split ("train" or "test"), with the labels 0..99.

    Takes half a minute, 1 GB of temporary disk space and 3 GB of memory for a moment.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    path = download.fetch(root, NAME, FILES[NAME])
    part = unpickled(path)
    part = part.get(split) if isinstance(part, dict) else None
    if not isinstance(part, dict) or not {"images", "labels"} <= set(part):
        raise ValueError(f"{path}: expected {WANT}, got something else for '{split}'")
    images, labels = np.asarray(part["images"]), np.asarray(part["labels"])
    if images.dtype != np.uint8 or images.shape[1:] != (3, SIZE, SIZE) or len(images) == 0:
        raise ValueError(f"{path}: expected {WANT}, got images {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected {WANT}, got labels {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(f"{path}: expected {WANT}, got labels {labels.min()}..{labels.max()}")
    return cifar100.Images(images, labels.astype(np.int64))


def unpickled(path: Path) -> object:
    """The content of a gzipped pickle, by way of a temporary file.

    Raises: ValueError if it is no gzip, is cut short, or does not hold plain data.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "s2_cifar100.pkl"
        try:
            with gzip.open(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error}); get it again") from None
        try:
            return files.read_pickled(plain)
        except ValueError as error:
            reason = str(error).removeprefix(f"{plain}: ")
            raise ValueError(f"{path}: {reason}") from None


TASK = {
    "title": "Spherical CIFAR-100: what a photograph on a sphere shows",
    "x_shape": (3, SIZE, SIZE),
    "y_shape": (),
    "kind": "classes",
    "num_classes": NUM_CLASSES,
    "loss": metrics.cross_entropy,
    "metric": metrics.zero_one,
    "metric_name": "0-1 error",
    "sources": {"embedded": "shapes", "paper": "tiny_imagenet"},
    "splits": ("train", "test"),
    "sizes": {"train": 1200, "val": 200, "test": 500},
    "published": {
        "Hand-designed": 0.6741,
        "NAS-Bench-360": 0.4823,
        "DASH": 0.7128,
        "Perceiver IO": 0.8257,
        "FPT": 0.7638,
        "NFT": 0.5526,
        "ORCA": 0.2985,
        "PaRe": 0.2555,
    },
}

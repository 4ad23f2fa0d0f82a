"""CIFAR-100: small photographs of a hundred kinds of thing. NAS-Bench-360, 2D, 100 classes.

Real data: Krizhevsky 2009, Learning multiple layers of features from tiny images; in the benchmark
of NAS-Bench-360 (Tu et al. 2022). 50,000 training and 10,000 test images of 32 x 32 pixels, from
`cifar100/cifar-100-python.tar.gz` or its folder `cifar-100-python` beside it, read by torchvision.
The last tenth of the training images validates; the files are in random order. --paper crops and
mirrors the training images (augment.py), as the published code does.

Simulated data: an outline filled with a texture, 10 x 10 classes, before a distracting background,
drawn with the parts of tasks/sources/shapes.py. Unlike there, the objects stand upright but for a
few degrees, are brighter than what is behind them, and every class has a hue it varies around: so
a dozen images of a class are enough to learn from, and a linear model beats chance.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks import download, metrics
from tasks.sources import shapes

NAME = "cifar100/cifar-100-python.tar.gz"
FILES = {
    NAME: download.Remote(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        169_001_437,
        "CC BY 4.0",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "eb9058c3a382ffc7106e4002c42a8d85",
    )
}
SIZE, NUM_CLASSES = 32, 100
HUES = np.random.default_rng(100).uniform(0, 1, NUM_CLASSES)  # of the classes, in turns
HUE_SD, TURN_SD, CLUTTER = 0.1, 0.2, 0.3  # spread of hue in turns and of angle in radians; contrast


def simulate(n: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """n images, every class as often as any other: x, float32 (n, 3, 32, 32); y, int64 (n,).

    A class is 10 * outline + texture. Place, size, angle, hue, light, contrast, background and
    noise vary.
    """
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % NUM_CLASSES)
    varied = lambda low, high: rng.uniform(low, high, (n, 1, 1))  # noqa: E731
    axis = (2 * np.arange(SIZE) + 1) / SIZE - 1
    across = axis[None, None, :] - varied(-0.2, 0.2)
    down = axis[None, :, None] - varied(-0.2, 0.2)
    radius, turn = varied(0.55, 0.85), rng.normal(0, TURN_SD, (n, 1, 1))
    u = (across * np.cos(turn) + down * np.sin(turn)) / radius  # the object's own coordinates
    v = (down * np.cos(turn) - across * np.sin(turn)) / radius
    mask = shapes.shape_mask(y // 10, u, v, SIZE * radius / 2)
    texture = shapes.texture_values(y % 10, u, v, rng) - 0.5
    around = shapes.texture_values(rng.integers(10, size=n), down, across, rng) - 0.5
    light = varied(0.3, 0.5)
    ground = (light + CLUTTER * around)[:, None] + 0.12 * tint(rng.uniform(0, 1, n))
    body = (light + varied(0.2, 0.4) + varied(0.3, 0.7) * texture)[:, None]
    body = body + 0.15 * tint(HUES[y] + rng.normal(0, HUE_SD, n))
    x = ground + (body - ground) * mask[:, None] + rng.normal(0, 0.03, (n, 3, SIZE, SIZE))
    return np.clip(x, 0, 1).astype(np.float32), y


def tint(hue: np.ndarray) -> np.ndarray:
    """What a hue, (n,) in turns, adds to red, green and blue: (n, 3, 1, 1), of mean 0."""
    return np.cos(2 * np.pi * (hue[:, None, None, None] - np.arange(3)[:, None, None] / 3))


class Images(Dataset):
    """Images kept as bytes, (n, 3, H, W) uint8, that become float32 in 0..1 when they are used."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.tensors = torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.tensors[1])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = (tensor[i] for tensor in self.tensors)
        return x.float() / 255, y


def read(root: Path, split: str) -> Images:
    """The real images of a split ("train", "val" or "test"), with the labels 0..99.

    Raises: FileNotFoundError or ValueError, naming the file and what it should be.
    """
    from torchvision.datasets import CIFAR100  # here: the simulation does without

    from tasks.sources.cifar10 import verified

    data = verified(CIFAR100, root, NAME, FILES[NAME], train=split != "test")
    images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    labels = np.array(data.targets, dtype=np.int64)
    held_out = len(labels) // 10
    rows = {"train": slice(0, -held_out), "val": slice(-held_out, None), "test": slice(None)}[split]
    return Images(images[rows], labels[rows])


TASK = {
    "title": "CIFAR-100: what a small photograph shows",
    "x_shape": (3, SIZE, SIZE),
    "y_shape": (),
    "kind": "classes",
    "num_classes": NUM_CLASSES,
    "loss": metrics.cross_entropy,
    "metric": metrics.zero_one,
    "metric_name": "0-1 error",
    "sources": {"embedded": "shapes", "paper": "cifar10"},
    "splits": ("train", "val", "test"),
    "sizes": {"train": 1200, "val": 200, "test": 500},
    "published": {
        "Hand-designed": 0.1939,
        "NAS-Bench-360": 0.2339,
        "DASH": 0.2437,
        "Perceiver IO": 0.7004,
        "FPT": 0.1011,
        "NFT": 0.0767,
        "ORCA": 0.0653,
        "PaRe": 0.0625,
    },
}

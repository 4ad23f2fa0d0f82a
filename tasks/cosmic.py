"""Cosmic: the pixels of a telescope's image that cosmic rays have hit. NAS-Bench-360, 2D, mask.

Real data: single exposures of Hubble's ACS/WFC camera, the set of deepCR (Zhang and Bloom 2020,
ApJ 889:24; NAS-Bench-360, Tu et al. 2022), of which filter F435W and the fields with galaxies are
used. `deepCR.ACS-WFC.{train,test}.tar` unpack to npy_train/ and npy_test/, where each
f435w/PROPOSAL/VISIT/EXPOSURE_NUMBER.npy is (3, W, W): the image in electrons, 1 where a cosmic ray
is, 1 where the pixel is to be ignored. The sky.npy beside them holds the sky of each exposure.

Simulated data: stars, galaxies and sky through a telescope, shot and read noise, and tracks of
protons through a detector 1 pixel deep (number and charges after Riess 2002, ACS ISR 2002-07, and
Miles et al. 2021, ApJ 918:86).

x: electrons as they are, like the published code's: few pixels are very bright, but a small network
learns from them once they are standardised. y: the mask, NaN where the pixel is to be ignored.
"""

import re
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import gamma
from torch.utils.data import Dataset

from tasks import download, files, metrics

LISTS = "src/datasets/preprocess_cosmic.py of https://github.com/sjunhongshen/ORCA"
FILES = {
    f"cosmic/deepCR.ACS-WFC.{split}.tar": download.nas_bench(
        f"cosmic/deepCR.ACS-WFC.{split}.tar", size, "open data"
    )
    for split, size in (("train", 6.5e9), ("test", 2e9))
}
SIZE = 128  # pixels a side
CROP = slice(64, 64 + SIZE)  # of a file's rows and columns
SATURATED = 8e4  # electrons: what a pixel can hold
READ_NOISE = 4.5  # electrons
SKY_SHIFT = (-0.9, 3.0)  # so many times the sky is added to an image
STEPS = 96  # into which a track is cut: less than half a pixel each


def deposit(shape: tuple[int, ...], indices: tuple, amount: np.ndarray) -> np.ndarray:
    """An array with amount added at the indices, of which some may lie outside."""
    *indices, amount = np.broadcast_arrays(*indices, amount)
    inside = np.all([(i >= 0) & (i < s) for i, s in zip(indices, shape, strict=True)], axis=0)
    flat = np.ravel_multi_index([i[inside] for i in indices], shape)
    return np.bincount(flat, amount[inside], np.prod(shape)).reshape(shape)


def stars(rng: np.random.Generator) -> np.ndarray:
    """The stars of one image, (SIZE, SIZE) electrons: flux density F^-1.8, Moffat's profile."""
    number = rng.poisson(rng.uniform(50, 400))
    low, high = 300.0**-0.8, 1e6**-0.8
    flux = (low + (high - low) * rng.random(number)) ** (-1 / 0.8)
    beta, width = rng.uniform(2.5, 3.0), rng.uniform(1.9, 2.4)  # pixels, at half maximum
    alpha = width / (2 * (2 ** (1 / beta) - 1) ** 0.5)
    centre = rng.uniform(-5, SIZE + 5, (2, number, 1))
    pixel = np.floor(centre).astype(int) + np.arange(-12, 13)  # (2, number, 25): rows, columns
    r2 = (pixel + 0.5 - centre) ** 2
    r2 = r2[0][:, :, None] + r2[1][:, None, :]
    light = (beta - 1) / (np.pi * alpha**2) * (1 + r2 / alpha**2) ** -beta
    place = (pixel[0][:, :, None], pixel[1][:, None, :])
    return deposit((SIZE, SIZE), place, flux[:, None, None] * light)


def galaxies(rng: np.random.Generator) -> np.ndarray:
    """Up to six galaxies, (SIZE, SIZE) electrons: ellipses with Sersic's profile."""
    one_each = (rng.integers(0, 7), 1, 1)
    index, radius = rng.uniform(1, 4, one_each), rng.uniform(2, 12, one_each)  # half the light in
    flux, axes = np.exp(rng.normal(9.5, 1.2, one_each)), rng.uniform(0.3, 1, one_each)
    row, column, angle = (rng.uniform(0, top, one_each) for top in (SIZE, SIZE, np.pi))
    down, right = np.arange(SIZE)[:, None] + 0.5 - row, np.arange(SIZE) + 0.5 - column
    along = down * np.cos(angle) + right * np.sin(angle)
    across = (right * np.cos(angle) - down * np.sin(angle)) / axes
    r = np.sqrt(along**2 + across**2 + 1)  # + 1: the telescope blurs the centre
    b = 2 * index - 1 / 3
    total = 2 * np.pi * axes * radius**2 * index * b ** (-2 * index) * gamma(2 * index)
    return (flux / total * np.exp(-b * (r / radius) ** (1 / index))).sum(axis=0)


def rays(exposure_s: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The charge that cosmic rays leave in each image, (n, SIZE, SIZE) electrons.

    They come from everywhere, so a track through the depth of one pixel runs tan(zenith angle)
    pixels across the image. A few are slow electrons, which curl.
    """
    number = rng.poisson(0.06 * exposure_s)
    image = np.repeat(np.arange(len(number)), number)[:, None]
    m = len(image)
    curls = rng.random((m, 1)) < 0.03
    u = rng.random((m, 1))  # sin^2 of the zenith angle: uniform for rays from everywhere
    length = np.where(curls, rng.uniform(10, 40, (m, 1)), np.minimum(np.sqrt(u / (1 - u)), 40))
    per_pixel = 900 - 150 * np.log(rng.standard_normal((m, 1)) ** 2)  # Moyal's law
    charge = per_pixel * np.sqrt(1 + length**2) / STEPS * rng.gamma(2, 0.5, (m, STEPS))
    turn = np.where(curls, rng.normal(0, 0.3, (m, STEPS)), 0)
    heading = rng.uniform(0, 2 * np.pi, (m, 1)) + turn.cumsum(axis=1)
    start = rng.uniform(0, SIZE, (2, m, 1)) - 0.5
    path = start + (np.stack([np.sin(heading), np.cos(heading)]) * length / STEPS).cumsum(axis=2)
    corner = np.floor(path).astype(int)
    part = path - corner
    total = 0
    for i, j in np.ndindex(2, 2):  # shared between the four nearest pixels
        weight = np.abs(1 - i - part[0]) * np.abs(1 - j - part[1])
        place = (image, corner[0] + i, corner[1] + j)
        total = total + deposit((len(number), SIZE, SIZE), place, charge * weight)
    return gaussian_filter(total, (0, 0.4, 0.4))  # charge diffuses in the detector


def simulate(n: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """n exposures: x, float32 (n, 1, 128, 128); y, float32 of the same shape, 0, 1 or NaN.

    A pixel belongs to a cosmic ray where it brought more than 1.5 times the noise, and more than 15
    electrons: real masks too take in the faint rim of a track. Pixels that are full or (one in a
    thousand) broken are to be ignored. Sky is added as `read` does.
    """
    rng = np.random.default_rng(seed)
    sky = rng.lognormal(np.log(60), 0.5, (n, 1, 1))
    slope = rng.normal(0, 0.1, (2, n, 1, 1))
    grid = np.linspace(-1, 1, SIZE)
    scene = sky * np.exp(slope[0] * grid[:, None] + slope[1] * grid)
    for image in scene:
        image += stars(rng) + galaxies(rng)
    charge = rays(rng.uniform(300, 1300, n), rng)
    x = rng.poisson(scene) + charge + rng.normal(0, READ_NOISE, scene.shape)
    y = (charge > np.maximum(1.5 * np.sqrt(scene + READ_NOISE**2), 15)).astype(np.float32)
    broken = rng.random(x.shape) < 0.001
    x = np.where(broken, rng.choice([0, 1], x.shape) * rng.uniform(0, 2e4, x.shape), x)
    y[broken | (x >= SATURATED)] = np.nan
    x = np.minimum(x, SATURATED) + sky * rng.uniform(*SKY_SHIFT, (n, 1, 1))
    return x[:, None].astype(np.float32), y[:, None]


def read(root: Path, split: str) -> "Exposures":
    """The real exposures of a split ("train" or "test"), read one at a time when asked for.

    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    path = Path(root) / "cosmic" / f"{split}_dirs.npy"
    want = f"a list of paths './cosmic/npy_{split}/f435w/PROPOSAL/VISIT/EXPOSURE_NUMBER.npy'"
    name = f"cosmic/deepCR.ACS-WFC.{split}.tar"
    remote = FILES[name]
    if not path.exists():  # first: without it, the images cannot be used
        raise FileNotFoundError(
            f"no file {path}; it has no address: write it with {LISTS}, {want}, of the files of "
            f"{name} ({remote}; {remote.url}, which is then downloaded), or {download.SIMULATE}"
        )
    names = files.read_pickled(path)
    form = re.compile(rf"(\./)?cosmic/npy_{split}(/\w[^/]*)+/[1-9]\d*_[^/]*\.npy")
    if np.ndim(names) != 1 or len(names) == 0:
        raise ValueError(f"{path}: expected {want}, got {type(names).__name__} {np.shape(names)}")
    wrong = [name for name in names if not (isinstance(name, str) and form.fullmatch(name))]
    if wrong:
        raise ValueError(f"{path}: expected {want}, got {wrong[0]!r}")
    download.unpacked(root, f"cosmic/npy_{split}", name, remote)
    paths = [Path(root) / name for name in names]
    for needed in dict.fromkeys(file for p in paths for file in (p, p.with_name("sky.npy"))):
        if not needed.exists():
            raise FileNotFoundError(
                f"no file {needed}, which {path} needs; unpack deepCR.ACS-WFC.{split}.tar in "
                f"{path.parent}, or run on simulated data (--data simulated)"
            )
    return Exposures(paths, fixed=split == "test")


class Exposures(Dataset):
    """(x, y) of image files, x and y float32 (1, 128, 128); x with a random share of the sky added.

    fixed: an image's share is the same at each access. Else it is drawn anew from torch's generator
    (the published code does that for the test images too).
    """

    def __init__(self, paths: list[Path], fixed: bool):
        self.paths, self.fixed = paths, fixed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask, ignored = read_image(self.paths[i])
        low, high = SKY_SHIFT
        u = np.random.default_rng([360, i]).random() if self.fixed else torch.rand(()).item()
        x = image + (low + (high - low) * u) * read_sky(self.paths[i])
        y = np.where(ignored == 1, np.nan, mask)
        return tuple(torch.from_numpy(a[None].astype(np.float32)) for a in (x, y))


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The middle of an image file, three (128, 128): electrons, cosmic rays, pixels to ignore."""
    want = (
        "numbers (3, W, W) with W >= 192: image, mask 0/1, ignore 0/1 (none ignored if (2, W, W))"
    )
    array = files.read_pickled(path)
    shape = np.shape(array)
    square = len(shape) == 3 and shape[0] in (2, 3) and shape[1] == shape[2] >= CROP.stop
    if not square or array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected {want}, got {type(array).__name__} {shape}")
    array = array[:, CROP, CROP]
    if not np.isfinite(array).all() or not np.isin(array[1:], (0, 1)).all():
        raise ValueError(f"{path}: expected {want}, got values not finite or masks not 0/1")
    return array[0], array[1], array[2] if len(array) == 3 else np.zeros_like(array[1])


def read_sky(path: Path) -> float:
    """The sky of an image's exposure, electrons: EXPOSURE_NUMBER.npy's is entry EXPOSURE - 1."""
    exposure, sky_path = int(path.name.split("_")[0]), path.with_name("sky.npy")
    sky = files.read_pickled(sky_path)
    numbers = isinstance(sky, np.ndarray) and sky.dtype.kind in "iuf" and sky.ndim == 1
    if not numbers or len(sky) < exposure or not np.isfinite(sky[exposure - 1]):
        raise ValueError(
            f"{sky_path}: expected a list of finite numbers, one for each exposure to "
            f"{exposure} or more, got {type(sky).__name__} {np.shape(sky)}"
        )
    return float(sky[exposure - 1])


TASK = {
    "title": "Cosmic: cosmic rays in the images of a space telescope",
    "x_shape": (1, SIZE, SIZE),
    "y_shape": (1, SIZE, SIZE),
    "kind": "mask",
    "num_classes": 1,
    "loss": metrics.bce,
    "metric": metrics.auroc,
    "metric_name": "1 - AUROC",
    "sources": {"embedded": "shapes", "paper": "voc"},
    "splits": ("train", "test"),
    "settings": {"patches": 1024},
    "sizes": {"train": 240, "val": 60, "test": 120},
    "published": {  # careful: of masks after a threshold, which leaves an AUROC at one point only
        "Hand-designed": 0.127,
        "NAS-Bench-360": 0.229,
        "DASH": 0.190,
        "Perceiver IO": 0.485,
        "FPT": 0.233,
        "NFT": 0.170,
        "ORCA": 0.152,
        "PaRe": 0.121,
    },
}

"""Textures: an embedded 2D source without objects. Ten kinds of pattern, made on the spot.

An image is one pattern from edge to edge: a class says how the pattern is made (CLASSES), while
its two colours, its scale, rotation and phase are random. With masks an image holds two patterns in
the same colours, one in a region and another around it: no colour gives the region away, and there
is no object, only a change of texture.

Scales are stated in periods to an image, so that a larger image shows the same, only finer; but
the grains of noise are pixels at any size.
"""

import numpy as np

CLASSES = ["grating", "plaid", "checkers", "bricks", "dots", "cells"]
CLASSES += ["rings", "blobs", "rough noise", "smooth noise"]
_BLOCK = 2**20  # pixels drawn at a time, which bounds the memory
_TABLE = 64  # cells of an irregular grid, to a side, before it repeats


def draw(
    texture: np.ndarray, size: int, rng: np.random.Generator, masks: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw one image for every texture.

    Args:
        texture: (n,) int, rows of CLASSES; with masks, of the region.
        size: height and width in pixels.
        masks: whether another texture surrounds a region.
    Returns: images, float32 (n, 3, size, size) in 0..1; masks, float32 (n, 1, size, size), 1 in the
        region, or None.
    """
    n, step = len(texture), max(1, _BLOCK // size**2)
    images = np.empty((n, 3, size, size), dtype=np.float32)
    regions = np.empty((n, 1, size, size), dtype=np.float32) if masks else None
    for block in (slice(i, i + step) for i in range(0, n, step)):
        value = texture_values(texture[block], size, rng)
        if masks:
            other = texture[block] + rng.integers(1, len(CLASSES), size=len(value))
            regions[block, 0] = region(len(value), size, rng)
            around = texture_values(other % len(CLASSES), size, rng)
            value = np.where(regions[block, 0] > 0, value, around)
        images[block] = _coloured(value, rng)
    return images, regions


def _coloured(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values (n, S, S) in 0..1 as a blend of two random colours, with a little noise."""
    n, size, _ = value.shape
    middle = rng.uniform(0.3, 0.7, (n, 3, 1, 1))
    apart = rng.uniform(0.15, 0.3, (n, 3, 1, 1)) * rng.choice([-1, 1], (n, 3, 1, 1))
    image = middle + apart * (2 * value[:, None] - 1)
    image += 0.03 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 1)


def region(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """n random regions, bool (n, size, size): ellipses, blobs and half planes in equal shares."""
    column = lambda low, high: rng.uniform(low, high, (n, 1, 1))  # noqa: E731
    u, v = _turned(n, size, rng)  # in -1..1 over the image, before it is turned
    u, v = u - column(-0.4, 0.4), v - column(-0.4, 0.4)
    phi, r = np.arctan2(v, u), np.hypot(u, v)
    wave = sum(column(-0.2, 0.2) * np.cos(m * phi + column(0, 2 * np.pi)) for m in (2, 3, 4))
    kinds = [
        np.hypot(u / column(0.35, 0.8), v / column(0.35, 0.8)) < 1,
        r < column(0.4, 0.7) * (1 + wave),
        u > 0,
    ]
    return np.choose(rng.integers(len(kinds), size=(n, 1, 1)), kinds)


def texture_values(texture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The textures at random scales, rotations and phases, (n, size, size) in 0..1."""
    value = np.empty((len(texture), size, size))
    for number, name in enumerate(CLASSES):
        rows = np.flatnonzero(texture == number)
        if len(rows):
            value[rows] = _MAKERS[name](len(rows), size, rng)
    return value


def _turned(n: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates u, v of the pixels, -1..1 over the image, turned at random, (n, S, S) each."""
    axis = (2 * np.arange(size) + 1) / size - 1
    turn = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    x, y = axis[None, None, :], axis[None, :, None]
    return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)


def _scaled(n: int, size: int, rng: np.random.Generator, low: float, high: float):
    """Coordinates with low..high periods of 1 to an image, at random places, turned.

    Returns: u, v, (n, S, S); pixels to a unit, (n, 1, 1).
    """
    periods = np.exp(rng.uniform(np.log(low), np.log(high), (n, 1, 1)))
    u, v = _turned(n, size, rng)
    shift = rng.uniform(0, _TABLE, (2, n, 1, 1))
    return u * periods / 2 + shift[0], v * periods / 2 + shift[1], size / periods


def _wave(u: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(2 * np.pi * u)


def _edge(inside: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """0..1 from a distance to an edge, positive inside: smooth over a pixel."""
    return np.clip(inside * pixels + 0.5, 0, 1)


def _grating(n, size, rng):
    u, _, _ = _scaled(n, size, rng, 4, 14)
    return _wave(u)


def _plaid(n, size, rng):
    """Two gratings that cross at a right angle, each with its own period."""
    u, v, _ = _scaled(n, size, rng, 4, 12)
    return (_wave(u) + _wave(v * rng.uniform(0.7, 1.4, (n, 1, 1)))) / 2


def _checkers(n, size, rng):
    u, v, pixels = _scaled(n, size, rng, 3, 8)
    # the distance to the nearest edge, with the sign of the square
    u, v = (np.abs(w % 1 - 0.5) - 0.25 for w in (u, v))
    return _edge(np.sign(u * v) * np.minimum(np.abs(u), np.abs(v)), pixels)


def _bricks(n, size, rng):
    """Bricks in rows, each of its own shade, with mortar between them."""
    u, v, pixels = _scaled(n, size, rng, 5, 11)
    row = np.floor(v).astype(int)
    u = u / 2 + 0.5 * (row % 2)  # bricks twice as long as they are high, every other row shifted
    column = np.floor(u).astype(int)
    (shade,) = _per_cell(column, row, rng.uniform(0.5, 1, (1, n, _TABLE, _TABLE)))
    across, along = np.minimum(v % 1, 1 - v % 1), 2 * np.minimum(u % 1, 1 - u % 1)
    return shade * _edge(np.minimum(across, along) - 0.1, pixels)


def _dots(n, size, rng):
    u, v, pixels = _scaled(n, size, rng, 4, 10)
    nearest, _, _ = _nearest(u, v, rng, jitter=0.3)
    return _edge(rng.uniform(0.22, 0.34, (n, 1, 1)) - nearest, pixels)


def _cells(n, size, rng):
    """Voronoi cells, each of its own shade, with dark borders."""
    u, v, pixels = _scaled(n, size, rng, 4, 9)
    nearest, second, shade = _nearest(u, v, rng, jitter=0.9)
    return (0.5 + 0.5 * shade) * _edge((second - nearest) / 2 - 0.06, pixels)


def _rings(n, size, rng):
    """Like wood: wavy rings around a point that may lie beyond the edge."""
    u, v = _turned(n, size, rng)
    r = np.hypot(u - rng.uniform(0, 1.5, (n, 1, 1)), v)
    bend = _noise(lambda f: np.exp(-((f / 2) ** 2)), n, size, rng)
    r = r + rng.uniform(0.02, 0.06, (n, 1, 1)) * bend
    return _wave(r * rng.uniform(3, 7, (n, 1, 1)) + rng.uniform(0, 1, (n, 1, 1)))


def _blobs(n, size, rng):
    """Noise of one scale, made black and white: like the spots of a reaction and diffusion."""
    f0 = np.exp(rng.uniform(np.log(4), np.log(10), (n, 1, 1)))
    noise = _noise(lambda f: np.exp(-((np.log(f / f0) / 0.2) ** 2)), n, size, rng)
    return _edge(noise - rng.uniform(-0.4, 0.4, (n, 1, 1)), size / (2 * np.pi * f0))


def _rough(n, size, rng):
    slope = rng.uniform(0, 0.5, (n, 1, 1))
    return np.clip(0.5 + 0.25 * _noise(lambda f: f**-slope, n, size, rng), 0, 1)


def _smooth(n, size, rng):
    slope = rng.uniform(1, 1.6, (n, 1, 1))
    return np.clip(0.5 + 0.25 * _noise(lambda f: f**-slope, n, size, rng), 0, 1)


_MAKERS = {
    "grating": _grating,
    "plaid": _plaid,
    "checkers": _checkers,
    "bricks": _bricks,
    "dots": _dots,
    "cells": _cells,
    "rings": _rings,
    "blobs": _blobs,
    "rough noise": _rough,
    "smooth noise": _smooth,
}


def _noise(amplitude, n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with a spectrum, (n, size, size); mean 0 and deviation 1 in every image.

    Args:
        amplitude: from frequencies, in periods to an image, to amplitudes.
    """
    f = np.hypot(np.fft.fftfreq(size, 1 / size)[:, None], np.fft.rfftfreq(size, 1 / size)[None])
    f[0, 0] = 1  # the mean, which is taken out below
    spectrum = np.fft.rfft2(rng.normal(size=(n, size, size))) * amplitude(f)
    noise = np.fft.irfft2(spectrum, s=(size, size))
    noise -= noise.mean(axis=(1, 2), keepdims=True)
    return noise / noise.std(axis=(1, 2), keepdims=True)


def _per_cell(column: np.ndarray, row: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Numbers that belong to the cells of a grid: (K, n, T, T) tables -> (K, n, S, S)."""
    image = np.arange(len(column))[:, None, None]
    return table[:, image, row % _TABLE, column % _TABLE]


def _nearest(u: np.ndarray, v: np.ndarray, rng: np.random.Generator, jitter: float):
    """Of points scattered one to a unit cell, off its middle by jitter / 2 at most.

    Returns: the distances to the nearest and the second nearest, and the nearest's random shade in
        0..1, each (n, S, S).
    """
    table = rng.uniform(0, 1, (3, len(u), _TABLE, _TABLE))
    table[:2] = 0.5 + jitter * (table[:2] - 0.5)
    column, row = np.floor(u).astype(int), np.floor(v).astype(int)
    nearest, second, shade = np.full(u.shape, np.inf), np.full(u.shape, np.inf), np.zeros(u.shape)
    for i, j in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
        a, b, own = _per_cell(column + i, row + j, table)
        r = np.hypot(column + i + a - u, row + j + b - v)
        second = np.minimum(second, np.maximum(nearest, r))
        shade = np.where(r < nearest, own, shade)
        nearest = np.minimum(nearest, r)
    return nearest, second, shade


def load(
    n: int,
    size: int,
    seed: int = 0,
    split: str = "train",
    root: str = "data",
    masks: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n images, as many of each class as of any other.

    Args:
        size: height and width in pixels.
        seed, split: which images ("train" or "val").
        root: not read; the images are drawn.
        masks: whether an image holds two textures and y says where the one of its class is.
    Returns: images, float32 (n, 3, size, size) in 0..1; classes, int64 (n,), or masks, float32
        (n, 1, size, size); the names of the classes.
    """
    rng = np.random.default_rng([seed, ["train", "val"].index(split)])
    y = rng.permutation(np.arange(n) % len(CLASSES))
    images, regions = draw(y, size, rng, masks)
    return images, regions if masks else y.astype(np.int64), list(CLASSES)

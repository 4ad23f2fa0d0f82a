"""Noise: the control among the embedded sources, for texts and images. It holds no meaning.

What a source without any structure gives is what comes of having a source at all; only what a
source gives beyond that comes of its data. There are classes to be learnt, since the methods need
labels, but all that tells them apart are frequencies:

- texts: token ids drawn one by one, with no regard to the others, by Zipf's law, the frequency of
  the r-th of the ids being in proportion to 1 / r. Each class ranks them in an order of its own.
- images: white noise. A class is the mean colour and the deviation of the pixels. With masks the
  deviation inside a disc is another.

The orders and the colours are the same in every run and in both splits.
"""

from collections.abc import Callable

import numpy as np

from tasks.sources import words

CLASSES = [f"order {i}" for i in range(8)]  # of texts
SPREAD = 0.45  # how far the orders of the ids differ: deviation of the logarithm of a rank
COLOURS = {
    "grey": (0.5, 0.5, 0.5),
    "red": (0.65, 0.4, 0.4),
    "green": (0.4, 0.65, 0.4),
    "blue": (0.4, 0.4, 0.65),
    "yellow": (0.6, 0.6, 0.35),
}
DEVIATIONS = {"weak": 0.08, "strong": 0.2}
IMAGE_CLASSES = [f"{strength} {colour}" for strength in DEVIATIONS for colour in COLOURS]
_TINT = 0.06  # deviation of an image's mean from its class's, in every channel
_BLOCK = 2**20  # pixels drawn at a time, which bounds the memory
SPLITS = ("train", "val")


def load_text(
    tokenize: Callable[[list[str]], list[list[int]]],
    n: int,
    length: int,
    seed: int = 0,
    split: str = "train",
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n windows of `length` tokens, as many of each class as of any other.

    Args:
        tokenize: texts to lists of token ids, without special tokens; the tokenizer of the body the
            windows are for. The ids are those that the text of source 'words' has.
        n, length: how many windows, and tokens in each.
        seed, split: which windows ("train" or "val").
    Returns: token ids, int64 (n, length); labels, int64 (n,), 0..7; the names of the classes.
    Raises: ValueError if this Python was stripped of its documentation.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    x = np.empty((n, length), dtype=np.int64)
    y = rng.permutation(np.arange(n) % len(CLASSES))
    try:
        texts = list(words.texts().values())
    except ValueError as error:
        raise ValueError(f"source 'noise' draws from the tokens of 'words': {error}") from None
    ids = np.unique(np.concatenate([np.array(i, dtype=np.int64) for i in tokenize(texts)]))
    for label, p in enumerate(frequencies(len(ids))):
        rows = np.flatnonzero(y == label)
        x[rows] = rng.choice(ids, size=(len(rows), length), p=p)
    return x, y, list(CLASSES)


def frequencies(vocabulary: int) -> np.ndarray:
    """How frequent each token is in each class, (8, vocabulary); rows sum to 1.

    All classes have the same frequencies, 1 / r of ranks r up to a factor, but in another order.
    The orders are alike, or else one frequent token would tell the class.
    """
    rng = np.random.default_rng(1949)
    common = np.log(1 + rng.permutation(vocabulary))
    apart = SPREAD * rng.normal(size=(len(CLASSES), vocabulary))
    rank = 1 + (common + apart).argsort(axis=1).argsort(axis=1)
    return (1 / rank) / (1 / rank).sum(axis=1, keepdims=True)


def load_images(
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
        masks: whether the noise in a disc is weak where the rest is strong, or the other way round,
            and y says where.
    Returns: images, float32 (n, 3, size, size) in 0..1; classes, int64 (n,), or masks, float32
        (n, 1, size, size); the names of the classes.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    y = rng.permutation(np.arange(n) % len(IMAGE_CLASSES))
    strength, colour = np.divmod(y, len(COLOURS))
    mean = np.array(list(COLOURS.values()))[colour] + rng.normal(0, _TINT, (n, 3))
    inside = _discs(n, size, rng) if masks else np.zeros((n, 1, size, size), dtype=np.float32)
    images = np.empty((n, 3, size, size), dtype=np.float32)
    step, deviations = max(1, _BLOCK // size**2), np.array(list(DEVIATIONS.values()))
    for block in (slice(i, i + step) for i in range(0, n, step)):
        own, other = deviations[strength[block]], deviations[1 - strength[block]]
        own, other = own[:, None, None, None], other[:, None, None, None]
        deviation = np.where(inside[block] > 0, other, own)
        noise = rng.standard_normal(images[block].shape, dtype=np.float32)
        images[block] = np.clip(mean[block, :, None, None] + deviation * noise, 0, 1)
    return images, inside if masks else y.astype(np.int64), list(IMAGE_CLASSES)


def _discs(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """A disc at a random place in each image, float32 (n, 1, size, size), 1 in it."""
    axis = (2 * np.arange(size) + 1) / size - 1
    a, b = rng.uniform(-0.4, 0.4, (2, n, 1, 1, 1))
    r = np.hypot(axis - a, axis[:, None] - b)
    return (r < rng.uniform(0.3, 0.7, (n, 1, 1, 1))).astype(np.float32)

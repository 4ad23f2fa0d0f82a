"""Shapes: the embedded 2D source. Fractals, shapes and textures, drawn on the spot, with masks.

An image is one object before a background: a shape given by its outline in polar coordinates, or
the attractor of an iterated function system, a fractal (Kataoka et al. 2020, Pre-training without
Natural Images; Anderson and Farrell 2022, Improving Fractal Pre-training). The object is filled
with one of ten textures, the background with another at low contrast. Place, size, rotation,
colours and noise are random, and say nothing about the class.

A class of the source is a shape or a fractal, in any texture: CLASSES. bodies/tiny_swin was
pretrained to name the pair of outline and texture, and more fractals: bodies/make_tiny_swin.py.
"""

import functools

import numpy as np

# outline r(phi) = 1 + e cos(m phi), as (m, e); the ring is a disc with a hole
OUTLINES = {
    "disc": (0, 0.0),
    "egg": (2, 0.3),
    "triangle": (3, 0.25),
    "square": (4, 0.25),
    "pentagon": (5, 0.25),
    "hexagon": (6, 0.2),
    "eight": (2, 0.5),
    "clover": (3, 0.45),
    "gear": (8, 0.15),
    "ring": (0, 0.0),
}
TEXTURES = ["coarse waves", "waves", "fine waves", "coarse stripes", "stripes", "fine stripes"]
TEXTURES += ["checkers", "circles", "dots", "clouds"]
FRACTALS = 140  # how many there are; the first ten are classes of the source
CLASSES = [*OUTLINES, *(f"fractal {i}" for i in range(10))]
_BLOCK = 250  # images drawn at a time, which bounds the memory


def draw(
    outline: np.ndarray,
    texture: np.ndarray,
    size: int,
    rng: np.random.Generator,
    clutter: float = 0.35,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image for every pair of an outline and a texture.

    Args:
        outline: (n,) int; 0..9 is a row of OUTLINES, 10 and more is fractal outline - 10.
        texture: (n,) int, rows of TEXTURES.
        size: height and width in pixels.
        clutter: contrast of the background's texture, 0..1.
    Returns: images, float32 (n, 3, size, size) in 0..1; masks, float32 (n, 1, size, size), 1 on
        the object.
    """
    blocks = [
        _draw(outline[i : i + _BLOCK], texture[i : i + _BLOCK], size, rng, clutter)
        for i in range(0, len(outline), _BLOCK)
    ]
    images, masks = zip(*blocks, strict=True)
    return np.concatenate(images), np.concatenate(masks)


def _draw(outline, texture, size, rng, clutter):
    n = len(outline)
    column = lambda low, high: rng.uniform(low, high, (n, 1, 1))  # noqa: E731
    axis = (2 * np.arange(size) + 1) / size - 1
    x, y = axis[None, None, :] - column(-0.3, 0.3), axis[None, :, None] - column(-0.3, 0.3)
    radius, turn = column(0.4, 0.75), column(0, 2 * np.pi)
    u = (x * np.cos(turn) + y * np.sin(turn)) / radius  # the object's own coordinates
    v = (y * np.cos(turn) - x * np.sin(turn)) / radius
    fractal = outline >= len(OUTLINES)
    alpha = shape_mask(np.where(fractal, 0, outline), u, v, size * radius / 2)
    if fractal.any():
        numbers = outline[fractal] - len(OUTLINES)
        alpha[fractal] = fractal_mask(numbers, size, rng)
    inside = texture_values(texture, u, v, rng)
    around = texture_values(rng.integers(len(TEXTURES), size=n), y, x, rng)
    first, second, third = (rng.uniform(0, 1, (n, 3, 1, 1)) for _ in range(3))
    # the two colours of the object differ by at least 0.5 in each channel
    second = np.where(first > 0.5, first - 0.5 - 0.5 * second * first, first + 0.5)
    ground = third + clutter * (around[:, None] - 0.5)
    image = first + (second - first) * inside[:, None]
    image = ground + (image - ground) * alpha[:, None]
    image += rng.normal(0, 0.03, image.shape)
    return np.clip(image, 0, 1).astype(np.float32), (alpha > 0.5).astype(np.float32)[:, None]


def shape_mask(outline: np.ndarray, u: np.ndarray, v: np.ndarray, pixels: np.ndarray):
    """How far each point lies inside its outline: 1 in it, 0 out of it, smooth over a pixel.

    Args:
        outline: (n,) rows of OUTLINES.
        u, v: coordinates, (n, S, S), in which the outline has a mean radius of 1.
        pixels: pixels to a unit of u, (n, 1, 1).
    """
    m, e = np.array(list(OUTLINES.values()))[outline].T[:, :, None, None]
    r = np.hypot(u, v)
    inside = (1 + e * np.cos(m * np.arctan2(v, u)) - r) * pixels
    hole = np.where(outline == list(OUTLINES).index("ring"), 0.55, 0.0)[:, None, None]
    inside = np.minimum(inside, np.where(hole > 0, (r - hole) * pixels, np.inf))
    return np.clip(inside + 0.5, 0, 1)


def texture_values(texture: np.ndarray, u: np.ndarray, v: np.ndarray, rng: np.random.Generator):
    """The texture at the coordinates u, v, (n, S, S), in 0..1, at a random phase."""
    n = len(texture)
    p, q = rng.uniform(0, 2 * np.pi, (2, n, 1, 1))
    value = np.empty(np.broadcast_shapes(u.shape, v.shape))
    u, v = np.broadcast_to(u, value.shape), np.broadcast_to(v, value.shape)
    for number, name in enumerate(TEXTURES):
        rows = np.flatnonzero(texture == number)
        a, b, s, t = u[rows], v[rows], p[rows], q[rows]
        if "waves" in name or "stripes" in name:
            wave = np.sin({"coarse": 5, "fine": 20}.get(name.split()[0], 10) * a + s)
            value[rows] = 0.5 + 0.5 * (wave if "waves" in name else np.sign(wave))
        elif name == "checkers":
            value[rows] = np.sin(9 * a + s) * np.sin(9 * b + t) > 0
        elif name == "circles":
            value[rows] = 0.5 + 0.5 * np.sin(14 * np.hypot(a, b) + s)
        elif name == "dots":
            value[rows] = np.sin(9 * a + s) * np.sin(9 * b + t) > 0.5
        else:
            value[rows] = _clouds(len(rows), value.shape[-1], rng)
    return value


def _clouds(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls as 1/f, (n, size, size), stretched to 0..1."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(n, size, size))) / f, s=(size, size))
    low, high = noise.min(axis=(1, 2), keepdims=True), noise.max(axis=(1, 2), keepdims=True)
    return (noise - low) / (high - low)


@functools.cache
def fractal_codes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The iterated function systems: FRACTALS of them, the same in every run.

    Returns: A (F, 4, 2, 2) and b (F, 4, 2) of the maps x -> A x + b; the cumulative probabilities
        of the maps, (F, 4). A system of 2 or 3 maps has maps of probability 0.
    Only systems whose attractor covers 10 to 50 % of a coarse grid are kept.
    """
    rng = np.random.default_rng(2020)
    kept = []
    while len(kept) < FRACTALS:
        maps = rng.integers(2, 5, 400)
        s = rng.uniform(0, 1, (400, 4, 2))
        turns, signs = rng.uniform(0, 2 * np.pi, (2, 400, 4)), rng.choice([-1, 1], (400, 4, 1, 2))
        A = _rotation(turns[0]) * s[:, :, None] @ _rotation(turns[1]) * signs
        b = rng.uniform(-1, 1, (400, 4, 2))
        used = np.arange(4) < maps[:, None]
        size = ((s[..., 0] + 2 * s[..., 1]) * used).sum(axis=1)  # Anderson and Farrell's measure
        p = np.where(used, np.abs(np.linalg.det(A)) + 0.02, 0.0)
        cumulative = np.cumsum(p / p.sum(axis=1, keepdims=True), axis=1)
        good = np.flatnonzero((size > (5 + maps) / 2) & (size < (6 + maps) / 2))
        codes = A[good], b[good], cumulative[good]
        cover = (_attractor(*codes, 32, rng) > 0).mean(axis=(1, 2))
        keep = (cover > 0.1) & (cover < 0.5)
        kept += list(zip(*(code[keep] for code in codes), strict=True))
    return tuple(np.array(code) for code in zip(*kept[:FRACTALS], strict=True))


def _rotation(angle: np.ndarray) -> np.ndarray:
    """Rotation matrices, (...) -> (..., 2, 2)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def _attractor(A, b, cumulative, size: int, rng: np.random.Generator) -> np.ndarray:
    """Points of each attractor counted on a grid, (n, size, size), by the chaos game.

    48 points a system wander at once; those of the first 20 steps are not on it yet.
    """
    n, walkers, steps = len(A), 48, 84
    point, row = np.zeros((n, walkers, 2)), np.arange(n)[:, None]
    track = np.empty((n, steps, walkers, 2))
    for step in range(steps):
        choice = (rng.random((n, walkers, 1)) > cumulative[:, None]).sum(axis=2).clip(max=3)
        point = (A[row, choice] @ point[..., None])[..., 0] + b[row, choice]
        track[:, step] = point
    track = track[:, 20:].reshape(n, -1, 2)
    low, high = np.percentile(track, 1, axis=1), np.percentile(track, 99, axis=1)
    span = (high - low).max(axis=1)[:, None, None] + 1e-9
    middle = (low + high)[:, None] / 2
    cell = np.floor((0.5 + 0.85 * (track - middle) / span) * size).astype(int)
    on = ((cell >= 0) & (cell < size)).all(axis=2)
    flat = (np.arange(n)[:, None] * size + cell[..., 1]) * size + cell[..., 0]
    counts = np.bincount(flat[on], minlength=n * size * size)
    return counts.reshape(n, size, size)


def fractal_mask(number: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Fractals as masks, (n, size, size) in 0..1: each a distorted, turned, scaled specimen."""
    n = len(number)
    A, b, cumulative = (code[number] for code in fractal_codes())
    A, b = A * rng.uniform(0.9, 1.1, (n, 4, 1, 1)), b * rng.uniform(0.9, 1.1, (n, 4, 1))
    # in coordinates x' = R x / scale, the map x -> A x + b is x' -> R A R^-1 x' + R b / scale
    R = _rotation(rng.uniform(-0.35, 0.35, n))[:, None]
    A, b = R @ A @ R.swapaxes(-1, -2), (R @ b[..., None])[..., 0]
    counts = _attractor(A, b, cumulative, size, rng).astype(float)
    return np.clip(np.log1p(counts) / np.log(3), 0, 1)


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
        masks: whether y says where the object is rather than what it is.
    Returns: images, float32 (n, 3, size, size) in 0..1; classes, int64 (n,), or masks, float32
        (n, 1, size, size); the names of the classes.
    """
    rng = np.random.default_rng([seed, ["train", "val"].index(split)])
    y = rng.permutation(np.arange(n) % len(CLASSES))
    images, mask = draw(y, rng.integers(len(TEXTURES), size=n), size, rng)
    return images, mask if masks else y.astype(np.int64), list(CLASSES)

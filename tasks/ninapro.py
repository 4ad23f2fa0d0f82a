"""NinaPro: a hand's gesture from 0.26 s of 16 muscle electrodes. NAS-Bench-360, 2D, 18 classes.

Real data: NinaPro DB5, surface electromyograms of ten people who wear two armbands of eight
electrodes, at 200 Hz (Pizzolato et al. 2017, PLoS ONE 12:e0186132; NAS-Bench-360, Tu et al. 2022).
3956 windows of 52 time steps: `ninapro_{train,val,test}.npy`, (n, 52, 16) float, and
`label_{train,val,test}.npy`, (n,) in 0..17: 17 gestures and rest. How they were chosen, filtered
and numbered is not documented; windows of one person are in all three.

Simulated data: a muscle's signal is noise whose strength follows its activation (Hogan and Mann
1980, IEEE TBME 27:382); a gesture is a mixture of a few synergies, groups of muscles that act
together (d'Avella, Saltiel and Bizzi 2003, Nature Neuroscience 6:300). The windows hold absolute
values (rectified signals, as in the pipeline of NAS-Bench-360's own model).
"""

from pathlib import Path

import numpy as np
from scipy import signal

from tasks import download, files, metrics

RATE, STEPS, ELECTRODES = 200, 52, 16  # samples a second, of a window; 2 rings of 8 electrodes
GESTURES, SYNERGIES, PEOPLE = 18, 6, 10  # gesture 0 is rest
REST = 0.02  # activation of every synergy at rest
NOISE = 0.15  # of the amplifier, relative to a strong contraction
FILES = {
    name: download.nas_bench(name, 8 * numbers, "CC BY-ND")
    for split, n in (("train", 2638), ("val", 659), ("test", 659))
    for name, numbers in (
        (f"ninapro/ninapro_{split}.npy", n * STEPS * ELECTRODES),
        (f"ninapro/label_{split}.npy", n),
    )
}
WARM_UP = 48  # steps before the window, until the filter has forgotten its start


def gestures(rng: np.random.Generator) -> np.ndarray:
    """The activation of each synergy in each gesture, (18, 6), no two much alike."""
    u = [np.full(SYNERGIES, REST)]
    while len(u) < GESTURES:
        new = rng.dirichlet(np.full(SYNERGIES, 0.4)) * rng.uniform(0.6, 1.4)
        cosine = [new @ old / np.linalg.norm(new) / np.linalg.norm(old) for old in u[1:]]
        if max(cosine, default=0) < 0.9:
            u.append(new)
    return np.array(u)


def people(rng: np.random.Generator) -> np.ndarray:
    """How strongly each synergy reaches each electrode of each person, (10, 16, 6).

    A synergy is centred on one side of the arm. People wear the bands turned by some degrees, and
    differ in how well each electrode sticks and in their muscles.
    """
    centre = rng.uniform(0, 2 * np.pi, SYNERGIES)
    reach = rng.uniform(0.5, 1.5, (2, SYNERGIES)).repeat(8, axis=0)
    around = np.radians(np.arange(ELECTRODES) * 45 + np.arange(ELECTRODES) // 8 * 22.5)
    turned = around + np.radians(rng.normal(0, 15, (PEOPLE, 1)))
    W = reach * np.exp(3 * (np.cos(turned[:, :, None] - centre) - 1))
    gain = rng.lognormal(0, 0.2, (PEOPLE, ELECTRODES, 1))
    return gain * W * rng.lognormal(0, 0.1, W.shape)


FIXED = np.random.default_rng(360)  # the same gestures and people in every split
U, W = gestures(FIXED), people(FIXED)


def muscle_noise(rng: np.random.Generator, n: int) -> np.ndarray:
    """Gaussian noise of 20 to 95 Hz, standard deviation 1, (n, 16, 52).

    Neighbours on a ring see part of the same fibres: their correlation is 0.3.
    """
    white = rng.normal(size=(n, 2, 8, WARM_UP + STEPS))
    white = (white + np.roll(white, 1, axis=2) / 3) / np.hypot(1, 1 / 3)
    band = signal.butter(4, (20, 95), "bandpass", fs=RATE, output="sos")
    response = signal.sosfilt(band, np.eye(1, 1000)[0])  # its energy is the variance it leaves
    filtered = signal.sosfilt(band, white)[..., WARM_UP:] / np.linalg.norm(response)
    return filtered.reshape(n, ELECTRODES, STEPS)


def effort(rng: np.random.Generator, n: int) -> np.ndarray:
    """How hard the hand works over the window, (n, 52): steady, trembling, or just starting."""
    t = np.arange(STEPS) / RATE
    tremble = np.sin(2 * np.pi * (rng.uniform(1, 6, (n, 1)) * t + rng.random((n, 1))))
    start = rng.uniform(0, 0.6, (n, 1)) * t[-1]
    ramp = np.where(rng.random((n, 1)) < 0.2, ((t - start) / 0.05).clip(0, 1), 1)
    return rng.uniform(0.6, 1.3, (n, 1)) * (1 + 0.2 * tremble) * ramp


def simulate(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n windows, every gesture as often as any other: x, float32 (n, 1, 16, 52); y, int64 (n,)."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % GESTURES)
    who = rng.integers(PEOPLE, size=n)
    mixture = U[y] * rng.lognormal(0, 0.3, (n, SYNERGIES))  # no gesture is made twice the same way
    strength = np.sqrt(np.einsum("ncm,nm->nc", W[who] ** 2, mixture**2))
    x = strength[:, :, None] * effort(rng, n)[:, None] * muscle_noise(rng, n)
    x += NOISE * rng.normal(size=x.shape)
    return np.abs(x).astype(np.float32)[:, None], y


def read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real windows of a split ("train", "val", "test"): x, float32 (n, 1, 16, 52); y, int64.

    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    names = f"ninapro/ninapro_{split}.npy", f"ninapro/label_{split}.npy"
    path, of_labels = (download.fetch(root, name, FILES[name]) for name in names)
    want = "(n, 52, 16) numbers"
    x = _array(path, want)
    if x.shape[1:] != (STEPS, ELECTRODES) or len(x) == 0:
        raise ValueError(f"{path}: expected {want}, got shape {x.shape}")
    path, want = of_labels, f"({len(x)},) whole numbers 0..17, one a window"
    label = _array(path, want)
    if label.shape != x.shape[:1] or not np.isin(label, np.arange(GESTURES)).all():
        raise ValueError(f"{path}: expected {want}, got shape {label.shape}, or other labels")
    return x.transpose(0, 2, 1)[:, None].astype(np.float32, order="C"), label.astype(np.int64)


def _array(path: Path, want: str) -> np.ndarray:
    """A file's array, if it holds finite numbers."""
    array = np.asarray(files.read_pickled(path))
    if array.dtype.kind not in "iuf" or array.ndim == 0 or not np.isfinite(array).all():
        raise ValueError(f"{path}: expected {want}, got {array.dtype}, or values not finite")
    return array


TASK = {
    "title": "NinaPro: the gesture of a hand from 16 muscle electrodes",
    "x_shape": (1, ELECTRODES, STEPS),
    "y_shape": (),
    "kind": "classes",
    "num_classes": GESTURES,
    "loss": metrics.cross_entropy,
    "metric": metrics.zero_one,
    "metric_name": "0-1 error",
    "sources": {"embedded": "shapes", "paper": "cifar10"},
    "splits": ("train", "val", "test"),
    "sizes": {"train": 1080, "val": 216, "test": 540},
    "published": {
        "Hand-designed": 0.0873,
        "NAS-Bench-360": 0.0734,
        "DASH": 0.0660,
        "Perceiver IO": 0.2222,
        "FPT": 0.1569,
        "NFT": 0.0835,
        "ORCA": 0.0754,
        "PaRe": 0.0653,
    },
}

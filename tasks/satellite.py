"""Satellite: the land cover of a field from 46 dates of one year. NAS-Bench-360, 1D, 24 classes.

Real data: Formosat-2 image time series over south-west France, one vegetation-like value a date,
labels without names (Petitjean, Inglada and Gancarski 2012, IEEE TGRS 50:3081; NAS-Bench-360, Tu
et al. 2022). 900,000 training and 100,000 test series: `satellite_train.npy` and
`satellite_test.npy`, each a pickled dict {"data": (n, 46) float, "label": (n,) in 1..24}.

Simulated data: the growing season as a double logistic curve (Beck et al. 2006, Remote Sensing of
Environment 100:321), with the parameters of 24 kinds of land cover, the weather's and the
farmer's variation, clouds and noise.
"""

from pathlib import Path

import numpy as np

from tasks import download, files, metrics

FILES = {
    name: download.nas_bench(name, size, "GPL")
    for name, size in (
        ("satellite/satellite_train.npy", 322e6),
        ("satellite/satellite_test.npy", 35e6),
    )
}
# name: v0 winter level, v1 summer level, S start and A end of season (day of year), their slopes
COVER = {
    "wheat": (0.20, 0.85, 75, 175, 0.08, 0.12),
    "barley": (0.20, 0.80, 65, 160, 0.08, 0.14),
    "rapeseed": (0.30, 0.85, 50, 165, 0.10, 0.10),
    "pea": (0.18, 0.75, 95, 165, 0.10, 0.14),
    "irrigated corn": (0.15, 0.88, 165, 265, 0.10, 0.07),
    "dry corn": (0.15, 0.75, 165, 240, 0.10, 0.08),
    "silage corn": (0.15, 0.88, 160, 245, 0.10, 0.20),
    "sunflower": (0.15, 0.78, 160, 225, 0.12, 0.10),
    "soybean": (0.15, 0.85, 175, 260, 0.10, 0.12),
    "sorghum": (0.15, 0.70, 180, 265, 0.09, 0.08),
    "permanent grass": (0.40, 0.70, 80, 300, 0.04, 0.04),
    "temporary grass": (0.35, 0.80, 70, 310, 0.05, 0.05),
    "alfalfa": (0.35, 0.80, 70, 310, 0.05, 0.05),
    "fallow": (0.25, 0.50, 100, 280, 0.03, 0.03),
    "broadleaf forest": (0.40, 0.85, 110, 300, 0.12, 0.06),
    "conifer forest": (0.65, 0.75, 100, 290, 0.02, 0.02),
    "eucalyptus": (0.60, 0.72, 60, 320, 0.02, 0.02),
    "poplar": (0.30, 0.80, 120, 270, 0.15, 0.10),
    "vine": (0.20, 0.50, 125, 285, 0.10, 0.05),
    "double crop": (0.20, 0.85, 75, 175, 0.08, 0.12),  # wheat, then soybean
    "water": (-0.10, -0.10, 100, 280, 0.05, 0.05),
    "gravel": (0.05, 0.05, 100, 280, 0.05, 0.05),
    "dense urban": (0.12, 0.12, 100, 280, 0.05, 0.05),
    "sparse urban": (0.30, 0.40, 100, 290, 0.03, 0.03),
}
MOWING = {"temporary grass": [150], "alfalfa": [130, 180, 230]}  # days of the cuts
DATES = np.sort(np.random.default_rng(360).uniform(1, 365, 46))  # the same dates for every field


def season(t, v0, v1, S, A, mS, mA):
    """The double logistic v(t): up around day S with slope mS, down around day A with slope mA."""
    up, down = 1 / (1 + np.exp(-mS * (t - S))), 1 / (1 + np.exp(mA * (t - A)))
    return v0 + (v1 - v0) * (up + down - 1)


def simulate(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n fields, every class as often as any other: x, float32 (n, 1, 46); y, int64 (n,).

    Each field has its own season (a shift of both ends, a shift of each), levels, slopes, cutting
    days, clouds that hide the ground on some dates, and sensor noise.
    """
    rng = np.random.default_rng(seed)
    names, curves = list(COVER), np.array(list(COVER.values()))
    y = rng.permutation(np.arange(n) % len(names))
    normal = lambda sd: rng.normal(0, sd, (n, 1))  # noqa: E731
    v0, v1, S, A, mS, mA = (column[:, None] for column in curves[y].T)
    shift = normal(10)
    v0, v1, S, A = (
        v0 + normal(0.03),
        v1 + normal(0.05),
        S + shift + normal(4),
        A + shift + normal(4),
    )
    mS, mA = mS * np.exp(normal(0.2)), mA * np.exp(normal(0.2))
    x = season(DATES, v0, v1, S, A, mS, mA)
    second = season(DATES, 0.15, 0.85 + normal(0.05), 195 + shift, 280 + shift, 0.10, 0.12)
    x = np.where(y[:, None] == names.index("double crop"), np.maximum(x, second), x)
    for name, days in MOWING.items():
        for day in days:  # a cut takes a third of the canopy, which grows back in two weeks
            since = DATES - (day + normal(6))
            cut = np.where(since > 0, 0.35 * np.exp(-since / 15), 0.0)
            x = np.where(y[:, None] == names.index(name), x - cut, x)
    clouds = rng.random(x.shape) < 0.07
    x = np.where(clouds, x * rng.uniform(0.2, 0.8, x.shape), x) + rng.normal(0, 0.025, x.shape)
    return np.clip(x, -0.2, 1.0).astype(np.float32)[:, None], y


def read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real series of a split ("train" or "test"): x, float32 (n, 1, 46); y, int64 (n,) 0..23.

    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    name = f"satellite/satellite_{split}.npy"
    path = download.fetch(root, name, FILES[name])
    want = "a pickled dict {'data': (n, 46) numbers, 'label': (n,) integers 1..24}"
    content = files.read_pickled(path)
    if not isinstance(content, dict) or not {"data", "label"} <= set(content):
        raise ValueError(f"{path}: expected {want}, got {type(content).__name__}")
    x, label = np.asarray(content["data"]), np.asarray(content["label"])
    if x.dtype.kind not in "biuf" or label.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected {want}, got {x.dtype} data and {label.dtype} labels")
    if x.ndim != 2 or x.shape[1] != 46 or label.shape != x.shape[:1] or len(x) == 0:
        raise ValueError(f"{path}: expected {want}, got shapes {x.shape} and {label.shape}")
    if not np.isin(label, np.arange(1, 25)).all() or not np.isfinite(x).all():
        raise ValueError(f"{path}: expected {want}, got other labels or values that are not finite")
    return x.astype(np.float32)[:, None], label.astype(np.int64) - 1


TASK = {
    "title": "Satellite: land cover from a year of satellite observations",
    "x_shape": (1, 46),
    "y_shape": (),
    "kind": "classes",
    "num_classes": 24,
    "loss": metrics.cross_entropy,
    "metric": metrics.zero_one,
    "metric_name": "0-1 error",
    "sources": {"embedded": "words", "paper": "conll2003"},
    "splits": ("train", "test"),
    "sizes": {"train": 2400, "val": 600, "test": 2400},
    "published": {
        "Hand-designed": 0.1980,
        "NAS-Bench-360": 0.1251,
        "DASH": 0.1228,
        "Perceiver IO": 0.1593,
        "FPT": 0.2083,
        "NFT": 0.1386,
        "ORCA": 0.1159,
        "PaRe": 0.1118,
    },
}

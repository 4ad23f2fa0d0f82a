"""DeepSEA: which marks a stretch of DNA carries. NAS-Bench-360, 1D, 36 labels.

Real data: 1000 bases of the human genome, one-hot in the order A, G, C, T, with 0 or 1 for each of
36 chromatin tracks (protein binding, open chromatin, histone marks) of the 919 of Zhou and
Troyanskaya 2015, Nature Methods 12:931; NAS-Bench-360, Tu et al. 2022, does not say which.
`deepsea_filtered.npz` holds x_train (71753, 1000, 4) and y_train (71753, 36), x_val and y_val
(2490 rows), x_test and y_test (149400 rows), one byte a number.

Simulated data: a Markov chain of order 1 whose composition differs from sequence to sequence (the
share of G and C, of CpG, and one of 6 states), as in real chromatin a part of what the tracks
follow; planted motifs (position weight matrices: Stormo 2000, Bioinformatics 16:16) are the rest.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks import download, files, metrics

NAME = "deepsea/deepsea_filtered.npz"
FILES = {NAME: download.nas_bench(NAME, 860e6, "CC BY 4.0")}
LENGTH, TRACKS, MOTIFS, STATES = 1000, 36, 12, 6
A, G, C, T = range(4)  # the order of the one-hot channels; the complement of base b is 3 - b

# What is the same for every seed: the motifs, and what each track follows.
_fixed = np.random.default_rng(36)
WIDTHS = _fixed.integers(8, 13, MOTIFS)  # bases of each motif
WEIGHTS = [_fixed.dirichlet(np.full(4, 0.05), width) for width in WIDTHS]  # (width, 4), 1.7 bit
BASE_RATE = _fixed.uniform(-3.0, -1.4, TRACKS)  # logits
BY_GC, BY_CPG = _fixed.normal(0, 0.8, TRACKS), _fixed.normal(0, 0.8, TRACKS)
BY_STATE = _fixed.normal(0, 0.8, (STATES, TRACKS))
STEPS = _fixed.normal(0, 0.3, (STATES, 4, 4))  # log odds of a base after another, in each state
STEPS -= STEPS.mean(axis=1, keepdims=True)


def simulate(n: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """n sequences: x, float32 (n, 4, 1000), one-hot; y, float32 (n, 36), 0 or 1.

    A sequence has its own share of G and C, and of C followed by G, and one of 6 states, which set
    the odds of each track. Where a track is 1, copies of its motif (k mod 12: three tracks share
    one) are planted in four cases of five; where it is 0, rarely.
    """
    rng = np.random.default_rng(seed)
    gc, cpg = rng.standard_normal((2, n))
    state = rng.integers(STATES, size=n)
    logit = BASE_RATE + BY_GC * gc[:, None] + BY_CPG * cpg[:, None] + BY_STATE[state]
    y = rng.random((n, TRACKS)) < 1 / (1 + np.exp(-logit))
    bases = background(gc, cpg, state, rng)
    bound = (y & (rng.random(y.shape) < 0.8)).reshape(n, -1, MOTIFS).any(axis=1)
    bound |= rng.random(bound.shape) < 0.05  # decoys
    for motif in range(MOTIFS):
        plant(bases, motif, np.flatnonzero(bound[:, motif]), rng)
    x = np.zeros((n, 4, LENGTH), np.float32)
    np.put_along_axis(x, bases[:, None], 1, axis=1)
    return x, y.astype(np.float32)


def background(gc: np.ndarray, cpg: np.ndarray, state: np.ndarray, rng) -> np.ndarray:
    """A Markov chain for each sequence: the base after a base, (n, 1000) of 0..3."""
    n = len(gc)
    share = np.clip(0.45 + 0.06 * gc, 0.25, 0.65)[:, None]
    odds = STEPS[state] + np.log(np.where(np.isin(range(4), (G, C)), share, 1 - share))[:, None]
    odds[:, C, G] += 0.4 * cpg - 1.0  # the genome has few CpG but in its islands
    steps = np.exp(odds)
    steps = np.cumsum(steps / steps.sum(axis=2, keepdims=True), axis=2)[:, :, :3]
    u = rng.random((LENGTH, n, 1))
    bases = np.empty((LENGTH, n), np.int64)
    bases[0] = rng.integers(4, size=n)
    for i in range(1, LENGTH):
        bases[i] = (u[i] > steps[np.arange(n), bases[i - 1]]).sum(axis=1)
    return bases.T.copy()


def plant(bases: np.ndarray, motif: int, rows: np.ndarray, rng: np.random.Generator) -> None:
    """Write 2 + Poisson(1.5) copies of a motif into each row, on either strand, in place."""
    rows = rows.repeat(2 + rng.poisson(1.5, len(rows)))
    width, weights = WIDTHS[motif], WEIGHTS[motif].cumsum(axis=1)[:, :3]
    copies = (rng.random((len(rows), width, 1)) > weights).sum(axis=2)
    other = rng.random(len(rows)) < 0.5
    copies[other] = 3 - copies[other, ::-1]  # the reverse complement
    starts = np.clip(rng.normal(LENGTH / 2, 150, len(rows)).astype(int), 0, LENGTH - width)
    bases[rows[:, None], starts[:, None] + np.arange(width)] = copies


class Sequences(Dataset):
    """Sequences kept at a byte a number (the test set: 600 MB), float32 one at a time."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        """x: uint8 (n, 1000, 4), as in the file; y: (n, 36)."""
        self.x, self.y = x, torch.from_numpy(y.astype(np.float32))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i].T.astype(np.float32, order="C")
        return torch.from_numpy(x), self.y[i]  # (4, 1000), (36,)


def read(root: Path, split: str) -> Sequences:
    """The real sequences of a split ("train", "val" or "test").

    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    path = download.fetch(root, NAME, FILES[NAME])
    x, y = files.read_npz(path, (f"x_{split}", f"y_{split}")).values()
    want = f"x_{split} (n, {LENGTH}, 4) and y_{split} (n, {TRACKS}) of 0 and 1"
    if x.shape[1:] != (LENGTH, 4) or y.shape != (len(x), TRACKS):
        raise ValueError(f"{path}: expected {want}, got shapes {x.shape} and {y.shape}")
    if not is_binary(x) or not is_binary(y):
        raise ValueError(f"{path}: expected {want}, got other values")
    x, y = (array.astype(np.uint8, copy=False) for array in (x, y))
    if x.sum(axis=2, dtype=np.uint8).max() > 1:  # an unknown base (N) has no 1
        raise ValueError(f"{path}: x_{split} is not one-hot: a place has more than one base")
    return Sequences(x, y)


def is_binary(array: np.ndarray) -> bool:
    """Whether all numbers are 0 or 1, without a copy of an array of integers."""
    if array.min() < 0 or array.max() > 1:
        return False
    return array.dtype.kind in "bui" or bool((array == array.round()).all())


TASK = {
    "title": "DeepSEA: marks on a stretch of DNA",
    "x_shape": (4, LENGTH),
    "y_shape": (TRACKS,),
    "kind": "labels",
    "num_classes": TRACKS,
    "loss": partial(metrics.bce, pos_weight=4.0),
    "metric": metrics.auroc,
    "metric_name": "1 - AUROC",
    "sources": {"embedded": "words", "paper": "conll2003"},
    "splits": ("train", "val", "test"),
    "settings": {"patches": 50},
    "sizes": {"train": 2000, "val": 400, "test": 1000},
    "published": {
        "Hand-designed": 0.30,
        "NAS-Bench-360": 0.32,
        "DASH": 0.28,
        "Perceiver IO": 0.38,
        "FPT": 0.37,
        "NFT": 0.51,
        "ORCA": 0.29,
        "PaRe": 0.28,
    },
}

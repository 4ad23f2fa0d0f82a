"""Advection: a wave that moves on and keeps its shape. PDEBench, 1D, regression.

u_t + beta u_x = 0 for x in (0, 1), periodic, beta = 0.4. x: u at t = 0; y: u at t = 2.
Copying x has an nRMSE of 1.1, the mean of x 0.70, both far from 0.

Real data: PDEBench (Takamoto et al. 2022), `1D_Advection_Sols_beta0.4.hdf5`, 10,000 series of 201
frames on 1024 cells (`tensor`), from random sines (sines.py), of which every fourth cell is taken,
as published: 256. The first 1000 series are for testing. A file from before September 2023 moves
with 2 beta, not beta: it is refused, but for published=True, since ORCA (February 2023) used it.

Simulated data: the exact solution, u(x, t) = u(x - beta t, 0).
`python -m tasks.advection --out FILE --n N` writes it in the layout of the real file.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks import download, metrics, pdebench, sines

BETA, T_END = 0.4, 2.0
STRIDE = 4  # every fourth of 1024 cells
X = sines.centres()[::STRIDE]
NAME, FRAMES = "1D_Advection_Sols_beta0.4.hdf5", 201
REMOTE = download.darus(255674, 8.23e9, "d595bbfd2c659df995a93cd40d6ea568")
FILES = {f"pdebench/{NAME}": REMOTE}


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n waves, before and after: x and y, float32 (n, 1, 256). published changes nothing."""
    u0 = sines.random_sines(n, np.random.default_rng(seed))
    x, y = u0(X), u0((X - BETA * T_END) % 1)
    return x[:, None].astype(np.float32), y[:, None].astype(np.float32)


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the waves of simulate(n, seed) for all frames, on all cells."""
    u0 = sines.random_sines(n, np.random.default_rng(seed))
    start = [(sines.centres() - BETA * frame / 100) % 1 for frame in range(FRAMES)]
    for i in range(0, n, sines.BLOCK):
        rows = slice(i, i + sines.BLOCK)
        yield {"tensor": np.stack([u0(x, rows) for x in start], axis=1)}


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real waves of a split ("train" or "test"): x and y, float32 (n, 1, 256).

    Args: published: whether a file that moves with 2 beta will do.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    wanted = {"frames": (0, FRAMES - 1), "steps": FRAMES, "attributes": FILE.attributes}
    u = sines.read_frames(root, NAME, REMOTE, split, **wanted)[:, 0]
    _check_speed(Path(root) / "pdebench" / NAME, u[:, 0], u[:, 1], published)
    return np.ascontiguousarray(u[:, :1, ::STRIDE]), np.ascontiguousarray(u[:, 1:, ::STRIDE])


def _check_speed(path: Path, before: np.ndarray, after: np.ndarray, published: bool) -> None:
    """Raise ValueError unless the waves have moved by beta t; or by 2 beta t, if published."""
    right, old = (
        np.square(np.roll(before, round(speed * T_END * sines.CELLS), axis=1) - after).sum()
        for speed in (BETA, 2 * BETA)
    )
    if min(right, old) > 0.1 * np.square(before - before.mean(axis=1, keepdims=True)).sum():
        raise ValueError(
            f"{path}: its tensor is not of waves that move by beta t = {BETA * T_END} and keep "
            f"their shape; expected those of advection ({REMOTE.url})"
        )
    if old < right and not published:
        raise ValueError(
            f"{path}: its waves move by {2 * BETA * T_END}, twice as far as beta t = "
            f"{BETA * T_END}: it is from before September 2023; get {REMOTE.url}"
        )


PUBLISHED = {}
TASK = {
    "title": "Advection: a wave that moves on",
    "x_shape": (1, len(X)),
    "y_shape": (1, len(X)),
    "kind": "regression",
    "num_classes": 1,
    "loss": metrics.relative_l2_loss,
    "metric": metrics.relative_l2,
    "metric_name": "nRMSE",
    "sources": {"embedded": "words", "paper": "conll2003"},
    "splits": ("train", "test"),
    "sizes": {"train": 1000, "val": 100, "test": 200},
    "published": {"PINN": 0.67, "FNO": 0.011, "U-Net": 1.1, "ORCA": 0.0098, "PaRe": 0.0027},
}
FILE = pdebench.File(NAME, frames, sines.coordinates(FRAMES), {"beta": BETA})

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

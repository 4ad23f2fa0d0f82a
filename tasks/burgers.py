"""Burgers: waves that steepen while friction flattens them. PDEBench, 1D, regression.

u_t + (u^2 / 2)_x = (nu / pi) u_xx for x in (0, 1), periodic, nu = 1.
x: u at t = 0; y: u at t = 0.01, 256 points.

The papers ask for t = 2 (published=True, 1024 points). By then nothing is left of the waves but
exp(-4 pi t) = 1e-11 of them: y is the mean of x everywhere, and the relative error divides by that
mean, which may be next to nothing. At t = 0.01 waves of number 1, 2, 3 and 4 keep 88, 60, 32 and
13 % of their height. Copying x has an nRMSE of 0.5 in the median and of about 1 on average: where y
is next to 0, which happens here too, the relative error is large. The mean of x has 0.46; to solve
the equation without its steepening, 0.02.

Real data: PDEBench (Takamoto et al. 2022), `1D_Burgers_Sols_Nu1.0.hdf5`, 10,000 series of 201
frames on 1024 cells (`tensor`), from random sines (sines.py). The first 1000 are for testing. A
file from before November 2023 solves another equation, u_t + (u^2)_x on (-1, 1): it is refused, but
for published=True, since ORCA (February 2023) used it.

Simulated data: the exact solution of Cole (1951, Q. Appl. Math. 9:225) and Hopf (1950, Comm. Pure
Appl. Math. 3:201), computed by Fourier series.
`python -m tasks.burgers --out FILE --n N` writes it in the layout of the real file.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks import download, metrics, pdebench, sines

NU = 1.0
FRAME, STRIDE = 1, 4  # ours: t = 0.01, every fourth of 1024 cells
FRAME_PUBLISHED, STRIDE_PUBLISHED = 200, 1
NAME, FRAMES = "1D_Burgers_Sols_Nu1.0.hdf5", 201
REMOTE = download.darus(281365, 8.23e9, "9021eba35332d127306f11ef84c1a60f")
FILES = {f"pdebench/{NAME}": REMOTE}


def solve(u0: np.ndarray, t: float, viscosity: float = NU / np.pi) -> np.ndarray:
    """u at time t, (n, L), from u0, (n, L), at L equidistant points of the periodic (0, 1).

    With m the mean of u0, w(x, t) = u(x + m t, t) - m has mean 0 and solves the same equation.
    w = -2 viscosity phi_x / phi turns that into phi_t = viscosity phi_xx, whose Fourier series is
    known for all t. careful: phi spans exp(max|w| / viscosity / 2 pi), so that digits get lost
    where the viscosity is below about 0.02.
    """
    L = u0.shape[1]
    ik = 2j * np.pi * np.fft.rfftfreq(L, 1 / L)
    m = u0.mean(axis=1, keepdims=True)
    integral = np.fft.rfft(u0 - m)
    integral[:, 1:] /= ik[1:]
    integral[:, 0] = 0
    phi = np.exp(-np.fft.irfft(integral, L) / (2 * viscosity))
    phi_hat = np.fft.rfft(phi) * np.exp(viscosity * ik**2 * t - ik * m * t)  # and moved by m t
    return m - 2 * viscosity * np.fft.irfft(ik * phi_hat, L) / np.fft.irfft(phi_hat, L)


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n waves, before and after: x and y, float32 (n, 1, 256); (n, 1, 1024) if published."""
    frame, stride = (FRAME_PUBLISHED, STRIDE_PUBLISHED) if published else (FRAME, STRIDE)
    x = sines.random_sines(n, np.random.default_rng(seed))(sines.centres())
    y = solve(x, frame / 100)
    return tuple(u[:, None, ::stride].astype(np.float32) for u in (x, y))


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the waves of simulate(n, seed) for all frames, on all cells."""
    u0 = sines.random_sines(n, np.random.default_rng(seed))(sines.centres())
    for u in np.array_split(u0, range(sines.BLOCK, n, sines.BLOCK)):
        later = [solve(u, frame / 100) for frame in range(1, FRAMES)]
        yield {"tensor": np.stack([u, *later], axis=1)}


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real waves of a split ("train" or "test"), in the form of simulate.

    Args: published: t = 2 on all cells, from a file of either equation.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    frame, stride = (FRAME_PUBLISHED, STRIDE_PUBLISHED) if published else (FRAME, STRIDE)
    wanted = {"frames": (0, frame), "steps": FRAMES, "attributes": FILE.attributes}
    wanted["first"] = None if published else sines.centres()[0]
    u = sines.read_frames(root, NAME, REMOTE, split, **wanted)[:, 0]
    before, after = (u[:, i].var(axis=1).sum() for i in (0, 1))
    if after > 0.9 * before:
        raise ValueError(
            f"{Path(root) / 'pdebench' / NAME}: its waves do not wear off, {after / before:.2g} of "
            f"their energy is left; expected those of Burgers ({REMOTE.url})"
        )
    return np.ascontiguousarray(u[:, :1, ::stride]), np.ascontiguousarray(u[:, 1:, ::stride])


PUBLISHED = {"x_shape": (1, sines.CELLS), "y_shape": (1, sines.CELLS)}
TASK = {
    "title": "Burgers: waves that steepen and wear off",
    "x_shape": (1, sines.CELLS // STRIDE),
    "y_shape": (1, sines.CELLS // STRIDE),
    "kind": "regression",
    "num_classes": 1,
    "loss": metrics.relative_l2_loss,
    "metric": metrics.relative_l2,
    "metric_name": "nRMSE",
    "sources": {"embedded": "words", "paper": "conll2003"},
    "splits": ("train", "test"),
    "sizes": {"train": 1000, "val": 100, "test": 200},
    "published": {"PINN": 0.36, "FNO": 0.0031, "U-Net": 0.99, "ORCA": 0.012, "PaRe": 0.0083},
}
FILE = pdebench.File(NAME, frames, sines.coordinates(FRAMES), {"Nu": NU})

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

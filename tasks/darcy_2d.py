"""Darcy 2D: the pressure of a fluid in a rock of two materials. PDEBench, 2D, regression.

-div(nu grad u) = beta in the unit square, u = 0 on its rim, beta = 0.1. nu is 1 where a sum of five
bumps exp(-|x - m|^2 / s), m ~ U(0, 1)^2, s ~ U(0, 0.5), is above its mean over all rocks, else 0.1.

Real data: `2D_DarcyFlow_beta0.1_Train.hdf5` (1.3 GB) of PDEBench (Takamoto et al. 2022, NeurIPS
Datasets and Benchmarks, doi:10.18419/darus-2986), 10000 rocks on 128 x 128 cells: `nu`
(10000, 128, 128) and `tensor`, which is u, (10000, 1, 128, 128). Test: the first tenth.

The default is the steady u of a rock of 64 x 64 square cells. The file's u is none: it is taken at
t = 1.75 on the way there, u_t = div(nu grad u) + beta, from a start at a random level (0.1 to 10,
where the steady u is about 0.02) that x does not show. What is left of it is 2 % of the steady u in
the median, but more than all of it in a tenth of the rocks, those with little of the high nu: no
model can know it. published=True is that problem, on every second cell of 128 x 128.

`python -m tasks.darcy_2d --out FILE --n N` writes that problem, in the layout of the real file.

x: nu; y: u, neither of them normalised. nRMSE of predicting the mean u: 0.53; of predicting x: 53.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy.linalg import cho_solve_banded, cholesky_banded

from tasks import download, metrics, pdebench

GRID, FILE_GRID = 64, 128  # cells a side: ours, and the file's
BETA, LOW, HIGH = 0.1, 0.1, 1.0  # the source, and the two values of nu
MEAN_OF_BUMPS = 1.853  # of the sum of five, over the square and over all rocks
TIME = 1.75  # of the file's u
KRYLOV = 12  # dimension of the space in which a start decays
ROWS = 500  # of the file that are read at once
NAME = "2D_DarcyFlow_beta0.1_Train.hdf5"
REMOTE = download.darus(133218, 1.31e9, "294f9a03a4aa16b0e386469ca8b471be")
FILES = {f"pdebench/{NAME}": REMOTE}
WANT = "nu > 0 (n, 128, 128) and tensor (n, 1, 128, 128), finite numbers, n >= 10"


def rocks(n: int, N: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """nu of n rocks at the centres of N x N cells, (N, N) each; all are drawn before the first."""
    m, s = rng.uniform(0, 1, (2, n, 5, 1)), rng.uniform(0, 0.5, (n, 5, 1))
    for i in range(n):
        bump_y, bump_x = np.exp(-(((np.arange(N) + 0.5) / N - m[:, i]) ** 2) / s[i])  # (5, N) each
        yield np.where(bump_y.T @ bump_x > MEAN_OF_BUMPS, HIGH, LOW)


def factor(nu: np.ndarray, published: bool = False) -> np.ndarray:
    """The Cholesky factor of A = -div(nu grad .) on N x N cells: its band, (N + 1, N * N).

    Finite volumes: the flow between two cells is the difference of their u times a mean of their
    nu: the harmonic one, exact where a rock changes at the face between them. From an outer cell to
    the rim it is half a cell's width. PDEBench: the arithmetic mean, and u = 0 a width away.
    """
    N = len(nu)
    down, right = np.empty((N + 1, N)), np.empty((N, N + 1))  # flows through the faces of the cells
    for flow, a in ((down, nu), (right.T, nu.T)):
        flow[1:-1] = (a[1:] + a[:-1]) / 2 if published else 2 / (1 / a[1:] + 1 / a[:-1])
        flow[[0, -1]] = a[[0, -1]] * (1 if published else 2)
    band = np.zeros((N + 1, N * N))  # row d: the d-th diagonal below the main one
    band[0] = (down[1:] + down[:-1] + right[:, 1:] + right[:, :-1]).ravel()
    band[1] = np.where(np.arange(N) < N - 1, -right[:, 1:], 0).ravel()  # a row's last has no next
    band[N] = -down[1:].ravel()
    return cholesky_banded(band * N**2, overwrite_ab=True, lower=True, check_finite=False)


def solve(A: np.ndarray, f: np.ndarray | float) -> np.ndarray:
    """u of A u = f, (N * N,). A: its Cholesky factor."""
    f = np.broadcast_to(f, A.shape[1:])
    return cho_solve_banded((A, True), f, check_finite=False)


def decay(A: np.ndarray, e: np.ndarray, t: float) -> np.ndarray:
    """exp(-t A) e, (N * N,): what is left after time t of e, without a source.

    The slow modes, which alone are left, are the largest of A^-1: so in the space of e, A^-1 e, ...
    (Lanczos' basis V), A is the inverse of the small matrix V A^-1 V^T.
    """
    V, images = [e / np.linalg.norm(e)], []
    for _ in range(KRYLOV):
        images.append(solve(A, V[-1]))
        rest = images[-1]
        for _ in range(2):  # once is not enough: rounding
            rest = rest - np.dot(np.array(V) @ rest, V)
        V.append(rest / np.linalg.norm(rest))
    basis = np.array(V[:-1])
    theta, Q = np.linalg.eigh(basis @ np.array(images).T)
    return np.linalg.norm(e) * (Q * np.exp(-t / theta)) @ Q[0] @ basis


def start(N: int, rng: np.random.Generator) -> np.ndarray:
    """The u that PDEBench's relaxation starts from, (N * N,): a level, waves, at times in a box."""
    level, size = rng.uniform(0.1, 10), rng.uniform(0.01, 0.5)
    k = np.array([-4, -3, -2, -1, 1, 2, 3, 4])
    centres = (np.arange(N) + 0.5) / N
    phase = np.exp(1j * rng.uniform(0, 2 * np.pi, (8, 8))) / np.hypot(k[:, None], k) ** 0.5
    wave = np.exp(2j * np.pi * np.outer(k, centres))  # (8, N)
    F = (wave.T @ phase @ wave).imag
    F *= size / abs(F).mean()
    if rng.random() < 0.5:
        low, high = rng.uniform(0.1, 0.45, (2, 1)), rng.uniform(0.55, 0.9, (2, 1))
        row, column = (np.tanh((centres - low) / 0.01) - np.tanh((centres - high) / 0.01)) / 2
        F *= row[:, None] * column
    return (level + F).ravel()


def pressures(n: int, seed: int | list[int], published: bool) -> Iterator[tuple[np.ndarray, ...]]:
    """nu and u of n rocks, (N, N) each: steady on 64 x 64 cells, or at t = 1.75 on 128 x 128."""
    rng = np.random.default_rng(seed)
    N = FILE_GRID if published else GRID
    for nu in rocks(n, N, rng):
        A = factor(nu, published)
        steady = solve(A, BETA)
        late = decay(A, start(N, rng) - steady, TIME) if published else 0
        yield nu, (steady + late).reshape(N, N)


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n rocks and their pressures: x and y, float32 (n, 1, 64, 64) each.

    published: u at t = 1.75 instead of the steady one; this takes ten times as long (a minute for
    all of the default sizes).
    """
    x, y = (np.empty((n, 1, GRID, GRID), np.float32) for _ in range(2))
    every = np.s_[:: FILE_GRID // GRID, :: FILE_GRID // GRID] if published else np.s_[:, :]
    for i, (nu, u) in enumerate(pressures(n, seed, published)):
        x[i, 0], y[i, 0] = nu[every], u[every]
    return x, y


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the rocks of simulate(n, seed, published=True), on all cells.

    The default problem, the steady pressure, is not what the published file holds.
    """
    for nu, u in pressures(n, seed, published=True):
        yield {"nu": nu[None], "tensor": u[None, None]}


@contextmanager
def hdf5(path: Path, remote: download.Remote, want: str) -> Iterator:
    """A file ROOT/pdebench/NAME to read from, downloaded if it is not there.

    All that goes wrong in the file is a ValueError of one line.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: an HDF5 file, which needs h5py: pip install h5py") from None
    download.fetch(path.parents[1], f"pdebench/{path.name}", remote)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except Exception as error:  # damaged files fail in many ways, which all mean the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: expected {want}; {reason}") from None


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real rocks of a split: x and y, float32 (n, 1, 64, 64) each. Only published=True.

    "test": the first tenth of the file; "train": the rest. Every second cell, as published.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    path = Path(root) / "pdebench" / NAME
    if not published:
        raise ValueError(
            f"{path}: holds pressures that are not steady yet, not those of this task; read it "
            "with --published, or run on simulated data (--data simulated)"
        )
    with hdf5(path, REMOTE, WANT) as file:
        pdebench.check_attributes(file, FILE.attributes)
        nu, u = file["nu"], file["tensor"]
        n = len(nu)
        if n < 10 or nu.shape != (n, FILE_GRID, FILE_GRID) or u.shape != (n, 1) + nu.shape[1:]:
            raise ValueError(f"got nu {nu.shape} and tensor {u.shape}")
        if nu.dtype.kind != "f" or u.dtype.kind != "f":
            raise ValueError(f"got nu {nu.dtype} and tensor {u.dtype}")
        rows = range(n // 10) if split == "test" else range(n // 10, n)
        x, y = (np.empty((len(rows), 1, GRID, GRID), np.float32) for _ in range(2))
        for i in range(0, len(rows), ROWS):
            block = slice(rows[i], min(rows[i] + ROWS, rows[-1] + 1))
            x[i : i + ROWS, 0] = nu[block][:, ::2, ::2]
            y[i : i + ROWS] = u[block][..., ::2, ::2]
        if not (np.isfinite(x).all() and np.isfinite(y).all() and x.min() > 0):
            raise ValueError(f"got numbers that are not finite, or nu <= 0, in '{split}'")
        if not y.any(axis=(1, 2, 3)).all():
            raise ValueError(f"got a tensor that is 0 everywhere, in '{split}'")
    return x, y


TASK = {
    "title": "Darcy 2D: steady pressure in a rock of two materials",
    "x_shape": (1, GRID, GRID),
    "y_shape": (1, GRID, GRID),
    "kind": "regression",
    "num_classes": 1,
    "loss": metrics.relative_l2_loss,
    "metric": metrics.relative_l2,
    "metric_name": "nRMSE",
    "sources": {"embedded": "shapes", "paper": "voc"},
    "splits": ("train", "test"),
    "sizes": {"train": 800, "val": 100, "test": 200},
    "published": {
        "PINN": 0.18,
        "FNO": 0.22,
        "ORCA": 0.081,
        "PaRe": 0.0806,
    },
}
PUBLISHED = {"title": "Darcy 2D: pressure at t = 1.75 in a rock of two materials"}
CENTRES = (np.arange(FILE_GRID) + 0.5) / FILE_GRID
FILE = pdebench.File(
    NAME,
    frames,
    {"x-coordinate": CENTRES, "y-coordinate": CENTRES},
    {"beta": BETA},
    published_only=True,
)

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

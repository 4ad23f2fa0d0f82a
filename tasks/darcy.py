"""Darcy Flow: the pressure of water in a rock of two materials. NAS-Bench-360, 2D, regression.

Real data: the piecewise constant set of the Fourier neural operator (Li et al. 2021, ICLR;
NAS-Bench-360, Tu et al. 2022), -div(a grad p) = 1 in the unit square with p = 0 on its rim, 1024
solutions a file on 421 x 421 nodes. `piececonst_r421_N1024_smooth1.mat` is for training,
`piececonst_r421_N1024_smooth2.mat` for testing; each has `coeff` (a) and `sol` (p), both
(1024, 421, 421), from which every fifth node is taken: 85 x 85.

Simulated data: the same equation on the 85 x 85 nodes, solved directly. a is 12 where a Gaussian
random field with covariance (-Laplace + 9)^-2 is positive, 3 elsewhere.

x: a and the coordinates X (grows along the last axis) and Y; y: p, neither of them normalised.
"""

from pathlib import Path

import numpy as np
import scipy.io
from scipy.linalg import solveh_banded

from tasks import download, metrics

GRID, STRIDE, FINE = 85, 5, 421  # nodes a side: ours, and every fifth of the files'
LOW, HIGH = 3.0, 12.0  # the two values of a
TRAIN_ROWS, TEST_ROWS = 1000, 100  # of a file that are used
HELD_OUT = 10  # one training row in so many is for validation
FILES = {
    f"darcy/{name}": download.nas_bench(name, 1.6e9, "MIT")
    for name in (f"piececonst_r421_N1024_smooth{i}.mat" for i in (1, 2))
}
WANT = f"coeff > 0 and sol, finite numbers of shape (1024, {FINE}, {FINE})"


def random_field(n: int, rng: np.random.Generator) -> np.ndarray:
    """n draws of the Gaussian field at the nodes, (n, GRID, GRID); its scale is arbitrary.

    A cosine series (no flow through the rim) whose amplitudes fall like 1 / (pi^2 |k|^2 + 9).
    """
    k = np.arange(GRID)
    amplitude = 1 / (np.pi**2 * (k[:, None] ** 2 + k**2) + 9)
    amplitude[0, 0] = 0  # no mean, so that both materials are about as frequent
    cosine = np.cos(np.pi * np.outer(np.linspace(0, 1, GRID), k)) * np.where(k > 0, 2**0.5, 1)
    return cosine @ (amplitude * rng.standard_normal((n, GRID, GRID))) @ cosine.T


def solve(a: np.ndarray, f: np.ndarray | float = 1.0) -> np.ndarray:
    """p of -div(a grad p) = f in the unit square, p = 0 on its rim, on a square grid of nodes.

    Finite volumes: a between two nodes is the mean of both. A node is coupled to the next one and
    to the one a row below, so the matrix has a band of the grid's width: Cholesky factorised there.

    Args: a, f: (G, G), at the nodes; a > 0. The values of f on the rim are not used.
    Returns: p, (G, G). Second order in the spacing where a is smooth.
    """
    G = len(a)
    N = G - 2  # unknowns a side
    a_down = (a[1:, 1:-1] + a[:-1, 1:-1]) / 2  # (G - 1, N): between a node and the one a row below
    a_right = (a[1:-1, 1:] + a[1:-1, :-1]) / 2  # (N, G - 1)
    band = np.zeros((N + 1, N * N))  # row d: the d-th diagonal below the main one
    band[0] = (a_down[1:] + a_down[:-1] + a_right[:, 1:] + a_right[:, :-1]).ravel()
    next_one = -a_right[:, 1:]
    next_one[:, -1] = 0  # the last of a line is no neighbour of the first of the next
    band[1] = next_one.ravel()
    band[N] = -a_down[1:].ravel()
    rhs = np.broadcast_to(f, (G, G))[1:-1, 1:-1].ravel() / (G - 1) ** 2
    p = np.zeros((G, G))
    p[1:-1, 1:-1] = solveh_banded(
        band, rhs, overwrite_ab=True, overwrite_b=True, lower=True, check_finite=False
    ).reshape(N, N)
    return p


def with_coordinates(a: np.ndarray) -> np.ndarray:
    """(n, GRID, GRID) -> float32 (n, 3, GRID, GRID): a, X, Y."""
    X, Y = np.meshgrid(*[np.linspace(0, 1, GRID)] * 2)
    grids = np.broadcast_to([X, Y], (len(a), 2, GRID, GRID))
    return np.concatenate([a[:, None], grids], axis=1, dtype=np.float32)


def simulate(n: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """n rocks and their pressures: x, float32 (n, 3, 85, 85); y, float32 (n, 1, 85, 85)."""
    a = np.where(random_field(n, np.random.default_rng(seed)) >= 0, HIGH, LOW)
    y = np.stack([solve(sample) for sample in a])
    return with_coordinates(a), y[:, None].astype(np.float32)


def read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The real rocks of a split: x, float32 (n, 3, 85, 85); y, float32 (n, 1, 85, 85).

    "train" and "val": the first 1000 rows of smooth1 (all, if there are fewer) but the last tenth,
    and that tenth. "test": the first 100 of smooth2. A file is read one array at a time, which
    takes 1.5 GB of memory for a moment.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    number, rows = (2, TEST_ROWS) if split == "test" else (1, TRAIN_ROWS)
    name = f"darcy/piececonst_r421_N1024_smooth{number}.mat"
    path = download.fetch(root, name, FILES[name])
    a, p = read_array(path, "coeff", rows), read_array(path, "sol", rows)
    if len(a) != len(p):
        raise ValueError(f"{path}: expected {WANT}, got {len(a)} rows of coeff and {len(p)} of sol")
    if a.min() <= 0 or not p.any(axis=(1, 2)).all():
        raise ValueError(f"{path}: expected {WANT}, got a coeff <= 0 or a sol that is 0 everywhere")
    if number == 1:
        start = len(a) - len(a) // HELD_OUT
        if start == len(a):
            raise ValueError(
                f"{path}: {len(a)} rows are too few to keep a tenth for validation; "
                f"give at least {HELD_OUT} of the real file's 1024"
            )
        a, p = (a[start:], p[start:]) if split == "val" else (a[:start], p[:start])
    return with_coordinates(a), p[:, None].astype(np.float32)


def read_array(path: Path, key: str, rows: int) -> np.ndarray:
    """The first rows of an array of a .mat file, every fifth node: float64 (n, 85, 85)."""
    try:
        array = scipy.io.loadmat(path, variable_names=[key]).get(key)
    except NotImplementedError:  # scipy's answer to the files of MATLAB 7.3, which are HDF5
        array = read_hdf5(path, key)
    except Exception as error:  # damaged files fail in many ways, which all mean the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable .mat file ({reason}); expected {WANT}") from None
    if array is None:
        raise ValueError(f"{path}: expected {WANT}, found no {key}")
    if array.ndim != 3 or array.shape[1:] != (FINE, FINE) or array.dtype.kind != "f":
        raise ValueError(f"{path}: expected {WANT}, got {key} {array.dtype} of {array.shape}")
    array = array[:rows, ::STRIDE, ::STRIDE].astype(np.float64)
    if len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(f"{path}: expected {WANT}, got {key} empty or not finite")
    return array


def read_hdf5(path: Path, key: str) -> np.ndarray | None:
    """An array of a MATLAB 7.3 file, where the order of the axes is MATLAB's: the reverse."""
    try:
        import h5py
    except ImportError:
        raise ValueError(
            f"{path}: saved by MATLAB 7.3 (HDF5): pip install h5py, or convert it with MATLAB's or "
            "Octave's save -v7"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            return np.transpose(file[key][()]) if key in file else None
    except Exception as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({error}); expected {WANT}") from None


TASK = {
    "title": "Darcy Flow: pressure in a rock of two materials",
    "x_shape": (3, GRID, GRID),
    "y_shape": (1, GRID, GRID),
    "kind": "regression",
    "num_classes": 1,
    "loss": metrics.relative_l2_loss,
    "metric": metrics.relative_l2,
    "metric_name": "relative L2 error",
    "sources": {"embedded": "shapes", "paper": "voc"},
    "splits": ("train", "val", "test"),
    "sizes": {"train": 800, "val": 100, "test": 200},
    "published": {
        "Hand-designed": 0.0080,
        "NAS-Bench-360": 0.0026,
        "DASH": 0.0079,
        "Perceiver IO": 0.024,
        "FPT": 0.021,
        "NFT": 0.00734,
        "ORCA": 0.00728,
        "PaRe": 0.00700,
    },
}

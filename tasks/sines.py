"""What the PDEBench series that start from random sines share: the initial fields and the files.

PDEBench (Takamoto et al. 2022, NeurIPS Datasets and Benchmarks) starts advection, Burgers, 1D
diffusion-reaction and 1D Navier-Stokes from the same family of fields, and stores each as one HDF5
file with arrays of (samples, frames, 1024 cells), a frame every 0.01.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tasks import pdebench
from tasks.download import Remote, fetch

CELLS = 1024
TEST = 10  # one row in so many, the first ones, is for testing
BLOCK = 16  # samples of which all frames are in memory at once


def centres(start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """The centres of the 1024 cells, (1024,). Every fourth of them, say, is a coarser grid."""
    return start + (np.arange(CELLS) + 0.5) * (end - start) / CELLS


def coordinates(steps: int, start: float = 0.0) -> dict[str, np.ndarray]:
    """The coordinates in a file of so many frames; careful: one time more than there are frames."""
    return {"x-coordinate": centres(start, 1.0), "t-coordinate": np.arange(steps + 1) / 100}


def random_sines(
    n: int, rng: np.random.Generator, waves: int = 4, windowed: float = 0.1, length: float = 1.0
) -> Callable[..., np.ndarray]:
    """Draw n periodic fields u(x) = sum_j A_j sin(2 pi j c_j x / length + phi_j), j = 1..waves.

    A_j is uniform in 0..1, phi_j in 0..2 pi. Two numbers are drawn from 1..waves; c_j is how often
    j was among them, so at most two sines are waves and the others are constants. A tenth of the
    fields are |u|, half are -u, and a share `windowed` is 0 outside a window within 0.1 < x < 0.9.

    Returns: a function of points x, (L,), or (n, L) if each field has its own, that gives the
        values there, (n, L); u(x, rows) those of some fields. Points and length have the unit of x;
        a domain that is not 0..length keeps its window at the same x. Points outside the domain are
        the caller's to wrap around. PDEBench's sines have the period length - length / 1024, ours
        are periodic in the domain.
    Example: `u0 = random_sines(8, rng)`, then `u0(centres())` and `u0((centres() - 0.8) % 1)`.
    """
    drawn = rng.integers(1, waves + 1, (n, 2))
    j = np.arange(1, waves + 1)
    c = (drawn[:, :, None] == j).sum(axis=1)
    amplitude, phi = rng.random((n, waves)), 2 * np.pi * rng.random((n, waves))
    absolute = rng.random((n, 1)) < 0.1
    sign = rng.choice([-1.0, 1.0], (n, 1))
    inside = rng.random((n, 1)) < windowed
    left, right = rng.uniform(0.1, 0.45, (n, 1)), rng.uniform(0.55, 0.9, (n, 1))

    def u(x: np.ndarray, rows: slice = np.s_[:]) -> np.ndarray:
        total = 0.0
        for i in range(waves):
            wave = 2 * np.pi * j[i] * c[rows, i, None] * x / length + phi[rows, i, None]
            total = total + amplitude[rows, i, None] * np.sin(wave)
        total = sign[rows] * np.where(absolute[rows], np.abs(total), total)
        window = (np.tanh((x - left[rows]) / 0.01) - np.tanh((x - right[rows]) / 0.01)) / 2
        return np.where(inside[rows], window * total, total)

    return u


def normalised(u: np.ndarray) -> np.ndarray:
    """u, (n, L), with each field's smallest value at 0 and its largest at 1."""
    low, high = u.min(axis=1, keepdims=True), u.max(axis=1, keepdims=True)
    return (u - low) / (high - low)


def read_frames(
    root: Path,
    name: str,
    remote: Remote,
    split: str,
    frames: tuple[int, ...],
    steps: int,
    keys: tuple[str, ...] = ("tensor",),
    first: float | None = None,
    attributes: dict[str, float] | None = None,
) -> np.ndarray:
    """Some frames of root/pdebench/name, and no other part of the file.

    Args:
        remote: where the file is downloaded from if it is not there.
        split: "test", the first tenth of the rows, or "train", the others.
        frames, steps: which frames, and how many there should be.
        keys: the arrays, each of (rows, steps, 1024).
        first: where the first cell's centre should be; None: not looked at.
        attributes: what the file's should be, where it has any; None: not looked at.
    Returns: float32, (rows, len(keys), len(frames), 1024).
    Raises: FileNotFoundError or ValueError, one line that names the file and what it should hold.
    """
    path = Path(root) / "pdebench" / name
    want = f"{', '.join(keys)} of shape (10000, {steps}, {CELLS}), finite numbers"
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: HDF5 files need h5py: pip install h5py") from None
    fetch(root, f"pdebench/{name}", remote)
    try:
        with h5py.File(path, "r") as file:
            if attributes is not None:
                pdebench.check_attributes(file, attributes)
            if first is not None:
                _check_grid(file, first)
            parts = [_frames(file, key, split, frames, steps) for key in keys]
    except Exception as error:  # damaged files fail in many ways, which all mean the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: {reason}; expected {want} ({remote.url})") from None
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"{path}: {', '.join(keys)} differ in their rows; expected {want}")
    return np.stack(parts, axis=1)


def _frames(file, key: str, split: str, frames: tuple[int, ...], steps: int) -> np.ndarray:
    """The frames of one array, (rows, len(frames), 1024), checked."""
    if key not in file:
        raise ValueError(f"no array {key}")
    array = file[key]
    if array.ndim != 3 or array.shape[1:] != (steps, CELLS) or array.dtype.kind != "f":
        raise ValueError(f"got {key} {array.dtype} of shape {array.shape}")
    tenth = len(array) // TEST
    if tenth == 0:
        raise ValueError(f"{len(array)} rows are too few to split, give {TEST} or more")
    rows = slice(0, tenth) if split == "test" else slice(tenth, len(array))
    values = np.stack([array[rows, frame] for frame in frames], axis=1, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{key} holds values that are not finite")
    return values


def _check_grid(file, first: float) -> None:
    if "x-coordinate" not in file or len(file["x-coordinate"]) == 0:
        raise ValueError("no array x-coordinate")
    found = float(file["x-coordinate"][0])
    if abs(found - first) > 1e-4:
        raise ValueError(f"x-coordinate starts at {found:.4g}, not {first:.4g}")

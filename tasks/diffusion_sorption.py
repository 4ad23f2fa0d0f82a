"""Diffusion-sorption: a solute seeps into soil that binds some of it. PDEBench, 1D, regression.

R(u) u_t = D u_xx for x in (0, 1), with R(u) = 1 + s A n_f u^(n_f - 1): the more there is, the less
of it is bound. u = 1 at x = 0, where the solute comes from, and u = -D u_x at x = 1.
x: u at t = 0, from 1 to 3 plumes on a uniform level, and the soil's capacity s, in multiples of
PDEBench's soil; y: u at t = 50, on 128 cells.

The papers start from a uniform level in 0..0.2, in one soil (s = 1), and ask for t = 500
(published=True, 1024 cells): a family of one parameter, a single number to be read off x and a
curve to be interpolated. Plumes alone would not do either, a linear map of them has an nRMSE of
0.008; it is where the soil varies too that a network is needed: copying u has 0.69, the mean field
0.41, ridge regression 0.07, a small convolutional network 0.016.

Real data: PDEBench (Takamoto et al. 2022), `1D_diff-sorp_NA_NA.h5`, a group ("0000", ...) for each
of 10,000 series, with `data` (101, 1024, 1), a frame every 5 time units. The last tenth of the
groups is for testing. ORCA's code tests on t = 495 what it trained on t = 500; here both are 500.
The default problem is not in the file.

Simulated data: the equation, solved by finite volumes and an implicit Runge-Kutta method.
`python -m tasks.diffusion_sorption --out FILE --n N` writes the published problem, in the layout of
the real file.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.linalg import solveh_banded

from tasks import download, metrics, pdebench

D, N_F = 5e-4, 0.874  # diffusion; Freundlich's exponent of sorption
A = (1 - 0.29) / 0.29 * 2880 * 3.5e-4  # of porosity, bulk density and Freundlich's constant
FLOOR = 1e-6  # keeps u^(n_f - 1) finite where u = 0
CELLS, T_END = 128, 50.0
CELLS_PUBLISHED, T_PUBLISHED = 1024, 500.0
FRAMES, TEST = 101, 10  # frames of a real series; one group in so many is for testing
BLOCK = 16  # samples of which all frames are in memory at once
GAMMA = 1 - 0.5**0.5  # of Alexander's method
NAME = "1D_diff-sorp_NA_NA.h5"
REMOTE = download.darus(133020, 4.14e9, "9d466d1213065619d087319e16d9a938")
FILES = {f"pdebench/{NAME}": REMOTE}
WANT = f"10000 groups with data ({FRAMES}, {CELLS_PUBLISHED}, 1), finite numbers"


def content(u: np.ndarray, soil: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """What a volume of soil holds, dissolved and bound, and its derivative R by u.

    Odd in u: a stage of a step that is long for the cells at the rim may be below 0.
    """
    size = np.abs(u) + FLOOR
    bound = size**N_F
    held = u + soil * A * np.sign(u) * (bound - FLOOR**N_F)
    return held, 1 + soil * A * N_F * bound / size


def solve(u: np.ndarray, t: float, soil: np.ndarray | float = 1.0, steps: int = 40) -> np.ndarray:
    """u at time t, (n, L), from u >= 0, (n, L), on L cells of equal width.

    content(u)_t = D u_xx by Alexander's method (1977, SIAM J. Numer. Anal. 14:1006): L-stable,
    second order, two implicit stages. Steps grow in proportion to time: at first u jumps at x = 0.
    Args: soil: s, (n, L) or a number.
    """
    L = u.shape[1]
    couple = D * L**2  # two neighbours; half a cell from the rim it is twice that
    out = np.full(L, 2 * couple)
    out[0], out[-1] = 3 * couple, couple + L / (1 + 1 / (2 * D * L))
    times = t * np.linspace(0, 1, steps + 1) ** 2

    def rate(u):
        change = -out * u
        change[:, 1:] += couple * u[:, :-1]
        change[:, :-1] += couple * u[:, 1:]
        change[:, 0] += 2 * couple  # u = 1 at x = 0
        return change

    def stage(u, known, dt):
        """u with content(u) = known + dt rate(u), by Newton's method."""
        below = np.full(u.shape, -dt * couple)
        below[:, -1] = 0  # the last cell of a sample is no neighbour of the first of the next
        for _ in range(20):
            held, R = content(u, soil)
            band = np.stack([(R + dt * out).ravel(), below.ravel()])
            gap = (known + dt * rate(u) - held).ravel()
            step = solveh_banded(band, gap, lower=True, check_finite=False).reshape(u.shape)
            u = u + step
            if np.abs(step).max() < 1e-7:  # careful: squared by the step just taken
                return u
        raise FloatingPointError(f"Newton's method is {np.abs(step).max():.1g} off: more steps")

    for dt in np.diff(times):
        held, _ = content(u, soil)
        middle = stage(u, held, GAMMA * dt)
        u = stage(middle, held + (1 - GAMMA) * dt * rate(middle), GAMMA * dt)
    return u


def plumes(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n initial states, (n, L): a uniform level in 0..0.2 and up to three Gaussian plumes."""
    level = rng.uniform(0, 0.2, (n, 1))
    middle, height = rng.uniform(0, 1, (2, n, 3, 1))
    width = rng.uniform(0.03, 0.1, (n, 3, 1))
    there = np.arange(3)[:, None] < rng.integers(1, 4, (n, 1, 1))
    return level + (there * height * np.exp(-(((x - middle) / width) ** 2) / 2)).sum(axis=1)


def soils(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n soils, (n, L): log s is a sum of four sines, random and the weaker the shorter."""
    j = np.arange(1, 5)[:, None]
    sines = np.sin(np.pi * j * x + rng.uniform(0, 2 * np.pi, (n, 4, 1)))
    return np.exp(0.6 * (rng.standard_normal((n, 4, 1)) / j**0.5 * sines).sum(axis=1))


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n series: x, float32 (n, 2, 128), y (n, 1, 128); both (n, 1, 1024) if published."""
    rng = np.random.default_rng(seed)
    if published:
        x = rng.uniform(0, 0.2, (n, 1, 1)).repeat(CELLS_PUBLISHED, axis=2)
        y = solve(x[:, 0], T_PUBLISHED)
    else:
        points = (np.arange(CELLS) + 0.5) / CELLS
        u, soil = plumes(points, n, rng), soils(points, n, rng)
        x, y = np.stack([u, soil], axis=1), solve(u, T_END, soil)
    return x.astype(np.float32), y[:, None].astype(np.float32)


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the series of simulate(n, seed, published=True) for all frames.

    The default problem, with plumes in soils that vary, has no place in the published layout.
    """
    levels = np.random.default_rng(seed).uniform(0, 0.2, (n, 1))
    for level in np.array_split(levels, range(BLOCK, n, BLOCK)):
        series = [level.repeat(CELLS_PUBLISHED, axis=1)]
        for frame in range(1, FRAMES):  # fewer steps a frame as the front slows down
            steps = 1 + 20 // frame
            series.append(solve(series[-1], T_PUBLISHED / (FRAMES - 1), steps=steps))
        yield {"data": np.stack(series, axis=1)[..., None]}


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real series of a split ("train" or "test"): x and y, float32 (n, 1, 1024).

    Args: published: must be True, the file does not hold the default problem.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    path = Path(root) / "pdebench" / NAME
    if not published:
        raise ValueError(
            f"{path}: PDEBench has one soil and uniform initial levels, not this task's plumes: "
            "run on simulated data (--data simulated), or ask for the papers' problem (--published)"
        )
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: HDF5 files need h5py: pip install h5py") from None
    download.fetch(root, f"pdebench/{NAME}", REMOTE)
    try:
        with h5py.File(path, "r") as file:
            x, y = _frames(file, split)
    except Exception as error:  # damaged files fail in many ways, which all mean the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: {reason}; expected {WANT} ({REMOTE.url})") from None
    return x, y


def _frames(file, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last frame of each group of a split, and no other part of the file."""
    names = sorted(file)
    tenth = len(names) // TEST
    if tenth == 0:
        raise ValueError(f"{len(names)} groups are too few to split, give {TEST} or more")
    names = names[-tenth:] if split == "test" else names[:-tenth]
    u = np.empty((2, len(names), 1, CELLS_PUBLISHED), dtype=np.float32)
    for i, name in enumerate(names):
        if "data" not in file[name]:
            raise ValueError(f"no data in group {name}")
        data = file[name]["data"]
        if data.shape != (FRAMES, CELLS_PUBLISHED, 1) or data.dtype.kind != "f":
            raise ValueError(f"got {name}/data {data.dtype} of shape {data.shape}")
        u[0, i, 0], u[1, i, 0] = data[0, :, 0], data[-1, :, 0]
    if not np.isfinite(u).all():
        raise ValueError("data holds values that are not finite")
    if len(names) > 1 and (u[0] == u[0, 0]).all():
        raise ValueError("all series start alike, so that nothing can be predicted from x")
    return u[0], u[1]


PUBLISHED = {
    "title": "Diffusion-sorption: a solute seeps into soil",
    "x_shape": (1, CELLS_PUBLISHED),
    "y_shape": (1, CELLS_PUBLISHED),
}
TASK = {
    "title": "Diffusion-sorption: a solute seeps into soil that varies",
    "x_shape": (2, CELLS),
    "y_shape": (1, CELLS),
    "kind": "regression",
    "num_classes": 1,
    "loss": metrics.relative_l2_loss,
    "metric": metrics.relative_l2,
    "metric_name": "nRMSE",
    "sources": {"embedded": "words", "paper": "conll2003"},
    "splits": ("train", "test"),
    "sizes": {"train": 1000, "val": 100, "test": 200},
    "published": {"PINN": 0.15, "FNO": 0.0017, "U-Net": 0.22, "ORCA": 0.0016, "PaRe": 0.0016},
}
FILE = pdebench.File(
    NAME,
    frames,
    {
        "grid/x": (np.arange(CELLS_PUBLISHED) + 0.5) / CELLS_PUBLISHED,
        "grid/t": np.linspace(0, T_PUBLISHED, FRAMES),
    },
    {"config": f"sim:\n  D: {D}\n  nf: {N_F}\n  t: {T_PUBLISHED}\n  xdim: {CELLS_PUBLISHED}\n"},
    groups=True,
    compression="lzf",
    published_only=True,
)

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

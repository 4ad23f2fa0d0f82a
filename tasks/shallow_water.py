"""Shallow Water 2D: a round dam breaks. PDEBench, 2D, regression.

h_t + div(h w) = 0 and (h w)_t + div(h w w) + grad(h^2 / 2) = 0 in (-2.5, 2.5)^2: depth h, velocity
w, gravity 1, flat ground. At t = 0 the water rests, 2 deep within R of the centre, 1 outside.

Real data: `2D_rdb_NA_NA.h5` (6.2 GB) of PDEBench (Takamoto et al. 2022, NeurIPS Datasets and
Benchmarks, doi:10.18419/darus-2986), 1000 dams with R ~ U(0.3, 0.7): groups "0000" ... with `data`
(101, 128, 128, 1), h at t = 0, 0.01, ... 1 as means over cells. Test: the last tenth.

The real dams differ in nothing but R, so the simulated default varies three numbers more: the
centre, 0.4 to each side, and the level H ~ U(0.8, 1.2) by which both depths are multiplied; on
64 x 64 cells. published=True is R alone, on 128 x 128. The real file has R alone either way; read
by default it is averaged to 64 x 64. Training and test sets both end at t = 1 (in the published
code, the tests end one frame earlier).

Before the wave reaches the walls (never, by t = 1) h depends on the distance r from the centre
only. And the equations have no length of their own: h / H is one function of r / R and
t sqrt(H) / R, so that a single solution, in one dimension, serves every dam. It is sharper than the
real file can be: solved on 128 x 128 cells, the trough in the middle is 0.04 less deep for R = 0.7.
`python -m tasks.shallow_water --out FILE --n N` writes the published problem, in the layout of the
real file.

x: h at t = 0; y: h at t = 1. nRMSE of predicting the mean y: 0.13; of predicting x: 0.23 (small
numbers, since most of h is the level H).
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from tasks import download, metrics, pdebench
from tasks.darcy_2d import hdf5

GRID, FILE_GRID = 64, 128  # cells a side: ours, and the file's
HALF = 2.5  # half of the side of the square
RADIUS, LEVEL, OFFSET = (0.3, 0.7), (0.8, 1.2), 0.4  # of the dams: R, H, centre
CELLS, REACH = 1200, 6.0  # of the solution for R = H = 1: the wave is within r <= 5.6
FINE = 4  # points a side of a cell over which h is averaged
NAME, FRAMES = "2D_rdb_NA_NA.h5", (0, 100)
REMOTE = download.darus(133021, 6.62e9, "75d838c47aa410694bdc912ea7f22282")
FILES = {f"pdebench/{NAME}": REMOTE}
WANT = "at least 10 groups, each with data, finite depths > 0 of shape (101, 128, 128, 1)"


def step(q: np.ndarray, dr: float, dt: float) -> np.ndarray:
    """One step (Heun) of h_t + (r hw)_r / r = 0, (hw)_t + (r hw^2)_r / r + (h^2 / 2)_r = 0.

    q: h and hw, means over rings of width dr around the centre, (2, cells).
    """
    first = q + dt * change(q, dr)
    return (q + first + dt * change(first, dr)) / 2


def change(q: np.ndarray, dr: float) -> np.ndarray:
    """q_t: what flows through a ring's two faces, and the push of the water's own pressure.

    Linear within a ring, the slope limited (monotonised central); flux of Harten, Lax and van Leer.
    """
    mirror = q[:, :2][:, ::-1] * [[1], [-1]]  # the rings beyond the centre
    q = np.concatenate([mirror, q, q[:, -1:], q[:, -1:]], axis=1)
    back, ahead = np.diff(q)[:, :-1], np.diff(q)[:, 1:]
    slope = np.minimum(2 * np.minimum(abs(back), abs(ahead)), abs(back + ahead) / 2)
    slope *= np.sign(back) * (back * ahead > 0)
    inner, outer = (q[:, 1:-1] + slope / 2)[:, :-1], (q[:, 1:-1] - slope / 2)[:, 1:]  # of a face
    (w_i, c_i), (w_o, c_o) = ((hw / h, np.sqrt(h)) for h, hw in (inner, outer))
    slow, fast = np.minimum(w_i - c_i, w_o - c_o), np.maximum(w_i + c_i, w_o + c_o)
    slow, fast = np.minimum(slow, 0), np.maximum(fast, 0)  # speeds of the fan that leaves a face
    f_i, f_o = (np.stack([q[1], q[1] * w]) for q, w in ((inner, w_i), (outer, w_o)))
    f_i[1] += inner[0] ** 2 / 2
    f_o[1] += outer[0] ** 2 / 2
    flux = (fast * f_i - slow * f_o + slow * fast * (outer - inner)) / (fast - slow)
    r = dr * np.arange(flux.shape[1])  # of the faces
    area = np.diff(r**2) / 2
    gain = -np.diff(r * flux) / area
    gain[1] += q[0, 2:-2] ** 2 / 2 * dr / area  # the ring's sides are not parallel
    return gain


@cache
def history(cells: int = CELLS, until: float = 3.7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The dam with R = H = 1: centres of the rings, times, and h, (times, cells)."""
    dr = REACH / cells
    r, dt = (np.arange(cells) + 0.5) * dr, 0.25 * dr  # waves are slower than 2: h <= 2
    share = np.clip(((1 / dr) ** 2 - np.arange(cells) ** 2) / (2 * np.arange(cells) + 1), 0, 1)
    q, h = np.stack([1 + share, np.zeros(cells)]), []  # share: of a ring within R
    for _ in range(round(until / dt)):
        h.append(q[0])
        q = step(q, dr, dt)
    return r, dt * np.arange(len(h)), np.array(h)


def depth(R: float, H: float, distance: np.ndarray, t: float = 1.0) -> np.ndarray:
    """h at the time t > 0 at these distances from the centre of a dam."""
    r, times, h = history()
    t = t * H**0.5 / R  # in the time of R = H = 1
    late = np.searchsorted(times, t)
    weight = (t - times[late - 1]) / times[1]
    return H * np.interp(distance / R, r, (1 - weight) * h[late - 1] + weight * h[late])


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n dams, before and after: x and y, float32 (n, 1, 64, 64) each; 128 x 128 if published."""
    rng = np.random.default_rng(seed)
    N, fine = (FILE_GRID, FINE // 2) if published else (GRID, FINE)
    R, H = rng.uniform(*RADIUS, n), rng.uniform(*LEVEL, n)
    centre = rng.uniform(-OFFSET, OFFSET, (n, 2))
    if published:
        H[:], centre[:] = 1, 0
    cells, points = centres(N), centres(N * fine)
    x, y = (np.empty((n, 1, N, N), np.float32) for _ in range(2))
    for i in range(n):
        row, column = (points - centre[i, :, None]) ** 2
        distance = np.sqrt(row[:, None] + column)
        x[i, 0] = H[i] * (1 + averaged(distance <= R[i], fine))
        if published:  # where PDEBench has no means: a cell is within or not
            x[i, 0] = 1 + (np.hypot(cells[:, None], cells) <= R[i])
        y[i, 0] = averaged(depth(R[i], H[i], distance), fine)
    return x, y


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the dams of simulate(n, seed, published=True), which differ in R alone, for all frames.

    The default's other centres and levels have no place in the published file: read without
    --published it gives these dams on 64 x 64 cells.
    """
    fine, (cells, points) = FINE // 2, (centres(FILE_GRID), centres(FILE_GRID * FINE // 2))
    distance = np.hypot(points[:, None], points)
    for R in np.random.default_rng(seed).uniform(*RADIUS, n):
        series = [1 + (np.hypot(cells[:, None], cells) <= R)]
        series += [averaged(depth(R, 1.0, distance, i / 100), fine) for i in range(1, 101)]
        yield {"data": np.stack(series)[None, ..., None]}


def centres(N: int) -> np.ndarray:
    """Of N cells along a side, (N,)."""
    return HALF * ((2 * np.arange(N) + 1) / N - 1)


def averaged(field: np.ndarray, size: int) -> np.ndarray:
    """Means over squares of size x size: (..., N size, N size) -> (..., N, N)."""
    N = field.shape[-1] // size
    return field.reshape(*field.shape[:-2], N, size, N, size).mean(axis=(-3, -1))


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real dams of a split: x and y, float32 (n, 1, 64, 64) each; 128 x 128 if published.

    By default four cells are averaged into one, which is again a mean over a cell.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    path = Path(root) / "pdebench" / NAME
    with hdf5(path, REMOTE, WANT) as file:
        h = read_groups(file, split, FRAMES, 1)
        if h.min() <= 0:
            raise ValueError(f"got depths <= 0 in '{split}'")
    if not published:
        h = averaged(h, FILE_GRID // GRID)
    return h[:, 0], h[:, 1]


def read_groups(file, split: str, frames: tuple[int, ...], channels: int) -> np.ndarray:
    """Some frames of the groups of a split, and no others: float32 (n, frames, channels, 128, 128).

    In the order of the names, the last tenth is "test", the rest "train".
    Raises: ValueError that says what the file holds instead.
    """
    names = sorted(file)
    if len(names) < 10:
        raise ValueError(f"got {len(names)} groups")
    first = len(names) - len(names) // 10
    names = names[first:] if split == "test" else names[:first]
    shape = (101, FILE_GRID, FILE_GRID, channels)
    fields = np.empty((len(names), len(frames), channels, *shape[1:3]), np.float32)
    for i, name in enumerate(names):
        data = file[f"{name}/data"]
        if data.shape != shape or data.dtype.kind != "f":
            raise ValueError(f"group {name} has {data.shape} {data.dtype}")
        fields[i] = np.moveaxis(data[list(frames)], -1, 1)
        if not np.isfinite(fields[i]).all():
            raise ValueError(f"group {name} has numbers that are not finite")
    return fields


TASK = {
    "title": "Shallow Water 2D: depth after a round dam broke",
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
        "PINN": 0.083,
        "FNO": 0.0044,
        "U-Net": 0.017,
        "ORCA": 0.0060,
        "PaRe": 0.0057,
    },
}
PUBLISHED = {"x_shape": (1, FILE_GRID, FILE_GRID), "y_shape": (1, FILE_GRID, FILE_GRID)}
FILE = pdebench.File(
    NAME,
    frames,
    {
        "grid/x": centres(FILE_GRID),
        "grid/y": centres(FILE_GRID),
        "grid/t": np.linspace(0, 1, 101),
    },
    {"config": f"sim:\n  gravity: 1.0\n  T_end: 1.0\n  xdim: {FILE_GRID}\n  ydim: {FILE_GRID}\n"},
    groups=True,
)

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

"""Diffusion-Reaction 2D: patterns of two substances. PDEBench, 2D, regression.

u_t = Du Laplace(u) + u - u^3 - k - v, v_t = Dv Laplace(v) + u - v (FitzHugh and Nagumo's nerve) in
(-1, 1)^2, nothing flows through the rim; Du = 0.001, Dv = 0.005, k = 0.005. At t = 0, u and v are
independent N(0, 1) in every cell.

Real data: `2D_diff-react_NA_NA.h5` (13 GB) of PDEBench (Takamoto et al. 2022, NeurIPS Datasets and
Benchmarks, doi:10.18419/darus-2986), 1000 starts on 128 x 128 cells: groups "0000" ... with `data`
(101, 128, 128, 2), u and v at t = 0, 0.05, ... 5. Test: the last tenth.

The default is (u, v) at t = 0.5 -> (u, v) at t = 5, on 64 x 64 cells. By then the noise, which
means something else on every grid, has become a field that 64 x 64 cells resolve, and both
substances are shown. published=True is u at t = 0 -> v at t = 5, on 128 x 128: there v at t = 0 is
hidden, and matters as much as u, so that no model can do better than about 0.53. Training and test
sets both end at t = 5 (in the published code, the tests end one frame earlier).

`python -m tasks.diffusion_reaction_2d --out FILE --n N` writes the starts on 128 x 128 cells, in
the layout of the real file.

Differs from the published solver: ours lets each cosine decay exactly, theirs (PDEBench's
sim_diff_react.py) has a Laplacian of five points, on which the shortest waves of the noise decay up
to 2.5 times too slowly. From the same noise the two solutions differ by 1.5 % in v at t = 5. So
simulated and real samples are draws of slightly different problems.

x: u, v; y: u, v. nRMSE of predicting the mean y: 0.99; of predicting x: 0.85.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import scipy.fft

from tasks import download, metrics, pdebench
from tasks.darcy_2d import hdf5
from tasks.shallow_water import averaged, read_groups

GRID, FILE_GRID = 64, 128  # cells a side: ours, and the file's
D_U, D_V, K = 1e-3, 5e-3, 5e-3
START, END = 0.5, 5.0  # times of x and y
PHASES = ((0.1, 16), (0.4, 16), (4.5, 48))  # to END: time and steps of each, for the rough start
PARTS = 4  # samples that are solved at once: few stay in the processor's cache
NAME, FRAMES = "2D_diff-react_NA_NA.h5", (0, 10, 100)  # t = 0, 0.5, 5
REMOTE = download.darus(133017, 1.32e10, "b8d0b86064193195ddc30c33be5dc949")
FILES = {f"pdebench/{NAME}": REMOTE}
WANT = "at least 10 groups, each with data, finite numbers of shape (101, 128, 128, 2)"


@cache
def heat(D: float, t: float, N: int) -> np.ndarray:
    """M such that M u M is what Laplace's diffusion makes of u, (N, N), in the time t. Exact.

    A cosine of wave number pi j / 2 (no flow through the rim of a side of length 2) decays with
    the rate D (pi j / 2)^2.
    """
    cosines = scipy.fft.dct(np.eye(N), axis=0, norm="ortho")
    rate = D * (np.pi * np.arange(N) / 2) ** 2
    return cosines.T @ (np.exp(-rate * t)[:, None] * cosines)


def react(u: np.ndarray, v: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """One midpoint step of u' = u - u^3 - k - v, v' = u - v."""
    u_mid = u + dt / 2 * (u - u * u * u - K - v)
    v_mid = v + dt / 2 * (u - v)
    return u + dt * (u_mid - u_mid * u_mid * u_mid - K - v_mid), v + dt * (u_mid - v_mid)


def evolve(u: np.ndarray, v: np.ndarray, t: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """u and v, (..., N, N), after the time t. Strang's splitting: second order in t / steps."""
    N, dt = u.shape[-1], t / steps
    M_u, M_v = heat(D_U, dt, N), heat(D_V, dt, N)
    u, v = react(u, v, dt / 2)
    for i in range(steps):
        u, v = M_u @ u @ M_u, M_v @ v @ M_v
        u, v = react(u, v, dt if i < steps - 1 else dt / 2)
    return u, v


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n patterns, early and late: x and y, float32 (n, 2, 64, 64) each.

    The noise on 64 x 64 cells is the mean over four cells of the file's: N(0, 1/4).
    published: (n, 1, 128, 128) each; this takes ten times as long (a minute for all of the default
    sizes).
    """
    rng = np.random.default_rng(seed)
    N, scale, channel = (FILE_GRID, 1.0, [1]) if published else (GRID, 0.5, [0, 1])
    x, y = (np.empty((n, len(channel), N, N), np.float32) for _ in range(2))
    for i in range(0, n, PARTS):
        part = slice(i, min(i + PARTS, n))
        fields = [scale * rng.standard_normal((part.stop - i, 2, N, N)).swapaxes(0, 1)]
        for t, steps in PHASES:
            fields.append(np.stack(evolve(*fields[-1], t, steps)))  # (2, n, N, N)
        x[part] = fields[0][:1].swapaxes(0, 1) if published else fields[2].swapaxes(0, 1)
        y[part] = fields[-1][channel].swapaxes(0, 1)
    return x, y


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the starts of simulate(n, seed, published=True) for all frames, u and v.

    The default's starts, of the same seed, are others, on 64 x 64 cells. Read without --published
    the file gives the same problem, averaged from 128 x 128.
    """
    rng = np.random.default_rng(seed)
    for i in range(0, n, PARTS):
        noise = rng.standard_normal((min(PARTS, n - i), 2, FILE_GRID, FILE_GRID))
        series = [noise.swapaxes(0, 1)]
        for t, steps in PHASES:
            for _ in range(round(t / 0.05)):
                series.append(np.stack(evolve(*series[-1], 0.05, max(1, round(steps * 0.05 / t)))))
        yield {"data": np.stack(series).transpose(2, 0, 3, 4, 1)}


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real patterns of a split: x and y, float32 (n, 2, 64, 64), or (n, 1, 128, 128) published.

    By default four cells are averaged into one.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    path = Path(root) / "pdebench" / NAME
    first, early, last = FRAMES
    with hdf5(path, REMOTE, WANT) as file:
        fields = read_groups(file, split, (first if published else early, last), 2)
    if published:
        return fields[:, 0, :1].copy(), fields[:, 1, 1:].copy()
    fields = averaged(fields, FILE_GRID // GRID)
    return fields[:, 0], fields[:, 1]


TASK = {
    "title": "Diffusion-Reaction 2D: patterns of two substances",
    "x_shape": (2, GRID, GRID),
    "y_shape": (2, GRID, GRID),
    "kind": "regression",
    "num_classes": 2,
    "loss": metrics.relative_l2_loss,
    "metric": metrics.relative_l2,
    "metric_name": "nRMSE",
    "sources": {"embedded": "shapes", "paper": "voc"},
    "splits": ("train", "test"),
    "sizes": {"train": 800, "val": 100, "test": 200},
    "published": {
        "PINN": 0.84,
        "FNO": 0.12,
        "U-Net": 1.6,
        "ORCA": 0.82,
        "PaRe": 0.818,
    },
}
PUBLISHED = {
    "title": "Diffusion-Reaction 2D: the inhibitor from the activator's noise",
    "x_shape": (1, FILE_GRID, FILE_GRID),
    "y_shape": (1, FILE_GRID, FILE_GRID),
    "num_classes": 1,
}
CENTRES = (2 * np.arange(FILE_GRID) + 1) / FILE_GRID - 1
FILE = pdebench.File(
    NAME,
    frames,
    {"grid/x": CENTRES, "grid/y": CENTRES, "grid/t": np.linspace(0, END, 101)},
    {"config": f"sim:\n  Du: {D_U}\n  Dv: {D_V}\n  k: {K}\n  t: {END}\n  xdim: {FILE_GRID}\n"},
    groups=True,
    compression="lzf",
)

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

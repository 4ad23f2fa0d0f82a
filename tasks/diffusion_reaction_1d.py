"""Diffusion-reaction: a species that spreads and grows until full. PDEBench, 1D, regression.

u_t = nu u_xx + rho u (1 - u) for x in (0, 1), periodic, nu = 0.5, rho = 1.
x: u at t = 0, scaled to 0..1; y: u at t = 0.03, 256 points.

The papers ask for t = 0.29 (published=True, 1024 points), when u is flat but for 0.05 %: all that
is left to predict is one number. At t = 0.03 the longest wave keeps half of its height. Copying x
has an nRMSE of 0.54, the mean of x 0.11; to solve the equation without its growth, 0.013.

Real data: PDEBench (Takamoto et al. 2022), `ReacDiff_Nu0.5_Rho1.0.hdf5`, 10,000 series of 101
frames on 1024 cells (`tensor`), from random sines (sines.py). The first 1000 are for testing.
careful: its solver's step of 2^-22 was too short for float32, so that little of the growth is in
the file. ORCA's code trains on t = 0.29 but tests on t = 0.99; here both are t = 0.29.

Simulated data: the equation, solved by Strang's splitting (1968, SIAM J. Numer. Anal. 5:506).
`python -m tasks.diffusion_reaction_1d --out FILE --n N` writes it in the layout of the real file.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks import download, metrics, pdebench, sines

NU, RHO = 0.5, 1.0
DT = 0.0025  # of the splitting
FRAME, STRIDE = 3, 4  # ours: t = 0.03, every fourth of 1024 cells
FRAME_PUBLISHED, STRIDE_PUBLISHED = 29, 1
NAME, FRAMES = "ReacDiff_Nu0.5_Rho1.0.hdf5", 101
REMOTE = download.darus(133177, 4.14e9, "69a429239778d529cd419ed5888ea835")
FILES = {f"pdebench/{NAME}": REMOTE}


def solve(u0: np.ndarray, t: float, nu: float = NU, rho: float = RHO, dt: float = DT) -> np.ndarray:
    """u at time t, (n, L), from u0, (n, L), at L equidistant points of the periodic (0, 1).

    In each step u grows for half of it, spreads for all of it and grows for the other half; growth
    u' = rho u (1 - u) and spreading u_t = nu u_xx are exact. Second order in dt.
    """
    L = u0.shape[1]
    steps = max(1, round(t / dt))
    dt = t / steps
    k = 2 * np.pi * np.fft.rfftfreq(L, 1 / L)
    grow = lambda u, time: u / (u + np.exp(-rho * time) * (1 - u))  # noqa: E731
    spread = lambda u: np.fft.irfft(np.fft.rfft(u) * np.exp(-nu * k**2 * dt), L)  # noqa: E731
    u = spread(grow(u0, dt / 2))
    for _ in range(steps - 1):
        u = spread(grow(u, dt))  # the second half of one step and the first of the next
    return grow(u, dt / 2)


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n fields, before and after: x and y, float32 (n, 1, 256); (n, 1, 1024) if published."""
    frame, stride = (FRAME_PUBLISHED, STRIDE_PUBLISHED) if published else (FRAME, STRIDE)
    u0 = sines.random_sines(n, np.random.default_rng(seed))
    x = sines.normalised(u0(sines.centres()))
    y = solve(x, frame / 100)
    return tuple(u[:, None, ::stride].astype(np.float32) for u in (x, y))


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the fields of simulate(n, seed) for all frames, on all cells.

    All of the growth is there, which PDEBench's own file lost to rounding.
    """
    u0 = sines.normalised(sines.random_sines(n, np.random.default_rng(seed))(sines.centres()))
    for u in np.array_split(u0, range(sines.BLOCK, n, sines.BLOCK)):
        series = [u]
        for _ in range(1, FRAMES):
            series.append(solve(series[-1], 0.01))
        yield {"tensor": np.stack(series, axis=1)}


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real fields of a split ("train" or "test"), in the form of simulate.

    Args: published: t = 0.29 on all cells.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    frame, stride = (FRAME_PUBLISHED, STRIDE_PUBLISHED) if published else (FRAME, STRIDE)
    wanted = {"frames": (0, frame), "steps": FRAMES, "attributes": FILE.attributes}
    u = sines.read_frames(root, NAME, REMOTE, split, **wanted)[:, 0]
    if u.min() < -0.01 or u.max() > 1.01:
        raise ValueError(
            f"{Path(root) / 'pdebench' / NAME}: its tensor is in {u.min():.3g}..{u.max():.3g}; "
            f"expected a species that fills 0..1 ({REMOTE.url})"
        )
    return np.ascontiguousarray(u[:, :1, ::stride]), np.ascontiguousarray(u[:, 1:, ::stride])


PUBLISHED = {"x_shape": (1, sines.CELLS), "y_shape": (1, sines.CELLS)}
TASK = {
    "title": "Diffusion-reaction 1D: a species that spreads and grows",
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
    "published": {"PINN": 0.006, "FNO": 0.0014, "U-Net": 0.08, "ORCA": 0.003, "PaRe": 0.0026},
}
FILE = pdebench.File(NAME, frames, sines.coordinates(FRAMES), {"Nu": NU, "rho": RHO})

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

"""Navier-Stokes in 1D: sound and friction in a gas of uneven density. PDEBench, 1D, regression.

rho_t + (rho v)_x = 0, (rho v)_t + (rho v^2 + p)_x = (rho nu v_x)_x and
E_t + ((E + p) v)_x = (rho nu v v_x)_x, E = p / (gamma - 1) + rho v^2 / 2, for x in (-1, 1),
periodic; gamma = 5/3, nu = 4/3 eta + zeta, eta = zeta = 0.1: no heat conduction.
x: density rho, pressure p and velocity v at t = 0; y: the same at t = 0.1, 128 points.

The papers ask for t = 1 (published=True, 1024 points), when friction has left little but the
density: p is flat to a few percent, at a level that the energy at t = 0 gives away. At t = 0.1
sound has crossed about a fifth of the domain: copying x has an nRMSE of 0.61, the mean field 0.72,
ridge regression 0.25, a small convolutional network 0.11. Half of PDEBench's fields are 0 outside a
window whose edges are narrower than a cell of 128; our simulated ones have none.

nRMSE is the mean over the channels, as for every task: p is tens of times v, and an error of all
three together would be that of p alone. ORCA and PaRe standardise x and y by the training
fields at t = 0 and report the error of that, which is not comparable.

Real data: PDEBench (Takamoto et al. 2022), `1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5`,
10,000 series of 101 frames on 1024 cells (`density`, `pressure`, `Vx`), from random sines
(sines.py), of which every eighth cell is taken. The first 1000 are for testing.

Simulated data: the equations, solved by a Fourier method in log rho, log p and v.
`python -m tasks.navier_stokes_1d --out FILE --n N` writes the published problem, in the layout of
the real file.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks import download, metrics, pdebench, sines

ETA, ZETA = 0.1, 0.1
GAMMA, NU = 5 / 3, 4 / 3 * ETA + ZETA
FRAME, STRIDE = 10, 8  # ours: t = 0.1, every eighth of 1024 cells
FRAME_PUBLISHED, STRIDE_PUBLISHED = 100, 1
STRIDE_SOLVED = 4  # of the published problem, which is solved on 256 points
COURANT = 2.0  # of the shortest wave; the method's limit is 2.8
CHUNK = 32  # samples solved together; more would not fit a processor's cache
NAME, FRAMES = "1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5", 101
REMOTE = download.darus(164668, 1.24e10, "45655bd77d006ab539c52b7fbcf099b9")
FILES = {f"pdebench/{NAME}": REMOTE}
KEYS = ("density", "pressure", "Vx")


def rate(u: np.ndarray, ik: np.ndarray) -> np.ndarray:
    """The time derivative of log rho, log p and v, (3, n, L), but for the term nu v_xx of v."""
    r, q, v = u
    r_x, q_x, v_x = np.fft.irfft(ik * np.fft.rfft(u), u.shape[-1])
    p_by_rho = np.exp(q - r)
    return np.stack(
        [
            -v * r_x - v_x,
            -v * q_x - GAMMA * v_x + (GAMMA - 1) * NU * v_x**2 / p_by_rho,
            -v * v_x - p_by_rho * q_x + NU * r_x * v_x,
        ]
    )


def solve(fields: np.ndarray, t: float, courant: float = COURANT) -> np.ndarray:
    """The fields at time t, (n, 3, L): rho, p, v at L equidistant points of the periodic (-1, 1).

    Logarithms keep rho and p positive, and leave one stiff term, nu v_xx, which has an exact
    solution in Fourier space; the rest is done by RK4 (Lawson 1967, SIAM J. Numer. Anal. 4:372).
    Derivatives of the shortest waves are faded out (Hou, Li 2007, J. Comput. Phys. 226:379), or
    else those would grow by the products of others.
    Raises: FloatingPointError if the fields are too sharp for the points.
    """
    rho, p, v = np.moveaxis(fields.astype(np.float64), 1, 0)
    L = rho.shape[-1]
    k = np.pi * np.arange(L // 2 + 1)
    ik = 1j * k * np.exp(-36 * (k / k[-1]) ** 36)
    fastest = 1.1 * (np.abs(v) + np.sqrt(GAMMA * p / rho)).max()
    steps = int(np.ceil(fastest * k[-1] * t / courant))
    dt = t / steps
    decay = np.exp(-NU * k**2 * dt / 2)

    def calm(u):  # nu v_xx for half a step
        return np.stack([u[0], u[1], np.fft.irfft(decay * np.fft.rfft(u[2]), L)])

    u = np.stack([np.log(rho), np.log(p), v])
    with np.errstate(all="ignore"):  # what is too sharp is found below
        for _ in range(steps):
            a = rate(u, ik)
            half = calm(u)
            b = rate(calm(u + dt / 2 * a), ik)
            c = rate(half + dt / 2 * b, ik)
            d = rate(calm(half + dt * c), ik)
            u = calm(calm(u + dt / 6 * a) + dt / 3 * (b + c)) + dt / 6 * d
        out = np.stack([np.exp(u[0]), np.exp(u[1]), u[2]], axis=1)
    if not np.isfinite(out).all():
        raise FloatingPointError(f"the fields are too sharp for {L} points; give more")
    return out


def refine(fields: np.ndarray, factor: int) -> np.ndarray:
    """Periodic fields, (..., L), on factor times as many points: the same Fourier series."""
    L = fields.shape[-1]
    series = np.fft.rfft(fields)
    series[..., -1] /= 2  # careful: of L points the shortest wave is both k and -k
    return factor * np.fft.irfft(series, factor * L)


def start(n: int, rng: np.random.Generator, windowed: float) -> np.ndarray:
    """n initial states, (n, 3, 1024): b + m f for rho and p, f for v, where f are random sines.

    For rho and p, f is in 0..1, and b and m are log-uniform in 1..10 and 10..100.
    """

    def f():
        return sines.random_sines(n, rng, waves=3, windowed=windowed, length=2.0)(points)

    points = sines.centres(-1, 1)
    channels = []
    for unit in (1, 10):
        b, m = unit * 10 ** rng.random((2, n, 1))
        channels.append(b + m * sines.normalised(f()))
    return np.stack([*channels, f()], axis=1)


def simulate(
    n: int, seed: int | list[int], published: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """n states, before and after: x and y, float32 (n, 3, 128).

    (n, 3, 1024) if published; that takes about a tenth of a second a sample.
    """
    x = start(n, np.random.default_rng(seed), windowed=0.5 if published else 0.0)
    frame, stride = (FRAME_PUBLISHED, STRIDE_SOLVED) if published else (FRAME, STRIDE)
    chunks = np.array_split(x[:, :, ::stride], range(CHUNK, n, CHUNK))
    y = np.concatenate([solve(chunk, frame / 100) for chunk in chunks])
    x, y = (x, refine(y, stride)) if published else (x[:, :, ::stride], y)
    return x.astype(np.float32), y.astype(np.float32)


def frames(n: int, seed: int | list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Solve the states of simulate(n, seed, published=True) for all frames, on 256 points.

    Half of the fields have a window, as PDEBench's have. Read without --published the file gives
    simulate(n, seed) for the samples, an eighth of all, whose three fields have none.
    """
    x = start(n, np.random.default_rng(seed), windowed=0.5)
    for chunk in np.array_split(x, range(CHUNK, n, CHUNK)):
        u, series = chunk[:, :, ::STRIDE_SOLVED], [chunk]
        for _ in range(1, FRAMES):
            u = solve(u, 0.01)
            series.append(refine(u, STRIDE_SOLVED))
        yield dict(zip(KEYS, np.stack(series, axis=2).swapaxes(0, 1), strict=True))


def read(root: Path, split: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The real states of a split ("train" or "test"), in the form of simulate.

    Args: published: t = 1 on all cells.
    Raises: FileNotFoundError or ValueError, naming the file and what it should hold.
    """
    frame, stride = (FRAME_PUBLISHED, STRIDE_PUBLISHED) if published else (FRAME, STRIDE)
    wanted = {"frames": (0, frame), "steps": FRAMES, "attributes": FILE.attributes}
    fields = sines.read_frames(root, NAME, REMOTE, split, keys=KEYS, **wanted)
    if fields[:, :2].min() <= 0:
        raise ValueError(
            f"{Path(root) / 'pdebench' / NAME}: a density or pressure is not positive; expected "
            f"{', '.join(KEYS)} of a gas; get {REMOTE.url}"
        )
    x, y = (np.ascontiguousarray(fields[:, :, i, ::stride]) for i in (0, 1))
    return x, y


PUBLISHED = {"x_shape": (3, sines.CELLS), "y_shape": (3, sines.CELLS)}
TASK = {
    "title": "Navier-Stokes 1D: sound in a gas of uneven density",
    "x_shape": (3, sines.CELLS // STRIDE),
    "y_shape": (3, sines.CELLS // STRIDE),
    "kind": "regression",
    "num_classes": 3,
    "loss": metrics.relative_l2_loss,
    "metric": metrics.relative_l2,
    "metric_name": "nRMSE",
    "sources": {"embedded": "words", "paper": "conll2003"},
    "splits": ("train", "test"),
    "sizes": {"train": 1000, "val": 100, "test": 200},
    "published": {"PINN": 0.72, "FNO": 0.068, "ORCA": 0.062, "PaRe": 0.0662},
}
FILE = pdebench.File(
    NAME, frames, sines.coordinates(FRAMES, start=-1.0), {"eta": ETA, "zeta": ZETA}
)

if __name__ == "__main__":
    raise SystemExit(pdebench.cli(FILE))

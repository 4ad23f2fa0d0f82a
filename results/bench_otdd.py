"""Time otdd.py against its floor: the product x_s x_t^T, forward and backward, in the same run.

    python results/bench_otdd.py --csv results/bench_otdd.csv --peers
    python results/bench_otdd.py --only "n = 1000"

float32, one thread, gradient to x_t; classes of random, unequal sizes. Times are medians of rounds
in which the floor and otdd run once each, so that load is shared. error is relative to the value in
double precision: exact for "exact" and "eps" rows, Gaussian for "gaussian" rows; streamed rows have
none. memory is the rise of the peak resident memory (Linux) in a process of its own.
--peers also times the same number from POT alone: ot.emd for each pair of classes, then ot.emd; and
geomloss' Sinkhorn divergence of the features alone, where geomloss is installed.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from otdd import DENSE, otdd  # noqa: E402

EPS = {"eps": 1e-3}
SINKHORN = {"eps": 1e-3, "label_distance": "sinkhorn"}
SMOOTH = {"eps": 0.1, "label_distance": "gaussian"}
CASES = {  # name: (n, m, D, C_s, C_t, settings, rounds)
    "10 x 10": (2000, 2000, 768, 10, 10, {}, 5),
    "9 x 100": (2000, 2000, 768, 9, 100, {}, 5),
    "one class": (5000, 64, 128, 10, 1, {}, 9),
    "one class, gaussian": (5000, 64, 128, 10, 1, {"label_distance": "gaussian"}, 9),
    "batch": (2000, 256, 128, 10, 8, {}, 9),
    "gaussian": (2000, 2000, 768, 10, 10, {"label_distance": "gaussian"}, 3),
    "eps 1e-3": (2000, 2000, 768, 10, 10, EPS, 3),
    "eps 1e-3, sinkhorn labels": (2000, 2000, 768, 10, 10, SINKHORN, 3),
    "n = 500": (500, 500, 128, 10, 10, {}, 9),
    "n = 1000": (1000, 1000, 128, 10, 10, {}, 5),
    "n = 2000": (2000, 2000, 128, 10, 10, {}, 5),
    "n = 4000": (4000, 4000, 128, 10, 10, {}, 3),
    "eps 0.1, gaussian": (4000, 4000, 128, 10, 10, SMOOTH, 1),
    "eps 0.1, gaussian, streamed": (20_000, 20_000, 128, 10, 10, SMOOTH, 1),
}

ALONE = """
import sys, time, torch
sys.path[:0] = [{root!r}, {results!r}]
from bench_otdd import data
from otdd import otdd
torch.set_num_threads(1)
n, m, D, C_s, C_t, settings = {case!r}
otdd(*data(200, 200, D, 4, 4), **settings)
x_s, y_s, x_t, y_t = data(n, m, D, C_s, C_t)
x_t.requires_grad_()
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before, start = peak(), time.perf_counter()
otdd(x_s, y_s, x_t, y_t, **settings).backward()
print(peak() - before, 1e3 * (time.perf_counter() - start))
"""


def data(n, m, D, C_s, C_t, seed=0):
    """Two labelled clouds of Gaussian classes, float32."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for count, classes, scale in ((n, C_s, 1.0), (m, C_t, 0.9)):
        y = torch.randint(classes, (count,), generator=rng)
        means = 0.7 * torch.randn(classes, D, generator=rng)
        out += [means[y] + scale * torch.randn(count, D, generator=rng), y]
    return out


def once(function) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def alone(case: tuple) -> tuple[float, float]:
    """The rise of the peak memory, bytes, and the time, ms, in a process of its own."""
    code = ALONE.format(root=str(ROOT), results=str(ROOT / "results"), case=case)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    memory, ms = map(float, done.stdout.split())
    return memory, ms


def measure(name: str) -> dict:
    *case, rounds = CASES[name]
    n, m, D, C_s, C_t, settings = case
    memory, ms = alone(tuple(case))
    row = {"case": name, "n": n, "m": m, "D": D, "classes": f"{C_s} x {C_t}", "floor_ms": ""}
    row |= {"forward_backward_ms": round(ms, 1), "ratio": "", "error": ""}
    row |= {"memory_mb": round(memory / 1e6)}
    if n * m > DENSE:
        return row
    x_s, y_s, x_t, y_t = data(n, m, D, C_s, C_t)
    z, ones = x_t.clone().requires_grad_(), torch.ones(n, m)

    def floor():
        (x_s @ z.T).backward(ones)

    def whole():
        otdd(x_s, y_s, z, y_t, **settings).backward()

    floor()
    whole()
    times = [(once(floor), once(whole)) for _ in range(rounds)]
    least, ms = (sorted(column)[rounds // 2] for column in zip(*times, strict=True))
    row |= {"floor_ms": round(least, 1), "forward_backward_ms": round(ms, 1)}
    kind = settings.get("label_distance", "exact").replace("sinkhorn", "exact")
    eps = settings.get("eps", 0.0) if kind == "gaussian" else 0.0
    double = x_s.double(), y_s, x_t.double(), y_t
    exact = float(otdd(*double, label_distance=kind, eps=eps))
    value = float(otdd(x_s, y_s, x_t, y_t, **settings))
    return row | {"ratio": round(ms / least, 2), "error": f"{abs(value / exact - 1):.1e}"}


def peers(name: str) -> dict:
    """One run each; POT's value must be ours."""
    import ot

    n, m, D, C_s, C_t, settings, _ = CASES[name]
    out = {"pot_ms": "", "geomloss_ms": ""}
    if n * m > DENSE:
        return out
    x_s, y_s, x_t, y_t = data(n, m, D, C_s, C_t)
    if not settings:

        def plain_pot():
            cost = torch.from_numpy(ot.dist(x_s.double().numpy(), x_t.double().numpy()))
            total = cost.clone()
            for a in range(C_s):
                for b in range(C_t):
                    i, j = (y_s == a).nonzero(), (y_t == b).nonzero()[:, 0]
                    total[i, j] += ot.emd2([], [], cost[i, j].numpy(), numItermax=10**7)
            value = ot.emd2([], [], total.numpy(), numItermax=10**8)
            ours = float(otdd(x_s, y_s, x_t, y_t))
            assert abs(value / ours - 1) < 1e-4, (value, ours)

        out["pot_ms"] = round(once(plain_pot), 1)
    try:
        from geomloss import SamplesLoss
    except ImportError:
        return out
    loss = SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")
    z = x_t.clone().requires_grad_()
    out["geomloss_ms"] = round(once(lambda: loss(x_s, z).backward()), 1)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--csv", help="write the rows to this file, too")
    parser.add_argument("--peers", action="store_true", help="POT and geomloss, too")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.only:
        rows.append({**measure(name), **(peers(name) if args.peers else {})})
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

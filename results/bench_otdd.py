"""Time otdd.py against its floor: the product x_s x_t^T, forward and backward, in the same run.

python results/bench_otdd.py [--csv results/bench_otdd.csv] [--peers] [--only NAME ...]

float32, 2 threads, gradient to x_t; classes of random, unequal sizes. "warm" is the next step of an
alignment: the same OTDD object after every target moved by 1 % of the spread. Nothing is carried
over from one call to the next, so that it differs from "cold" in the target alone. Medians of
rounds in which the floor and every form run once, so that load is shared. error is relative to the
value in double precision: exact for "exact" and "eps" rows, Gaussian for "gaussian" rows. memory is
the rise of the peak resident memory (Linux) in a process of its own, in float32 cost matrices
(n, m).
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
from otdd import OTDD, otdd  # noqa: E402

CASES = {  # name: (n, m, D, C_s, C_t, settings, rounds)
    "10 x 10": (2000, 2000, 768, 10, 10, {}, 5),
    "9 x 100": (2000, 2000, 768, 9, 100, {}, 5),
    "one class": (5000, 64, 128, 10, 1, {}, 9),
    "one class, gaussian": (5000, 64, 128, 10, 1, {"label_distance": "gaussian"}, 9),
    "batch": (2000, 256, 128, 10, 8, {}, 9),
    "gaussian": (2000, 2000, 768, 10, 10, {"label_distance": "gaussian"}, 3),
    "eps 1e-3": (2000, 2000, 768, 10, 10, {"eps": 1e-3}, 3),
    "eps 1e-3, sinkhorn labels": (
        *(2000, 2000, 768, 10, 10),
        {"eps": 1e-3, "label_distance": "sinkhorn"},
        3,
    ),
    "n = 500": (500, 500, 128, 10, 10, {}, 9),
    "n = 1000": (1000, 1000, 128, 10, 10, {}, 5),
    "n = 2000": (2000, 2000, 128, 10, 10, {}, 5),
    "n = 4000": (4000, 4000, 128, 10, 10, {}, 3),
}

MEMORY = """
import sys, torch
sys.path[:0] = [{root!r}, {results!r}]
from bench_otdd import data
from otdd import otdd
torch.set_num_threads(2)
n, m, D, C_s, C_t, settings = {case!r}
otdd(*data(200, 200, D, 4, 4), **settings)
x_s, y_s, x_t, y_t = data(n, m, D, C_s, C_t)
x_t.requires_grad_()
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
otdd(x_s, y_s, x_t, y_t, **settings).backward()
print((peak() - before) / (4 * n * m))
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


def measure(name: str) -> dict:
    n, m, D, C_s, C_t, settings, rounds = CASES[name]
    x_s, y_s, x_t, y_t = data(n, m, D, C_s, C_t)
    z, ones = x_t.clone().requires_grad_(), torch.ones(n, m)
    distance, rng = OTDD(x_s, y_s, **settings), torch.Generator().manual_seed(1)
    moved = [x_t]

    def cold():
        distance(z, y_t).backward()

    def warm():  # one step on from where the last round ended
        moved[0] = moved[0] + 0.01 * x_t.std() * torch.randn(x_t.shape, generator=rng)
        distance(moved[0].requires_grad_(), y_t).backward()
        moved[0] = moved[0].detach()

    def forward():
        with torch.no_grad():
            distance(x_t, y_t)

    forms = {
        "floor": lambda: (x_s @ z.T).backward(ones),
        "forward": forward,
        "cold": cold,
        "warm": warm,
    }
    for function in forms.values():
        function()
    times = {form: [] for form in forms}
    for _ in range(rounds):
        moved[0] = x_t
        for form, function in forms.items():
            times[form].append(once(function))
    t = {form: sorted(values)[rounds // 2] for form, values in times.items()}

    value = float(otdd(x_s, y_s, x_t, y_t, **settings))
    kind = settings.get("label_distance", "exact").replace("sinkhorn", "exact")
    double = float(otdd(x_s.double(), y_s, x_t.double(), y_t, label_distance=kind))
    case = (n, m, D, C_s, C_t, settings)
    code = MEMORY.format(root=str(ROOT), results=str(ROOT / "results"), case=case)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {
        "case": name,
        "n": n,
        "m": m,
        "D": D,
        "classes": f"{C_s} x {C_t}",
        "floor_ms": round(t["floor"], 1),
        "forward_ms": round(t["forward"], 1),
        "forward_backward_ms": round(t["cold"], 1),
        "warm_ms": round(t["warm"], 1),
        "ratio": round(t["cold"] / t["floor"], 2),
        "warm_ratio": round(t["warm"] / t["floor"], 2),
        "error": f"{abs(value / double - 1):.1e}",
        "memory": round(float(done.stdout), 1),
    }


def peers(name: str) -> dict:
    """One run each; POT's value must be ours."""
    import ot

    n, m, D, C_s, C_t, settings, _ = CASES[name]
    x_s, y_s, x_t, y_t = data(n, m, D, C_s, C_t)
    out = {"pot_ms": "", "geomloss_ms": ""}
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
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--csv", help="write the rows to this file, too")
    parser.add_argument("--peers", action="store_true", help="POT and geomloss, too")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for name in args.only:
        rows.append({**measure(name), **(peers(name) if args.peers else {})})
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

"""Time mmd.py against its floor: three Gram products forward and two backward, in the same run.

python results/bench_mmd.py [--csv results/bench_mmd.csv]    # float32, 2 threads, gradient to y
Five kernels, D features, n samples a side; the other forms are forward and backward as well.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mmd import mmd2, mmd2_features, mmd2_linear  # noqa: E402

CASES = ((500, 128), (1000, 768), (2000, 128), (2000, 768), (4000, 768))


def once(function) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def measure(n: int, D: int, repeats: int) -> dict:
    """Medians of `repeats` rounds; every form runs once in each round, so that load is shared."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, D, generator=rng), torch.randn(n, D, generator=rng) + 0.1
    z = y.clone().requires_grad_()

    def floor():
        kxx, kyy, kxy = x @ x.T, y @ y.T, x @ y.T
        return kxx, kyy @ y, kxy.T @ x

    forms = {
        "floor": floor,
        "mmd2": lambda: mmd2(x, z).backward(),
        "linear": lambda: mmd2_linear(x, z).backward(),
        "features": lambda: mmd2_features(x, z).backward(),
    }
    for function in forms.values():
        function()  # warm up
    times = {name: [] for name in forms}
    for _ in range(repeats):
        for name, function in forms.items():
            times[name].append(once(function))
    row = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    return {
        "n": n,
        "D": D,
        "forward_backward_ms": round(row["mmd2"], 1),
        "floor_ms": round(row["floor"], 1),
        "ratio": round(row["mmd2"] / row["floor"], 2),
        "linear_ms": round(row["linear"], 1),
        "features_ms": round(row["features"], 1),
    }


def main(args):
    torch.set_num_threads(2)
    print(f"torch={torch.__version__} threads=2 device=cpu dtype=float32 repeats={args.repeats}")
    rows = []
    for n, D in CASES:
        rows.append(measure(n, D, args.repeats))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--csv", help="write the table here as well")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the median")
    main(parser.parse_args())

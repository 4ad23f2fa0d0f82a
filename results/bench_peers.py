"""OTDD and MMD beside other libraries, on one device: python results/bench_peers.py --csv FILE

    python results/bench_peers.py --csv results/gpu_peers.csv     a CUDA machine
    python results/bench_peers.py --device cpu --sizes 200        does it run?

n samples a side of D = 128 features, float32, 10 classes where there are labels. ms is the median
of three passes, forward and backward to the target's features, after one that is not counted;
peak_gb the memory that torch allocated on a GPU meanwhile, inputs included. value tells whether two
rows solve the same problem: "otdd" rows are the exact OTDD; "w2" rows the squared Wasserstein
distance of the features with an entropic term of a hundredth of the mean cost (the others' value
includes that term); "mmd" rows the biased MMD^2 with one Gaussian kernel. POT runs on its torch
backend, geomloss without KeOps; flash-sinkhorn needs CUDA. A library that is not installed has no
row; a form that fails, for want of memory for instance, has its error as value.
"""

import argparse
import csv
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
from bench_gpu import hardware  # noqa: E402 (the repository's root has to be on the path first)

from mmd import mmd2  # noqa: E402
from otdd import otdd, wasserstein  # noqa: E402

D, CLASSES, EPS = 128, 10, 1e-2
EXACT = 4000  # samples a side up to which exact programmes are solved, and matrices kept


def data(n: int, device: str) -> tuple:
    """x_s (n, D), y_s (n,), x_t, y_t of Gaussian classes; x_t takes a gradient."""
    rng, out = torch.Generator().manual_seed(0), []
    for scale in (1.0, 0.9):
        y = torch.randint(CLASSES, (n,), generator=rng)
        means = 0.7 * torch.randn(CLASSES, D, generator=rng)
        x = means[y] + scale * torch.randn(n, D, generator=rng)
        out += [x.to(device), y.to(device)]
    out[2].requires_grad_()
    return tuple(out)


def pot_otdd(x_s, y_s, x_t, y_t):
    """The exact OTDD from POT alone: a programme for each pair of classes, then one of all."""
    import ot

    cost = torch.cdist(x_s, x_t).square()
    W = torch.stack([
        torch.stack([
            ot.emd2([], [], cost[y_s == a][:, y_t == b], numItermax=10**8) for b in range(CLASSES)
        ])
        for a in range(CLASSES)
    ])  # fmt: skip
    return ot.emd2([], [], cost + W[y_s][:, y_t], numItermax=10**8)


def pot_w2(x_s, x_t, eps):
    import ot

    a = x_s.new_full((len(x_s),), 1 / len(x_s))
    cost = torch.cdist(x_s, x_t).square()
    return ot.sinkhorn2(a, a, cost, eps, method="sinkhorn_log", numItermax=300, stopThr=1e-4)


def forms(n: int, device: str) -> dict:
    """{(problem, library): a function that takes x_t and gives the value}."""
    x_s, y_s, x_t, y_t = data(n, device)
    with torch.no_grad():
        gap = (x_s.mean(dim=0) - x_t.mean(dim=0)).square()
        mean = float((x_s.var(dim=0) + x_t.var(dim=0) + gap).sum())
    blur = (EPS * mean / 2) ** 0.5  # geomloss takes |x - x'|^2 / 2, and eps = blur^2
    found = {}
    if n <= EXACT:
        found["otdd", "ours"] = lambda: otdd(x_s, y_s, x_t, y_t)
        found["otdd", "POT"] = lambda: pot_otdd(x_s, y_s, x_t, y_t)
        found["w2", "POT"] = lambda: pot_w2(x_s, x_t, EPS * mean)
    found["otdd eps", "ours"] = lambda: otdd(x_s, y_s, x_t, y_t, eps=EPS, label_distance="gaussian")
    found["w2", "ours"] = lambda: wasserstein(x_s, x_t, eps=EPS) ** 2
    found["mmd", "ours"] = lambda: mmd2(x_s, x_t, bandwidths=[mean], unbiased=False)
    try:
        from geomloss import SamplesLoss

        how = {"backend": "tensorized", "debias": False}
        w2 = SamplesLoss("sinkhorn", p=2, blur=blur, **how)
        kernel = SamplesLoss("gaussian", blur=(mean / 2) ** 0.5, backend="tensorized")
        found["w2", "geomloss"] = lambda: 2 * w2(x_s, x_t)
        found["mmd", "geomloss"] = lambda: 2 * kernel(x_s, x_t)  # theirs is MMD^2 / 2
    except ImportError:
        pass
    if device.startswith("cuda"):
        try:
            from flash_sinkhorn import SamplesLoss as FlashLoss

            flash = FlashLoss("sinkhorn", blur=(EPS * mean) ** 0.5, debias=False)
            found["w2", "flash-sinkhorn"] = lambda: flash(x_s, x_t)
        except ImportError:
            pass
    return {key: (function, x_t) for key, function in found.items()}


def measure(function, x_t, gpu: bool) -> dict:
    times = []
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        if gpu:
            torch.cuda.synchronize()
        start, x_t.grad = time.perf_counter(), None
        value = function()
        value.backward()
        if gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        if times[-1] > 20e3:  # a first pass that long is near enough to the others
            break
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.3f}" if gpu else ""
    ms = statistics.median(times[1:] or times)
    return {"ms": f"{ms:.4g}", "peak_gb": memory, "value": f"{float(value.detach()):.6g}"}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 20000], help="n")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no form is begun")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    args = parser.parse_args(argv)
    gpu, end, rows = args.device.startswith("cuda"), time.time() + args.seconds, []
    for n in args.sizes:
        for (problem, library), (function, x_t) in forms(n, args.device).items():
            if time.time() > end:
                print(f"no time left for {problem} by {library} of {n} samples", flush=True)
                continue
            row = {"problem": problem, "library": library, "n": n}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row |= measure(function, x_t, gpu)
            except Exception as error:  # another library's: it can be any
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
                row |= {"ms": "", "peak_gb": "", "value": reason}
            rows.append(row | {"device": hardware(args.device), "torch": torch.__version__})
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            if args.csv:  # anew after each row: nothing is lost if time runs out
                with args.csv.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Does the gate of pare.py find the patches that carry the label?

Planted tasks: noise, but for one patch of a sample, which holds the pattern of the sample's class.
Where it stands varies ("varying": the gate has to see the pattern) or is the same in all samples
("fixed": the gate can see the position). After each epoch, the area under the ROC curve of the
scores on held-out samples: 1 if the planted patch has the highest score in all of them, 0.5 by
chance.

    python results/gate.py                                    seeds 0, 1, 2: one row a run
    python results/gate.py --seeds 0 --flags "--gate separate"
Rows are appended to results/gate.csv. About a minute a run on one core.
"""

import argparse
import contextlib
import csv
import io
import math
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import pare  # noqa: E402
import run  # noqa: E402

PATCHES, POINTS, CLASSES, AMPLITUDE = 16, 8, 4, 3.0
SIZES = {"train": 640, "val": 200, "test": 400}


def planted(kind: str, seed: int) -> tuple[dict, np.ndarray]:
    """Arrays of a FILE.npz, and where the pattern is in the test samples, (n, PATCHES) bool.

    Patterns are cosines, orthogonal to each other, of deviation AMPLITUDE; the noise has 1. The
    best linear score of x, the sum of all patterns, has an AUC of 0.999.
    """
    rng = np.random.default_rng([seed, 7])
    points = (np.arange(POINTS) + 0.5) / POINTS
    patterns = np.cos(np.pi * np.arange(1, CLASSES + 1)[:, None] * points) * math.sqrt(2)
    fixed = rng.integers(PATCHES)
    arrays = {}
    for split, n in SIZES.items():
        y = rng.integers(CLASSES, size=n)
        place = rng.integers(PATCHES, size=n) if kind == "varying" else np.full(n, fixed)
        x = rng.normal(size=(n, PATCHES, POINTS))
        x[np.arange(n), place] += AMPLITUDE * patterns[y]
        arrays[f"x_{split}"] = x.reshape(n, 1, -1).astype(np.float32)
        arrays[f"y_{split}"] = y
    return arrays, np.arange(PATCHES) == place[:, None]


def auc(s: np.ndarray, here: np.ndarray) -> float:
    """Share of pairs (planted patch, other patch of the same sample) in the right order."""
    planted = s[here][:, None]  # one a sample
    others = s[~here].reshape(len(s), -1)
    return float((planted > others).mean() + 0.5 * (planted == others).mean())


def measure(kind: str, seed: int, flags: list[str], folder: str) -> dict:
    """Fine-tune on a planted task; AUC at the start and after every epoch."""
    path = str(Path(folder) / f"{kind}.npz")
    arrays, here = planted(kind, seed)
    np.savez(path, **arrays)
    given = ["--task", path, "--seed", str(seed), "--patches", str(PATCHES), "--epochs", "8"]
    cfg = pare.parse_args([*given, *flags, "--out", str(Path(folder) / "run"), "--overwrite"])
    cfg, task, net, tokenize, model, _ = pare.build(cfg)
    f_s = pare.source_embedder(net)
    cfg = replace(cfg, k0=pare.first_k(cfg, math.prod(model.f_t.grid)))
    source = run.load_source(cfg, tokenize, max(pare.WINDOW, cfg.k0), 0)
    mixer = pare.Mixer(f_s, source, model.g.maps, cfg.seed, cfg.gate)
    x, aucs, start, evaluate = torch.from_numpy(arrays["x_test"]), [], time.time(), pare.evaluate

    def look(*args) -> float:
        with torch.no_grad():
            scores = mixer.gate(model.f_t(x)).numpy()
        aucs.append(auc(scores, here))
        return evaluate(*args) if args else 0.0

    look()
    pare.evaluate = look  # finetune() calls it after every epoch
    try:
        record = run.Record(run.open_run(cfg, pare.METHOD), cfg, pare.METHOD, start)
        val_error = pare.finetune(model, mixer, task, cfg, record)
    finally:
        pare.evaluate = evaluate
    row = {"task": kind, "seed": seed, "flags": shlex.join(flags), "auc_start": aucs[0]}
    row |= {"auc_best": max(aucs[1:]), "auc_end": aucs[-1], "val_error": val_error}
    return {key: run.number(value) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=["varying", "fixed"])
    parser.add_argument("--flags", default="", help="of pare.py, in quotes")
    parser.add_argument("--csv", type=Path, default=HERE / "gate.csv")
    args = parser.parse_args()
    command = f"python results/gate.py {shlex.join(sys.argv[1:])}".strip()
    for seed in args.seeds:
        for kind in args.tasks:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                row = measure(kind, seed, shlex.split(args.flags), folder) | {"command": command}
            print(row, flush=True)
            new = not args.csv.exists()
            with open(args.csv, "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()

"""What does alignment take out of the embedded data? python results/lost.py --csv results/lost.csv

For the series and the PDE tasks of results/all_tasks.py, with their samples: f^t as it starts and
after the alignment of ORCA (otdd). A row is written as soon as it is there; what the file holds is
not done again. --align-lr takes another learning rate of the alignment than the task's.

lost: a linear map, of least squares on the training samples, reads the values of a patch
    (standardised, as the convolution of f^t sees them) from its embedding, without position; the
    share of the variance that it misses on the validation samples. 0: all of x can be read off.
gain: |W x| / |b|, the convolution's product with x beside its bias. What is large beside the bias
    loses its length in the LayerNorm that follows.
doubled: how far embeddings move when x doubles, over their spread.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
import all_tasks  # noqa: E402 (the repository's root has to be on the path first)
import collect  # noqa: E402

import orca  # noqa: E402
import run  # noqa: E402
import tasks  # noqa: E402
from tasks import papers  # noqa: E402

SAMPLES = 200  # of each split, at most
TASKS = [name for name in tasks.NAMES if name in papers.SERIES or name in tasks.PDES]


def patches(f_t: nn.Module, x: Tensor) -> Tensor:
    """What the convolution of f^t makes a patch of: (B, C, ...) -> (B, N, C p) or (B, N, C p p)."""
    x = (x - f_t.mean) / f_t.std
    if x.ndim == 3:
        x = F.pad(x, (0, -x.shape[-1] % f_t.patch))
        return x.unflatten(2, (-1, f_t.patch)).transpose(1, 2).flatten(2)
    x = F.interpolate(x, f_t.size, mode="bilinear", antialias=True)
    return F.unfold(x, f_t.conv.kernel_size, stride=f_t.conv.stride).transpose(1, 2)


def embeddings(f_t: nn.Module, x: Tensor) -> Tensor:
    """Embedded patches without their position, and a one: (B, N, D + 1)."""
    z = f_t(x) if f_t.position is None else f_t(x) - f_t.position
    return torch.cat([z, torch.ones_like(z[..., :1])], dim=-1)


@torch.no_grad()
def lost(f_t: nn.Module, train: Tensor, held_out: Tensor) -> float:
    """Share of the variance of patches that no linear map reads from their embeddings."""
    z, p = embeddings(f_t, train).flatten(0, 1).double(), patches(f_t, train).flatten(0, 1)
    square = z.T @ z
    ridge = 1e-6 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    W = torch.linalg.solve(square + ridge, z.T @ p.double())
    z, p = embeddings(f_t, held_out).flatten(0, 1).double(), patches(f_t, held_out).flatten(0, 1)
    return float((z @ W - p).square().sum() / (p - p.mean(dim=0)).square().sum())


@torch.no_grad()
def gain(f_t: nn.Module, x: Tensor) -> float:
    """|W x| / |b|, of all patches together."""
    product = patches(f_t, x) @ f_t.conv.weight.flatten(1).T
    return float(product.norm() / f_t.conv.bias.expand_as(product).norm())


@torch.no_grad()
def doubled(f_t: nn.Module, x: Tensor) -> float:
    """How far embedded patches move when x, standardised, doubles, over their spread."""
    z, moved = (embeddings(f_t, x_) for x_ in (x, 2 * x - f_t.mean))
    return float((moved - z).norm() / (z - z.mean(dim=(0, 1))).norm())


def measure(name: str, seed: int, align_lr: float) -> dict:
    """A row: a task and a seed, with the setting that ORCA (otdd) has in results/all_tasks.py."""
    setting = f"--task {name} --train-size {all_tasks.SIZE[name]} --seed {seed}"
    cfg = orca.parse_args(f"{setting} --align-lr {align_lr} {all_tasks.ALIGN} otdd".split())
    cfg, task, net, tokenize, model, _ = orca.build(cfg)
    source, device = orca.load_source(cfg.source, cfg, tokenize), torch.device("cpu")
    z_s = orca.source_features(orca.source_embedder(net), source, device, cfg.align_features)
    train, held_out = (
        torch.stack([split[i][0] for i in range(min(SAMPLES, len(split)))])
        for split in (task.train, task.val)
    )

    def state(when: str) -> dict[str, float]:
        found = {"lost": lost(model.f_t, train, held_out), "gain": gain(model.f_t, held_out)}
        found["doubled"] = doubled(model.f_t, held_out)
        return {f"{name}_{when}": round(value, 6) for name, value in found.items()}

    found = {"task": name, "seed": seed, "align": cfg.align, "align_lr": cfg.align_lr}
    found |= state("before")
    with contextlib.redirect_stdout(None):
        orca.align(model, z_s, source.y, task, cfg, run.Record(None))
    found |= state("after") | {"torch": torch.__version__}
    command = f"python results/lost.py --tasks {name} --seeds {seed} --align-lr {align_lr}"
    return {**found, "command": command}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=tasks.NAMES)
    parser.add_argument("--align-lr", type=float, default=0.0, help="0: that of the task")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    rows = collect.read(args.csv) if args.csv else []
    done = {(row["task"], int(row["seed"]), float(row["align_lr"])) for row in rows}
    for seed in args.seeds:
        for name in args.tasks:
            align_lr = args.align_lr or orca.ALIGN_LR[2 if name in papers.SERIES else 3]
            if (name, seed, align_lr) not in done:
                rows.append(measure(name, seed, align_lr))
                print(*rows[-1].values(), flush=True)
                if args.csv:
                    collect.write(args.csv, rows)


if __name__ == "__main__":
    main()

"""How long patch replacement takes, and a whole step of PaRe: python results/bench_pare.py

Forward and backward, in one run on one machine:
    floor      cloning the target's and the source's patches
    ours       pare.replace_patches, the gate included, --select top and gumbel
    loop       the release's second phase: sample by sample, in place (and the wrong patches)
    release    the release's first phase: relaxed sampling without replacement (Xie and Ermon 2019),
               a softmax over all patches for each of the N patches that are kept or taken
and, per step of whole models on two tasks: plain fine-tuning, PaRe with one pass of the body for
[target; mixture] as in pare.py, and with two. The published loops are written anew from their
description, for this comparison alone. --csv FILE writes the rows.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pare  # noqa: E402 (the repository's root has to be on the path first)
import tasks  # noqa: E402

TAU = 0.9  # of the release's relaxation


def seconds(work: Callable[[], None], repeats: int) -> float:
    """The best of some repeats, after one that is not counted (unless there is only one)."""
    if repeats > 1:
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def relaxed_top_k(s: Tensor, k: int) -> Tensor:
    """A 0/1 mask of k sampled patches with the gradient of a sum of k soft one-hots, (B, N)."""
    s = s - torch.log(-torch.log(torch.rand_like(s).clamp(1e-7, 1 - 1e-7)))
    soft, one = torch.zeros_like(s), torch.zeros_like(s)
    for _ in range(k):
        s = s + torch.log((1 - one).clamp(min=1e-20))
        one = torch.softmax(s / TAU, dim=1)
        soft = soft + one
    hard = torch.zeros_like(soft).scatter(1, soft.topk(k, dim=1).indices, 1.0)
    return hard - soft.detach() + soft


def released_sampling(z_t: Tensor, z_s: Tensor, s_t: Tensor, s_s: Tensor, k: int) -> Tensor:
    """First phase: keep N - k sampled target patches, fill up with k sampled source patches."""
    keep, take = relaxed_top_k(s_t, z_t.shape[1] - k), relaxed_top_k(s_s, k)
    kept, taken = z_t * keep.unsqueeze(2), z_s * take.unsqueeze(2)
    rows = []
    for b in range(len(z_t)):
        row = kept[b].clone()
        row[keep[b] < 0.5] = taken[b][take[b] > 0.5]
        rows.append(row)
    return torch.stack(rows)


def released_loop(z_t: Tensor, z_s: Tensor, s_t: Tensor, s_s: Tensor, k: int) -> Tensor:
    """Second phase: the k highest target patches are overwritten, sample by sample."""
    z_mix = z_t.clone()
    for b in range(len(z_t)):
        best = s_s[b].topk(k).indices
        z_mix[b, s_t[b].argsort()[-k:]] = z_s[b, best]
    return z_mix


def cloned(z_t: Tensor, z_s: Tensor, s_t: Tensor, s_s: Tensor, k: int) -> Tensor:
    return z_t.clone() + 0 * z_s.clone().sum()


def of_selection(B: int, N: int, D: int, k: int, device: str, slow: bool) -> dict[str, float]:
    """Seconds for gate, selection and replacement, forward and backward."""
    torch.manual_seed(0)
    z_t, z_s = (torch.randn(B, N, D, device=device) for _ in range(2))
    z_t.requires_grad_()  # f^s is frozen: no gradient passes to z_s
    gate, weight = pare.Gate(D).to(device), torch.randn(B, N, D, device=device)

    def step(mix: Callable, *extra) -> Callable[[], None]:
        def work() -> None:
            z_mix = mix(z_t, z_s, gate(z_t), gate(z_s), k, *extra)
            z_mix.backward(weight)
            z_t.grad = None

        return work

    found = {
        "floor": seconds(lambda: (z_t.detach().clone(), z_s.detach().clone()), 7),
        "ours": seconds(step(pare.replace_patches), 7),
        "ours, gumbel": seconds(step(pare.replace_patches, "gumbel"), 7),
        "loop": seconds(step(released_loop), 3),
    }
    if slow:
        found["release"] = seconds(step(released_sampling), 1)
    return found


def of_steps(name: str, device: str, batch: int = 32) -> dict[str, float]:
    """Seconds for a step of a whole model: plain, and PaRe with one and with two passes of g."""
    cfg = pare.configure(task=name, train_size=2 * batch, device=device, source_size=200)
    cfg, task, net, tokenize, model, _ = pare.build(cfg)
    cfg = pare.replace(cfg, k0=pare.first_k(cfg, model.g.maps[0][0][0]))
    source = pare.load_source(cfg, tokenize, masks=len(task.out_shape) == 3)
    mixer = pare.Mixer(pare.source_embedder(net), source, model.g.maps, 0).to(device)
    x = torch.stack([task.train[i][0] for i in range(batch)]).to(device)
    y = torch.stack([torch.as_tensor(task.train[i][1]) for i in range(batch)]).to(device)

    def two_passes() -> Tensor:
        rows = torch.randint(len(source.y), (batch,))
        z_t, z_s = model.f_t(x), mixer.f_s(source.x[rows].to(device))
        z_mix = pare.replace_patches(z_t, z_s, mixer.gate(z_t), mixer.gate(z_s), cfg.k0)
        mixed, y_s = model.g(z_mix), source.y[rows].to(device)
        mix = task.loss(model.h_t(mixed), y) + source.loss(mixer.h_s(mixed), y_s)
        return task.loss(model.h_t(model.g(z_t)), y) + 0.15 * mix

    losses = {
        "plain": lambda: mixer.loss(model, task, x, y, 0, cfg),
        "pare": lambda: mixer.loss(model, task, x, y, cfg.k0, cfg),
        "pare, two passes": two_passes,
    }
    return {name: seconds(lambda f=f: f().backward(), 7) for name, f in losses.items()}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 3136, 128, 2000), help="B N D k")
    parser.add_argument("--fast", action="store_true", help="without the release's first phase")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    B, N, D, k = args.shape
    rows = []
    found = of_selection(B, N, D, k, args.device, slow=not args.fast)
    for name, time_s in found.items():
        ratio = time_s / found["ours"]
        rows.append({"case": f"({B}, {N}, {D}), k = {k}", "what": name, "time_s": time_s})
        print(f"{rows[-1]['case']}  {name:18} {time_s:10.4f} s  {ratio:8.2f} of ours")
    for task in ("satellite", "ninapro"):
        assert task in tasks.NAMES
        found = of_steps(task, args.device)
        for name, time_s in found.items():
            rows.append({"case": f"step of {task}", "what": name, "time_s": time_s})
            ratio = time_s / found["plain"]
            print(f"{rows[-1]['case']:26}  {name:18} {time_s:10.4f} s  {ratio:8.2f} of plain")
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            extra = {"device": args.device, "threads": args.threads, "torch": torch.__version__}
            writer = csv.DictWriter(file, [*rows[0], *extra], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**r, "time_s": f"{r['time_s']:.5f}", **extra} for r in rows)
    return rows


if __name__ == "__main__":
    main()

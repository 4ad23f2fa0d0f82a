"""What else one would take for a task, in the time that naive fine-tuning (NFT) needs for it.

    python results/peers.py                                  all tasks that have rows of NFT
    python results/peers.py --tasks advection --seeds 0 1    FNO and U-Net on a PDE

The same data, loss, metric and batch size as the method scripts, one thread. A class or label for a
sample: a plain convolutional network, and Perceiver IO (transformers). A field: FNO
(neuraloperator, pip install neuraloperator) and a plain U-Net. Each of the RATES is a run of its
own with AdamW, whose rate rises for a tenth of the time and then falls to 0; the table shows the
one with the least validation error. Weights are those of the last step. Every run is a row of
results/peers.csv; rows that are there are not made again.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
import collect  # noqa: E402 (results/ has to be on the path first)

import run  # noqa: E402
import tasks  # noqa: E402

RATES = (1e-3, 3e-3)
WIDTH = 32  # channels of the convolutional networks' first layer, and half of FNO's

# ---- The networks: from x (B, C, L) or (B, C, H, W), standardised, to out_shape ------------------


def convolution(axes: int, c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d)[axes - 1](c_in, c_out, 3, stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(8, c_out), nn.ReLU())


class ConvNet(nn.Module):
    """Four pairs of convolutions, each at half the resolution of the one before, and a mean."""

    def __init__(self, x_shape: tuple, out_shape: tuple):
        super().__init__()
        axes, widths = len(x_shape) - 1, [WIDTH * 2**i for i in range(4)]
        pairs = zip([x_shape[0], *widths], widths, strict=False)
        layers = [(convolution(axes, a, b), convolution(axes, b, b, stride=2)) for a, b in pairs]
        self.layers = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.linear = nn.Linear(widths[-1], out_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(x).flatten(2).mean(2))


class UNet(nn.Module):
    """Convolutions at three halvings of the resolution, and back, beside what was there before."""

    def __init__(self, x_shape: tuple, out_shape: tuple):
        super().__init__()
        self.axes, widths = len(x_shape) - 1, [WIDTH * 2**i for i in range(4)]
        self.size = out_shape[1:]

        def pair(a, b):
            return nn.Sequential(convolution(self.axes, a, b), convolution(self.axes, b, b))

        self.down = nn.ModuleList(map(pair, [x_shape[0], *widths], widths))
        self.up = nn.ModuleList(map(pair, [3 * width for width in widths[:-1]], widths))
        self.last = (nn.Conv1d, nn.Conv2d)[self.axes - 1](WIDTH, out_shape[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        pool = (F.avg_pool1d, F.avg_pool2d)[self.axes - 1]
        seen = []
        for i, layer in enumerate(self.down):
            x = layer(pool(x, 2, ceil_mode=True) if i else x)
            seen.append(x)
        for layer, before in reversed(list(zip(self.up, seen[:-1], strict=True))):
            x = layer(torch.cat([before, F.interpolate(x, before.shape[2:])], dim=1))
        return fitted(self.last(x), self.size)


class FNO(nn.Module):
    """The Fourier neural operator of neuraloperator: 4 layers, 16 frequencies along each axis."""

    def __init__(self, x_shape: tuple, out_shape: tuple):
        super().__init__()
        from neuralop.models import FNO as Operator

        modes, self.size = tuple(min(16, n // 2) for n in x_shape[1:]), out_shape[1:]
        self.operator = Operator(modes, x_shape[0], out_shape[0], hidden_channels=2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return fitted(self.operator(x), self.size)


class Perceiver(nn.Module):
    """Perceiver IO of transformers on single points, with learnt positions; one query a sample."""

    def __init__(self, x_shape: tuple, out_shape: tuple):
        super().__init__()
        from transformers import PerceiverConfig, PerceiverModel

        D, points = 2 * WIDTH, math.prod(x_shape[1:])
        shape = {"d_model": D, "d_latents": 2 * D, "num_latents": 32, "num_blocks": 1}
        shape |= {"num_self_attends_per_block": 4, "num_self_attention_heads": 4}
        shape |= {"num_cross_attention_heads": 1, "attention_probs_dropout_prob": 0.0}
        self.embed = nn.Linear(x_shape[0], D)
        self.position = nn.Parameter(0.02 * torch.randn(points, D))
        self.body = PerceiverModel(PerceiverConfig(**shape))
        self.linear = nn.Linear(2 * D, out_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x.flatten(2).mT) + self.position  # (B, C, L) -> (B, L, D)
        return self.linear(self.body(inputs=z).last_hidden_state.mean(1))


def fitted(out: Tensor, size: tuple) -> Tensor:
    """A field on as many points as the target has."""
    if out.shape[2:] == size:
        return out
    return F.interpolate(out, size, mode="linear" if len(size) == 1 else "bilinear")


# ---- Training ------------------------------------------------------------------------------------


class Standardised(nn.Module):
    """A network between the standardisation of x and that of y, both by the training set."""

    def __init__(self, network: nn.Module, statistics: tuple):
        super().__init__()
        self.network = network
        self.x_mean, self.x_std, self.y_mean, self.y_std = statistics

    def forward(self, x: Tensor) -> Tensor:
        return self.y_mean + self.y_std * self.network((x - self.x_mean) / self.x_std)


def train(model: nn.Module, task: tasks.Task, rate: float, seconds: float, batch: int) -> int:
    """AdamW for so many seconds of the processor, a tenth of them to rise to the rate.

    Returns: the number of steps taken.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    start, steps = time.process_time(), 0
    loader = torch.utils.data.DataLoader(task.train, batch, shuffle=True)
    while True:
        for x, y in loader:
            done = (time.process_time() - start) / seconds
            if done >= 1:
                return steps
            optimizer.param_groups[0]["lr"] = rate * min(done / 0.1 + 1e-3, (1 - done) / 0.9)
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1


@torch.no_grad()
def error(model: nn.Module, task: tasks.Task, split: str) -> float | None:
    model.eval()
    made = [(model(x), y) for x, y in run.split(getattr(task, split))]
    return run.error_of(task, split, *map(list, zip(*made, strict=True)))


def row(name: str, name_of_task: str, seed: int, rate: float, seconds: float, line: str) -> dict:
    torch.manual_seed(seed)
    task = tasks.load_task(name_of_task, seed=seed)
    model = Standardised(PEERS[name](task.x_shape, task.out_shape), tasks.statistics(task))
    steps = train(model, task, rate, seconds, 8 if len(task.out_shape) > 1 else 32)
    made = {"method": name, "task": name_of_task, "seed": seed, "metric": task.metric_name}
    made |= {key: round(error(model, task, key[:-6]), 6) for key in ("val_error", "test_error")}
    made |= {"steps": steps, "train_size": len(task.train), "time_s": round(seconds, 1)}
    made |= {"device": collect.hardware("cpu"), "torch": torch.__version__}
    return made | {"commit": collect.commit(), "command": line}


PEERS = {"convolutions": ConvNet, "Perceiver IO": Perceiver, "FNO": FNO, "U-Net": UNet}


def command(task: str, seed: int, rate: float, seconds: float | None) -> str:
    time = f" --seconds {seconds:g}" if seconds else ""
    return f"python results/peers.py --tasks {task} --seeds {seed}{time} --rates {rate:g}"


def times() -> dict[str, float]:
    """Seconds that NFT takes for a task on this hardware: {task: seconds}, of any seed."""
    found = {}
    for line in collect.read(RESULTS / "all_tasks.csv"):
        here = line["device"] == collect.hardware("cpu") and line["time_s"]
        if here and line["method"] == "NFT" and "--train-size" not in line["command"]:
            found[line["task"]] = float(line["time_s"])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tasks", nargs="+", choices=tasks.NAMES, help="default: all with a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seconds", type=float, help="time of a run; default: NFT's")
    parser.add_argument("--csv", type=Path, default=RESULTS / "peers.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = times()
    done = {(row["method"], row["command"]) for row in collect.read(args.csv)}
    for name in args.tasks or known:
        if not args.seconds and name not in known:
            parser.error(f"no row of NFT on {name} has a time on this hardware; give --seconds")
        field = name in (*tasks.PDES, "darcy", "psicov", "cosmic")
        for peer in ("FNO", "U-Net") if field else ("convolutions", "Perceiver IO"):
            for seed in args.seeds:
                for rate in args.rates:
                    line = command(name, seed, rate, args.seconds)
                    if (peer, line) not in done:
                        made = row(peer, name, seed, rate, args.seconds or known[name], line)
                        collect.append(args.csv, [made])
                        print(peer, name, seed, rate, made["test_error"], flush=True)


if __name__ == "__main__":
    main()

"""What every run needs and no slide is about: settings, command line, device, batches, results.

The methods stand in orca.py, pare.py and proposed.py, each with its training loop and evaluation;
they reach everything else through this file. It knows no method, and of a model only its body g.
The folder of a run, its checkpoints and its processes are in record.py.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, default_collate

import bodies
import tasks
from record import (  # noqa: F401 (the scripts take some of these from here)
    Process,
    Record,
    Stopped,
    draw_curves,
    load_weights,
    number,
    open_run,
    rank,
    share,
    signals,
    sum_gradients,
    summed,
    synchronise,
    whole,
    world,
    write_atomically,
)
from tasks import baselines, own

SWITCH = ("auto", "on", "off")
FEWEST = 15  # epochs of large data sets, for which --steps are not enough
MOST = 1e38  # the largest value of a float setting; whole numbers end at 2^31


# ---- 1. Settings ---------------------------------------------------------------------------------


def opt(default, text: str, choices: tuple = (), low: float | None = None, high: float = MOST):
    """A field of a Config: its default, what it means, and the values it can take."""
    limits = {"choices": choices, "low": low, "high": high}
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Settings:
    """The settings that all methods share, in the groups of --help."""

    # data and parts (slides 6 to 8)
    task: str = opt("satellite", "one of the tasks of tasks/README.md, or your own FILE.npz")
    data: str = opt("simulated", "origin of the task's data", ("simulated", "real"))
    data_dir: str = opt("data", "directory of the real data")
    kind: str = opt("", "meaning of y in FILE.npz, in place of what its type says", own.KINDS)
    published: bool = opt(False, "the papers' grid, times and inputs of a PDE task")
    augment: bool = opt(False, "random crops and mirror images of training images with classes")
    train_size: int = opt(0, "number of training samples; 0: all that the task has", low=0)
    paper: bool = opt(False, "the papers' setting: real data, large bodies, published values")
    body: str = opt("", "folder or hub name of g, or random:NAME; default: the tiny body")
    source: str = opt(
        "", "source data set, of orca.py and pare.py; default: the task's own choice", tasks.SOURCES
    )
    source_size: int = opt(2000, "number of source samples", low=2)
    patches: int = opt(0, "largest number of patches N; 0: 32 for series, 256 for images", low=0)
    embedder_init: str = opt("body", "starting point of f^t", ("body", "random"))
    # training (slide 6)
    epochs: int = opt(-1, "epochs of fine-tuning; -1: as many as --steps needs", low=-1)
    steps: int = opt(0, "fewest optimiser steps, in whole epochs; 0: 1500, fields 3000", low=0)
    batch_size: int = opt(0, "global batch size, over all processes; 0: 32, or 8 for fields", low=0)
    accumulate: int = opt(1, "gradient accumulation steps of a batch, which save memory", low=1)
    optimizer: str = opt("adamw", "optimiser of all stages", ("adamw", "adam", "sgd"))
    lr: float = opt(2e-3, "peak learning rate of the new parts, f^t and h^t", low=0)
    body_lr: float = opt(0.0, "peak learning rate of g; 0: 0.3 --lr, or --lr if untrained", low=0)
    weight_decay: float = opt(0.01, "weight decay", low=0)
    momentum: float = opt(0.9, "momentum of SGD", low=0)
    beta2: float = opt(0.999, "second beta of AdamW and Adam", low=0, high=1)
    warmup: float = opt(0.1, "share of the schedule in which the rate rises", low=0, high=1)
    schedule_epochs: int = opt(0, "epochs until the rate reaches 0; 0: --epochs", low=0)
    clip: float = opt(1.0, "value at which the gradient norm is clipped; 0: never", low=0)
    # machine and run
    device: str = opt("", "cpu, cuda, cuda:1 or mps; default: cuda if there is one, else cpu")
    precision: str = opt("fp32", "precision of the forward pass", ("fp32", "bf16", "fp16"))
    tf32: bool = opt(False, "TF32 products of fp32 matrices on the GPU")
    compile: bool = opt(False, "compilation of g: a slow first step, then faster ones")
    recompute: bool = opt(False, "recomputation of g's layers in the backward pass")
    workers: int = opt(0, "number of processes that load data", low=0)
    seed: int = opt(0, "seed of data, weights and batches", low=0)
    deterministic: bool = opt(False, "deterministic algorithms on a GPU, where torch has them")
    baselines: str = opt("auto", "simple learners beside the result; auto: if fast", SWITCH)
    out: str = opt("", "folder of the run; default: runs/METHOD-TASK-SEED")
    overwrite: bool = opt(False, "permission to replace a run in that folder")
    resume: bool = opt(False, "continuation of the run in that folder")
    save_every: int = opt(1, "epochs between two states to resume from", low=1)
    track: str = opt("", "tracker that receives the logged numbers", ("tensorboard", "wandb"))
    print_config: bool = opt(False, "all settings as JSON, and nothing else")
    predict: str = opt("", "X.npy: inputs to predict with the run of --run, into the file --out")
    run: str = opt("", "folder of the finished run for --predict")

    def __post_init__(self):
        for f in fields(self):
            check(f, getattr(self, f.name))


GROUPS = {"task": "data and parts", "epochs": "training", "device": "machine and run"}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check(f, value) -> None:
    """Raises: ValueError, naming the flag, if the field f cannot have this value."""
    choices, low, high = (f.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in (f.default, *choices):
        raise ValueError(f"{flag(f.name)} {value} is unknown; choose one of {', '.join(choices)}")
    high = 2**31 if isinstance(value, int) and high == MOST else high
    if low is not None and not low <= value <= high:
        wanted = f"at least {low}" + (f" and at most {high:g}" if value > high else "")
        raise ValueError(f"{flag(f.name)} {value} is out of range; give a number of {wanted}")


def configure(config: type, presets: dict, given: dict):
    """Defaults < the papers' values for the task, with paper=True < what is given."""
    task, preset = given.get("task", Settings.task), {}
    if given.get("paper"):
        if task not in presets:
            raise ValueError(f"--paper has no settings for '{task}'; it has {', '.join(presets)}")
        preset = presets[task]
    names = {f.name for f in fields(config)}
    return config(**{name: value for name, value in preset.items() if name in names} | given)


def parse(config: type, configure: Callable, doc: str, argv: list[str] | None):
    """The command line, with a flag for every field. Exits with 2 and one line if it is wrong."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    common = {f.name for f in fields(Settings)}
    group = parser.add_argument_group("method")
    for f in sorted(fields(config), key=lambda f: f.name in common):  # the method's own come first
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        text = f.metadata["help"].replace("%", "%%")  # argparse formats it
        if f.type is bool:
            group.add_argument(flag(f.name), action="store_true", help=text)
        else:
            text += f" (default: {f.default})" if f.default != "" else ""
            kind = {"type": f.type, "choices": f.metadata["choices"] or None}
            group.add_argument(flag(f.name), help=text, **kind)
    try:
        return configure(**vars(parser.parse_args(argv)))
    except ValueError as error:
        return parser.error(str(error))


def cli(method: str, parse_args: Callable, main: Callable, argv: list[str] | None = None) -> int:
    """main() for the shell: 0 done, 1 failed, 2 bad input, 3 diverged, 130 or 143 interrupted."""
    cfg = parse_args(argv)
    if cfg.print_config:
        print(json.dumps(asdict(cfg), indent=1))
        return 0
    for stream in (sys.stdout, sys.stderr):  # careful: a path can hold what they cannot encode
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals():
            main(cfg)
        return 0
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        code, reason = 2, error
    except FloatingPointError as error:
        code, reason = 3, f"diverged: {error}; try a lower --lr"
    except OSError as error:
        code, reason = 1, error
    except (KeyboardInterrupt, Stopped) as stop:
        code = 128 + getattr(stop, "signum", signal.SIGINT)
        reason = "interrupted; continue with --resume"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"{method}.py: error: {reason}", file=sys.stderr)
    return code


# ---- 2. Device and batches -----------------------------------------------------------------------


def start(cfg) -> torch.device:
    """The device asked for, seeded; joins the other processes if torchrun has started several.

    Raises: ValueError if the device is not available. Another one is never taken instead.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and processes > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("nothing can be computed there")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name} is not available ({reason}); try --device cpu") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    torch.manual_seed(cfg.seed)
    Process.device = device
    return device


def load_parts(cfg) -> tuple:
    """The settings without gaps, the task, the pretrained body, and its tokenizer or None."""
    start(cfg)
    task = load_task(cfg)
    axes = len(task.x_shape)
    cfg = resolve(cfg, task, bodies.TINY[axes], bodies.PATCHES[axes])
    drop_path = 0.1 if cfg.paper else 0.0  # of images, as published
    net, tokenize = bodies.load_body(cfg.body, task.x_shape, cfg.patches, drop_path)
    return cfg, task, net, tokenize


def load_task(cfg) -> tasks.Task:
    """The task that the settings ask for."""
    size, which = cfg.train_size or None, (cfg.task, cfg.data, cfg.data_dir, cfg.seed)
    return tasks.load_task(*which, size, cfg.published, cfg.kind, cfg.augment)


def load_source(cfg, tokenize: Callable | None, length: int, size: int, masks=False):
    """The source: windows of a text, of `length` tokens, or images of `size` pixels a side."""
    which = (cfg.source, cfg.source_size, cfg.seed, cfg.data_dir)
    return tasks.load_source(*which, tokenize=tokenize, length=length, size=size, masks=masks)


def resolve(cfg, task: tasks.Task, body: str, patches: int):
    """The settings without gaps: what suits the task, wherever nothing was asked for."""
    field = len(task.out_shape) > 1
    given = {"body": body, "source": task.sources["embedded"], "patches": patches}
    given |= {"steps": 3000 if field else 1500, "batch_size": 8 if field else 32}
    given |= {name: value for name, value in task.settings.items() if hasattr(cfg, name)}
    cfg = replace(cfg, **{name: getattr(cfg, name) or value for name, value in given.items()})
    cfg = replace(cfg, body_lr=cfg.body_lr or cfg.lr * (1 if "random:" in cfg.body else 0.3))
    if cfg.epochs < 0:
        epoch = math.ceil(len(task.train) / cfg.batch_size)  # steps
        cfg = replace(cfg, epochs=max(FEWEST, math.ceil(cfg.steps / epoch)))
    return cfg


def on_device(model: nn.Module, cfg) -> nn.Module:
    """The model on the device of this process, its g as --recompute and --compile say."""
    model.g.recompute = cfg.recompute
    if cfg.compile:
        model.g.compile()
    return model.to(Process.device)


def autocast(device: torch.device, precision: str):
    """The forward pass in fp32, or in bf16 or fp16 where torch considers it safe."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, kind, enabled=precision != "fp32")


class _Shares(BatchSampler):
    """Of every batch, the rows of this process."""

    def __iter__(self):
        return (share(rows) for rows in super().__iter__())


def _collate(rows: list):
    return default_collate(rows) if rows else None


def batches(dataset, cfg, seed: int) -> DataLoader:
    """The training set in a random order, which the seed fixes for all epochs of a run."""
    rng = torch.Generator().manual_seed(seed)
    order = _Shares(RandomSampler(dataset, generator=rng), cfg.batch_size, drop_last=False)
    how = {"num_workers": cfg.workers, "pin_memory": Process.device.type == "cuda"}
    return DataLoader(dataset, batch_sampler=order, generator=rng, collate_fn=_collate, **how)


def moved(v: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU on the device of this process; nobody waits for the copy to end."""
    pinned = v.pin_memory() if Process.device.type == "cuda" else v
    return pinned.to(Process.device, non_blocking=True)


def parts(batch, pieces: int, weigh: Callable) -> Iterator[tuple]:
    """The parts of this process' share of a batch: x and y on the device, weight, portion.

    The weights of all parts of all processes add up to 1, in proportion to weigh(y), so that the
    sum of weight * (loss of the part) is the loss of the batch. The portions do so in proportion
    to the number of samples. batch: (x, y) on the CPU; None if this process has no row of it.
    """
    x, y = batch if batch is not None else (torch.empty(0), torch.empty(0))
    total = weigh(y) if len(x) else 0.0, len(x)
    if world() > 1:
        total = summed(torch.tensor(total, dtype=torch.float32)).tolist()
    if len(x):
        for x_part, y_part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            weight, portion = weigh(y_part) / max(total[0], 1.0), len(x_part) / total[1]
            x_part, y_part = (v.to(Process.device, non_blocking=True) for v in (x_part, y_part))
            yield x_part, y_part, weight, portion


def split(dataset) -> DataLoader:
    """This process' share of a data set, in order, for evaluation; large samples a few at once."""
    size = max(1, min(256, 2**26 // dataset[0][0].numel()))
    if world() > 1:
        dataset = Subset(dataset, share(range(len(dataset))))
    return DataLoader(dataset, size)


def error_of(task, split: str, out: list, y: list) -> float | None:
    """The task's error on all predictions for a split, from those that each process made.

    None if the metric is not defined for the test data, which training cannot know.
    """
    dataset = getattr(task, split)
    out, y = (whole(part, len(dataset)) for part in (out, y))
    try:
        return task.metric(*tasks.pooled(dataset, out, y))
    except ValueError as undefined:
        if split != "test":
            raise
        print(f"note: the test data have no {task.metric_name}: {undefined}")
        return None


# ---- 3. Optimiser and schedule -------------------------------------------------------------------


def optimizer_of(groups: list[dict], cfg, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD, as --optimizer says, for groups of parameters, {"params": [...]}."""
    how = {"lr": lr, "weight_decay": weight_decay}
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=cfg.momentum, **how)
    kind = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, betas=(0.9, cfg.beta2), **how)


def schedule_of(optimizer: torch.optim.Optimizer, cfg, epoch_steps: int):
    """The learning rates rise linearly for the share --warmup of all steps, then fall to 0."""
    steps = max(1, (cfg.schedule_epochs or cfg.epochs) * epoch_steps)
    rise = max(1, round(cfg.warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / rise, max(0, steps - step) / max(1, steps - rise))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ---- 4. Around a run -----------------------------------------------------------------------------


def describe(cfg, method: str, task, model: nn.Module, out: Path, shape: dict, source: str) -> None:
    """Print the header; write config.json: settings, what load() needs, versions, command."""
    if rank() > 0:
        return
    sizes = "/".join(str(len(part)) for part in (task.train, task.val, task.test))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    tf32 = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    processes = f" processes={world()}" if world() > 1 else ""
    print(
        f"{method} | task={cfg.task} data={task.data} {tasks.describe(task)} "
        f"train/val/test={sizes} body={cfg.body} source={source} device={Process.device}"
        f"{processes} precision={cfg.precision} tf32={tf32} seed={cfg.seed} "
        f"torch={torch.__version__} params={count:.2f}M out={out}",
        *(f"note: {notice}" for notice in task.notices),
        sep="\n",
        flush=True,
    )
    used = [name for name in ("torch", "transformers", "timm", "numpy") if name in sys.modules]
    versions = {"python": sys.version.split()[0]}
    versions |= {name: sys.modules[name].__version__ for name in used}
    content = {"config": asdict(cfg), "model": shape, "kind": task.kind, "encoding": task.encoding}
    content |= {"versions": versions, "command": sys.argv}
    write_atomically(out / "config.json", (json.dumps(content, indent=1) + "\n").encode())


def finish(
    cfg, method: str, task, model: nn.Module, record: Record, errors: dict, source: str
) -> dict:
    """Write and print the result, and draw the curves.

    errors: "test_error", None where the metric is not defined, "val_error", and what else there is.
    """
    result = {"method": method, "task": cfg.task, "data": task.data, "body": cfg.body}
    result |= {"source": source, "seed": cfg.seed, "metric": task.metric_name}
    known = {k: v is not None and math.isfinite(v) for k, v in errors.items()}
    result |= {k: round(v, 6) if known[k] else None for k, v in errors.items()}
    result |= {"epochs": cfg.epochs, "train_size": len(task.train)}
    result |= {"spikes": record.spikes(), "time_s": round(time.time() - record.start, 1)}
    result |= {"params_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 3)}
    result |= {"device": str(Process.device), "precision": cfg.precision}
    result |= {"converged": record.converged()}
    if cfg.baselines == "on" or (cfg.baselines == "auto" and baselines.cheap(task)):
        simple = baselines.simple_learners(task, cfg.seed)
        result["baselines"] = {name: round(error, 6) for name, error in simple.items()}
        if rank() == 0:
            print(*baselines.compared(simple, result["test_error"]), sep="\n")
    if rank() == 0:
        title = f"{method}: {task.title} ({task.data})"
        draw_curves(record, title, task.metric_name, errors["test_error"])
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(record.out / "result.json", text.encode())
        print("result", json.dumps(result), flush=True)
    return result


def load_model(folder: str | Path, make: Callable) -> nn.Module:
    """The model of a finished run, in evaluation mode: a batch of x to predictions.

    make: a Model, from a body and what describe() has written of its shape.
    Raises: FileNotFoundError if the folder holds no run, ValueError if it is of another script.
    """
    saved = own.read_run(Path(folder))["model"]
    try:
        model = make(bodies.rebuild(saved.pop("body")), **saved)
    except TypeError:  # its Model has other arguments
        raise ValueError(
            f"{folder} is a run of another script; use the script that made it"
        ) from None
    load_weights(model, Path(folder) / "model.safetensors")
    return model.eval()


def predict(cfg, load: Callable) -> np.ndarray:
    """--predict X.npy --run DIR --out Y.npy: what a finished run predicts for new inputs.

    Writes what own.predictions() returns. Raises: ValueError if X does not fit the run's data.
    """
    if not (cfg.run and cfg.out):
        raise ValueError("--predict X.npy needs --run DIR, a finished run, and --out Y.npy")
    saved, out = own.read_run(Path(cfg.run)), own.output(cfg.out)
    x = own.read_inputs(cfg.predict, tuple(saved["model"]["x_shape"]), saved["encoding"])
    device = start(cfg)
    model = load(cfg.run).to(device)
    found = own.predictions(model, cfg.predict, x, saved["kind"], saved["encoding"])
    np.save(out, found)
    print(f"{len(found)} predictions, shape {found.shape}, in {out}")
    return found

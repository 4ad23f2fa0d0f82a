"""What every run needs and no slide is about: flags, device, processes, checkpoints, logs, curves.

The methods stand in orca.py, pare.py and proposed.py, with their training loops and evaluation;
this file is the machine room under all of them. It knows no method, task or model.

A run that is killed goes on with --resume to the very same weights and numbers (CPU, the same
number of processes): last.pt holds model, optimiser, schedule, place in the epoch, best error, all
random states and where the logs stood. It is one file with a checksum, replaced in one step, and
nothing in it is executed.

Several processes (torchrun --nproc-per-node N orca.py ...): every process takes each N-th row of a
batch, and gradients are added up. That is the gradient of the whole batch, uneven last batches
included, whichever parameters a stage trains or a step leaves out.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, default_collate
from tqdm import tqdm

MOST = 1e38  # a large float32; whole numbers end before
LIMITS = ("low", "high", "choices")
FREE = {"resume", "overwrite", "out", "device", "workers", "track", "data_dir"}  # may change


# ---- 1. Flags ------------------------------------------------------------------------------------


def opt(default, text: str, choices: tuple = (), low: float | None = None, high=MOST):
    """A field of Config: its default, what it means, the values it can take."""
    limits = {"low": low, "high": high}
    return field(default=default, metadata={"help": text, "choices": choices, **limits})


@dataclass(frozen=True)
class Settings:
    """What every run can be told beside its method: where to run, how, and where to write."""

    device: str = opt("", "cpu, cuda, cuda:1, mps; default: cuda where there is one, else cpu")
    precision: str = opt("fp32", "of the forward pass in training", ("fp32", "bf16", "fp16"))
    tf32: bool = opt(False, "let the GPU multiply fp32 matrices in TF32")
    compile: bool = opt(False, "compile g: minutes at first, then faster steps")
    recompute: bool = opt(False, "compute g's layers again in the backward pass, to save memory")
    workers: int = opt(0, "processes that load data", low=0)
    seed: int = opt(0, "of data, weights and batches", low=0)
    deterministic: bool = opt(False, "on a GPU: the same numbers again, where torch can")
    out: str = opt("", "directory to write; default: runs/METHOD-TASK-SEED")
    overwrite: bool = opt(False, "write there even if it holds a run")
    resume: bool = opt(False, "go on with the run there, from where it was broken")
    track: str = opt("", "hand the numbers on, too", ("tensorboard", "wandb"))
    print_config: bool = opt(False, "only print all settings, as JSON")
    predict: str = opt("", "X.npy: only predict, with the run of --run, into the file --out")
    run: str = opt("", "directory of the finished run for --predict")

    def __post_init__(self):
        check(self)


def check(cfg) -> None:
    """Raises: ValueError, naming the flag, if a field has a value that it cannot take."""
    for f in fields(cfg):
        value, low, high, choices = (getattr(cfg, f.name), *map(f.metadata.get, LIMITS))
        flag = "--" + f.name.replace("_", "-")
        if choices and value not in (f.default, *choices):
            raise ValueError(f"{flag} {value} is unknown; choose one of {', '.join(choices)}")
        high = 2**31 if isinstance(value, int) and high == MOST else high
        if low is not None and not low <= value <= high:
            most = f" and at most {high}" if value > high else ""
            raise ValueError(
                f"{flag} {value} is out of range; give a number of at least {low}{most}"
            )


def parse(config: type, configure: Callable, doc: str, argv: list[str] | None):
    """The command line: a flag for every field of config. Exits with 2 and a line if it is bad."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    for f in fields(config):
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"].replace("%", "%%")  # argparse formats it
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            text += f" (default: {f.default})" if f.default != "" else ""
            choices = f.metadata["choices"] or None
            parser.add_argument(flag, type=f.type, choices=choices, help=text)
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
        reason = "interrupted; --resume goes on from here"
    finally:
        leave()
    print(f"{method}.py: error: {reason}", file=sys.stderr)
    return code


# ---- 2. Signals ----------------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised where nothing is half done."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class _Flag:
    signum = 0  # the signal that came, while training
    training = False  # then the loop looks at it after each step, and saves first


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the run after the step, when it is saved; a second one at once."""

    def handle(signum, frame):
        if not _Flag.training or _Flag.signum:
            raise Stopped(signum)
        _Flag.signum = signum

    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _Flag.training, _Flag.signum = False, 0
        for signum, handler in old.items():
            signal.signal(signum, handler)


# ---- 3. Device and processes ---------------------------------------------------------------------


def start(cfg) -> torch.device:
    """The device asked for, seeded; joins the other processes where torchrun has started several.

    Raises: ValueError if the device is not there; never another one in silence.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    name = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and world > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError(f"{device.type} is no device to compute on")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"--device {name} is not to be had ({reason}); try --device cpu"
        ) from error
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    torch.manual_seed(cfg.seed)
    return device


def leave() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows):
    """This process' part of the rows of a batch or data set."""
    return rows[rank() :: world()]


def whole(part: Tensor, n: int) -> Tensor:
    """All n rows again, on the CPU, from every process' share()."""
    if world() == 1:
        return part
    parts = [None] * world()
    dist.all_gather_object(parts, part)
    out = torch.empty(n, *part.shape[1:], dtype=part.dtype)
    for i, rows in enumerate(parts):
        out[i :: world()] = rows
    return out


def summed(values: Tensor) -> Tensor:
    """values added up over all processes."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """The gradient of the whole batch, from those of every process' share of it."""
    if world() == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = summed(torch.cat([g.flatten() for g in grads]))
    for p, g in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        p.grad = g.view_as(p).clone()


def synchronise(model: nn.Module) -> None:
    """The weights of the first process for all, after a stage that each has done by itself."""
    if world() > 1:
        for w in model.state_dict().values():
            dist.broadcast(w, 0)


def autocast(device: torch.device, precision: str):
    """The forward pass in fp32, or in bf16 or fp16 where torch says that it is safe."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, kind, enabled=precision != "fp32")


# ---- 4. Batches ----------------------------------------------------------------------------------


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
    how = {"num_workers": cfg.workers, "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, batch_sampler=order, generator=rng, collate_fn=_collate, **how)


def parts(batch, number: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The parts (x, y, weight) in which a process takes its share of a batch through the model.

    The weights of all parts of all processes add up to 1, in proportion to their known targets, so
    that the sum of weight * (mean loss) is the mean loss of the batch. None if there is no share.
    """
    x, y = batch if batch is not None else (torch.empty(0), torch.empty(0))
    known = lambda y: y.isfinite().sum().double()  # noqa: E731
    total = summed(known(y).to(device if device.type == "cuda" else "cpu")).item()
    if len(x):
        for x_part, y_part in zip(x.chunk(number), y.chunk(number), strict=True):
            weight = known(y_part).item() / max(total, 1.0)
            x_part = x_part.to(device, non_blocking=True)
            yield x_part, y_part.to(device, non_blocking=True), weight


def split(dataset) -> DataLoader:
    """This process' share of a data set, in order, for evaluation, large samples a few at once."""
    size = max(1, min(256, 2**26 // dataset[0][0].numel()))
    if world() > 1:
        dataset = Subset(dataset, share(range(len(dataset))))
    return DataLoader(dataset, size)


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: a linear rise in the first share `warmup`, then a fall to 0."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def optimizer_of(parameters: list, cfg, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD, as --optimizer says."""
    how = {"lr": lr, "weight_decay": weight_decay}
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=cfg.momentum, **how)
    kind = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, betas=(0.9, cfg.beta2), **how)


def update(
    parameters: list, optimizer: torch.optim.Optimizer, schedule, scaler, loss: float, clip: float
) -> tuple[float, float]:
    """One step of the optimiser, on the gradients of all processes together.

    Returns: the loss of the whole batch, and the norm of its gradient before it was clipped.
    Raises: FloatingPointError if one of them is not finite, before any weight changes.
    """
    step, lr = schedule.last_epoch, schedule.get_last_lr()[0]
    loss = summed(torch.tensor(loss, device=parameters[0].device)).item()
    finite(loss, "loss", step, lr)
    sum_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip or math.inf))
    if not scaler.is_enabled():  # in fp16 it skips such a step, and scales less
        finite(norm, "gradient norm", step, lr)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    return loss, norm


def finite(value: float, what: str, step: int, lr: float) -> None:
    """Raises: FloatingPointError if the value is NaN or infinite: the run has diverged."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} is {value} at step {step}, learning rate {lr:g}")


# ---- 5. The record of a run ----------------------------------------------------------------------


class Record:
    """The directory of a run: its logs, the state to resume from, its best weights.

    A stage is a loop over `begin`, which says the epochs that are still to do; it registers what
    changes in it. Between `begin` and the end of the stage, everything is saved after each epoch,
    and after the step in which a signal came. out=None: a record of nothing.
    """

    def __init__(self, out: Path | None, cfg=None, method: str = "", start: float | None = None):
        self.out, self.rows, self.start = out, [], start or time.time()
        self.pending = ["step,lr,loss,grad_norm"]
        self.best, self.sums, self.stage = math.inf, {}, ""
        self.epochs, self.epoch, self.batch = 1, 0, 0  # of the stage: all, done; steps of this one
        self.parts, self.order, self.random, self.ended = {}, None, None, []
        self.tracker = _tracker(cfg.track, out) if cfg and cfg.track and rank() == 0 else None
        self.identity = identity(cfg, method) if cfg else {}
        resume = bool(cfg) and cfg.resume and (out / "last.pt").exists()
        self.loaded = _read_state(out / "last.pt", self.identity) if resume else None
        self.result = _result(out) if resume else None
        if self.loaded and not self.result:
            self._take_over(self.loaded)
        elif out and cfg and not self.result:
            self.save()

    def begin(self, stage: str, epochs: int, **changing) -> Iterator[int]:
        """The epochs of a stage that are to do; none of a stage that was done before.

        changing: what the state holds: anything with a state_dict(), or random generators.
        """
        if stage in self.ended:
            return
        self.parts = {name: part for name, part in changing.items() if part is not None}
        self.epoch, self.batch, self.sums = 0, 0, {}
        if self.loaded and self.loaded["stage"] == stage:
            self._restore(self.loaded)
        self.stage, self.epochs, self.loaded = stage, epochs, None
        _Flag.training = True
        while self.epoch < epochs:  # end_epoch() counts
            yield self.epoch
        _Flag.training, self.parts = False, {}
        self.ended.append(stage)

    def batches(self, loader: DataLoader) -> Iterator:
        """The batches of this epoch, after those that were done before the run was broken."""
        if self.order is not None:
            loader.generator.set_state(self.order)
        self.order, done = loader.generator.get_state(), self.batch
        rows = iter(loader)
        for _ in range(done):
            next(rows)
        self._set_random()
        shown = tqdm(  # the steps of the stage, and the time to its end; nothing but on a terminal
            rows,
            f"epoch {self.epoch + 1}/{self.epochs}",
            len(loader) * self.epochs,
            initial=len(loader) * self.epoch + done,
            leave=False,
            disable=None if rank() == 0 else True,
        )
        for batch in shown:
            self.batch += 1
            yield batch
            if self.batch < len(loader):  # after the last one, end_epoch() does
                self._poll()
        self.order = loader.generator.get_state()  # where the next epoch starts

    def add(self, **values: float) -> None:
        """Add to sums of the epoch, which last until end_epoch()."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def step(self, step: int, *values: float) -> None:
        """Keep a step of stage "finetune"; it is written at the end of the epoch."""
        self.pending.append(",".join([str(step), *(f"{value:.6g}" for value in values)]))

    def log(self, epoch: int, epochs: int, stage: str, **values) -> None:
        """One line an epoch, on the screen and in metrics.jsonl."""
        values["time_s"] = round(time.time() - self.start, 1)
        self.rows.append({"epoch": epoch, "stage": stage, **values})
        if self.out is None or rank() > 0:
            return
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        with (self.out / "steps.csv").open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self.pending)
        self.pending.clear()
        if self.tracker:
            self.tracker({f"{stage}/{key}": v for key, v in values.items()}, epoch)
        shown = " ".join(f"{key}={number(value)}" for key, value in values.items())
        print(f"epoch {epoch:0{len(str(epochs))}}/{epochs} stage={stage} {shown}", flush=True)

    def end_epoch(self, error: float = math.nan, model: nn.Module | None = None) -> None:
        """Count the epoch and save; keep the model if its error is the best so far (NaN is not)."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        better = error < self.best
        self.best = error if better else self.best
        self.save(better)
        if better and self.out is not None and rank() == 0:
            save_weights(model, self.out / "model.safetensors")
        self._poll(saved=True)

    # careful: last.pt is written before model.safetensors. Should the run be killed in between, the
    # state holds the weights, and `better` tells _restore to write them.
    def save(self, better: bool = False) -> None:
        """Write last.pt: the old one stays until the new one is whole."""
        if self.out is None:
            return
        random = [None] * world()
        mine = {"cpu": torch.get_rng_state(), "cuda": _cuda_random()}
        dist.all_gather_object(random, mine) if world() > 1 else random.__setitem__(0, mine)
        if rank() > 0:
            return
        sizes = {}
        for name in ("metrics.jsonl", "steps.csv"):
            path = self.out / name
            sizes[name] = path.stat().st_size if path.exists() else 0
        state = {"identity": self.identity, "stage": self.stage, "ended": self.ended}
        state |= {"epoch": self.epoch, "batch": self.batch, "order": self.order, "best": self.best}
        state |= {"better": better, "sums": self.sums, "rows": self.rows, "sizes": sizes}
        state |= {"pending": self.pending, "time_s": time.time() - self.start, "random": random}
        state["parts"] = {name: _state_of(part) for name, part in self.parts.items()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.out / "last.pt", *sealed(buffer.getbuffer()))

    def _take_over(self, state: dict) -> None:
        """Cut the logs back to where the state was saved, and go on from there."""
        self.rows, self.pending = state["rows"], state["pending"]
        self.best, self.ended = state["best"], state["ended"]
        self.start = time.time() - state["time_s"]
        self.random = state["random"]
        if rank() == 0:
            for name, size in state["sizes"].items():
                if (self.out / name).exists():
                    with (self.out / name).open("r+b") as file:
                        file.truncate(size)
        if not state["stage"] or state["stage"] in self.ended:
            self._set_random()

    def _restore(self, state: dict) -> None:
        for name, part in self.parts.items():
            saved = state["parts"][name]
            load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
            load(saved)
        self.epoch, self.batch, self.order = state["epoch"], state["batch"], state["order"]
        self.sums = state["sums"]
        if state["better"] and rank() == 0:
            save_weights(self.parts["model"], self.out / "model.safetensors")
        if not self.batch:
            self._set_random()

    def _set_random(self) -> None:
        if self.random is not None:
            mine = self.random[rank()]
            torch.set_rng_state(mine["cpu"])
            if mine["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(mine["cuda"])
        self.random = None

    def _poll(self, saved: bool = False) -> None:
        """After a step: has a signal come, to any of the processes? Then save and stop."""
        signum = _Flag.signum
        if world() > 1:
            flag = torch.tensor(signum, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            signum = int(flag)
        if signum:
            if not saved:
                self.save()
            raise Stopped(signum)


def identity(cfg, method: str) -> dict:
    """What must be the same for a run to go on: the method, the processes, nearly all settings."""
    settings = {key: value for key, value in asdict(cfg).items() if key not in FREE}
    return {"method": method, "processes": world(), **settings}


def _state_of(part):
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _cuda_random() -> Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def sealed(content) -> tuple[bytes, bytes]:
    """The content after a line with its checksum."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n", content


def _read_state(path: Path, wanted: dict) -> dict:
    """The state of a run, if it is whole and of this run.

    Raises: ValueError, one line, if it is damaged or of another run. Nothing in it is executed.
    """
    seal, _, content = path.read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != seal:
        raise ValueError(f"{path} is damaged (its checksum differs); start anew with --overwrite")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:  # a file that somebody made: it can fail in many ways
        raise ValueError(
            f"{path} is no state of a run ({type(error).__name__}); start anew with --overwrite"
        ) from None
    for key, value in wanted.items():
        if found.get(key) != value:
            flag = key if key in ("method", "processes") else "--" + key.replace("_", "-")
            raise ValueError(
                f"{path} is of another run: {flag} was {found.get(key)}, not {value}; resume with "
                "the settings of its config.json"
            )
    return state


def write_atomically(path: Path, *content: bytes) -> None:
    """The whole content or, if anything goes wrong, the old file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_weights(model: nn.Module, path: Path) -> None:
    """Weights alone, in a format that executes nothing; an old file stays until this is whole."""
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    save_file(weights, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises: FileNotFoundError; ValueError if the file is damaged or of another model."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {path.parent} holds no finished run")
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch have their own kinds of errors
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} does not hold the weights of this run ({reason})") from None


def number(value) -> str:
    """Four digits of a float, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- 6. Around a run -----------------------------------------------------------------------------


def open_run(cfg, method: str) -> Path:
    """The directory of the run: new, or empty of an earlier one, or that which --resume is for.

    Raises: ValueError if it holds something else, or another process is using it.
    """
    out = Path(cfg.out or f"runs/{method}-{Path(cfg.task).stem}-{cfg.seed}")
    if out.is_file():
        raise ValueError(f"--out {out} is a file; choose another --out")
    used = out.is_dir() and any(p.suffix != ".tmp" for p in out.iterdir())
    if rank() == 0:
        if cfg.resume and used and not (out / "last.pt").is_file():
            raise ValueError(f"{out} holds no last.pt to resume from; start anew with --overwrite")
        if used and not cfg.overwrite and not cfg.resume:
            raise ValueError(
                f"{out} is not empty; choose another --out, or give --resume or --overwrite"
            )
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        if not cfg.resume:
            old = ("last.pt", "model.safetensors", "result.json", "metrics.jsonl", "steps.csv")
            for name in old:
                (out / name).unlink(missing_ok=True)
    if world() > 1:
        dist.barrier()
    return out


_LOCKS: dict[str, int] = {}


def _lock(out: Path) -> None:
    """Hold the directory until the process ends (where the system has such locks)."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    key = str(out.resolve())
    if key in _LOCKS:  # an earlier run of this process
        os.close(_LOCKS.pop(key))
    _LOCKS[key] = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(_LOCKS[key], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{out} is in use by another run; choose another --out") from None


def _result(out: Path) -> dict | None:
    """The result of a run that --resume finds finished; it is printed, and nothing is done."""
    path = out / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if rank() == 0:
        print("result", json.dumps(result), flush=True)
    return result


def describe(cfg, method: str, task, model: nn.Module, out: Path, shape: dict) -> None:
    """Print the header; write config.json: settings, what load() needs, versions, command."""
    if rank() > 0:
        return
    device = next(model.parameters()).device
    sizes = "/".join(str(len(part)) for part in (task.train, task.val, task.test))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    tf32 = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    processes = f" processes={world()}" if world() > 1 else ""
    print(
        f"{method} | task={cfg.task} data={task.data} train/val/test={sizes} body={cfg.body} "
        f"source={cfg.source} device={device}{processes} precision={cfg.precision} tf32={tf32} "
        f"seed={cfg.seed} torch={torch.__version__} params={count:.2f}M out={out}",
        flush=True,
    )
    used = [name for name in ("torch", "transformers", "timm", "numpy") if name in sys.modules]
    versions = {"python": sys.version.split()[0]}
    versions |= {name: sys.modules[name].__version__ for name in used}
    content = {"config": asdict(cfg), "model": shape, "kind": task.kind}
    content |= {"versions": versions, "command": sys.argv}
    (out / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def finish(
    cfg, method: str, task, model: nn.Module, record: Record, errors: dict, source: str
) -> dict:
    """Write and print the result, and draw the curves; the state to resume from is not needed."""
    result = {"method": method, "task": cfg.task, "data": task.data, "body": cfg.body}
    result |= {"source": source, "align": cfg.align}
    result |= {"seed": cfg.seed, "metric": task.metric_name}
    result |= {key: round(value, 6) for key, value in errors.items()}
    result |= {"epochs": cfg.epochs, "train_size": len(task.train)}
    result |= {"time_s": round(time.time() - record.start, 1)}
    result |= {"params_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 3)}
    result |= {"device": str(next(model.parameters()).device), "precision": cfg.precision}
    if rank() == 0:
        title = f"{method}: {task.title} ({task.data})"
        draw_curves(record, title, task.metric_name, errors["test_error"])
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(record.out / "result.json", text.encode())
        print("result", json.dumps(result), flush=True)
    return result


def draw_curves(record: Record, title: str, metric: str, test_error: float) -> None:
    """A panel for each quantity that was logged, against the epochs of its stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = {"distance": "distance D, stage align", "k": "patches replaced, k"}
    labels |= {"contrast": "contrastive loss", "train_loss": "training loss"}
    labels |= {"val_error": f"validation {metric}"}
    shown = [key for key in labels if any(key in row for row in record.rows)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.3 * len(shown), 3), layout="constrained")
    for axis, key in zip(np.atleast_1d(axes), shown, strict=True):
        points = [(row["epoch"], row[key]) for row in record.rows if key in row]
        axis.plot(*zip(*points, strict=True), color="tab:blue")
        axis.set(xlabel="epoch", title=labels[key])
        axis.set_ylim(bottom=0)
    last = np.atleast_1d(axes)[-1]
    last.axhline(test_error, color="tab:orange", linestyle="--", label="test, best epoch")
    last.legend()
    figure.suptitle(title)
    figure.savefig(record.out / "curves.png", dpi=100)
    plt.close(figure)


def predict(cfg, load: Callable) -> np.ndarray:
    """--predict X.npy --run DIR --out Y.npy: what a finished run makes of new inputs.

    Writes classes (n,), probabilities of labels and masks, or values in the units of y.
    Raises: ValueError if X is not of the shape that the run was trained on, or not finite.
    """
    if not (cfg.run and cfg.out):
        raise ValueError("--predict X.npy needs --run DIR, a finished run, and --out Y.npy")
    saved = json.loads((Path(cfg.run) / "config.json").read_text(encoding="utf-8"))
    shape = tuple(saved["model"]["x_shape"])
    try:
        x = np.load(cfg.predict, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{cfg.predict}: not a readable .npy file ({reason})") from None
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
        raise ValueError(f"{cfg.predict}: expected an array of numbers, saved with numpy.save")
    x = x[:, None] if x.shape[1:] == shape[1:] and shape[0] == 1 else x
    if x.shape[1:] != shape or not len(x):
        raise ValueError(f"{cfg.predict}: got shape {x.shape}, expected (n, *{shape}) of {cfg.run}")
    if not np.isfinite(x).all():
        raise ValueError(f"{cfg.predict}: holds NaN or infinite values; fill them in")
    device = start(cfg)
    model = load(cfg.run).to(device)
    with torch.no_grad():
        rows = torch.from_numpy(x).float().split(256)
        out = torch.cat([model(part.to(device)).float().cpu() for part in rows])
    if saved["kind"] == "classes":
        out = out.argmax(dim=1)
    elif saved["kind"] in ("labels", "mask"):
        out = out.sigmoid()
    np.save(cfg.out, out.numpy())
    print(f"{len(out)} predictions, shape {tuple(out.shape)}, in {cfg.out}")
    return out.numpy()


def _tracker(kind: str, out: Path) -> Callable[[dict, int], None]:
    """A function that hands numbers to TensorBoard or Weights & Biases, imported only now."""
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(out))

            def track(values: dict, epoch: int) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, epoch)
                writer.flush()

            return track
        import wandb
    except ImportError as error:
        raise ValueError(f"--track {kind}: {error.name} is missing; pip install {kind}") from None
    run = wandb.init(project="cross-modal", name=out.name, dir=str(out), resume="allow")
    return lambda values, epoch: run.log({**values, "epoch": epoch})

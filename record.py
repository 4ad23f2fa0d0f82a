"""The folder of a run, and what it takes that a run which was stopped continues as if it had not.

run.py hands all of this to the methods; nobody else has to import it. It knows no method, task or
model: signals, the processes of a run, and its record: logs, curves, checkpoints, weights.

Several processes (torchrun --nproc-per-node N orca.py ...): each takes every N-th row of a batch,
and the gradients are added up. The sum is the gradient of the whole batch, also for a last batch
that is smaller, whichever parameters a stage trains.

A run that was stopped or killed continues with --resume to the same weights and numbers (on a CPU,
with the same number of processes). last.pt holds the models, the optimiser, the schedule, the place
in the epoch, the best error, the random states and the length of the logs. It is one file with a
checksum, it is replaced in one step, and nothing in it is executed.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

READ_EVERY = 20  # steps between two readings of the numbers that a step leaves on the device
FREE = {"resume", "overwrite", "out", "device", "workers", "track", "data_dir", "save_every"}
FREE |= {"steps"}  # of which the number of epochs was made


# ---- 1. Signals and processes --------------------------------------------------------------------


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised where nothing is half done."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Process:
    """Of this process: the device it computes on, and the signal that came."""

    signum = 0  # the signal that came during training
    training = False  # whether the loop looks at it after each step, and saves first
    device = torch.device("cpu")  # of this process, on which it also talks to the others


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the run after the step, once it is saved; a second one at once."""

    def handle(signum, frame):
        if not Process.training or Process.signum:
            raise Stopped(signum)
        Process.signum = signum

    old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        Process.training, Process.signum = False, 0
        for signum, handler in old.items():
            signal.signal(signum, handler)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows):
    """The rows of a batch or data set that belong to this process."""
    return rows[rank() :: world()]


def summed(values: Tensor) -> Tensor:
    """The values added up over all processes, on the device on which they were."""
    if world() == 1:
        return values
    sums = values.to(Process.device, copy=True)  # careful: NCCL takes tensors of the GPU alone
    dist.all_reduce(sums)
    return sums.to(values.device)


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Make the gradient of the whole batch from those of every process' share of it.

    A parameter that no process has a gradient for keeps none, so that the optimiser skips it.
    """
    if world() == 1:
        return
    used = summed(torch.tensor([float(p.grad is not None) for p in parameters]))
    shared = [p for p, n in zip(parameters, used.tolist(), strict=True) if n]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
    flat = summed(torch.cat([g.flatten() for g in grads]))
    for p, g in zip(shared, flat.split([g.numel() for g in grads]), strict=True):
        p.grad = g.view_as(p).clone()


def synchronise(model: nn.Module) -> None:
    """Give all processes the weights of the first, after a stage that each has done by itself."""
    if world() > 1:
        for w in model.state_dict().values():
            on = w.to(Process.device)
            dist.broadcast(on, 0)
            w.copy_(on)


def whole(parts: list[Tensor], n: int) -> Tensor:
    """All n rows in their order, on the CPU, from the rows of every process' share()."""
    if world() == 1:
        return torch.cat(parts)
    found = [None] * world()
    dist.all_gather_object(found, torch.cat(parts) if parts else None)  # fewer rows than processes
    like = next(rows for rows in found if rows is not None)
    out = like.new_empty(n, *like.shape[1:])
    for i, rows in enumerate(found):
        if rows is not None:
            out[i :: world()] = rows
    return out


# ---- 2. The record of a run ----------------------------------------------------------------------


class Record:
    """The folder of a run: its logs, the state to resume from, its best weights.

    A stage is a loop over `begin`, which yields the epochs that remain. Everything that changes in
    it is registered there, and saved after each epoch and after the step in which a signal came.
    out=None: a record that keeps nothing.
    """

    def __init__(self, out: Path | None, cfg=None, method: str = "", start: float | None = None):
        self.out, self.rows, self.start = out, [], start or time.time()
        self.lines, self.names, self.pending = [], (), []
        self.every, self.fp16 = (cfg.save_every, cfg.precision == "fp16") if cfg else (1, False)
        self.best, self.sums, self.stage = math.inf, {}, ""
        self.epochs, self.epoch = 1, 0  # of the stage: all, done
        self.length, self.batch = 1, 0  # steps of the epoch: all, done
        self.parts, self.order, self.random, self.ended = {}, None, None, []
        self.tracker = _tracker(cfg.track, out) if cfg and cfg.track and rank() == 0 else None
        self.identity = identity(cfg, method) if cfg else {}
        resume = bool(cfg) and cfg.resume and (out / "last.pt").exists()
        self.loaded = read_state(out / "last.pt", self.identity) if resume else None
        self.result = _result(out, cfg.epochs) if resume else None
        if self.loaded and not self.result:
            self._take_over(self.loaded)
        elif out and cfg and not self.result:
            self.save()

    def begin(self, stage: str, epochs: int, **changing) -> Iterator[int]:
        """The epochs of a stage that remain; none of a stage that was done before.

        changing: what the state holds: anything with a state_dict(), or random generators.
        """
        if stage in self.ended:
            return
        self.parts = {name: part for name, part in changing.items() if part is not None}
        self.epoch, self.batch, self.sums = 0, 0, {}
        if self.loaded and self.loaded["stage"] == stage:
            self._restore(self.loaded)
        self.stage, self.epochs, self.loaded = stage, epochs, None
        Process.training = True
        while self.epoch < epochs:  # end_epoch() counts
            yield self.epoch
        Process.training, self.parts = False, {}
        self.ended.append(stage)

    def batches(self, loader: DataLoader) -> Iterator:
        """The batches of this epoch, after those that were done before the run was stopped."""
        if self.order is not None:
            loader.generator.set_state(self.order)
        self.order, done, self.length = loader.generator.get_state(), self.batch, len(loader)
        rows = iter(loader)
        for _ in range(done):
            next(rows)
        self._set_random()
        shown = tqdm(  # steps of the stage and time to its end; only on a terminal
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
        self.read()

    def step(self, lr: float, **values: Tensor) -> None:
        """Keep the numbers of a step on the device; they are read some steps later."""
        self.names = tuple(values)
        on = {"dtype": torch.float32, "device": Process.device}  # careful: of one device, all
        shown = [v if isinstance(v, Tensor) else torch.full((), v, **on) for v in values.values()]
        numbers = torch.stack([v.detach().float() for v in shown])
        self.pending.append((self.batch, lr, numbers))
        if len(self.pending) >= READ_EVERY:
            self.read()

    def read(self) -> None:
        """Read the kept numbers, in one transfer, into the sums of the epoch and steps.csv.

        Raises: FloatingPointError if one of them is not finite: the run has diverged.
        """
        if not self.pending:
            return
        numbers = torch.stack([numbers for *_, numbers in self.pending]).cpu()
        if "loss" in self.names:  # each process has its share of it
            numbers[:, 0] = summed(numbers[:, 0])
        for (batch, lr, _), row in zip(self.pending, numbers.tolist(), strict=True):
            for name, value in zip(self.names, row, strict=True):
                skipped = self.fp16 and name == "grad_norm"  # the scaler leaves such a step out
                if not math.isfinite(value) and not skipped:
                    what = f"the {name.replace('_', ' ')} is {value} in epoch {self.epoch + 1}"
                    raise FloatingPointError(f"{what}, step {batch}, learning rate {lr:g}")
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.sums["steps"] = self.sums.get("steps", 0) + 1
            if self.stage == "finetune":
                values = ",".join(f"{value:.6g}" for value in (lr, *row))
                self.lines.append(f"{self.epoch * self.length + batch - 1},{values}")
        self.pending = []

    def means(self) -> dict[str, float]:
        """The mean of every number over the steps of this epoch."""
        self.read()
        steps = self.sums.get("steps", 1)
        return {name: value / steps for name, value in self.sums.items() if name != "steps"}

    def log(self, epochs: int, **values) -> None:
        """One line an epoch, on the screen and in metrics.jsonl."""
        values["time_s"], epoch = round(time.time() - self.start, 1), self.epoch + 1
        self.rows.append({"epoch": epoch, "stage": self.stage, **values})
        if self.out is None or rank() > 0:
            return
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        with (self.out / "steps.csv").open("a", encoding="utf-8") as file:
            header = ["step,lr,loss,grad_norm"] if not file.tell() else []
            file.writelines(line + "\n" for line in header + self.lines)
        self.lines.clear()
        if self.tracker:
            self.tracker({f"{self.stage}/{key}": v for key, v in values.items()}, epoch)
        shown = " ".join(f"{key}={number(value)}" for key, value in values.items())
        place = f"epoch {epoch:0{len(str(epochs))}}/{epochs} stage={self.stage}"
        print(place, shown, flush=True)

    def end_epoch(self, error: float = math.nan, model: nn.Module | None = None) -> None:
        """Count the epoch and save; keep the model if its error is the best so far (NaN is not)."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        better = error < self.best
        self.best = error if better else self.best
        saved = self.epoch % self.every == 0 or self.epoch == self.epochs
        if saved:
            self.save(better)
        if better and self.out is not None and rank() == 0:
            save_weights(model, self.out / "model.safetensors")
        self._poll(saved)

    def keep(self, part: nn.Module, name: str) -> None:
        """Write the weights of a part of the model beside the run's own."""
        if self.out is not None and rank() == 0:
            save_weights(part, self.out / f"{name}.safetensors")

    def restore_best(self, model: nn.Module) -> None:
        """Give the model the weights of its best epoch; without any epoch, write those it has."""
        path = self.out / "model.safetensors"
        if rank() == 0 and not path.exists():
            save_weights(model, path)
        if world() > 1:
            dist.barrier()
        load_weights(model, path)

    def spikes(self) -> int:
        """Epochs of fine-tuning whose mean loss is over 1.2 times the lowest one before."""
        losses = [row["train_loss"] for row in self.rows if row["stage"] == "finetune"]
        lowest = accumulate(losses, min)
        return sum(b > 1.2 * a for a, b in zip(lowest, losses[1:], strict=False))

    def converged(self) -> bool:
        """Whether the validation error fell by less than 2 % in the last tenth of the epochs."""
        errors = [row["val_error"] for row in self.rows if "val_error" in row]
        late = max(1, len(errors) // 10)
        return len(errors) > late and min(errors[-late:]) > 0.98 * min(errors[:-late])

    # careful: last.pt is written before model.safetensors. If the run is killed in between, the
    # state holds the weights, and `better` tells _restore to write them.
    def save(self, better: bool = False) -> None:
        """Write last.pt; the old one stays until the new one is whole."""
        if self.out is None:
            return
        random = [None] * world()
        mine = {"cpu": torch.get_rng_state(), "cuda": None}
        if Process.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(Process.device)
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
        state |= {"lines": self.lines, "time_s": time.time() - self.start, "random": random}
        state["parts"] = {name: _state_of(part) for name, part in self.parts.items()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.out / "last.pt", *sealed(buffer.getbuffer()))

    def _take_over(self, state: dict) -> None:
        """Cut the logs back to where the state was saved, and continue from there."""
        self.rows, self.lines, self.random = state["rows"], state["lines"], state["random"]
        self.best, self.ended = state["best"], state["ended"]
        self.start = time.time() - state["time_s"]
        if rank() == 0:
            for name, size in state["sizes"].items():
                if (self.out / name).exists():
                    with (self.out / name).open("r+b") as file:
                        file.truncate(size)
        if not state["stage"] or state["stage"] in self.ended:
            self._set_random()

    def _restore(self, state: dict) -> None:
        for name, part in self.parts.items():
            load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
            load(state["parts"][name])
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
            if mine["cuda"] is not None and Process.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda"], Process.device)
        self.random = None

    def _poll(self, saved: bool = False) -> None:
        """After a step: has a signal come, to any of the processes? Then save and stop."""
        signum = Process.signum
        if world() > 1:
            if self.batch % READ_EVERY:  # all processes have to ask at the same step
                return
            signum = int(summed(torch.tensor([float(signum)])).clamp(max=signal.SIGTERM))
        if signum:
            self.read()
            if not saved:
                self.save()
            raise Stopped(signum)


def draw_curves(record: Record, title: str, metric: str, test_error: float | None) -> None:
    """A panel for each quantity that was logged, against the epochs of its stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # the numbers that a method can log
    labels = {"distance": "distance D, stage align", "k": "patches replaced, k"}
    labels |= {"contrast": "contrastive loss", "train_loss": "training loss"}
    labels |= {"val_error": f"validation {metric}"}
    shown = [key for key in labels if any(key in row for row in record.rows)] or ["val_error"]
    size = {"figsize": (3.3 * len(shown), 3), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, len(shown), **size)
    for axis, key in zip(axes[0], shown, strict=True):
        points = [(row["epoch"], row[key]) for row in record.rows if key in row]
        axis.plot([epoch for epoch, _ in points], [value for _, value in points])
        axis.set(xlabel="epoch", title=labels[key])
        axis.set_ylim(bottom=0)
        if key == "val_error" and test_error is not None:
            axis.axhline(test_error, color="tab:orange", linestyle="--", label="test, best epoch")
            axis.legend()
    figure.suptitle(title)
    figure.savefig(record.out / "curves.png", dpi=100)
    plt.close(figure)


# ---- 3. Files ------------------------------------------------------------------------------------


def identity(cfg, method: str) -> dict:
    """What must be the same for a run to continue: method, processes, nearly all settings."""
    settings = {key: value for key, value in asdict(cfg).items() if key not in FREE}
    path = Path(cfg.task)  # a file is its content, wherever it is now
    if path.suffix == ".npz":
        content = 0
        if path.is_file():
            with zipfile.ZipFile(path) as file:
                content = sum(array.CRC for array in file.infolist())
        settings["task"] = f"{path.resolve().name} ({content:x})"
    return {"method": method, "processes": world(), **settings}


def _state_of(part):
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def sealed(content) -> tuple[bytes, bytes]:
    """The content after a line with its checksum."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n", content


def read_state(path: Path, wanted: dict) -> dict:
    """The state of a run, if it is whole and of this run. Nothing in it is executed.

    Raises: ValueError, one line, if it is damaged or belongs to another run.
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
        if key == "epochs" and value > found.get(key, value):
            if rank() == 0:
                print(f"note: {value} epochs instead of {found[key]}; the schedules now end there")
        elif found.get(key) != value:
            name = key if key in ("method", "processes") else "--" + key.replace("_", "-")
            raise ValueError(
                f"{path} belongs to another run: {name} was {found.get(key)}, not {value}; resume "
                "with the settings of its config.json"
            )
    return state


def write_atomically(path: Path, *content: bytes) -> None:
    """The whole content or, if anything goes wrong, the old file and no remains of the new one.

    Raises: OSError, naming the file; whatever else went wrong.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def save_weights(model: nn.Module, path: Path) -> None:
    """Weights alone, in a format that executes nothing; an old file stays until this is whole."""
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(weights))


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises: FileNotFoundError; ValueError if the file is damaged or of another model."""
    if not path.is_file():
        what = "aligned f^t" if path.stem == "f_t" else "finished run"
        raise FileNotFoundError(f"no file {path}; {path.parent} holds no {what}")
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except Exception as error:  # safetensors and torch have their own kinds of errors
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} does not fit this model ({reason})") from None


def open_run(cfg, method: str) -> Path:
    """The folder of the run: new, or cleared of an earlier run, or the one that --resume is for.

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
            for pattern in ("last.pt", "*.safetensors", "result.json", "metrics.jsonl", "*.csv"):
                for path in out.glob(pattern):
                    path.unlink()
    if world() > 1:
        dist.barrier()
    return out


_LOCKS: dict[str, int] = {}


def _lock(out: Path) -> None:
    """Hold the folder until the process ends, where the system has such locks."""
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


def _result(out: Path, epochs: int) -> dict | None:
    """The result of a run that has all epochs: --resume prints it, and there is nothing to do."""
    path = out / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["epochs"] < epochs:
        return None
    if rank() == 0:
        print("result", json.dumps(result), flush=True)
    return result


def number(value) -> str:
    """Four digits of a float, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tracker(kind: str, out: Path) -> Callable[[dict, int], None]:
    """A function that passes numbers to TensorBoard or Weights & Biases, imported only now."""
    try:
        if kind == "wandb":
            import wandb

            run = wandb.init(project="cross-modal", name=out.name, dir=str(out), resume="allow")
            return lambda values, epoch: run.log({**values, "epoch": epoch})
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--track {kind}: {error.name} is missing; pip install {kind}") from None
    writer = SummaryWriter(str(out))
    return lambda values, epoch: [writer.add_scalar(k, v, epoch) for k, v in values.items()]

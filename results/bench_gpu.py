"""What a training step costs at the papers' sizes: python results/bench_gpu.py --csv FILE

For ORCA, PaRe and the proposal: seconds a step, samples a second, peak memory, in fp32, in TF32, in
bf16, and in bf16 with --compile or --recompute. ORCA is without alignment: naive fine-tuning. The
bodies are roberta-base and Swin-base, untrained; the data are simulated, of the shapes of the real
ones; batch, optimiser and number of patches are those of --paper. So nothing is downloaded, and a
step costs what it costs in the papers' setting.

    python results/bench_gpu.py                         a CUDA machine
    python results/bench_gpu.py --device cpu --batch 2 --steps 1 --methods orca --variants fp32
    python results/bench_gpu.py --tiny --steps 2        tiny bodies: does it run?

A row is a run of the script's main(), in whose stage of fine-tuning the time of the counted steps
is taken, loading of data included, after some that are not counted. step_s is their mean, cpu_s the
mean of a processor's seconds: on one thread, what a step takes where nothing else runs. Memory is
that which torch allocated on a GPU, else that of the whole process, imports and checkpoints
included. paper_step.csv has rows of a CPU, a core of an AMD EPYC (Zen 5: AVX-512 with bf16, no
AMX), whose step_s is a median.
"""

import argparse
import contextlib
import csv
import gc
import importlib
import itertools
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bodies  # noqa: E402 (the repository's root has to be on the path first)
from record import Record  # noqa: E402

METHODS = ("orca", "pare", "proposed")
TASKS = ("satellite", "deepsea", "cifar100", "darcy")  # series and images, classes and a field
VARIANTS = {
    "fp32": {},
    "tf32": {"tf32": True},
    "bf16": {"precision": "bf16"},
    "bf16+compile": {"precision": "bf16", "compile": True},
    "bf16+recompute": {"precision": "bf16", "recompute": True},
}
SWIN = bodies.SWIN_BASE.split(".")[0]
SHOWN = ("step_s", "cpu_s", "samples_s", "peak_gb", "device")
WARM_UP = {False: 1, True: 3}  # steps that are not counted, on a CPU and a GPU; double to compile
HELD = 4  # samples for validation and test each


def roberta_base(folder: Path) -> Path:
    """A folder for --body random:FOLDER with the architecture of roberta-base.

    Its tokenizer is tiny_roberta's: the real one is with the weights, on the hub.
    """
    from transformers import AutoTokenizer, RobertaConfig

    RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bodies.FOLDER / "tiny_roberta").save_pretrained(folder)
    return folder


def shrink(name: str, train: int) -> None:
    """Let a simulated task have so many training samples, and next to none for evaluation."""
    module = importlib.import_module(f"tasks.{name}")
    module.TASK["sizes"] = {"train": train, "val": HELD, "test": HELD}


def settings(method: str, task: str, args: argparse.Namespace, folder: Path):
    """The method's module, and the values of --paper but for what would be downloaded."""
    module = importlib.import_module(method)
    series = len(importlib.import_module(f"tasks.{task}").TASK["x_shape"]) == 2
    cfg = vars(module.configure(task=task, paper=not args.tiny))
    if not args.tiny:
        body = roberta_base(folder / "body") if series else SWIN
        cfg |= {"data": "simulated", "body": f"random:{body}", "paper": False}
    cfg |= {"source": "noise", "source_size": 64}
    if method == "orca":
        cfg |= {"align": "none"}
    if method == "proposed":
        cfg |= {"contrast_epochs": 1, "contrast_steps_per_epoch": 1, "draws": 2}
    if args.batch:
        cfg |= {"batch_size": args.batch, "accumulate": 1}
    return module, cfg | {"device": args.device, "epochs": 1, "out": str(folder / "run")}


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    kilo = 1 if sys.platform == "darwin" else 1024  # bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9


def measure(method: str, task: str, variant: str, args: argparse.Namespace) -> dict:
    """A row of the table: a short run of a method's main(), timed in its stage of fine-tuning."""
    gpu, steps = args.device.startswith("cuda"), []
    if gpu:  # an earlier row of this process may have left something
        gc.collect()
        torch.cuda.empty_cache()

    def now() -> tuple[float, float]:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def timed_step(self, *given, **values):
        done(self, *given, **values)
        if self.stage == "finetune":
            steps.append(now() if len(steps) + 1 in (warm_up, warm_up + args.steps) else None)

    with tempfile.TemporaryDirectory() as folder:
        module, cfg = settings(method, task, args, Path(folder))
        cfg |= VARIANTS[variant]
        warm_up = WARM_UP[gpu] * (2 if cfg["compile"] else 1)
        shrink(task, cfg["batch_size"] * (args.steps + warm_up))
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        done = Record.step
        Record.step = timed_step
        try:
            with contextlib.redirect_stdout(None):
                result = module.main(module.Config(**cfg))
        finally:
            Record.step = done
        assert len(steps) == args.steps + warm_up
        (start, cpu_start), (end, cpu_end) = steps[warm_up - 1], steps[-1]
        step_s, cpu_s = (end - start) / args.steps, (cpu_end - cpu_start) / args.steps
        row = {"method": method, "task": task, "variant": variant, "batch": cfg["batch_size"]}
        row |= {"parts": cfg["accumulate"], "step_s": f"{step_s:.4g}", "cpu_s": f"{cpu_s:.4g}"}
        row |= {"samples_s": f"{cfg['batch_size'] / step_s:.4g}"}
        row |= {"peak_gb": f"{peak_gb(args.device):.2f}", "params_m": result["params_m"]}
    return row | {"device": hardware(args.device), "torch": torch.__version__}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=0, help="in one part; 0: as in the papers")
    parser.add_argument("--steps", type=int, default=5, help="that are counted")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no row is begun")
    parser.add_argument("--tiny", action="store_true", help="tiny bodies and embedded settings")
    parser.add_argument("--csv", type=Path, help="file to add the rows to")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch < 0:
        parser.error("--steps takes 1 or more, --batch 0 or more")
    command = " ".join([Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    end, rows, shown = time.time() + args.seconds, [], ("task", "method", "variant", "batch")
    # A CPU's peak of memory is that of a process, so each row has its own; a GPU's can be reset.
    own = None if args.device.startswith("cuda") else 1
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=own) as pool:
        for task, variant, method in itertools.product(args.tasks, args.variants, args.methods):
            if time.time() > end:
                print(f"{task} {method} {variant}: no time left", flush=True)
                continue
            try:
                row = pool.submit(measure, method, task, variant, args).result()
            except torch.OutOfMemoryError:
                print(f"{task} {method} {variant}: out of memory; try a smaller --batch")
                continue
            rows.append({**row, "command": command})
            print(*(f"{key}={row[key]}" for key in (*shown, "parts", *SHOWN)), flush=True)
            if args.csv:
                add(rows[-1], args.csv)
    return rows


def add(row: dict, path: Path) -> None:
    """Add a row to a CSV file, which gets a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()

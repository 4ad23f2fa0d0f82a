"""Every method on every task, three seeds: python results/all_tasks.py --jobs 2

A small setting, so that 432 runs and the baselines take under four hours on one CPU core: a fifth
of each task's training samples (five images a class where there are a hundred) and half of the
alignment's samples a step, but the task's epochs. All methods see the same samples; PaRe, whose
step takes two samples through the body, has two thirds of the epochs, the proposal nine tenths,
since its stage 2 comes before. A row is added to results/all_tasks.csv as soon as its run ends; a
command whose row is there is not run again. One seed comes after the other.
"""

import argparse
import multiprocessing
import shlex
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
import baselines  # noqa: E402 (the repository's root has to be on the path first)
import collect  # noqa: E402

import orca  # noqa: E402
import pare  # noqa: E402
import proposed  # noqa: E402
import tasks  # noqa: E402
from tasks import papers  # noqa: E402

CLIS = {"orca": orca.cli, "pare": pare.cli, "proposed": proposed.cli}
SIZE = {"cifar100": 500, "spherical": 500, "psicov": 48, "cosmic": 48, "ninapro": 216}
SIZE |= {"fsd50k": 200, "ecg": 300, "satellite": 480, "deepsea": 400, "darcy": 160}
SIZE |= dict.fromkeys(tasks.PDES, 200)
SIZE |= dict.fromkeys(("darcy_2d", "shallow_water", "diffusion_reaction_2d"), 160)
ALIGN = "--align-samples 192 --align"
METHODS = {  # name: script, share of the epochs, flags
    "scratch": ("orca", 1, "--align none --body random:{body}"),
    "fpt": ("orca", 1, "--align none --freeze layernorm-only"),
    "nft": ("orca", 1, "--align none"),
    "orca-otdd": ("orca", 1, f"{ALIGN} otdd"),
    "orca-otdd-classwise": ("orca", 1, f"{ALIGN} otdd-classwise"),
    "orca-mmd": ("orca", 1, f"{ALIGN} mmd"),
    "pare": ("pare", 2 / 3, ""),
    "proposed": ("proposed", 0.9, ""),
}


def commands(names: list[str], seeds: list[int]) -> list[str]:
    """All command lines, seed by seed, the baselines of a task first."""
    found = []
    for seed in seeds:
        for task in names:
            setting = f"--task {task} --train-size {SIZE[task]} --seed {seed}"
            found.append(f"python results/baselines.py {setting}")
            epochs = orca.configure(task=task).epochs
            body = "tiny_roberta" if task in papers.SERIES else "tiny_swin"
            for name, (script, share, flags) in METHODS.items():
                part = f"--epochs {round(share * epochs)} {flags.format(body=body)}".strip()
                out = f"--out runs/all-tasks/{task}-{name}-{seed} --resume"
                found.append(f"python {script}.py {setting} {part} {out}")
    return found


def run(command: str) -> list[dict]:
    """The rows of a command. Called in a process of its own, which has all libraries already."""
    torch.set_num_threads(1)
    script, *argv = shlex.split(command)[1:]
    if script == "results/baselines.py":
        task, size, seed = argv[1::2]
        setting = {"task": task, "data": "simulated", "seed": seed, "train_size": size}
        errors = {k: round(error, 6) for k, error in baselines.main(argv).items()}
        return [
            {"method": name, **setting, "test_error": error, "command": command}
            for name, error in errors.items()
        ]
    sys.argv = [script, *argv]  # which config.json keeps
    code = CLIS[script.removesuffix(".py")](argv)
    if code:
        raise RuntimeError(f"{command} ended with code {code}")
    return [collect.row(Path(argv[argv.index("--out") + 1]))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(tasks.NAMES), choices=tasks.NAMES)
    parser.add_argument("--csv", type=Path, default=RESULTS / "all_tasks.csv")
    args = parser.parse_args(argv)
    rows = collect.read(args.csv)
    done = {row["command"] for row in rows}
    todo = [line for line in commands(args.tasks, args.seeds) if line not in done]
    workers = multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1)
    with workers:
        for new in workers.imap_unordered(run, todo):
            rows += new
            collect.write(args.csv, rows)


if __name__ == "__main__":
    main()

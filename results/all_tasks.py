"""Every method on every task, and the studies of their parts, a row a run.

    python results/all_tasks.py                              18 tasks, 6 methods, 3 seeds
    python results/all_tasks.py --jobs 16 --device cuda      16 runs at a time on one GPU
    python results/all_tasks.py --study pare                 what each choice of PaRe is worth
    python results/all_tasks.py --npz crop.npz:1200          on 1200 training samples of a file
    python results/all_tasks.py --simple                     the simple learners of every task

All runs have the scripts' default settings, and all methods the same number of epochs. Rows are
appended to results/all_tasks.csv as runs end; a command whose row is there is not run again. The
methods of one task and seed are run together, so that whatever is there can be compared.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
import collect  # noqa: E402 (results/ has to be on the path first)

import tasks  # noqa: E402
from tasks import papers  # noqa: E402

# ---- the runs: name of a setting, script and flags; BODY is the task's tiny body -----------------

METHODS = {  # in the order in which they are run
    "NFT": "orca.py --align none",
    "PaRe": "pare.py",
    "ORCA": "orca.py",
    "proposed": "proposed.py",
    "scratch": "orca.py --align none --body random:BODY",
    "FPT": "orca.py --align none --freeze layernorm-only",
}
STUDIES = {
    "large": METHODS,
    "pare": {
        "no gate": "pare.py --gate none",
        "random gate": "pare.py --gate random",
        "a gate for each modality": "pare.py --gate separate",
        "patches chosen by sampling": "pare.py --select gumbel",
        "highest scores replaced": "pare.py --replace highest",
        "k0 of 35 %": "pare.py --k0 K0",
        "lambda = k/N": "pare.py --lam k/N",
        "L_mix alone": "pare.py --plain-target-loss off",
        "without source labels": "pare.py --source-labels off",
    },
    "orca": {  # the study of slides 12 to 21
        "source: code": "orca.py --source code",
        "source: textures": "orca.py --source textures",
        "source: noise": "orca.py --source noise",
        "embedder frozen": "orca.py --freeze embedder",
        "body frozen": "orca.py --freeze body",
        "both frozen": "orca.py --freeze both",
        "a tenth of the pretraining": "orca.py --body tiny_roberta_10pct",
        "a hundredth of the pretraining": "orca.py --body tiny_roberta_1pct",
        "no pretraining": "orca.py --body random:BODY",
        "5 epochs of alignment": "orca.py --align-epochs 5",
        "60 epochs of alignment": "orca.py --align-epochs 60",
        "OTDD class by class": "orca.py --align otdd-classwise",
        "MMD": "orca.py --align mmd",
    },
    "proposed": {
        "no contrast": "proposed.py --contrast none",
        "outer loss": "proposed.py --contrast outer",
        "loss as written": "proposed.py --contrast literal",
        "contrast at the output": "proposed.py --contrast-at output",
        "no noise": "proposed.py --sigmas 0",
        "no preservation": "proposed.py --preserve none",
        "preservation by the Jacobian": "proposed.py --preserve jacobian",
        "preservation by the slope": "proposed.py --preserve slope",
        "embedder's weights frozen": "proposed.py --finetune frozen-embedder",
        "projection alone": "proposed.py --finetune projection",
    },
    "few": {  # labels a class
        f"{name}, {labels}": f"{flags} --train-size {labels}*CLASSES"
        for labels in (2, 5, 10, 50)
        for name, flags in METHODS.items()
        if name != "FPT"
    },
    "lr": {
        f"{name}, {lr}": f"{flags} --lr {lr}"
        for lr in ("1e-3", "4e-3")
        for name, flags in METHODS.items()
        if name != "FPT"
    },
}
# One after the other in this order, so that each kind of data is seen early.
ORDER = ("satellite", "advection", "ninapro", "burgers", "ecg", "darcy_2d", "cifar100", "deepsea")
ORDER += ("diffusion_reaction_1d", "shallow_water", "fsd50k", "diffusion_sorption", "spherical")
ORDER += ("navier_stokes_1d", "darcy", "diffusion_reaction_2d", "psicov", "cosmic")
STUDIED = ("satellite", "ninapro", "ecg", "cifar100")
CLASSES = {"satellite": 24, "ecg": 4, "ninapro": 18, "cifar100": 100}
K0 = {"satellite": 8, "ecg": 18, "ninapro": 90, "cifar100": 90}  # 35 % of 23, 50, 256, 256 patches
TEXT, IMAGE = ("code", "tiny_roberta_"), ("textures",)  # what only series, only images can take
TINY = ("--epochs", "1", "--batch-size", "8")  # of the runs of --tiny
SLOW = {"psicov": 3, "cosmic": 3}  # times as slow as other fields, about


# ---- from names to jobs --------------------------------------------------------------------------


def is_series(task: str, files: dict) -> bool:
    """Whether the samples are series: (C, L), or (L) in a file; else images."""
    if task not in files:
        return task in papers.SERIES
    with np.load(files[task]) as arrays:
        return arrays["x_train"].ndim < 4


def is_field(task: str, files: dict) -> bool:
    """Whether a field is predicted, which takes more steps."""
    if task not in files:
        return task in (*tasks.PDES, "darcy", "psicov", "cosmic")
    with np.load(files[task]) as arrays:
        return arrays["y_train"].ndim > 2


def command(task: str, seed: int, flags: str, size: int = 0, series: bool = True) -> str:
    """The command line of a run; "" if the task cannot take the flags."""
    if any(name in flags for name in (IMAGE if series else TEXT)):
        return ""
    script, *rest = shlex.split(flags.replace("BODY", "tiny_roberta" if series else "tiny_swin"))
    line = shlex.join(["python", script, "--task", task, "--seed", str(seed), *rest])
    line = line.replace("K0", str(K0.get(task, 0)))
    if "*CLASSES" in line:
        labels = int(line.split("--train-size '")[1].split("*")[0])
        line = line.replace(f"'{labels}*CLASSES'", str(labels * CLASSES[task]))
    return line + (f" --train-size {size}" if size else "")


def jobs_of(study: str, task: str, seed: int, files: dict, tiny: bool) -> list:
    """The jobs of a study for one task, or FILE.npz:SIZE, and one seed."""
    task, _, size = task.partition(":")
    series, field = is_series(task, files), is_field(task, files)
    found = []
    for method, flags in STUDIES[study].items():
        line = command(task, seed, flags, int(size or 0), series)
        if line:
            guess = 20.0 * (1 + field) * (1 if series else 1.5) * SLOW.get(task, 1)
            guess *= {"pare.py": 2, "proposed.py": 1.4}.get(line.split()[1], 1)
            few = () if not tiny or "--train-size" in line else ("--train-size", "24")
            extra = (*TINY, *few) if tiny else ()
            found.append(
                collect.Job(method, task, seed, line, files.get(task, ""), extra, guess=guess)
            )
    return found


def simple_job(task: str, seed: int) -> collect.Job:
    line = f"python results/all_tasks.py --simple --tasks {task} --seeds {seed}"
    return collect.Job("simple", task, seed, line)


def groups_of(args, files: dict, done: set[str]) -> list[list]:
    """What is to be run: seed by seed, study by study; the methods of a task in one group.

    With several workers, groups that take long come first within a seed, so that no worker is left
    with one at the end.
    """
    groups = []
    for seed in args.seeds:
        for study in args.study:
            of_seed = []
            for task in args.tasks:
                if args.simple:
                    jobs = [simple_job(task, seed)]
                else:
                    jobs = jobs_of(study, task, seed, files, args.tiny)
                jobs = [job for job in jobs if job.command not in done]
                if study == "few":  # the comparison at each number of labels is a group
                    names = dict.fromkeys(job.method.split(", ")[1] for job in jobs)
                    of_seed += [[j for j in jobs if j.method.endswith(f", {n}")] for n in names]
                else:
                    of_seed.append(jobs)
            if args.jobs > 1:
                of_seed.sort(key=lambda jobs: -sum(job.guess for job in jobs))
            groups += of_seed
    return [group for group in groups if group]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu", help="device of the runs: cpu or cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time until it ends")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", help="tasks; default: those of the study")
    parser.add_argument("--study", nargs="+", default=["large"], choices=STUDIES)
    parser.add_argument("--npz", nargs="+", default=[], metavar="FILE[:SIZE]", help="own data")
    parser.add_argument("--simple", action="store_true", help="simple learners, on the CPU")
    parser.add_argument("--csv", type=Path, default=RESULTS / "all_tasks.csv")
    parser.add_argument("--commit", default="", help="commit for the rows, outside a repository")
    parser.add_argument("--tiny", action="store_true", help="one epoch, to try the script out")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    args = parser.parse_args(argv)
    if args.tiny and args.csv.resolve() == (RESULTS / "all_tasks.csv").resolve():
        parser.error("rows of --tiny are no results; give another --csv")
    if args.tasks is None and not args.npz:
        args.tasks = list(ORDER if args.study == ["large"] or args.simple else STUDIED)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    paths = [Path(text) for text in args.npz]  # the size is a part of the name here
    files = {path.name.partition(":")[0]: str(path).partition(":")[0] for path in paths}
    args.tasks = [*(args.tasks or []), *(path.name for path in paths)]
    there = [args.csv, *([] if args.tiny else RESULTS.glob("*all_tasks.csv"))]
    done = {row["command"] for path in there for row in collect.read(path)}
    groups = groups_of(args, files, done)
    if args.dry_run:
        print(*(job.command for group in groups for job in group), sep="\n")
        return 0
    name = args.commit or collect.commit()
    return collect.run_all(groups, args.csv, args.jobs, args.device, args.seconds, name)


if __name__ == "__main__":
    sys.exit(min(main(), 1))

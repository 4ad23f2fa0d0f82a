"""Every script on a device that is not the CPU: on a stand-in for one, and on CUDA if it is there.

The stand-in (standin.py) fails where tensors of two devices meet, and counts what makes the host
wait. Tests marked gpu ask the same of a real device, and more.
"""

import io
import json
import math
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from standin import Chip
from torch.nn import functional as F

import contrast
import orca
import pare
import proposed
import record
import run
from mmd import mmd2
from otdd import otdd
from tasks import burgers, cifar100, cosmic, darcy, deepsea, satellite

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"orca": orca, "pare": pare, "proposed": proposed}
KINDS = (satellite, deepsea, burgers, cifar100, cosmic, darcy)  # classes, labels, fields, a mask
IMAGES = ("cifar100", "cosmic", "darcy")
NAMES = [module.__name__.split(".")[1] for module in KINDS]
SMALL = "--train-size 24 --batch-size 8 --epochs 1 --source-size 64 --baselines off"
SMALL = {
    "orca": f"{SMALL} --align-epochs 1 --align-steps-per-epoch 2 --align-samples 24",
    "pare": SMALL,
    "proposed": f"{SMALL} --contrast-epochs 1 --contrast-steps-per-epoch 2 --draws 6",
}
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
on_cuda = lambda function: gpu[0](gpu[1](function))  # noqa: E731
# While the tests are collected: the first backward pass of a process fixes what devices there are.
registered = standin.register()


sources = {}  # that were loaded before


def load_source(cfg, tokenize, *which):
    key = (cfg.source, cfg.source_size, cfg.seed, *which)
    if key not in sources:
        sources[key] = loading(cfg, tokenize, *which)
    return sources[key]


loading = run.load_source


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few samples of every task; nothing twice that the device has no part in."""
    monkeypatch.setattr(run, "load_source", load_source)
    for module in KINDS:
        monkeypatch.setitem(module.TASK, "sizes", {"train": 24, "val": 8, "test": 8})
    yield
    record.Process.device = torch.device("cpu")


@pytest.fixture
def chip(monkeypatch):
    if not registered:
        pytest.skip("this PyTorch takes no backend written in Python")
    monkeypatch.setattr(torch, "Generator", standin.Generator)
    Chip.launches.clear()
    Chip.waits.clear()
    return "chip"


@pytest.fixture(params=["chip", pytest.param("cuda", marks=gpu)])
def device(request):
    return request.getfixturevalue("chip") if request.param == "chip" else request.param


def settings(line: str, series: Path, device: str, out: Path, more: str = ""):
    """The script and the settings of a command line; SERIES in it is a file of 4 classes."""
    script, *argv = f"{line} {more}".replace("SERIES", str(series)).split()
    small = SMALL[script] + " --patches 64" * any(task in line for task in IMAGES)
    argv = [*small.split(), *argv, "--device", device, "--out", str(out), "--overwrite"]
    return SCRIPTS[script], SCRIPTS[script].parse_args(argv)


def measured(script, cfg) -> dict[str, float]:
    """What a run logs of its first stage, and of the first step of fine-tuning."""
    script.main(cfg)
    out = Path(cfg.out)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = {k: v for k, v in json.loads(lines[0]).items() if isinstance(v, float)}
    first = np.genfromtxt(out / "steps.csv", delimiter=",", names=True)[0]
    return values | {"first_loss": float(first["loss"]), "first_norm": float(first["grad_norm"])}


# ---- 1. Every script, kind of task and option ----------------------------------------------------

DISTANCES = ("otdd-gaussian", "otdd-classwise", "mmd", "l2")
RUNS = [f"{script} --task {task}" for task in NAMES for script in SCRIPTS]
RUNS += [f"orca --task SERIES --align {name}" for name in DISTANCES]
RUNS += ["orca --task SERIES --align none --freeze layernorm-only --clip 0 --optimizer sgd"]
RUNS += ["orca --task cifar100 --align none --accumulate 2 --recompute --body-lr 1e-4"]
RUNS += ["pare --task SERIES --gate separate --source-labels off"]
RUNS += ["pare --task SERIES --gate none --lam k/N --replace highest"]
RUNS += ["pare --task SERIES --plain-target-loss off --accumulate 2"]
RUNS += ["proposed --task SERIES --contrast none --finetune projection"]
RANDOM = ["pare --task SERIES --gate random", "pare --task SERIES --select gumbel"]
RANDOM += [f"proposed --task SERIES --contrast {form}" for form in ("outer", "literal")]
RANDOM += [f"proposed --task SERIES --preserve {form}" for form in ("jacobian", "slope", "none")]
RANDOM += ["proposed --task SERIES --contrast-at output --prediction perturbed"]


@pytest.mark.parametrize("line", RUNS + RANDOM)
def test_a_run_agrees_with_the_cpu(line, device, series, tmp_path):
    """Distances and the first loss to 1e-4; after a stage of training, the loss to 2 %.

    Where numbers are drawn on the device, it only has to run.
    """
    there = measured(*settings(line, series, device, tmp_path / "there"))
    assert all(map(math.isfinite, there.values()))
    if line in RANDOM or (line.startswith("proposed") and "none" not in line):
        return
    here = measured(*settings(line, series, "cpu", tmp_path / "here"))
    trained = line.startswith("orca") and "--align none" not in line
    if trained:
        rough = 1e-3 if "gaussian" in line else 1e-4
        assert there["distance"] == pytest.approx(here["distance"], rel=rough)
    # careful: a topk of equal scores, of patches that look alike, may choose others elsewhere
    loss, norm = (2e-2, 0.2) if trained or line.startswith("pare") else (1e-4, 1e-3)
    assert there["first_loss"] == pytest.approx(here["first_loss"], rel=loss)
    assert there["first_norm"] == pytest.approx(here["first_norm"], rel=norm)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("task", ["satellite", "darcy"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_half_precision_stays_close(script, task, precision, device, tmp_path):
    if device == "chip" and (task, precision) != ("satellite", "bf16"):
        pytest.skip("the CPU behind the stand-in is slow in half precision")
    more = {"orca": "--align none", "proposed": "--contrast none"}.get(script, "")
    line = f"{script} --task {task} {more}"
    there = measured(*settings(line, "", device, tmp_path, f"--precision {precision}"))
    here = measured(*settings(line, "", "cpu", tmp_path))
    assert there["first_loss"] == pytest.approx(here["first_loss"], rel=5e-2)


@pytest.mark.parametrize("line", ["pare --task SERIES --gate random", "proposed --task SERIES"])
def test_a_stopped_run_continues(line, device, series, tmp_path, monkeypatch):
    """To the same numbers, those that are drawn on the device included."""
    more = "--epochs 2 --deterministic"
    script, cfg = settings(line, series, device, tmp_path / "whole", more)
    whole = script.main(cfg)
    script, cfg = settings(line, series, device, tmp_path / "halves", more)
    end_epoch = record.Record.end_epoch

    def stop(self, *given):
        end_epoch(self, *given)
        if self.stage == "finetune":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record.Record, "end_epoch", stop)
        script.main(cfg)
    again = script.main(type(cfg)(**{**vars(cfg), "resume": True, "overwrite": False}))
    assert again["val_error"] == whole["val_error"]
    rows = [
        [json.loads(line)["train_loss"] for line in path.read_text().splitlines()[-2:]]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "halves/metrics.jsonl")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_predictions_are_those_of_the_cpu(script, device, series, tmp_path):
    module, cfg = settings(f"{script} --task darcy", "", "cpu", tmp_path / "run")
    module.main(cfg)
    x = torch.from_numpy(np.asarray(darcy.simulate(4, 5)[0], dtype=np.float32))
    model = module.load(tmp_path / "run")
    with torch.no_grad():
        here = model(x)
        there = model.to(device)(x.to(device)).cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4 * float(here.abs().max()))
    np.save(tmp_path / "x.npy", x.numpy())
    argv = f"--predict {tmp_path}/x.npy --run {tmp_path}/run --out {tmp_path}/y.npy"
    module.main(module.parse_args([*argv.split(), "--device", device]))
    found = torch.from_numpy(np.load(tmp_path / "y.npy"))
    torch.testing.assert_close(found, here, rtol=1e-4, atol=1e-4 * float(here.abs().max()))


# ---- 2. What a step costs ------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """Of each step: the number of launches, and what the host waits for."""
    found, batches = [], record.Record.batches

    def watched(self, loader):
        for batch in batches(self, loader):
            Chip.launches.clear()
            Chip.waits.clear()
            yield batch
            found.append((len(Chip.launches), Counter(Chip.waits)))

    monkeypatch.setattr(record.Record, "batches", watched)
    return found


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_waits_for_nothing(script, task, chip, steps, tmp_path):
    more = {"orca": "--align none", "proposed": "--contrast none"}.get(script, "")
    module, cfg = settings(f"{script} --task {task} {more}", "", chip, tmp_path)
    module.main(cfg)
    assert [waits for _, waits in steps] == [{}, {}, {}]


def test_the_log_is_read_every_so_many_steps(chip, steps, series, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "READ_EVERY", 2)
    module, cfg = settings("orca --task SERIES --align none", series, chip, tmp_path)
    module.main(cfg)
    assert [waits.total() for _, waits in steps] == [0, 1, 0]


def test_fp16_waits_once_for_its_scaler(chip, steps, series, tmp_path):
    line = "orca --task SERIES --align none --precision fp16"
    module, cfg = settings(line, series, chip, tmp_path)
    module.main(cfg)
    assert [waits.total() for _, waits in steps] == [1, 1, 1]


def test_a_step_of_pare_launches_little_more_than_a_plain_one(chip, steps, series, tmp_path):
    """In a body of twelve layers, as many as roberta-base has; how wide it is plays no part."""
    from transformers import AutoTokenizer, RobertaConfig

    size = {"hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 48}
    body = RobertaConfig(vocab_size=50265, max_position_embeddings=514, **size)
    body.save_pretrained(tmp_path / "body")
    AutoTokenizer.from_pretrained(ROOT / "bodies/tiny_roberta").save_pretrained(tmp_path / "body")
    more = f"--body random:{tmp_path / 'body'}"
    for line in ("orca --task SERIES --align none", "pare --task SERIES"):
        module, cfg = settings(line, series, chip, tmp_path / "run", more)
        module.main(cfg)
    (plain, _), (mixed, waits) = steps[1], steps[4]  # not the first: it makes the optimiser's state
    assert waits.total() <= 1 and mixed <= 2.1 * plain, (plain, mixed)


@pytest.mark.parametrize(
    "line",
    ["orca --task darcy --align none", "pare --task satellite", "proposed --task satellite"],
)
def test_a_device_without_float64_will_do(line, chip, tmp_path, monkeypatch):
    monkeypatch.setattr(Chip, "allow_double", False)
    module, cfg = settings(line, "", chip, tmp_path)
    assert math.isfinite(module.main(cfg)["val_error"])


def test_the_stand_in_is_strict(chip):
    there, here = torch.ones(3, device="chip"), torch.ones(3)
    for mixed in (lambda: there + here, lambda: torch.stack([there.sum(), torch.tensor(1.0)])):
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            mixed()
    with pytest.raises(RuntimeError, match="expected a generator of the chip"):
        torch.randn(3, generator=torch.Generator(), device="chip")
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
    Chip.waits.clear()
    there.sum().item(), there[there > 0], there.cpu(), here.to("chip")
    assert len(Chip.waits) == 4
    here.to("chip", non_blocking=True), there * 2, there.new_full((), 2.0)
    assert len(Chip.waits) == 4


# ---- 3. Several processes ------------------------------------------------------------------------

WORKER = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import torch.distributed as dist

import standin

kept = standin.register()
torch.Generator = standin.Generator
import orca, pare, proposed, run
from tasks.sources import words

run.draw_curves = lambda *given: None
words.texts = lambda: dict.fromkeys(words.CLASSES, open(orca.__file__, encoding="utf-8").read())

def of_the_device(name, place):
    real = getattr(dist, name)

    def collective(*given, **values):
        given = list(given)
        assert isinstance(given[place], standin.Chip), name + " of a tensor of the CPU"
        given[place] = given[place].raw
        return real(*given, **values)

    setattr(dist, name, collective)

of_the_device("all_reduce", 0)
of_the_device("broadcast", 0)
from tasks import darcy, satellite
for task in (darcy, satellite):
    task.TASK["sizes"] = {{"train": 20, "val": 9, "test": 9}}
scripts = {{"orca": orca, "pare": pare, "proposed": proposed}}
for argv in {runs!r}:
    script, *argv = argv.split()
    scripts[script].main(scripts[script].parse_args(argv))
"""


@pytest.mark.slow
def test_processes_talk_on_their_device_alone(chip, tmp_path):
    """As NCCL demands: an all-reduce or a broadcast of a tensor of the CPU fails."""
    runs = []
    for script, small in SMALL.items():
        task = {"pare": "darcy"}.get(script, "satellite")
        small += " --patches 64" if task in IMAGES else ""
        given = f"{script} --task {task} {small} --device chip --out {tmp_path / script}"
        runs.append(given.replace("--train-size 24", "--train-size 17"))  # the last batch: one row
    code = WORKER.format(root=str(ROOT), runs=runs)
    port = 20_000 + os.getpid() % 20_000
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], (
        said[0][-2000:] + said[1][-2000:]
    )
    assert said[0].count("result {") == 3 and "result {" not in said[1]


# ---- 4. CUDA alone -------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_waits_for_nothing_in_a_step(script, task, tmp_path, monkeypatch):
    """PyTorch itself raises where the host waits for the GPU."""
    batches = record.Record.batches

    def strict(self, loader):
        for batch in batches(self, loader):
            torch.cuda.set_sync_debug_mode("error")
            yield batch
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(record.Record, "batches", strict)
    more = {"orca": "--align none", "proposed": "--contrast none"}.get(script, "")
    module, cfg = settings(f"{script} --task {task} {more}", "", "cuda", tmp_path)
    try:
        module.main(cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@pytest.mark.parametrize("line", ["orca --task satellite --align none", "pare --task cifar100"])
def test_compilation_changes_nothing_on_cuda(line, tmp_path):
    plain = measured(*settings(line, "", "cuda", tmp_path / "a"))
    compiled = measured(*settings(line, "", "cuda", tmp_path / "b", "--compile"))
    assert compiled["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-3)


@on_cuda
def test_recomputation_saves_memory_and_changes_nothing(tmp_path):
    line, peak, loss = "orca --task darcy --align none --patches 256", {}, {}
    for more in ("", "--recompute"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loss[more] = measured(*settings(line, "", "cuda", tmp_path, more))["first_loss"]
        peak[more] = torch.cuda.max_memory_allocated()
    assert loss["--recompute"] == pytest.approx(loss[""], rel=1e-5)
    assert peak["--recompute"] < peak[""]


@on_cuda
def test_a_deterministic_run_repeats_itself_to_the_bit(tmp_path):
    """In processes of their own, since cuBLAS takes its workspace when it starts."""
    weights = []
    for name in ("a", "b"):
        argv = f"pare.py --task satellite {SMALL['pare']} --device cuda --deterministic"
        argv = [*argv.split(), "--out", str(tmp_path / name)]
        subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, timeout=120)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@on_cuda
def test_a_run_on_cuda_0_keeps_the_random_state_of_that_device(tmp_path):
    script, cfg = settings("pare --task satellite --gate random", "", "cuda:0", tmp_path)
    script.main(cfg)
    content = (tmp_path / "last.pt").read_bytes().partition(b"\n")[2]
    (random,) = torch.load(io.BytesIO(content), weights_only=True)["random"]
    assert random["cuda"].dtype == torch.uint8


@on_cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_load_data_for_cuda(workers, tmp_path):
    line = "orca --task cifar100 --align none"
    script, cfg = settings(line, "", "cuda", tmp_path, f"--workers {workers}")
    assert math.isfinite(script.main(cfg)["val_error"])


@on_cuda
def test_a_run_on_the_cpu_leaves_the_gpu_alone(tmp_path):
    code = f"""
        import torch
        import pare
        argv = "--task satellite {SMALL["pare"]} --device cpu --out {tmp_path / "run"}"
        pare.main(pare.parse_args(argv.split()))
        assert not torch.cuda.is_initialized()
    """
    done = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(done, cwd=ROOT, check=True, timeout=120)


@on_cuda
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"label_distance": "gaussian"},
        {"label_distance": "sinkhorn"},
        {"eps": 1e-2},
        {"eps": 1e-2, "debias": True},
    ],
)
def test_otdd_on_cuda(how):
    """Value and gradient, to 1e-4 in single precision."""
    rng = torch.Generator().manual_seed(0)
    x_s, x_t = torch.randn(300, 32, generator=rng), torch.randn(200, 32, generator=rng) + 0.5
    y_s, y_t = torch.arange(300) % 5, torch.arange(200) % 4
    found = []
    for device in ("cpu", "cuda"):
        x = x_t.detach().to(device).requires_grad_()
        value = otdd(x_s.to(device), y_s.to(device), x, y_t.to(device), **how)
        value.backward()
        found.append((float(value.detach()), x.grad.cpu()))
    (here, grad), (there, grad_there) = found
    assert there == pytest.approx(here, rel=1e-4)
    assert float((grad - grad_there).norm() / grad.norm()) < 1e-2


@on_cuda
@pytest.mark.parametrize("n", [100, 5000])
def test_mmd_on_cuda(n):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 32, generator=rng), torch.randn(n, 32, generator=rng) + 0.1
    here, there = mmd2(x, y), mmd2(x.to("cuda"), y.to("cuda"))
    assert float(there) == pytest.approx(float(here), rel=1e-4)


@on_cuda
@pytest.mark.parametrize("form", ["inner", "outer", "literal"])
def test_the_contrastive_loss_on_cuda(form):
    rng = torch.Generator().manual_seed(0)
    z, y = torch.randn(64, 16, generator=rng), torch.arange(64) % 8
    lam = contrast.label_weights(F.normalize(z, dim=1), y, 1.0)
    args = (z, y, lam, torch.rand(64, generator=rng))
    here = getattr(contrast, form)(*args, 0.2)[0]
    there = getattr(contrast, form)(*(v.to("cuda") for v in args), 0.2)[0]
    assert float(there) == pytest.approx(float(here), rel=1e-4)


@on_cuda
def test_tf32_is_off_unless_it_is_asked_for(tmp_path):
    script, cfg = settings("orca --task satellite --align none", "", "cuda", tmp_path)
    run.start(cfg)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    product = (a.to("cuda") @ a.to("cuda")).cpu()
    assert float((product - a @ a).abs().max()) < 1e-3


# ---- 5. The script for a GPU ---------------------------------------------------------------------


def test_gpu_sh_is_a_script_of_commands_that_exist():
    text = (ROOT / "results/gpu.sh").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(ROOT / "results/gpu.sh")], check=True)
    scripts = [word for word in text.split() if word.endswith(".py") and "*" not in word]
    for script in scripts:
        name = script.strip('"').replace("$script", "orca")
        assert (ROOT / name).exists(), name
    asked = subprocess.run(
        ["bash", str(ROOT / "results/gpu.sh"), "--nonsense"], capture_output=True, text=True
    )
    assert asked.returncode == 2 and "unknown argument --nonsense" in asked.stderr

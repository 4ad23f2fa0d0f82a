"""PaRe: the gate, the replacement, the schedule, the loss, and a whole run."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orca
import pare
import run as plumbing
import tasks
from tasks import metrics


def naive_replace(z_t, z_s, s_t, s_s, k):
    """(P3) by the slide's words: one sample, one patch at a time."""
    z_mix = z_t.clone()
    for b in range(len(z_t)):
        worst = sorted(range(z_t.shape[1]), key=lambda i: s_t[b, i].item())[:k]
        best = sorted(range(z_s.shape[1]), key=lambda i: -s_s[b, i].item())[:k]
        for i, j in zip(worst, best, strict=True):
            z_mix[b, i] = z_s[b, j]
    return z_mix


def patches(B=3, N=7, N_s=9, D=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    return make(B, N, D), make(B, N_s, D), torch.sigmoid(make(B, N)), torch.sigmoid(make(B, N_s))


def test_P1_scores_are_one_number_a_patch_in_0_1():
    gate = pare.Gate(5)
    z_t, z_s, *_ = patches()
    s_t, s_s = gate(z_t), gate(z_s)
    assert s_t.shape == (3, 7) and s_s.shape == (3, 9)
    want = 1 / (1 + torch.exp(-(z_t @ gate.linear.weight[0] + gate.linear.bias)))
    torch.testing.assert_close(s_t, want)


def test_P2_falls_linearly_from_k0_to_0():
    k = [pare.patches_to_replace(30, epoch, 16) for epoch in range(16)]
    assert k == [30 - 2 * epoch for epoch in range(16)]
    for k0, epochs in ((0, 5), (7, 3), (46, 60)):
        k = [pare.patches_to_replace(k0, epoch, epochs) for epoch in range(epochs)]
        assert k[0] == k0 and k[-1] == 0 and sorted(k, reverse=True) == k
    assert pare.patches_to_replace(9, 0, 1) == 9
    k = [pare.patches_to_replace(30, epoch, 11, k_end=10) for epoch in range(11)]
    assert k == [30 - 2 * epoch for epoch in range(11)]


@pytest.mark.parametrize("kind", pare.GATES)
def test_P1_kinds_of_gates(kind):
    torch.manual_seed(0)
    gate = pare.Gate(5, kind)
    z_t, z_s, *_ = patches()
    s_t, s_s = gate(z_t), gate(z_s, source=True)
    assert s_t.shape == (3, 7) and 0 < s_t.min() and s_t.max() < 1
    same_side = torch.equal(gate(z_s), s_s)
    assert same_side == (kind in ("shared", "none"))
    if kind == "none":  # the last target patches make way for the first source patches
        z_mix = pare.replace_patches(z_t, z_s, s_t, s_s, 3)
        torch.testing.assert_close(z_mix[:, :4], z_t[:, :4])
        torch.testing.assert_close(z_mix[:, 4:].flip(1), z_s[:, :3])
    z_mix = pare.replace_patches(z_t, z_s, gate(z_t), gate(z_s, source=True), 3)
    z_mix.square().sum().backward() if z_mix.requires_grad else None
    learns = [w.grad is not None for w in (gate.linear.weight, gate.linear_s.weight)]
    assert learns == {"shared": [True] * 2, "separate": [True] * 2}.get(kind, [False] * 2)


def test_P3_replaces_the_highest_if_asked():
    z_t, z_s, s_t, s_s = patches()
    z_mix = pare.replace_patches(z_t, z_s, s_t, s_s, 3, lowest=False)
    torch.testing.assert_close(z_mix, naive_replace(z_t, z_s, -s_t, s_s, 3), rtol=0, atol=0)


def test_P3_sampling_follows_the_scores_and_varies():
    """Gumbel's top k is a sample without replacement: odds exp(score / spread of the scores)."""
    torch.manual_seed(0)
    s = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).expand(20000, 5)
    first = pare.sampled(s).argmax(dim=1).bincount(minlength=5) / 20000
    want = torch.softmax(s[0] / s[0].std(), dim=0)
    torch.testing.assert_close(first, want, atol=0.015, rtol=0)
    z_t, z_s, s_t, s_s = patches()
    mixed = [pare.replace_patches(z_t, z_s, s_t, s_s, 3, "gumbel") for _ in range(30)]
    changed = torch.stack([(z_mix != z_t).any(dim=2) for z_mix in mixed])
    assert (changed.sum(dim=2) == 3).all() and len(changed.flatten(1).unique(dim=0)) > 5
    often, low = changed.float().mean(dim=0), s_t.argsort(dim=1)
    assert often.gather(1, low[:, :1]).mean() > often.gather(1, low[:, -1:]).mean() + 0.2


def test_P3_any_number_of_patches_on_both_sides():
    for N, N_s in ((7, 3), (3, 9), (1, 1)):
        z_t, z_s, s_t, s_s = patches(N=N, N_s=N_s)
        for k in range(min(N, N_s) + 1):
            z_mix = pare.replace_patches(z_t, z_s, s_t, s_s, k)
            torch.testing.assert_close(z_mix, naive_replace(z_t, z_s, s_t, s_s, k))


@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_P3_replaces_exactly_k_the_lowest_by_the_highest(k):
    z_t, z_s, s_t, s_s = patches()
    before = z_t.clone(), z_s.clone()
    z_mix = pare.replace_patches(z_t, z_s, s_t, s_s, k)
    torch.testing.assert_close(z_mix, naive_replace(z_t, z_s, s_t, s_s, k), rtol=0, atol=0)
    changed = (z_mix != z_t).any(dim=2)
    assert (changed.sum(dim=1) == k).all()
    if 0 < k < 7:  # every replaced target patch scores below every kept one
        assert (s_t[changed].view(3, k).amax(1) < s_t[~changed].view(3, 7 - k).amin(1)).all()
    assert torch.equal(z_t, before[0]) and torch.equal(z_s, before[1])  # nothing in place


def test_P3_gradient_reaches_the_gate_and_the_kept_patches():
    z_t, z_s, *_ = patches()
    z_t.requires_grad_()
    gate = pare.Gate(5)
    s_t = gate(z_t.detach())
    z_mix = pare.replace_patches(z_t, z_s, s_t, gate(z_s), 3)
    z_mix.square().sum().backward()
    assert gate.linear.weight.grad.abs().sum() > 0
    changed = (z_mix != z_t).any(dim=2)
    assert (z_t.grad[changed] == 0).all()
    torch.testing.assert_close(z_t.grad[~changed], 2 * z_t[~changed].detach())


def test_P3_gate_gradient_is_that_of_scores_as_weights():
    z_t, z_s, s_t, s_s = (a.double() for a in patches())
    s_t.requires_grad_(), s_s.requires_grad_()
    z_mix = pare.replace_patches(z_t, z_s, s_t, s_s, 3)
    c = torch.randn(z_mix.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    (z_mix * c).sum().backward()
    lowest = torch.zeros_like(s_t, dtype=torch.bool).scatter(1, s_t.topk(3, largest=False)[1], True)
    want = torch.where(lowest, 0.0, (z_t * c).sum(dim=2))
    torch.testing.assert_close(s_t.grad, want)
    assert ((s_s.grad != 0).sum(dim=1) == 3).all()


def test_P3_refuses_more_patches_than_there_are():
    with pytest.raises(ValueError, match="k=8 .* target has 7, source has 9"):
        pare.replace_patches(*patches(), 8)


def test_P4_both_readings_of_lambda():
    assert pare.mixing_weight("k/k0", 10, 40, 46) == 0.25
    assert pare.mixing_weight("k/N", 23, 40, 46) == 0.5
    assert pare.mixing_weight("k/k0", 0, 0, 46) == 0.0


class Toy(nn.Module):
    """A target model whose parts are simple enough to follow by hand."""

    def __init__(self):
        super().__init__()
        self.f_t = nn.Linear(5, 5)  # "patches" are the rows of x, (B, N, 5)
        self.g = lambda z: [torch.tanh(z)]
        self.h_t = pare.Predictor([((7,), 5)], (3,))


TOY = tasks.Source("toy", torch.arange(72).view(8, 9) % 20, torch.arange(8) % 4, list("abcd"))


def toy(seed=0, **given):
    """A model, a mixer, a task, a batch and settings that are simple enough to follow by hand."""
    torch.manual_seed(seed)
    model, table = Toy(), nn.Embedding(20, 5)
    mixer = pare.Mixer(table, TOY, [((7,), 5)], seed=3)
    task = type("task", (), {"loss": staticmethod(F.cross_entropy)})
    x, y = torch.randn(6, 7, 5), torch.randint(3, (6,))
    return model, mixer, task, x, y, pare.Config(k0=4, mix_weight=0.3, **given)


def by_hand(model, mixer, x, y, rows, k, cfg):
    """L_tar, and L_tar and L_src of the mixture, of (P5), (P6)."""
    z_t, z_s = model.f_t(x), mixer.f_s(TOY.x[rows])
    z_mix = naive_replace(z_t, z_s, mixer.gate(z_t), mixer.gate(z_s), k)
    p_mt, p_ms = model.h_t(model.g(z_mix)), mixer.h_s(model.g(z_mix))
    plain = F.cross_entropy(model.h_t(model.g(z_t)), y)
    return plain, F.cross_entropy(p_mt, y), F.cross_entropy(p_ms, TOY.y[rows])


@pytest.mark.parametrize("labels", ["on", "off"])
@pytest.mark.parametrize("lam", ["k/k0", "k/N"])
def test_P5_P6_loss_is_the_weighted_sum(lam, labels):
    model, mixer, task, x, y, cfg = toy(lam=lam, source_labels=labels)
    rows, k = mixer.draw(len(x)), 2
    assert torch.equal(rows, torch.randint(8, (6,), generator=torch.Generator().manual_seed(3)))
    target, source = mixer.losses(model, task, x, y, rows, k, cfg)
    plain, mt, ms = by_hand(model, mixer, x, y, rows, k, cfg)
    weight = {"k/k0": 2 / 4, "k/N": 2 / 7}[lam]
    torch.testing.assert_close(target, plain + 0.3 * (1 - weight) * mt)
    torch.testing.assert_close(source, 0.3 * weight * ms if labels == "on" else 0 * ms)


@pytest.mark.parametrize("lam", ["k/k0", "k/N"])
def test_P5_without_the_plain_loss_it_is_the_slide_s(lam):
    """(1 - lambda) L_tar + lambda L_src of weight 1, whatever --mix-weight says; (P5)."""
    model, mixer, task, x, y, cfg = toy(lam=lam, plain_target_loss="off")
    rows = mixer.draw(len(x))
    for k in (4, 2, 1):
        target, source = mixer.losses(model, task, x, y, rows, k, cfg)
        _, mt, ms = by_hand(model, mixer, x, y, rows, k, cfg)
        weight = k / {"k/k0": 4, "k/N": 7}[lam]
        torch.testing.assert_close(target, (1 - weight) * mt)
        torch.testing.assert_close(source, weight * ms)


def test_P5_the_loss_is_continuous_where_k_becomes_0():
    """Off: at k = 0 the mixture is the target, lambda is 0, and L_mix is the plain loss."""
    model, mixer, task, x, y, cfg = toy(plain_target_loss="off")
    rows = mixer.draw(len(x))
    target, source = mixer.losses(model, task, x, y, torch.empty(0), 0, cfg)
    torch.testing.assert_close(target, F.cross_entropy(model.h_t(model.g(model.f_t(x))), y))
    assert source == 0
    nearly, _ = mixer.losses(model, task, x, y, rows, 1, replace(cfg, k0=10**6))  # lambda = 1e-6
    _, mixed, _ = by_hand(model, mixer, x, y, rows, 1, cfg)
    torch.testing.assert_close(nearly, mixed)  # it differs from L_tar by one patch, not in weight


def test_P6_without_patches_is_the_plain_loss():
    """Times 1 + w: what the weights of L_tar tend to as k falls, so that nothing jumps there."""
    model, mixer, task, x, y, cfg = toy()
    target, source = mixer.losses(model, task, x, y, torch.empty(0), 0, cfg)
    plain = F.cross_entropy(model.h_t(model.g(model.f_t(x))), y)
    torch.testing.assert_close(target, 1.3 * plain)
    assert source == 0


@pytest.mark.parametrize("labels", ["on", "off"])
@pytest.mark.parametrize("plain", ["on", "off"])
def test_P6_parts_of_a_batch_with_unknown_targets_add_up(plain, labels):
    """L_src is a mean over samples, L_tar one over the targets that are known."""
    torch.manual_seed(0)
    model = Toy()
    mixer = pare.Mixer(nn.Embedding(20, 5), TOY, [((7,), 5)], seed=3)
    task = type("task", (), {"loss": staticmethod(metrics.mse)})
    weigh = functools.partial(metrics.terms, metrics.mse)
    x, y = torch.randn(6, 7, 5), torch.randn(6, 3)
    y[0], y[1, 1:] = float("nan"), float("nan")
    cfg = pare.Config(k0=4, lam="k/N", source_labels=labels, plain_target_loss=plain)
    rows, slopes = mixer.draw(len(x)), []
    for pieces in (1, 2, 3, 6):
        left = rows
        model.zero_grad(), mixer.zero_grad()
        for x_part, y_part, weight, portion in plumbing.parts((x, y), pieces, weigh):
            some, left = left[: len(x_part)], left[len(x_part) :]
            target, source = mixer.losses(model, task, x_part, y_part, some, 2, cfg)
            (weight * target + portion * source).backward()
        found = [p.grad for p in (*model.parameters(), *mixer.parameters()) if p.grad is not None]
        slopes.append(torch.cat([g.flatten() for g in found]))
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def run(series, tmp_path_factory):
    """A short run on a file of one's own."""
    out = tmp_path_factory.mktemp("runs") / "pare"
    cfg = pare.Config(task=str(series), epochs=4, source_size=64, body_lr=2e-3, out=str(out))
    return cfg, pare.main(cfg), out


def test_a_run_learns_and_writes_everything(run):
    cfg, result, out = run
    names = "config.json metrics.jsonl steps.csv curves.png model.safetensors result.json last.pt"
    names = names.split()
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    keys = "method task data body source seed metric test_error val_error epochs train_size spikes"
    keys += " time_s params_m device precision converged baselines"
    assert list(result) == keys.split()
    assert json.loads((out / "result.json").read_text()) == result
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["k"] for row in rows] == [16, 11, 5, 0]  # 70 % of 23 patches at first
    assert [round(row["lam"], 3) for row in rows] == [1.0, 0.688, 0.312, 0.0]
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert result["test_error"] < 0.5  # four classes: chance is 0.75


def test_the_same_seed_gives_the_same_result(run, tmp_path):
    cfg, result, out = run
    again = pare.main(pare.configure(**{**vars(cfg), "out": str(tmp_path / "again")}))
    assert {**again, "time_s": 0} == {**result, "time_s": 0}
    other = {**vars(cfg), "out": str(tmp_path / "other"), "seed": 1, "epochs": 1}
    assert pare.main(pare.configure(**other))["val_error"] != result["val_error"]


@pytest.mark.slow
def test_half_precision_stays_close(run, tmp_path):
    """In the first epoch, which is the same whatever number of epochs follows."""
    cfg, result, out = run
    half = {"out": str(tmp_path / "run"), "precision": "fp16", "epochs": 1, "schedule_epochs": 4}
    assert pare.main(pare.configure(**{**vars(cfg), **half}))["precision"] == "fp16"
    found = [
        np.genfromtxt(p / "steps.csv", delimiter=",", names=True) for p in (tmp_path / "run", out)
    ]
    for name in ("lr", "loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name][:3], rel=2e-2), name
    assert (found[0]["loss"] != found[1]["loss"][:3]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(run, tmp_path, precision):
    cfg, result, out = run
    gpu = {**vars(cfg), "out": str(tmp_path), "precision": precision, "device": "cuda"}
    assert abs(pare.main(pare.configure(**gpu))["val_error"] - result["val_error"]) < 0.3


def test_a_saved_model_is_the_target_model_alone(run, series):
    cfg, result, out = run
    model = pare.load(out)
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {"f_t", "g", "h_t"}
    arrays = np.load(series)
    with torch.no_grad():
        guess = model(torch.from_numpy(arrays["x_test"])[:, None]).argmax(dim=1).numpy()
    assert round(float((guess != arrays["y_test"]).mean()), 6) == result["test_error"]


def test_k0_beyond_the_patches_is_refused(series, tmp_path):
    cfg = pare.Config(task=str(series), k0=24, out=str(tmp_path / "no"))
    with pytest.raises(ValueError, match=r"--k0 24 exceeds the 23 patches of task .* choose 0..23"):
        pare.main(cfg)
    assert not (tmp_path / "no").exists()


def test_without_replacement_it_is_naive_fine_tuning(series, tmp_path):
    """k0 = 0 and ORCA without alignment take the same steps, gate and h^s aside."""
    common = {"task": str(series), "epochs": 2, "source_size": 64, "clip": 0.0}
    how = {"k0": 0, "plain_target_loss": "off"}  # of weight 1
    a = pare.main(pare.Config(**common, **how, out=str(tmp_path / "pare")))
    b = orca.main(orca.Config(**common, align="none", out=str(tmp_path / "orca")))
    assert a["val_error"] == b["val_error"] and a["test_error"] == b["test_error"]


FLAGS = ["--gate separate", "--gate random", "--gate none", "--select gumbel", "--replace highest"]
FLAGS += ["--k0 5", "--k-end 3", "--lam k/N", "--mix-weight 0.9"]
FLAGS += ["--plain-target-loss off", "--source-labels off"]


@pytest.fixture(scope="module")
def rows_with(series, small_body, tmp_path_factory):
    """What a short run logs with a flag, or with none."""

    def rows(flag):
        out = tmp_path_factory.mktemp("runs") / "run"
        argv = f"--task {series} --body {small_body} --epochs 4 --source-size 64 --out {out} {flag}"
        pare.main(pare.parse_args(argv.split()))
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return functools.cache(rows)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_changes_the_run(flag, rows_with):
    rows, plain = rows_with(flag), rows_with("")
    losses = [[row["train_loss"] for row in found] for found in (rows, plain)]
    assert losses[0] != losses[1]
    if flag == "--k-end 3":
        assert [row["k"] for row in rows] == [16, 12, 7, 3]


def test_k_end_beyond_k0_is_refused(series, tmp_path):
    cfg = pare.Config(task=str(series), k0=4, k_end=5, out=str(tmp_path / "no"))
    with pytest.raises(ValueError, match="--k-end 5 exceeds k0 = 4; choose 0..4"):
        pare.main(cfg)


def test_a_first_epoch_without_a_loss_is_refused():
    """lambda = 1 there: nothing of the target's labels, and the source's are left out."""
    off = {"plain_target_loss": "off", "source_labels": "off"}
    with pytest.raises(ValueError, match="leaves no loss in the first epoch.*--lam k/N"):
        pare.Config(**off)
    assert pare.Config(**off, lam="k/N").lam == "k/N"


def test_the_last_batch_is_mixed_as_well(series, tmp_path, monkeypatch):
    """87 samples in batches of 32: the last has 23, and the source follows."""
    sizes = []
    whole = pare.replace_patches

    def seen(z_t, z_s, *rest):
        sizes.append((len(z_t), len(z_s)))
        return whole(z_t, z_s, *rest)

    monkeypatch.setattr(pare, "replace_patches", seen)
    common = {"task": str(series), "epochs": 1, "source_size": 64, "k0": 3}
    pare.main(pare.Config(**common, out=str(tmp_path / "run")))
    assert sizes == [(32, 32), (32, 32), (23, 23)]


def test_a_single_patch_is_sampled_without_a_spread():
    """Its noise was NaN times infinity."""
    score = torch.rand(4, 1)
    assert torch.equal(pare.sampled(score), score)

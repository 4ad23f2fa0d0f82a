"""PaRe: the gate, the replacement, the schedule, the loss, and a whole run."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orca
import pare
import tasks


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


@pytest.mark.parametrize("lam", ["k/k0", "k/N"])
def test_P5_P6_loss_is_the_weighted_sum(lam):
    torch.manual_seed(0)
    model = Toy()
    table = nn.Embedding(20, 5)
    source = tasks.Source("toy", torch.randint(20, (8, 9)), torch.randint(4, (8,)), list("abcd"))
    mixer = pare.Mixer(table, source, [((7,), 5)], seed=3)
    task = type("task", (), {"loss": staticmethod(F.cross_entropy)})
    x, y, k = torch.randn(6, 7, 5), torch.randint(3, (6,)), 2
    cfg = pare.Config(k0=4, lam=lam, mix_weight=0.3)
    got = mixer.loss(model, task, x, y, k, cfg)

    rows = torch.randint(8, (6,), generator=torch.Generator().manual_seed(3))
    z_t, z_s = model.f_t(x), table(source.x[rows])
    z_mix = naive_replace(z_t, z_s, mixer.gate(z_t), mixer.gate(z_s), k)
    ce, weight = F.cross_entropy, {"k/k0": 2 / 4, "k/N": 2 / 7}[lam]
    p_mt, p_ms = model.h_t(model.g(z_mix)), mixer.h_s(model.g(z_mix))
    l_mix = (1 - weight) * ce(p_mt, y) + weight * ce(p_ms, source.y[rows])
    want = ce(model.h_t(model.g(z_t)), y) + 0.3 * l_mix
    torch.testing.assert_close(got, want)


def test_P6_without_patches_is_the_plain_loss():
    torch.manual_seed(0)
    model, x, y = Toy(), torch.randn(6, 7, 5), torch.randint(3, (6,))
    source = tasks.Source("toy", torch.zeros(8, 9, dtype=torch.long), torch.zeros(8).long(), ["a"])
    mixer = pare.Mixer(nn.Embedding(2, 5), source, [((7,), 5)], seed=0)
    task = type("task", (), {"loss": staticmethod(F.cross_entropy)})
    got = mixer.loss(model, task, x, y, 0, pare.Config(k0=4))
    torch.testing.assert_close(got, F.cross_entropy(model.h_t(model.g(model.f_t(x))), y))


@pytest.fixture(scope="module")
def run(series, tmp_path_factory):
    """A short run on a file of one's own."""
    out = tmp_path_factory.mktemp("runs") / "pare"
    cfg = pare.Config(task=str(series), epochs=4, source_size=64, out=str(out))
    return cfg, pare.main(cfg), out


def test_a_run_learns_and_writes_everything(run):
    cfg, result, out = run
    names = "config.json metrics.jsonl steps.csv curves.png model.safetensors result.json".split()
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    keys = "method task data body source align seed metric test_error val_error epochs train_size"
    assert list(result) == [*keys.split(), "time_s", "params_m", "device", "precision"]
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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(run, tmp_path, precision):
    cfg, result, out = run
    half = {**vars(cfg), "out": str(tmp_path), "precision": precision}
    assert abs(pare.main(pare.configure(**half))["val_error"] - result["val_error"]) < 0.3


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
    a = pare.main(pare.Config(**common, k0=0, out=str(tmp_path / "pare")))
    b = orca.main(orca.Config(**common, align="none", out=str(tmp_path / "orca")))
    assert a["val_error"] == b["val_error"] and a["test_error"] == b["test_error"]

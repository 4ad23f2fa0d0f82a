"""The errors against numbers worked out by hand and against scikit-learn, and the losses."""

import math
import time
from functools import partial

import numpy as np
import pytest
import torch

from tasks import metrics

NAN = math.nan


def t(*rows):
    return torch.tensor(rows)


def logits(classes, num_classes):
    """Logits whose largest entry is that of the given class."""
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def scores(n, K, seed, distinct=None):
    """Random scores (rounded to few values, for ties, if asked) and rare labels that follow them"""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(n, K))
    y = (score + rng.normal(size=(n, K)) > 1).astype(np.float32)
    score = np.round(score * distinct) / distinct if distinct else score
    return torch.from_numpy(score).float(), torch.from_numpy(y)


# ---- by hand ---------------------------------------------------------------------------------


def test_zero_one_by_hand():
    assert metrics.zero_one(logits([0, 1, 1, 0], 2), t(0, 1, 0, 0)) == 0.25


def test_macro_f1_by_hand():
    # class 0: TP 2, FP 1, FN 0, F1 4/5; class 1: TP 0, FP 0, FN 1, F1 0; class 2: TP 1, F1 1
    got = metrics.macro_f1(logits([0, 0, 0, 2], 3), t(0, 0, 1, 2))
    assert got == pytest.approx(1 - (4 / 5 + 0 + 1) / 3)
    # a fourth class that is nowhere is left out; one that is only predicted counts as 0
    assert metrics.macro_f1(logits([0, 0, 0, 2], 4), t(0, 0, 1, 2)) == pytest.approx(got)
    assert metrics.macro_f1(logits([0, 3], 4), t(0, 0)) == pytest.approx(1 - (2 / 3 + 0) / 2)


def test_mean_ap_by_hand():
    out = t(4.0, 3.0, 2.0, 1.0)[:, None]
    # positives at ranks 1 and 3: (1/1 + 2/3) / 2
    assert metrics.mean_ap(out, t(1.0, 0.0, 1.0, 0.0)[:, None]) == pytest.approx(1 - 5 / 6)
    # a tie of one positive and one negative at ranks 2 and 3 is one step of precision 2/3
    tied = t(4.0, 3.0, 3.0, 1.0)[:, None]
    for y in (t(1.0, 1.0, 0.0, 0.0), t(1.0, 0.0, 1.0, 0.0)):
        assert metrics.mean_ap(tied, y[:, None]) == pytest.approx(1 - (1 + 2 / 3) / 2)
    # all equal: the share of positives
    assert metrics.mean_ap(torch.zeros(4, 1), t(1.0, 0.0, 0.0, 0.0)[:, None]) == 0.75
    # a label without a positive is left out of the mean
    y = torch.stack([t(1.0, 0.0, 1.0, 0.0), torch.zeros(4)], 1)
    assert metrics.mean_ap(out.expand(4, 2), y) == pytest.approx(1 - 5 / 6)
    # and so is an unknown sample: without rank 2, (1/1 + 2/2) / 2
    assert metrics.mean_ap(out, t(1.0, NAN, 1.0, 0.0)[:, None]) == pytest.approx(0)


def test_auroc_by_hand():
    out = t(4.0, 3.0, 2.0, 1.0)[:, None]
    # pairs: 4 > 3, 4 > 1, 2 < 3, 2 > 1
    assert metrics.auroc(out, t(1.0, 0.0, 1.0, 0.0)[:, None]) == 0.25
    # a tie is half a pair: 3 = 3, 3 > 1
    assert metrics.auroc(t(3.0, 3.0, 1.0)[:, None], t(1.0, 0.0, 0.0)[:, None]) == 0.25
    assert metrics.auroc(torch.zeros(4, 1), t(1.0, 0.0, 0.0, 0.0)[:, None]) == 0.5
    # the mean over labels that have both kinds
    y = torch.stack([t(1.0, 0.0, 1.0, 0.0), t(1.0, 1.0, 0.0, 0.0), torch.ones(4)], 1)
    assert metrics.auroc(out.expand(4, 3), y) == pytest.approx((0.25 + 0) / 2)


def test_auroc_of_masks_is_one_area_over_the_known_pixels():
    out = t([[[4.0, 3.0]]], [[[2.0, 1.0]]])  # (2, 1, 1, 2)
    assert metrics.auroc(out, t([[[1.0, 0.0]]], [[[1.0, 0.0]]])) == 0.25  # 0 in each picture alone
    assert metrics.auroc(out, t([[[1.0, NAN]]], [[[1.0, 0.0]]])) == 0


def test_relative_l2_by_hand():
    y = t([[3.0, 4.0]], [[6.0, 8.0]])  # norms 5 and 10
    out = y + t([[0.0, 1.0]], [[3.0, 4.0]])  # gaps 1 and 5
    assert metrics.relative_l2(out, y) == pytest.approx((1 / 5 + 5 / 10) / 2)
    assert metrics.relative_l2(torch.zeros_like(y), y) == pytest.approx(1)
    assert float(metrics.relative_l2_loss(out, y)) == pytest.approx(0.35)
    nrmse = [math.sqrt(0.5) / math.sqrt(12.5), math.sqrt(12.5) / math.sqrt(50)]  # as PDEBench's
    assert metrics.relative_l2(out, y) == pytest.approx(sum(nrmse) / 2)
    assert metrics.relative_l2(out, t([[3.0, 4.0]], [[6.0, NAN]])) == pytest.approx(
        (1 / 5 + 3 / 6) / 2
    )


def test_relative_l2_is_per_channel_as_pdebench_has_it():
    y = t([[3.0, 4.0], [0.0, 0.1]], [[6.0, 8.0], [0.0, 2.0]])  # (samples, channels, points)
    out = y + t([[0.0, 1.0], [0.0, 0.1]], [[3.0, 4.0], [0.0, 1.0]])
    each = [1 / 5, 0.1 / 0.1, 5 / 10, 1 / 2]  # flattened, the first sample would have 0.2 instead
    assert metrics.relative_l2(out, y) == pytest.approx(sum(each) / 4)
    assert metrics.relative_l2(out[..., None], y[..., None]) == pytest.approx(sum(each) / 4)
    assert float(metrics.relative_l2_loss(out, y)) == pytest.approx(sum(each) / 4)
    gap, size = ((v**2).mean(-1).sqrt() for v in (out - y, y))  # PDEBench's metrics.py
    assert metrics.relative_l2(out, y) == pytest.approx(float((gap / size).mean(0).mean()))
    y[0, 1] = NAN  # a channel that is unknown is left out, not its sample
    assert metrics.relative_l2(out, y) == pytest.approx((each[0] + each[2] + each[3]) / 3)


LOSSES = {
    "cross entropy": metrics.cross_entropy,
    "bce": partial(metrics.bce, pos_weight=3.0),
    "mse": partial(metrics.mse, clip=1.0, scale=2.0),
    "relative l2": metrics.relative_l2_loss,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_parts_of_a_batch_add_up_to_it_whatever_is_unknown(name, size):
    rng = torch.Generator().manual_seed(0)
    loss, out = LOSSES[name], torch.randn(6, 2, 5, generator=rng, dtype=torch.float64)
    y = torch.rand(out.shape, generator=rng, dtype=torch.float64) + 0.1
    y = y.round() if name == "bce" else y
    y[torch.rand(y.shape, generator=rng) < 0.4] = NAN
    y[0], y[3, 1] = NAN, NAN  # a part of one sample without any target, and an unknown channel
    if name == "cross entropy":
        out, y = out[:, :, 0], torch.tensor([0, 1, 1, 0, 1, 0])
    out.requires_grad_()
    parts = list(zip(out.split(size), y.split(size), strict=True))
    total = sum(metrics.terms(loss, part) for _, part in parts)
    assert total == metrics.terms(loss, y) > 0
    summed = sum(metrics.terms(loss, b) * loss(a, b) for a, b in parts) / total
    torch.testing.assert_close(summed, loss(out, y), rtol=1e-12, atol=0)
    grads = [
        torch.autograd.grad(value, out, retain_graph=True)[0] for value in (summed, loss(out, y))
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["bce", "mse", "relative l2"])
def test_a_part_without_targets_has_no_loss_no_gradient_and_no_weight(name):
    loss, y = LOSSES[name], torch.full((2, 1, 4), NAN)
    out = torch.ones(2, 1, 4, requires_grad=True)
    assert metrics.terms(loss, y) == 0 and loss(out, y) == 0
    assert (torch.autograd.grad(loss(out, y), out)[0] == 0).all()


def test_relative_rmse_by_hand():
    y = t([1.0, 10.0], [3.0, 30.0])  # about the means 2, 20: gaps 1, 10
    assert metrics.relative_rmse(y.mean(0).expand(2, 2), y) == pytest.approx(1)
    assert metrics.relative_rmse(y, y) == 0
    assert metrics.relative_rmse(y + 5, y) == pytest.approx(5 / math.sqrt((1 + 100) / 2))
    hidden = t([1.0, 10.0], [3.0, NAN])  # entry 2 is its own mean: gaps 1, 1, 0
    assert metrics.relative_rmse(y + 5, hidden) == pytest.approx(5 / math.sqrt(2 / 3))


def test_mae8_by_hand():
    y = torch.full((2, 1, 30, 30), 20.0)
    y[0, 0, 0, 24], y[0, 0, 2, 27], y[0, 0, 0, 23] = 8.0, 4.0, 5.0  # the last is too close by
    y[1, 0, 5, 29] = 6.0
    y = torch.minimum(y, y.mT)
    out = y.clone()
    out[0, 0, 0, 24], out[0, 0, 24, 0] = 9.0, 11.0  # symmetrised: 10, off by 2
    out[0, 0, 2, 27] = out[0, 0, 27, 2] = -7.0  # floored at 0.01, off by 3.99
    out[1, 0, 5, 29] = 7.0  # symmetrised: 6.5
    assert metrics.mae8(out, y) == pytest.approx(((2 + 3.99) / 2 + 0.5) / 2)
    out[0, 0, 0, 23] = out[0, 0, 3, 29] = 99.0  # neither is a contact that counts
    assert metrics.mae8(out, y) == pytest.approx(((2 + 3.99) / 2 + 0.5) / 2)
    y[0, 0, :, 27:] = y[0, 0, 27:] = NAN  # padding
    assert metrics.mae8(out, y) == pytest.approx((2 + 0.5) / 2)
    y[1] = 20.0  # a protein without a pair
    assert metrics.mae8(out, y) == pytest.approx(2)


def test_losses_by_hand():
    half = math.log(2)
    assert float(metrics.cross_entropy(torch.zeros(3, 2), t(0, 1, 1))) == pytest.approx(half)
    out, y = torch.zeros(2, 2), t([1.0, 0.0], [NAN, 0.0])
    assert float(metrics.bce(out, y)) == pytest.approx(half)
    assert float(metrics.bce(out, y, pos_weight=4.0)) == pytest.approx((4 + 1 + 1) / 3 * half)
    out, y = t([1.0, 2.0, 9.0]), t([3.0, NAN, 100.0])
    assert float(metrics.mse(out, y)) == pytest.approx((4 + 91**2) / 2)
    assert float(metrics.mse(out, y, clip=16.0)) == pytest.approx((4 + 49) / 2)
    assert float(metrics.mse(out, y, clip=16.0, scale=10.0)) == pytest.approx(53 / 200)


@pytest.mark.parametrize("loss", [metrics.bce, metrics.mse, metrics.relative_l2_loss])
def test_losses_have_no_gradient_where_the_target_is_unknown(loss):
    out = torch.ones(2, 1, 2, 2, requires_grad=True)
    y = torch.ones(2, 1, 2, 2)
    y[0, 0, 0, 0], y[1, 0, 1] = NAN, 0.0
    (grad,) = torch.autograd.grad(loss(out, y), out)
    assert grad.isfinite().all() and grad[0, 0, 0, 0] == 0 and (grad[1, 0, 1] != 0).all()


def test_relative_l2_loss_has_a_gradient_at_a_perfect_prediction():
    out = torch.ones(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(metrics.relative_l2_loss(out, torch.ones(2, 3)), out)
    assert (grad == 0).all()


# ---- against scikit-learn --------------------------------------------------------------------


@pytest.mark.parametrize("distinct", [None, 3, 1])
def test_rankings_agree_with_scikit_learn(distinct):
    oracle = pytest.importorskip("sklearn.metrics")
    out, y = scores(500, 7, seed=1, distinct=distinct)
    y[:, 3] = 0  # AP and AUROC are undefined there
    kept = [k for k in range(7) if k != 3]
    ap = [oracle.average_precision_score(y[:, k], out[:, k]) for k in kept]
    area = [oracle.roc_auc_score(y[:, k], out[:, k]) for k in kept]
    assert metrics.mean_ap(out, y) == pytest.approx(1 - np.mean(ap), abs=1e-12)
    assert metrics.auroc(out, y) == pytest.approx(1 - np.mean(area), abs=1e-12)


def test_masks_agree_with_scikit_learn():
    oracle = pytest.importorskip("sklearn.metrics")
    out, y = (v.view(10, 1, 20, 30) for v in scores(6000, 1, seed=2, distinct=10))
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.2] = NAN
    known = ~y.isnan()
    want = 1 - oracle.roc_auc_score(y[known], out[known])
    assert metrics.auroc(out, y) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_agrees_with_scikit_learn(seed):
    oracle = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(seed)
    out, y = torch.randn(30, 12, generator=rng), torch.randint(0, 10, (30,), generator=rng)
    want = 1 - oracle.f1_score(y, out.argmax(1), average="macro", zero_division=0)
    assert metrics.macro_f1(out, y) == pytest.approx(want, abs=1e-12)


def test_auroc_of_seven_million_pixels_takes_seconds():
    rng = torch.Generator().manual_seed(0)
    y = (torch.rand(427, 1, 128, 128, generator=rng) < 0.05).float()
    out = torch.randn(y.shape, generator=rng) + y  # one standard deviation: area Phi(1/sqrt(2))
    start = time.perf_counter()
    got = metrics.auroc(out, y)
    assert time.perf_counter() - start < 15
    assert 1 - got == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=2e-3)


# ---- what is refused -------------------------------------------------------------------------

ONE, TWO = torch.zeros(4, 1), torch.zeros(4, 2)
MASK, MAP = torch.zeros(2, 1, 3, 3), torch.full((1, 1, 30, 30), 9.0)
ZERO_CHANNEL = torch.cat([MAP, 0 * MAP], dim=1)
NAMES = "zero_one macro_f1 mean_ap auroc relative_l2 relative_rmse mae8".split()


@pytest.mark.parametrize(
    ("name", "out", "y", "message"),
    [
        ("zero_one", TWO, t([0], [1], [0], [1]), "needs logits"),
        ("macro_f1", TWO[:, 0], t(0, 1, 0, 1), "macro F1 needs logits"),
        ("macro_f1", TWO[:0], t(0)[:0], "n >= 1"),
        ("macro_f1", TWO, t(0, 1, 2, 1), r"integer labels 0\.\.1"),
        ("zero_one", TWO, t(0, -1, 0, 1), r"integer labels 0\.\.1"),
        ("zero_one", TWO, t(0.0, 1.0, 0.0, 1.0), "integer labels"),
        ("mean_ap", TWO, ONE, r"one shape needed, got \(4, 2\), \(4, 1\)"),
        ("mean_ap", TWO[:, 0], TWO[:, 0], r"average precision needs labels \(n, K\) or masks"),
        ("mean_ap", ONE, ONE + 0.5, "labels that are 0, 1 or NaN"),
        ("mean_ap", ONE, ONE, "no label has a positive sample"),
        ("auroc", TWO, ONE, "one shape needed"),
        ("auroc", TWO[:, 0], TWO[:, 0], r"labels \(n, K\) or masks \(n, C, ...\), got \(4,\)"),
        ("auroc", ONE, ONE + 2, "labels that are 0, 1 or NaN"),
        ("auroc", ONE, ONE, "no label has a positive and a negative"),
        ("auroc", MASK, MASK + 1, "no label has a positive and a negative"),
        ("auroc", MASK, MASK * NAN, "no label has a positive and a negative"),
        ("relative_l2", TWO, ONE, "one shape needed"),
        ("relative_l2", TWO, TWO, "zero or unknown everywhere; leave such"),
        ("relative_l2", MAP.expand(1, 2, 30, 30), ZERO_CHANNEL, "zero or unknown everywhere"),
        ("relative_l2", TWO, TWO * NAN, "zero or unknown everywhere"),
        ("relative_l2", TWO[:0], TWO[:0], "zero or unknown everywhere"),
        ("relative_l2", TWO, TWO + math.inf, "infinite values"),
        ("relative_rmse", TWO, ONE, "one shape needed"),
        ("relative_rmse", TWO, TWO, "do not vary from sample to sample; more samples"),
        ("relative_rmse", TWO, TWO * NAN, "do not vary"),
        ("mae8", TWO, ONE, "one shape needed"),
        ("mae8", MAP[:, :, 1:], MAP[:, :, 1:], r"distance maps \(n, 1, L, L\), got"),
        ("mae8", MAP, MAP, "no pair with j - i >= 24 within 8 Angstrom"),
        ("mae8", MAP, MAP * NAN, "no pair"),
        ("bce", TWO, ONE, "one shape needed"),
        ("mse", TWO, ONE, "one shape needed"),
    ],
)
def test_what_has_no_meaning_is_refused(name, out, y, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, name)(out, y)


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_that_are_not_finite_are_refused(name, bad):
    out, y = TWO.clone(), t([0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    if name in ("zero_one", "macro_f1"):
        y = t(0, 1, 0, 1)
    if name == "mae8":
        out, y = MAP.clone(), MAP - 3
    assert math.isfinite(getattr(metrics, name)(out, y))
    out.view(-1)[1] = bad
    with pytest.raises(FloatingPointError, match="predictions are not finite"):
        getattr(metrics, name)(out, y)


def test_auroc_of_masks_is_that_of_each_channel_s_points():
    rng = torch.Generator().manual_seed(0)
    out, y = torch.randn(5, 2, 7, generator=rng), torch.rand(5, 2, 7, generator=rng).round()
    each = [metrics.auroc(out[:, c].reshape(-1, 1), y[:, c].reshape(-1, 1)) for c in (0, 1)]
    assert metrics.auroc(out, y) == pytest.approx(sum(each) / 2)
    assert metrics.auroc(out[..., None], y[..., None]) == pytest.approx(sum(each) / 2)

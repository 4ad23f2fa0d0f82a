"""Noise of many scales, the contrastive loss, labels kept, prediction from perturbed features."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import contrast


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def points(B=24, d=5, K=4, seed=0):
    """Outputs, labels, weights lambda and probabilities P of a batch."""
    make = rng(seed)
    z, y = torch.randn(B, d, generator=make).double(), torch.arange(B) % K
    u = F.normalize(torch.randn(K, 6, generator=make).double(), dim=1)[y]
    P = torch.rand(B, generator=make).double()
    return z, y, contrast.label_weights(u, y, 0.5), P


# ---- noise ----


def test_N1_each_step_adds_noise_to_the_one_before():
    d, sigma = torch.randn(6, 3, generator=rng()), 0.3
    steps, source = contrast.chain(d, sigma, 4, rng(1)), rng(1)
    for step in steps:
        d = (1 - sigma**2) ** 0.5 * d + sigma * torch.randn(6, 3, generator=source)
        torch.testing.assert_close(step, d)


@pytest.mark.parametrize("sigma", [0.05, 0.4])
def test_N1_N2_the_chain_and_its_closed_form_have_the_same_moments(sigma):
    n, T = 200_000, 5
    d = torch.tensor([2.0, -1.0]).expand(n, 2)
    steps = contrast.chain(d, sigma, T, rng(1))
    a, s = contrast.noise_levels([sigma], T)
    for t in range(1, T + 1):
        once = contrast.perturb(d, a[t].expand(n), s[t].expand(n), rng(2))
        for found in (steps[t - 1], once):
            torch.testing.assert_close(found.mean(0), a[t] * d[0], atol=0.01, rtol=0)
            torch.testing.assert_close(found.std(0), s[t].expand(2), atol=0.01, rtol=0)


def test_N2_levels_are_all_scales_and_steps_after_no_noise():
    a, s = contrast.noise_levels([0.1, 0.5], 3)
    assert a.shape == s.shape == (7,) and (a[0], s[0]) == (1, 0)
    want = [math.sqrt(1 - sigma**2) ** t for sigma in (0.1, 0.5) for t in (1, 2, 3)]
    torch.testing.assert_close(a[1:], torch.tensor(want))
    torch.testing.assert_close(a**2 + s**2, torch.ones(7))


def test_N2_draws_have_the_noise_they_say():
    d = torch.randn(40, 500, generator=rng()).repeat(10, 1)
    a, s = contrast.noise_levels([0.2, 0.6], 2)
    level, source = torch.randint(5, (400,), generator=rng(1)), rng(2)
    a, s = a[level], s[level]
    noisy = contrast.perturb(d, a, s, source)
    noise = noisy - a[:, None] * d
    torch.testing.assert_close(noise.std(dim=1), s, atol=0.08, rtol=0)
    assert torch.equal(noisy[s == 0], d[s == 0]) and len(s.unique()) == 5
    assert not torch.equal(noisy, contrast.perturb(d, a, s, source))
    assert torch.equal(noisy, contrast.perturb(d, a, s, rng(2)))


# ---- the contrastive loss ----


LOSSES = {"inner": contrast.inner, "outer": contrast.outer, "literal": contrast.literal}


def naive(z, y, lam, P, tau, kind):
    """(N3) by the slide's words: one class, one pair at a time."""
    cos = lambda i, j: float(z[i] @ z[j] / z[i].norm() / z[j].norm())  # noqa: E731
    w = lambda i, j: float(P[i] * P[j])  # noqa: E731
    B, total, left_out, classes = len(z), [], 0, 0
    for Y in y.unique():
        own = [i for i in range(B) if y[i] == Y]
        if len(own) < 2:
            continue
        classes += 1
        if kind == "literal":
            top = sum(w(i, j) * cos(i, j) for i in own for j in own)
            bottom = sum(w(i, j) * float(lam[i, j]) * cos(i, j) for i in own for j in range(B))
            if top > 0 and bottom > 0:
                total.append(-math.log(top / bottom))
            else:
                left_out += 1
            continue
        e = lambda i, j: w(i, j) * math.exp(cos(i, j) / tau)  # noqa: E731
        others = lambda i: [j for j in range(B) if j != i]  # noqa: E731
        below = {i: sum(float(lam[i, j]) * e(i, j) for j in others(i)) for i in own}
        if kind == "inner":
            top = sum(e(i, j) for i in own for j in own if i != j)
            total.append(-math.log(top / sum(below.values())))
        else:
            each = []
            for i in own:
                pairs = [j for j in own if j != i]
                share = sum(w(i, j) for j in pairs)
                log = sum(w(i, j) / share * -math.log(e(i, j) / below[i]) for j in pairs)
                each.append(float(P[i]) * log)
            total.append(sum(each) / sum(float(P[i]) for i in own))
    return sum(total) / len(total) if total else 0.0, left_out / classes


@pytest.mark.parametrize("kind", ["inner", "outer", "literal"])
@pytest.mark.parametrize("seed", range(3))
def test_N3_is_the_sum_over_pairs(kind, seed):
    z, y, lam, P = points(B=17, seed=seed)
    y[-1] = 9  # alone in its class: a negative for the others, without a loss of its own
    lam[-1, :-1] = lam[:-1, -1] = 1.7
    loss, undefined = LOSSES[kind](z, y, lam, P, 0.3)
    want, left_out = naive(z, y, lam, P, 0.3, kind)
    assert float(loss) == pytest.approx(want, rel=1e-6)
    assert undefined == pytest.approx(left_out)


@pytest.mark.parametrize("kind", ["inner", "outer"])
@pytest.mark.parametrize("tau", [0.05, 0.2, 5.0])
def test_N3_is_not_negative_and_finite_whatever_the_cosines(kind, tau):
    for seed in range(20):
        z, y, lam, P = points(d=2, seed=seed)
        z.requires_grad_()
        loss, undefined = LOSSES[kind](z, y, lam, P * (seed % 2), tau)
        loss.backward()
        assert loss >= 0 and undefined == 0 and z.grad.isfinite().all()
    opposite = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])  # equal labels, cosine -1
    y = torch.tensor([0, 0, 1, 1])
    loss, _ = LOSSES[kind](opposite, y, torch.ones(4, 4), torch.ones(4), tau)
    assert loss.isfinite() and loss > math.log(2)


@pytest.mark.parametrize("kind", ["inner", "outer", "literal"])
def test_N3_does_not_depend_on_the_order_or_the_length(kind):
    z, y, lam, P = points()
    order = torch.randperm(len(z), generator=rng(3))
    a = LOSSES[kind](z, y, lam, P, 0.2)[0]
    moved = (3 * z[order], y[order] + 5, lam[order][:, order], P[order])
    torch.testing.assert_close(LOSSES[kind](*moved, 0.2)[0], a)


@pytest.mark.parametrize("kind", ["inner", "outer", "literal"])
def test_N3_falls_as_classes_come_apart(kind):
    y, ones = torch.arange(24) % 4, torch.ones(24)
    lam = torch.where(y[:, None] == y, 1.0, 2.0)
    noise = torch.randn(24, 8, generator=rng()) / 8
    apart = F.one_hot(y, 8) + noise
    mixed = F.one_hot(y[torch.randperm(24, generator=rng(1))], 8) + noise
    losses = [LOSSES[kind](z, y, lam, ones, 0.2)[0] for z in (apart, mixed)]
    assert losses[0] < losses[1] - 0.5


def test_N3_doubtful_points_weigh_less():
    """A point without weight changes nothing; and of the slide's form nothing is infinite."""
    z, y, lam, P = points(B=16)
    P[:] = 1
    P[3] = 1e-6
    keep = torch.arange(16) != 3
    less = (z[keep], y[keep], lam[keep][:, keep], P[keep])
    for kind in ("inner", "outer", "literal"):
        a, b = (LOSSES[kind](*x, 0.2)[0] for x in ((z, y, lam, P), less))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_N3_says_where_the_slide_s_form_is_undefined():
    z = torch.tensor([[1.0, 0], [-0.9, 0.1], [0.0, 1], [0.1, 1]]).requires_grad_()
    y, lam = torch.tensor([0, 0, 1, 1]), torch.ones(4, 4)
    P = torch.tensor([1.0, 1, 1, 1])
    close = z.detach().clone()
    close[1] = -close[0]  # the cosines of class 0 add up to 0
    loss, undefined = contrast.literal(close, y, lam, P)
    assert undefined == 0.5 and loss.isfinite()
    loss, undefined = contrast.literal(torch.zeros(4, 2, requires_grad=True), y, lam, P)
    loss.backward()
    assert undefined == 1 and loss == 0


@pytest.mark.parametrize("kind", list(LOSSES))
def test_N3_needs_a_pair(kind):
    alone = (torch.randn(3, 2), torch.arange(3), torch.ones(3, 3), torch.ones(3), 0.2)
    with pytest.raises(ValueError, match="no two points of the batch have one label"):
        LOSSES[kind](*alone)


def test_N4_is_1_for_equal_labels_and_grows_as_labels_differ():
    u = F.normalize(torch.tensor([[1.0, 0], [1, 0], [1, 1], [0, 1], [-1, 0]]), dim=1)
    lam = contrast.label_weights(u, torch.tensor([0, 0, 1, 2, 3]), 0.25)
    assert torch.equal(lam, lam.T) and (lam.diagonal() == 1).all() and lam[0, 1] == 1
    torch.testing.assert_close(lam[0, 2], torch.tensor(1.25 / (0.5**0.5 + 0.25)))
    assert lam[0, 3] == lam[0, 4] == 1.25 / 0.25  # what correlates negatively counts as 0
    assert (contrast.label_weights(u, torch.zeros(5), 0.25) == 1).all()


# ---- is the label preserved? ----


HEADS = {
    "linear": lambda: nn.Linear(32, 5),
    "mlp": lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 5)),
}


@pytest.mark.parametrize("kind", list(HEADS))
@pytest.mark.parametrize(("sigma", "error"), [(0.1, 0.02), (0.3, 0.07)])
def test_N5_margin_agrees_with_monte_carlo(kind, sigma, error):
    torch.manual_seed(0)
    head, d, s = HEADS[kind](), torch.randn(200, 32), torch.full((200,), sigma)
    a, y = (1 - s**2).sqrt(), head(d).argmax(dim=1)
    P = contrast.preserved_by_margin(head, d, y, a, s)
    with torch.no_grad():
        draws = [head(contrast.perturb(d, a, s, rng(i))).argmax(dim=1) == y for i in range(400)]
    want = torch.stack(draws).float().mean(dim=0)
    assert (P - want).abs().mean() < error and torch.corrcoef(torch.stack([P, want]))[0, 1] > 0.95
    # bounds by the norm of the change are far from it, the slide's farthest
    noisy = contrast.perturb(d, a, s, rng(1))
    C = contrast.margin(head(d), y)
    bound = contrast.preserved_by_jacobian(head, d, noisy, C)
    slide = contrast.preserved_by_slope(head, d, noisy, C)
    assert (slide - want).abs().mean() > (bound - want).abs().mean() > 5 * error
    assert torch.corrcoef(torch.stack([bound, want]))[0, 1] > 0.4  # but it falls where P does


def test_N5_margin_of_two_classes_of_a_linear_head_is_exact():
    torch.manual_seed(0)
    head, d = nn.Linear(8, 2), torch.randn(50, 8)
    y, s = torch.arange(50) % 2, torch.full((50,), 0.5)
    a = (1 - s**2).sqrt()
    P = contrast.preserved_by_margin(head, d, y, a, s)  # of the label given, be it predicted or not
    noisy = a[:, None, None] * d[:, None] + 0.5 * torch.randn(50, 20_000, 8)
    want = (head(noisy).argmax(dim=2) == y[:, None]).float().mean(dim=1)
    torch.testing.assert_close(P, want, atol=0.02, rtol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_N5_jacobian_is_the_first_order_change(soft):
    torch.manual_seed(0)
    head, d = HEADS["mlp"](), torch.randn(7, 32)
    noisy, C = d + 0.05 * torch.randn(7, 32), torch.rand(7)
    J = torch.stack([torch.autograd.functional.jacobian(head, row) for row in d])
    change = torch.einsum("bij,bj->bi", J, noisy - d).norm(dim=1)
    want = torch.exp(-((change / C) ** 2) / 2) if soft else (1 - change / C).clamp(0, 1)
    got = contrast.preserved_by_jacobian(head, d, noisy, C, soft)
    torch.testing.assert_close(got, want)
    assert got.min() >= 0 and got.max() <= 1 and len(got.unique()) > 2


def test_N5_slope_is_the_slide_s_form():
    """1 - |d~ - d| |dh/dd| / C, with the Frobenius norm; never above the directional form."""
    torch.manual_seed(0)
    head, d = HEADS["mlp"](), torch.randn(7, 32)
    noisy, C = d + 0.02 * torch.randn(7, 32), torch.linspace(0.05, 2, 7)
    J = torch.stack([torch.autograd.functional.jacobian(head, row) for row in d])  # (7, 5, 32)
    change = (noisy - d).norm(dim=1) * J.square().sum(dim=(1, 2)).sqrt()
    got = contrast.preserved_by_slope(head, d, noisy, C)
    torch.testing.assert_close(got, (1 - change / C).clamp(0, 1))
    assert (
        len(got.unique()) > 2 and (got <= contrast.preserved_by_jacobian(head, d, noisy, C)).all()
    )


def test_N5_is_1_without_noise_and_in_0_1_and_without_gradient():
    torch.manual_seed(0)
    head, d, y = HEADS["mlp"](), torch.randn(60, 32), torch.arange(60) % 5
    d.requires_grad_()
    s = torch.linspace(0, 0.99, 60)
    a = (1 - s**2).sqrt()
    noisy = contrast.perturb(d, a, s, rng())
    with torch.no_grad():
        C = contrast.margin(head(d), y)
    for P in (
        contrast.preserved_by_margin(head, d, y, a, s),
        contrast.preserved_by_jacobian(head, d, noisy, C),
        contrast.preserved_by_jacobian(head, d, noisy, 0.5, soft=True),
        contrast.preserved_by_slope(head, d, noisy, 0.5),
    ):
        assert P[0] == 1 and P.min() >= 0 and P.max() <= 1 and not P.requires_grad
    assert d.grad is None and all(w.grad is None for w in head.parameters())
    nowhere = contrast.preserved_by_margin(
        lambda d: 0 * d[:, :5], d, y, a, s
    )  # no margin, no slope
    assert nowhere[0] == 1 and (nowhere[1:] == 0.5).all()


def test_margin_is_to_the_best_other():
    scores = torch.tensor([[3.0, 1, 2], [3, 1, 2]])
    assert contrast.margin(scores, torch.tensor([0, 1])).tolist() == [1, -2]


# ---- prediction ----


def test_N7_without_noise_is_the_normal_prediction():
    h, d = HEADS["mlp"](), torch.randn(9, 32, generator=rng())
    a, s = contrast.noise_levels([0.0], 2)
    for kind in ("classes", "labels", "regression"):
        out, variance = contrast.predict_perturbed(h, d, a, s, 6, kind)
        want = h(d).log_softmax(dim=1) if kind == "classes" else h(d)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        assert variance.max() < 1e-6


def test_N7_of_a_linear_head_only_rescales_and_of_another_does_more():
    torch.manual_seed(0)
    a, s, d = torch.tensor([0.8]), torch.tensor([0.6]), torch.randn(9, 32)
    linear, mlp = HEADS["linear"](), HEADS["mlp"]()
    with torch.no_grad():
        out, variance = contrast.predict_perturbed(linear, d, a, s, 4000, "regression")
        torch.testing.assert_close(out, linear(0.8 * d), atol=0.05, rtol=0)
        want = 0.36 * linear.weight.square().sum(dim=1)
        torch.testing.assert_close(variance, want.expand(9, 5), atol=0.02, rtol=0.1)
        for param in mlp.parameters():
            param.mul_(3)
        out, _ = contrast.predict_perturbed(mlp, d, a, s, 4000, "regression")
        assert (out - mlp(0.8 * d)).abs().mean() > 0.2


def test_N7_averages_probabilities_over_the_levels_and_knows_no_batch():
    torch.manual_seed(0)
    head, d = HEADS["mlp"](), torch.randn(6, 32)
    a, s = (level[1:] for level in contrast.noise_levels([0.3, 0.6], 2))
    with torch.no_grad():
        out, variance = contrast.predict_perturbed(head, d, a, s, 6, "classes")
        torch.testing.assert_close(out.exp().sum(dim=1), torch.ones(6))
        source, p = rng(), []
        for i in range(8):  # 6 draws, rounded up to twice each of the 4 levels
            noise = torch.randn(32, generator=source)
            p.append(head(a[i % 4] * d + s[i % 4] * noise).softmax(dim=1))
        p = torch.stack(p)
        torch.testing.assert_close(out, p.mean(dim=0).log())
        torch.testing.assert_close(variance, p.var(dim=0, correction=0), atol=1e-6, rtol=1e-4)
        alone, _ = contrast.predict_perturbed(head, d[2:3], a, s, 6, "classes")
        torch.testing.assert_close(alone, out[2:3])
        out, _ = contrast.predict_perturbed(head, d, a, s, 6, "labels")
        assert out.sigmoid().max() <= 1 and not torch.allclose(out, head(d), atol=1e-3)


@pytest.mark.parametrize("draws", [1, 4, 12, 32])
def test_N7_every_level_is_drawn_equally_often(draws):
    """The mean of a, which is what a linear head tells of the levels, is that of all of them."""
    a, s = (level[1:] for level in contrast.noise_levels([0.05, 0.2, 0.9], 4))
    seen, d = [], torch.full((2, 3), 1e6)  # so large that the noise does not count
    h = lambda d: seen.append(d[0, 0] / 1e6) or d  # noqa: E731
    out, _ = contrast.predict_perturbed(h, d, a, s, draws, "regression")
    level = (torch.stack(seen)[:, None] - a).abs().argmin(dim=1)
    times = level.bincount(minlength=12)
    assert (times == times[0]).all() and draws <= len(seen) < draws + 12
    torch.testing.assert_close(out, a.mean() * d, rtol=1e-4, atol=0)

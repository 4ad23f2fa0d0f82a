"""OTDD against its definition written out naively, closed forms and finite differences."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import otdd as module
from otdd import OTDD, label_distances, otdd, otdd_naive, wasserstein

ROOT = Path(__file__).resolve().parents[1]
ORACLE = ROOT.parent / "shared" / "oracle"


def data(n=24, m=18, D=3, K_s=3, K_t=2, seed=0, dtype=torch.double):
    rng = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.double)  # noqa: E731
    x_s, x_t = make(n, D), make(m, D) * 1.3 + 0.7
    return x_s.to(dtype), torch.arange(n) % K_s, x_t.to(dtype), torch.arange(m) % K_t


def linear_programme(cost):
    """min <pi, cost> over couplings of uniform marginals, by scipy's solver: value, plan."""
    from scipy.optimize import linprog

    n, m = cost.shape
    rows = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    marginals = np.r_[np.full(n, 1 / n), np.full(m, 1 / m)]
    found = linprog(np.ravel(cost), A_eq=rows, b_eq=marginals, method="highs")
    return found.fun, found.x.reshape(n, m)


def naive_costs(x, z, p):
    return np.array([[float((a - b).norm()) ** p for b in z] for a in x])


def naive_otdd(x_s, y_s, x_t, y_t, p=2):
    """(D1) to (D3), one pair of samples and one pair of classes at a time."""
    W = {}
    for a in y_s.unique().tolist():
        for b in y_t.unique().tolist():
            W[a, b], _ = linear_programme(naive_costs(x_s[y_s == a], x_t[y_t == b], p))
    cost = naive_costs(x_s, x_t, p)
    for i, a in enumerate(y_s.tolist()):
        for j, b in enumerate(y_t.tolist()):
            cost[i, j] += W[a, b]  # (D1)
    return *linear_programme(cost), W  # (D2)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_D1_D2_D3_is_the_definition(p):
    a = data()
    value, pi = otdd(*a, p=p, plan=True)
    want, _, W = naive_otdd(*a, p=p)
    assert float(value) == pytest.approx(want, rel=1e-9)
    ours = label_distances(*a, p=p)
    assert ours.shape == (3, 2)
    for (i, j), w in W.items():
        assert float(ours[i, j]) == pytest.approx(w, rel=1e-9)
    torch.testing.assert_close(pi.sum(1), torch.full((24,), 1 / 24, dtype=pi.dtype))
    torch.testing.assert_close(pi.sum(0), torch.full((18,), 1 / 18, dtype=pi.dtype))


def test_D2_properties():
    x, y, z, w = data()
    assert float(otdd(x, y, x, y)) == pytest.approx(0, abs=1e-9)
    assert float(otdd(x, y, z, w)) == pytest.approx(float(otdd(z, w, x, y)), rel=1e-9)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert float(otdd(x[order], y[order], z, w)) == pytest.approx(float(otdd(x, y, z, w)))
    names = torch.tensor([7, -3, 100])  # labels are names: any integers do
    assert float(otdd(x, names[y], z, w)) == pytest.approx(float(otdd(x, y, z, w)))
    assert float(otdd(x, y, z, w * 0)) != pytest.approx(float(otdd(x, y, z, w)))  # labels matter
    shift = torch.tensor([1.0, 2.0, 2.0], dtype=x.dtype)  # moves features and classes by 3 each
    assert float(otdd(x, y, x + shift, y)) == pytest.approx(18.0, rel=1e-6)


def test_D3_in_one_dimension_is_sorting():
    x, z = torch.randn(30, 1).double(), torch.randn(30, 1).double() * 2 + 1
    for p in (1, 2):
        want = (x.sort(0)[0] - z.sort(0)[0]).abs().pow(p).mean() ** (1 / p)
        assert float(wasserstein(x, z, p=p)) == pytest.approx(float(want), rel=1e-9)


def test_D4_is_the_distance_of_gaussians():
    from scipy.linalg import sqrtm

    x, y, z, w = data(n=60, m=50)
    ours = label_distances(x, y, z, w, label_distance="gaussian")
    for a in range(3):
        for b in range(2):
            u, v = x[y == a].numpy(), z[w == b].numpy()
            S, T = np.cov(u.T), np.cov(v.T)
            root = sqrtm(S)
            cross = np.trace(sqrtm(root @ T @ root).real)
            want = ((u.mean(0) - v.mean(0)) ** 2).sum() + np.trace(S + T) - 2 * cross
            assert float(ours[a, b]) == pytest.approx(want, rel=1e-8)


def sinkhorn(cost, eps):
    """OT_eps (D5) of a cost matrix by plain steps in the log domain, and the plan."""
    (n, m), f, g = cost.shape, torch.zeros(len(cost)).to(cost), torch.zeros(cost.shape[1]).to(cost)
    for _ in range(5000):
        f = -eps * torch.logsumexp((g - cost) / eps - math.log(m), dim=1)
        g = -eps * torch.logsumexp((f[:, None] - cost) / eps - math.log(n), dim=0)
    return f.mean() + g.mean(), torch.exp((f[:, None] + g - cost) / eps) / (n * m)


def entropic_by_hand(x, y, z, w, share, kind, strengths):
    """(D5) with its KL term, from plain Sinkhorn steps; strengths: absolute eps, set once."""
    c = torch.from_numpy(naive_costs(x, z, 2))
    eps = strengths.setdefault("labels", (share or 1e-2) * c.mean())
    total = c.clone()
    for a in y.unique():
        for b in w.unique():
            pair = (y == a).nonzero(), (w == b).nonzero().T
            W = linear_programme(c[pair])[0] if kind == "exact" else sinkhorn(c[pair], eps)[0]
            total[pair] += W
    return sinkhorn(total, strengths.setdefault("samples", share * total.mean()))


@pytest.mark.parametrize("kind", ["exact", "sinkhorn"])
def test_D5_D6_entropic_values_are_those_of_plain_sinkhorn(kind):
    """OT_eps with its KL term, and S_eps of exactly these, which returned 1.231 for 1.538."""
    x, y, z, w = data()
    absolute = {}
    want, plan = entropic_by_hand(x, y, z, w, 0.1, kind, absolute)
    value, pi = otdd(x, y, z, w, eps=0.1, label_distance=kind, plan=True, tol=1e-9)
    assert float(value) == pytest.approx(float(want), rel=1e-7)
    assert float((pi - plan).abs().sum()) < 1e-4
    for part in ((x, y, x, y), (z, w, z, w)):
        want = want - entropic_by_hand(*part, 0.1, kind, absolute)[0] / 2
    got = otdd(x, y, z, w, eps=0.1, label_distance=kind, debias=True, tol=1e-9)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_D5_little_entropy_comes_close_to_the_exact_value():
    a = data()
    exact, near = float(otdd(*a)), float(otdd(*a, eps=1e-4))
    assert exact < near == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.1])
def test_D5_one_dimension_to_the_stated_tolerance(eps):
    x, y, z, w = data(n=60, m=60, D=1, K_s=1, K_t=1, seed=5)
    want = sinkhorn(c := torch.from_numpy(naive_costs(x, z, 2)), eps * c.mean())[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, single = (wasserstein(x.to(d), z.to(d), eps=eps) for d in (x.dtype, torch.float32))
    assert float(got) ** 2 == pytest.approx(float(want), rel=1e-5 if eps > 1e-3 else 1e-4)
    assert float(single) == pytest.approx(float(got), rel=1e-4)


def test_D5_a_tolerance_that_is_not_met_is_said(monkeypatch):
    monkeypatch.setattr(module._Entropic, "improve", lambda self, *_, **__: self.fail())
    monkeypatch.setattr(
        module._Entropic,
        "fail",
        lambda self: setattr(self, "values", self.f.mean((1, 2))) or self.values.abs() + 1,
        raising=False,
    )
    with pytest.warns(UserWarning, match="sinkhorn stopped .* short; raise eps"):
        wasserstein(*data()[::2], eps=0.1)


def few(seed, n, m, D, dtype):
    """Two small point clouds, one of which is rounded, so that points coincide."""
    rng = np.random.default_rng(seed)
    x, z = np.round(rng.normal(size=(n, D))), rng.normal(size=(m, D)) + 0.5
    return (torch.from_numpy(v).to(dtype) for v in (x, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-3, 1e-2])
def test_D5_few_points_and_little_entropy_converge(eps, dtype):
    """Newton's steps overshot: values of NaN in single precision, and far from the optimum."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a solver that stops early says so
        for seed in range(6):
            x, z = few(seed, 14 + seed, 24 - seed, 2, dtype)
            y, w = torch.arange(len(x)) % 2, torch.arange(len(z)) % 3
            W = label_distances(x, y, z, w, eps=eps, label_distance="sinkhorn")
            assert W.isfinite().all()
            exact = float(wasserstein(x, z)) ** 2
            near = float(wasserstein(x, z, eps=eps)) ** 2  # with its KL term, at most log n
            mean = float(torch.cdist(x, z).square().mean())
            assert exact < near * (1 + 1e-6) and near < exact + eps * mean * math.log(len(x))


@pytest.mark.parametrize("seed", range(5))
def test_D6_is_not_negative_beyond_the_tolerance(seed):
    """24 points, 3 classes, eps 0.3 gave -9.4e-4 where 1.3e-4 is right."""
    x, y, *_ = data(n=24, seed=seed)
    moved = x + 1e-2 * data(n=24, seed=seed + 50)[0]
    value = float(otdd(x, y, moved, y, eps=0.3, debias=True))
    assert value > -1e-6


@pytest.mark.parametrize("kind", ["exact", "gaussian", "sinkhorn"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("debias", [False, True])
def test_D7_gradients_are_those_of_the_values(kind, eps, debias):
    """Finite differences of what is returned; eps is a share of the mean cost and moves with it."""
    x, y, z, w = data(n=12, m=10)
    options = {"label_distance": kind, "eps": eps, "debias": debias, "tol": 1e-12}
    inputs = (x.requires_grad_(), z.requires_grad_())
    value = lambda x, z: otdd(x, y, z, w, **options)  # noqa: E731
    assert torch.autograd.gradcheck(value, inputs, eps=1e-5, atol=1e-6, rtol=1e-5, fast_mode=True)
    if not debias:
        del options["debias"]
        value = lambda x, z: label_distances(x, y, z, w, **options)  # noqa: E731
        assert torch.autograd.gradcheck(value, inputs, eps=1e-5, atol=1e-6, fast_mode=True)


def test_D7_wasserstein_with_entropy():
    x, _, z, _ = data(n=12, m=10)
    value = lambda x, z: wasserstein(x, z, eps=0.2, tol=1e-12)  # noqa: E731
    assert torch.autograd.gradcheck(value, (x.requires_grad_(), z.requires_grad_()), atol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_D1_D2_D3_D7_the_fast_form_is_the_definition(p):
    """Values and both gradients of otdd and otdd_naive, on random data sets."""
    for seed in range(8):
        x, y, z, w = data(n=10 + 5 * seed, m=35 - 3 * seed, D=1 + seed, K_t=3, seed=seed)
        x, z = x.requires_grad_(), z.requires_grad_()
        fast, slow = otdd(x, y, z, w, p=p), otdd_naive(x, y, z, w, p=p)
        torch.testing.assert_close(fast, slow, rtol=1e-7, atol=0)
        for a, b in zip(*(torch.autograd.grad(v, (x, z)) for v in (fast, slow)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()))


@pytest.mark.parametrize("scale", [1e-12, 3e-8, 1e-7, 1e7, 1e12])
@pytest.mark.parametrize("settings", [{}, {"eps": 0.1}, {"label_distance": "gaussian"}])
def test_no_unit_matters(scale, settings):
    """Features times 1e-7 gave 18 % too much; times 3e-8 a shuffled copy was not at distance 0."""
    x, y, z, w = data(n=40, m=30)
    want, slope = (lambda v: (v, torch.autograd.grad(v, z)[0]))(
        otdd(x, y, z.requires_grad_(), w, **settings)
    )
    far = (z.detach() * scale).requires_grad_()
    got = otdd(x * scale, y, far, w, **settings)
    torch.testing.assert_close(got / scale**2, want, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, far)[0] / scale, slope, rtol=1e-6, atol=1e-7
    )
    single = otdd(*(v.float() if v.is_floating_point() else v for v in (x * scale, y, far, w)))
    exact = float(otdd(x * scale, y, far, w))
    assert float(single) == pytest.approx(exact, rel=1e-4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert float(otdd(x * scale, y, x[order] * scale, y[order])) < 1e-12 * scale**2


@pytest.mark.parametrize("settings", [{}, {"eps": 0.1}, {"label_distance": "gaussian"}])
def test_features_too_small_for_their_squares_are_refused(settings):
    """1e-20 in float32 gave 22 % too much with eps, 1e-30 a distance of 0."""
    x, y, z, w = data(dtype=torch.float32)
    for scale in (1e-20, 1e-30):
        with pytest.raises(ValueError, match=r"beyond torch.float32; scale the features to 1"):
            otdd(x * scale, y, z * scale, w, **settings)
    assert float(otdd(x * 0, y, z * 0, w)) == 0  # all alike, which is another thing


def test_many_classes_of_one_sample_are_quick():
    """300 x 200 of them took 72 s."""
    import time

    x, _, z, _ = data(n=300, m=200)
    start = time.perf_counter()
    W = label_distances(x, torch.arange(300), z, torch.arange(200))
    value = otdd(x, torch.arange(300), z, torch.arange(200))
    assert time.perf_counter() - start < 20
    torch.testing.assert_close(W, torch.cdist(x, z).square())
    assert float(value) == pytest.approx(2 * float(wasserstein(x, z)) ** 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["exact", "gaussian", "sinkhorn"])
def test_streamed_is_stored(monkeypatch, kind):
    """Blocks of rows give what the whole matrix does: values, gradients, plans; debiased, too."""
    x, y, z, w = data(n=300, m=280, D=5, K_s=3, K_t=2)
    results = []
    for dense in (2**26, 0):
        monkeypatch.setattr(module, "DENSE", dense)
        monkeypatch.setattr(module, "BLOCK", 5000)
        u, v = x.clone().requires_grad_(), z.clone().requires_grad_()
        value = otdd(u, y, v, w, eps=0.1, label_distance=kind, debias=True, tol=1e-10)
        results.append((value, *torch.autograd.grad(value, (u, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_D6_divergence_is_0_on_itself_and_positive_elsewhere():
    x, y, z, w = data()
    assert float(otdd(x, y, x, y, eps=0.05, debias=True)) == pytest.approx(0, abs=1e-6)
    assert float(otdd(x, y, z, w, eps=0.05, debias=True)) > 0
    assert float(otdd(x, y, x, y, eps=0.05)) > 0.01  # without it: not 0


@pytest.mark.parametrize("kind", ["exact", "gaussian"])
def test_D7_gradient_agrees_with_finite_differences(kind):
    x, y, z, w = data(n=12, m=10)
    x, z = x.requires_grad_(), z.requires_grad_()
    value = lambda x, z: otdd(x, y, z, w, label_distance=kind)  # noqa: E731
    assert torch.autograd.gradcheck(value, (x, z), eps=1e-6, atol=1e-6)


def test_D7_labels_act_on_the_gradient():
    x, y, z, w = data()
    gradients = []
    for labels in (w, w[torch.randperm(18, generator=torch.Generator().manual_seed(1))]):
        z = z.detach().requires_grad_()
        otdd(x, y, z, labels).backward()
        gradients.append(z.grad)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)


def test_D8_screening_finds_the_optimum_of_the_full_problem():
    """Large enough for the screened solver; compared with POT on the full cost."""
    import ot

    x, y, z, w = data(n=700, m=600, D=8, K_s=5, K_t=4)
    W = label_distances(x, y, z, w)
    cost = torch.cdist(x, z).square() + W[y][:, w]
    want = ot.emd2([], [], cost.numpy(), numItermax=10**6)
    assert float(otdd(x, y, z, w)) == pytest.approx(want, rel=1e-8)


def test_a_cached_source_and_warm_starts_change_nothing():
    x, y, z, w = data(n=200, m=90, D=6)
    for settings in ({}, {"label_distance": "gaussian"}, {"eps": 0.05}):
        distance = OTDD(x, y, **settings)
        for step in range(3):
            moved = z - 0.1 * step
            cold = float(otdd(x, y, moved, w, **settings))
            assert float(distance(moved, w)) == pytest.approx(
                cold, rel=1e-6 if not settings.get("eps") else 1e-3
            )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float32_at_any_scale_and_far_from_the_origin(scale):
    a = data(dtype=torch.float32)
    x, y, z, w = a[0] * scale + 100 * scale, a[1], a[2] * scale + 100 * scale, a[3]
    want = float(otdd(x.double(), y, z.double(), w))
    assert float(otdd(x, y, z, w)) == pytest.approx(want, rel=1e-4)
    assert math.isfinite(float(otdd(x, y, z, w, eps=1e-3)))


def put(v, value):
    v = v.clone()
    v[2, 1] = value
    return v


NAN, INF = float("nan"), float("inf")
SHAPE = r"x \(n, D\), n >= 1, D >= 1: reshape it or add samples"
LABELS = r"y \(n,\): give each sample one label"
WHOLE = r"integers as labels: use y\.long\(\)"
BAD = {  # case: what is said to be wrong, what becomes of x_s, y_s, x_t, y_t, what is expected
    "NaN in x_s": ("s", lambda x, y, z, w: (put(x, NAN), y, z, w), "no NaN or inf in x_s: drop"),
    "inf in x_s": ("s", lambda x, y, z, w: (put(x, INF), y, z, w), "no NaN or inf in x_s: drop"),
    "NaN in x_t": ("t", lambda x, y, z, w: (x, y, put(z, NAN), w), "no NaN or inf in x_t: drop"),
    "inf in x_t": ("t", lambda x, y, z, w: (x, y, put(z, -INF), w), "no NaN or inf in x_t: drop"),
    "NaN labels": ("t", lambda x, y, z, w: (x, y, z, w * NAN), WHOLE),
    "no source": ("s", lambda x, y, z, w: (x[:0], y[:0], z, w), SHAPE),
    "no target": ("t", lambda x, y, z, w: (x, y, z[:0], w[:0]), SHAPE),
    "no features": ("s", lambda x, y, z, w: (x[:, :0], y, z[:, :0], w), SHAPE),
    "one axis": ("s", lambda x, y, z, w: (x[:, 0], y, z[:, 0], w), SHAPE),
    "a number": ("s", lambda x, y, z, w: (x.sum(), y, z, w), SHAPE),
    "widths": ("t", lambda x, y, z, w: (x, y, z[:, :2], w), "x_s and x_t of one width D: embed"),
    "short labels": ("s", lambda x, y, z, w: (x, y[:-1], z, w), LABELS),
    "long labels": ("t", lambda x, y, z, w: (x, y, z[1:], w), LABELS),
    "wide labels": ("s", lambda x, y, z, w: (x, y[:, None], z, w), LABELS),
    "float labels": ("s", lambda x, y, z, w: (x, y.double(), z, w), WHOLE),
    "complex labels": ("s", lambda x, y, z, w: (x, y + 0j, z, w), WHOLE),
    "whole features": ("s", lambda x, y, z, w: (x.long(), y, z, w), r"floating .*use x\.float\(\)"),
    "dtypes": (
        "t",
        lambda x, y, z, w: (x, y, z.float(), w),
        r"one dtype .*use x\.to\(torch.float64",
    ),
    "devices": ("t", lambda x, y, z, w: (x, y, z.to("meta"), w), r"one .*device: use .*'cpu'"),
    "labels elsewhere": ("s", lambda x, y, z, w: (x, y.to("meta"), z, w), r"device: use .*'cpu'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    """By what compares two data sets, once or again, and by the distances of labels and of x."""
    side, change, message = BAD[case]
    bad = change(*data())
    runs = [otdd, label_distances, lambda x, y, z, w: OTDD(x, y)(z, w)]
    runs += [] if "label" in case else [lambda x, y, z, w: wasserstein(x, z)]
    for run in runs:
        with pytest.raises(ValueError, match=rf"got x_{side}, y_{side} \(.*; expected .*{message}"):
            run(*bad)


def test_costs_that_are_no_numbers_are_refused():
    x, y, z, w = data()
    for a, b in ((x, z * 1e160), (x.float(), z.float() * 1e25)):
        with pytest.raises(
            ValueError, match=r"got \|x - x'\|\^2 beyond torch.*; scale the features to 1"
        ):
            otdd(a, y, b, w)
    one, label = torch.zeros(1, 1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="beyond torch.float32"):  # the sum of (D1) alone
        otdd(one, label, one + 1.5e19, label)
    with pytest.raises(ValueError, match=r"got \|x - x'\|\^300 beyond torch.float64"):
        otdd(x, y, z * 100, w, p=300)


@pytest.mark.parametrize(
    "bad",
    [{"label_distance": "exakt"}, {"label_distance": "gaussian", "p": 1}]
    + [{"p": 1, "label_distance": "sinkhorn"}, {"p": 3, "eps": 0.1}]  # entropy: p = 2 alone
    + [{"p": p} for p in (0.5, NAN, INF)]
    + [{"eps": eps} for eps in (-1.0, NAN, INF)],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"got label_distance=.*, p=.*, eps=.*; expected one of"):
        otdd(*data(), **bad)


def test_an_eps_too_small_for_the_dtype_is_refused():
    with pytest.raises(ValueError, match=r"eps=1e-09; expected .*eps = 0 or >= 1e-06"):
        otdd(*data(dtype=torch.float32), eps=1e-9)


def test_a_class_of_one_sample():
    x, y, z, w = data()
    y = y.clone()
    y[0] = 9
    want, _, _ = naive_otdd(x, y, z, w)
    assert float(otdd(x, y, z, w)) == pytest.approx(want, rel=1e-9)
    for sets in ((x, y, z, w), (z, w, x, y)):
        with pytest.raises(ValueError, match="got 1 sample of class 9, 'gaussian' needs 2; choose"):
            otdd(*sets, label_distance="gaussian")


@pytest.mark.parametrize("kind", ["exact", "gaussian", "sinkhorn"])
@pytest.mark.parametrize("n", [30, 400])  # the larger one is solved from a start
@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_collapsed_features(kind, n, gap):
    """All samples of a data set are alike, as after a bad alignment: 2 D gap^2, no NaN."""
    x, y = torch.zeros(n, 3), torch.arange(n) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({}, {"eps": 0.05}, {"eps": 0.05, "debias": True}):
            value = otdd(x, y, x + gap, y, label_distance=kind, **settings)
            assert float(value) == pytest.approx(6 * gap, abs=1e-4)
        assert float(wasserstein(x, x + gap)) == pytest.approx(math.sqrt(3) * gap, abs=1e-4)


def draw(seed):
    """Two small data sets in float64, their scale, and p: any sizes, classes, distance from 0."""
    rng = np.random.default_rng(seed)
    (n, m), D, p = rng.integers(1, 11, 2), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    scale, far = 10.0 ** rng.uniform(-3, 3), rng.uniform(-10, 10)
    x, z = (rng.normal(size=(k, D)) * rng.uniform(0.5, 2) + far for k in (n, m))
    y, w = (torch.from_numpy(rng.integers(-2, 3, k)) for k in (n, m))
    return (torch.from_numpy(scale * x), y, torch.from_numpy(scale * z), w), scale, p, rng


def properties(seed):
    """otdd of one draw against (D1) to (D3), and what must hold of any distance of data sets.

    Tolerances are relative, 1e-7: costs are differences of squares, and their roots if p is 1. What
    is 0 is compared with scale^p.
    """
    (x, y, z, w), scale, p, rng = draw(seed)
    value = float(otdd(x, y, z, w, p=p))
    same = lambda other: other == pytest.approx(value, rel=1e-7, abs=1e-7 * scale**p)  # noqa: E731
    want, _, _ = naive_otdd(x / scale, y, z / scale, w, p)  # its solver's tolerances are absolute
    assert value >= 0 and same(want * scale**p)
    assert 0 <= float(otdd(x, y, x, y, p=p)) <= 1e-6 * scale**p
    assert same(float(otdd(z, w, x, y, p=p)))  # symmetry
    i, j = (torch.from_numpy(rng.permutation(len(v))) for v in (x, z))
    assert same(float(otdd(x[i], y[i], z[j], w[j], p=p)))  # order
    assert same(float(otdd(x, 7 - 3 * y, z, 100 + w, p=p)))  # names of the classes
    shift = torch.from_numpy(scale * rng.normal(size=x.shape[1]))
    assert same(float(otdd(x + shift, y, z + shift, w, p=p)))  # translation of both
    moved = float(otdd(x, y, x + shift, y, p=p))  # and of one: features and classes by |shift| each
    assert moved == pytest.approx(2 * float(shift.norm()) ** p, rel=1e-6)
    factor = 10.0 ** rng.uniform(-2, 2)
    assert same(float(otdd(factor * x, y, factor * z, w, p=p)) / factor**p)


def test_D1_D2_D3_properties_of_random_data_sets():
    for seed in range(20):
        properties(seed)


@pytest.mark.slow
def test_D1_D2_D3_properties_of_many_random_data_sets(record_property):
    record_property("cases", 100)
    for seed in range(20, 120):
        properties(seed)


def test_it_runs_alone(tmp_path):
    (tmp_path / "otdd.py").write_bytes((ROOT / "otdd.py").read_bytes())
    done = subprocess.run([sys.executable, "otdd.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "otdd" in done.stdout


@pytest.mark.skipif(not ORACLE.exists(), reason="the reference values are not here")
@pytest.mark.parametrize(
    "name", ["balanced_small", "far_small_scale", "rank_deficient", "unbalanced"]
)
def test_reference_values(name):
    import json

    arrays, values = (
        np.load(ORACLE / f"{name}.npz"),
        json.loads((ORACLE / f"{name}.json").read_text()),
    )
    x, y, z, w = (torch.from_numpy(arrays[key]) for key in "XyZw")
    z.requires_grad_()
    value = otdd(x, y.long(), z, w.long())
    value.backward()
    assert float(value) == pytest.approx(values["otdd_sq_exact"], rel=1e-6)
    gradient = torch.from_numpy(arrays["grad_Z_exact"])
    assert float((z.grad - gradient).norm() / gradient.norm()) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entropic = otdd(x, y.long(), z.detach(), w.long(), eps=0.01)
    assert float(entropic) == pytest.approx(values["entropic"]["0.01"]["ot_eps"], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    here = data()
    there = [v.to("cuda") for v in here]
    assert float(otdd(*there)) == pytest.approx(float(otdd(*here)), rel=1e-9)

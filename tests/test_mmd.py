"""MMD against a naive double loop, closed forms, the oracle files, and what must not change it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mmd
from mmd import mmd2, mmd2_features, mmd2_linear, mmd2_naive, two_sample_test

ORACLE = Path(__file__).resolve().parents[2] / "shared" / "oracle"
CASES = sorted(file.stem for file in ORACLE.glob("*.npz"))
LIST = [0.7, 3.0, 10.0]  # bandwidths that do not halve


def sample(n, m, D, seed=0, shift=0.5, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, D, generator=rng, dtype=torch.float64) for k in (n, m))
    return x.to(dtype), (1.3 * y + shift).to(dtype)


def default_bandwidths(x, y):
    z = torch.cat([x, y]).detach()
    mean = sum(float((a - b).square().sum()) for a in z for b in z) / (len(z) * (len(z) - 1))
    return [mean * share for share in (0.25, 0.5, 1, 2, 4)]


def kernel(a, b, bandwidths):
    return sum(torch.exp(-(a - b).square().sum() / s) for s in bandwidths)


def naive(x, y, bandwidths, unbiased):
    def mean(p, q, drop):
        terms = [
            kernel(a, b, bandwidths)
            for i, a in enumerate(p)
            for j, b in enumerate(q)
            if not (drop and i == j)
        ]
        return sum(terms) / len(terms)

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


def test_M1_is_the_distance_between_feature_means():
    """k(x, y) = sum_r phi_r(x) phi_r(y), phi_r(x) = exp(-x^2/b) (2/b)^(r/2) x^r / sqrt(r!)."""
    x, y = sample(9, 7, 1)
    b = 2.0

    def mean_feature(x):
        r = torch.arange(60, dtype=x.dtype)
        size = (2 / b) ** (r / 2) / torch.exp(torch.lgamma(r + 1) / 2)
        return (torch.exp(-x.square() / b) * size * x**r).mean(0)

    gap = (mean_feature(x) - mean_feature(y)).square().sum()
    torch.testing.assert_close(mmd2(x, y, bandwidths=[b], unbiased=False), gap)


def test_M1_two_gaussians_in_closed_form():
    """E exp(-|u|^2 / b) for u ~ N(d, v I) is (1 + 2v/b)^(-D/2) exp(-|d|^2 / (b + 2v))."""
    D, b, s, gap = 3, 4.0, 1.3, 0.5
    x, y = sample(2000, 2000, D)

    def expected(v, d2):
        return (1 + 2 * v / b) ** (-D / 2) * math.exp(-d2 / (b + 2 * v))

    population = expected(2, 0) + expected(2 * s**2, 0) - 2 * expected(1 + s**2, D * gap**2)
    assert mmd2(x, y, bandwidths=[b]).item() == pytest.approx(population, abs=0.006)
    assert mmd2_linear(x, y, bandwidths=[b]).item() == pytest.approx(population, abs=0.04)


def test_M2_default_bandwidths_follow_the_mean_squared_distance():
    x, y = sample(12, 9, 4)
    got = mmd._prepare(x, y, None)[1]
    assert got == pytest.approx(default_bandwidths(x, y)[::-1], rel=1e-12)
    torch.testing.assert_close(mmd2(1000 * x, 1000 * y), mmd2(x, y))  # so no unit matters


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidths", [None, LIST, [2.0]])
def test_M3_equals_the_double_loop(unbiased, bandwidths):
    x, y = sample(11, 8, 3)
    expected = naive(x, y, bandwidths or default_bandwidths(x, y), unbiased)
    got = mmd2(x, y, bandwidths=bandwidths, unbiased=unbiased)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mmd2(y, x, bandwidths=bandwidths, unbiased=unbiased), got)


def test_M3_V_is_zero_on_equal_samples_and_U_is_unbiased():
    x, _ = sample(40, 1, 5)
    assert abs(mmd2(x, x, unbiased=False)) < 1e-14
    assert abs(mmd2(x.float(), x.float(), unbiased=False)) < 1e-6
    values = [mmd2(*sample(20, 20, 2, seed)).item() for seed in range(200)]
    twin = [torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(s)) for s in range(200)]
    nulls = [mmd2(x, y).item() for x, y in twin]
    assert abs(np.mean(nulls)) < 4 * np.std(nulls) / math.sqrt(200) < np.mean(values)


def test_M3_one_sample_a_side_is_enough_for_V():
    value = mmd2(torch.tensor([[0.0]]), torch.tensor([[2.0]]), bandwidths=[4.0], unbiased=False)
    assert value.item() == pytest.approx(2 - 2 * math.exp(-1))


@pytest.mark.parametrize("function", [mmd2, mmd2_linear, mmd2_features])
def test_M3_equal_points_give_zero_and_no_nan(function):
    x, y = torch.ones(4, 3), torch.ones(6, 3, requires_grad=True)
    value = function(x, y)
    value.backward()
    assert abs(value.item()) < 1e-6 and abs(y.grad).max() < 1e-6


@pytest.mark.parametrize("block", [1, 3, 8, 1000])
def test_M3_does_not_depend_on_the_size_of_blocks(monkeypatch, block):
    x, y = sample(11, 16, 3)
    x.requires_grad_(), y.requires_grad_()
    expected = (mmd2(x, y), *torch.autograd.grad(mmd2(x, y), (x, y)))
    monkeypatch.setattr(mmd, "BLOCK", block)
    got = (mmd2(x, y), *torch.autograd.grad(mmd2(x, y), (x, y)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_M3_float32_far_from_the_origin():
    x, y = sample(300, 200, 20, dtype=torch.float32)
    x, y = (x * 1024).round() / 1024, (y * 1024).round() / 1024  # exact after the shift as well
    near, far = mmd2(x, y), mmd2(x + 1000, y + 1000)
    assert far.dtype == torch.float32
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(near.double(), mmd2(x.double(), y.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_M3_half_precision_is_computed_in_float32(dtype):
    x, y = sample(30, 20, 4, dtype=dtype)
    y.requires_grad_()
    value = mmd2(x, y)
    value.backward()
    assert value.dtype == torch.float32 and y.grad.dtype == dtype
    torch.testing.assert_close(value, mmd2(x.float(), y.float()))


def test_M4_squaring_equals_one_exponential_each():
    x, y = sample(20, 30, 4)
    y.requires_grad_()
    together = mmd2(x, y, bandwidths=[1, 2, 4, 8], unbiased=False)
    apart = sum(mmd2(x, y, bandwidths=[b], unbiased=False) for b in (1, 2, 4, 8))
    torch.testing.assert_close(together, apart)
    grads = [torch.autograd.grad(v, y)[0] for v in (together, apart)]
    torch.testing.assert_close(*grads)


def test_M4_far_pairs_underflow_to_zero_quietly():
    x, y = sample(5, 5, 2, shift=1e4, dtype=torch.float32)
    y.requires_grad_()
    value = mmd2(x, y, bandwidths=[1, 2, 4])
    value.backward()
    assert value.isfinite() and y.grad.isfinite().all()


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidths", [[1.0, 2.0, 4.0], LIST])
def test_M5_gradient_against_finite_differences(monkeypatch, unbiased, bandwidths):
    monkeypatch.setattr(mmd, "BLOCK", 4)
    x, y = (v.requires_grad_() for v in sample(6, 5, 3))
    options = {"bandwidths": bandwidths, "unbiased": unbiased}
    assert torch.autograd.gradcheck(lambda x, y: mmd2(x, y, **options), (x, y))
    assert torch.autograd.gradcheck(lambda y: mmd2(x.detach(), y, **options), (y,))
    assert torch.autograd.gradcheck(lambda x: mmd2(x, y.detach(), **options), (x,))


@pytest.mark.parametrize("unbiased", [True, False])
def test_M3_M5_the_fast_form_is_the_definition(unbiased):
    """Values and both gradients of mmd2 and mmd2_naive, on random samples of any size."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        n, m, D = (int(k) for k in rng.integers(2, 30, 3))
        x, y = (v.requires_grad_() for v in sample(n, m, D, seed))
        widths = default_bandwidths(x, y)
        fast, slow = mmd2(x, y, unbiased=unbiased), mmd2_naive(x, y, widths, unbiased)
        torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-10)
        for a, b in zip(*(torch.autograd.grad(v, (x, y)) for v in (fast, slow)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_M5_gradient_equals_autograd_of_the_double_loop(unbiased):
    x, y = (v.requires_grad_() for v in sample(7, 9, 3))
    expected = torch.autograd.grad(naive(x, y, default_bandwidths(x, y), unbiased), (x, y))
    got = torch.autograd.grad(3 * mmd2(x, y, unbiased=unbiased), (x, y))
    torch.testing.assert_close(got, tuple(3 * g for g in expected), rtol=1e-10, atol=1e-12)


def test_M5_no_gradient_where_none_is_asked_for():
    x, y = sample(6, 5, 3)
    assert not mmd2(x, y).requires_grad
    y.requires_grad_()
    mmd2(x, y).backward()
    assert x.grad is None and y.grad.abs().max() > 0
    assert not two_sample_test(x, y)[0].requires_grad


def test_M5_autocast_changes_nothing():
    x, y = sample(60, 50, 8, dtype=torch.float32)
    y.requires_grad_()
    expected = (mmd2(x, y), *torch.autograd.grad(mmd2(x, y), y))
    with torch.autocast("cpu", torch.bfloat16):
        got = (mmd2(x, y), *torch.autograd.grad(mmd2(x, y), y))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_M5_second_derivatives_are_refused():
    x, y = sample(4, 4, 2)
    (g,) = torch.autograd.grad(mmd2(x, y.requires_grad_()), y, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        g.sum().backward()


def test_M5_descent_moves_one_sample_onto_the_other():
    x, y = sample(60, 50, 2, shift=3.0)
    y.requires_grad_()
    optimiser = torch.optim.Adam([y], lr=0.1)
    before = mmd2(x, y).item()
    for _ in range(100):
        optimiser.zero_grad()
        mmd2(x, y).backward()
        optimiser.step()
    assert mmd2(x, y).item() < 0.1 * before


def test_M6_equals_the_loop_over_consecutive_pairs():
    x, y = sample(9, 6, 3)
    bandwidths, terms = default_bandwidths(x, y), []
    for i in range(0, 6, 2):
        a, a2, b, b2 = x[i], x[i + 1], y[i], y[i + 1]
        pairs = ((a, a2, 1), (b, b2, 1), (a, b2, -1), (a2, b, -1))
        terms.append(sum(sign * kernel(p, q, bandwidths) for p, q, sign in pairs))
    torch.testing.assert_close(mmd2_linear(x, y), sum(terms) / 3)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: mmd2_linear(x, y, bandwidths=LIST), (x, y))


def test_M7_random_features_converge():
    x, y = sample(200, 150, 3)
    exact = mmd2(x, y, unbiased=False).item()

    def error(features):
        gaps = [mmd2_features(x, y, features=features, seed=s).item() - exact for s in range(8)]
        return np.sqrt(np.mean(np.square(gaps)))

    assert error(16384) < 0.02 * exact and error(16384) < error(256) / 3
    assert mmd2_features(x, y) == mmd2_features(x, y)  # the seed is fixed
    y.requires_grad_()
    grads = [torch.autograd.grad(f, y)[0] for f in (mmd2(x, y), mmd2_features(x, y, features=8192))]
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[0].norm()


def test_M8_p_value():
    x, y = sample(40, 30, 2, shift=1.0)
    value, p = two_sample_test(x, y)
    torch.testing.assert_close(value, mmd2(x, y))
    assert p == 1 / 201
    same = [torch.randn(2, 25, 2, generator=torch.Generator().manual_seed(s)) for s in range(60)]
    ps = np.array([two_sample_test(x, y, permutations=60)[1] for x, y in same])
    assert 0.3 < ps.mean() < 0.7 and (ps <= 0.1).mean() < 0.25  # uniform: 0.5 and 0.1
    assert two_sample_test(torch.ones(5, 2), torch.ones(4, 2))[1] == 1


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize("function", [mmd2, mmd2_linear, mmd2_features, two_sample_test])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (GOOD[0], GOOD, r"got x and y \(3,\).*expected \(n, D\) and \(m, D\): reshape"),
        (GOOD[None], GOOD, "reshape or embed"),
        (torch.tensor(1.0), GOOD, "reshape or embed"),
        (GOOD, GOOD[:, :2], "reshape or embed"),
        (GOOD[:0], GOOD, "D >= 1: add"),
        (GOOD[:, :0], GOOD[:, :0], "D >= 1: add"),
        (GOOD.long(), GOOD.long(), r"floating point: use .float\(\)"),
        (GOOD.double(), GOOD, r"one dtype and one device: use y.to\(x\)"),
        (GOOD.to("meta"), GOOD, r"one dtype and one device: use y.to\(x\)"),
        (GOOD, GOOD / 0, "no NaN or inf in y: drop"),
        (GOOD, GOOD - math.inf, "no NaN or inf in y: drop"),
        (GOOD * math.nan, GOOD, "no NaN or inf in x: drop"),
        (GOOD + math.inf, GOOD, "no NaN or inf in x: drop"),
        (GOOD, GOOD + 1e20, r"got bandwidths=\[inf, .*: scale x, y or pass None"),  # |x - y|^2: inf
    ],
)
def test_refuses_what_has_no_meaning(function, x, y, message):
    with pytest.raises(ValueError, match=message):
        function(x, y)


@pytest.mark.parametrize("function", [mmd2, mmd2_linear, mmd2_features, two_sample_test])
@pytest.mark.parametrize("other", [GOOD.numpy(), GOOD.tolist(), None])
def test_refuses_what_is_not_a_tensor(function, other):
    message = rf"got .*{type(other).__name__}.*; expected tensors: use torch.as_tensor\(x\)"
    for pair in ((other, GOOD), (GOOD, other), (other, other)):
        with pytest.raises(ValueError, match=message):
            function(*pair)


@pytest.mark.parametrize("function", [mmd2, mmd2_linear, two_sample_test])
def test_refuses_one_sample_where_pairs_are_needed(function):
    with pytest.raises(ValueError, match="n, m >= 2"):
        function(GOOD, GOOD[:1])


@pytest.mark.parametrize(
    "bandwidths", [[], [0.0], [1.0, -1.0], [math.nan], [1, math.nan], [math.inf]]
)
@pytest.mark.parametrize("function", [mmd2, mmd2_linear, mmd2_features])
def test_refuses_bandwidths_that_are_not_positive(function, bandwidths):
    with pytest.raises(ValueError, match="got bandwidths=.*expected positive numbers"):
        function(GOOD, GOOD, bandwidths=bandwidths)


@pytest.mark.parametrize("bandwidths", [[1e-39], [1e-30, 1e30], [1e308]])
@pytest.mark.parametrize("function", [mmd2, mmd2_linear, mmd2_features])
def test_refuses_bandwidths_that_leave_no_number(function, bandwidths):
    """|x - y|^2 / b, or a ratio of the bandwidths, beyond float32."""
    with pytest.raises(ValueError, match="got bandwidths=.*: scale x, y or pass None"):
        function(*sample(5, 4, 3, dtype=torch.float32), bandwidths=bandwidths)


def test_refuses_no_features():
    for features in (0, -5):
        with pytest.raises(ValueError, match=f"got features={features}; expected 1 or more"):
            mmd2_features(GOOD, GOOD, features=features)


def properties(seed):
    """mmd2 of one draw in float64 against (M1) to (M3), and what must hold of it.

    Values are at most 2 a bandwidth, and compared to within 1e-10; samples lie up to ten times
    their spread from 0.
    """
    rng = np.random.default_rng(seed)
    (n, m), D = rng.integers(2, 13, 2), int(rng.integers(1, 6))
    scale, far = 10.0 ** rng.uniform(-3, 3), rng.uniform(-10, 10)
    x, y = (rng.normal(size=(k, D)) * rng.uniform(0.5, 2) + far for k in (n, m))
    x, y = torch.from_numpy(scale * x), torch.from_numpy(scale * y)
    given = (scale**2 * 10.0 ** rng.uniform(-1, 2, rng.integers(1, 5))).tolist()
    i, j = torch.from_numpy(rng.permutation(n)), torch.from_numpy(rng.permutation(m))
    shift, factor = torch.from_numpy(scale * rng.normal(size=D)), 10.0 ** rng.uniform(-2, 2)
    for unbiased in (True, False):
        for bandwidths in (None, given):
            options = {"bandwidths": bandwidths, "unbiased": unbiased}
            value = mmd2(x, y, **options).item()
            want = naive(x, y, bandwidths or default_bandwidths(x, y), unbiased).item()
            others = [want, mmd2(y, x, **options).item(), mmd2(x[i], y[j], **options).item()]
            others.append(mmd2(x + shift, y + shift, **options).item())
            options["bandwidths"] = bandwidths and [b * factor**2 for b in bandwidths]
            others.append(mmd2(factor * x, factor * y, **options).item())
            assert others == pytest.approx([value] * 5, rel=0, abs=1e-10), seed
            if not unbiased:
                assert value >= -1e-12 and abs(mmd2(x, x[i], **options).item()) < 1e-10, seed


def test_M1_M2_M3_properties_of_random_samples():
    for seed in range(20):
        properties(seed)


@pytest.mark.slow
def test_M1_M2_M3_properties_of_many_random_samples(record_property):
    record_property("cases", 100)
    for seed in range(20, 120):
        properties(seed)


@pytest.mark.skipif(not CASES, reason="the oracle files are not part of the repository")
@pytest.mark.parametrize("name", CASES)
def test_oracle(name):
    data, answer = (
        np.load(ORACLE / f"{name}.npz"),
        json.loads((ORACLE / f"{name}.json").read_text()),
    )
    x, y = torch.from_numpy(data["X"]), torch.from_numpy(data["Z"]).requires_grad_()
    bandwidths = answer["mmd_bandwidths"]
    assert mmd._prepare(x, y, None)[1] == pytest.approx(bandwidths[::-1], rel=1e-9)
    for kind, given in (("multi", None), ("single", bandwidths[2:3])):
        got = {
            f"mmd_biased_{kind}": mmd2(x, y, bandwidths=given, unbiased=False),
            f"mmd_unbiased_{kind}": mmd2(x, y, bandwidths=given),
            f"mmd_linear_{kind}": mmd2_linear(x, y, bandwidths=given),
        }
        for key in set(got) & set(answer):
            assert got[key].item() == pytest.approx(answer[key], rel=1e-9, abs=1e-12), key
    (grad,) = torch.autograd.grad(mmd2(x, y, unbiased=False), y)
    expected = torch.from_numpy(data["mmd_grad_Z"])
    assert (grad - expected).norm() <= 1e-7 * expected.norm()
    single = mmd2(x.float(), y.float(), unbiased=False).item()
    loose = 1e-4 if name == "far_small_scale" else 1e-5
    assert single == pytest.approx(answer["mmd_biased_multi"], rel=loose)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cpu_and_cuda_agree():
    x, y = sample(700, 600, 16, dtype=torch.float32)
    x2, y2 = x.to("cuda"), y.to("cuda").requires_grad_()
    y.requires_grad_()
    for function in (mmd2, mmd2_linear, mmd2_features):
        a, b = function(x, y), function(x2, y2)
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)
        (p,), (q,) = torch.autograd.grad(a, y), torch.autograd.grad(b, y2)
        torch.testing.assert_close(p, q.cpu(), rtol=1e-3, atol=1e-7)
    assert two_sample_test(x2, y2)[1] == two_sample_test(x, y)[1]


@pytest.mark.parametrize("function", [mmd2, mmd2_linear, mmd2_features])
def test_samples_too_small_for_their_squares_are_refused(function):
    """1e-25 in single precision gave a distance of 0, whatever the samples."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="scale x, y"):
        function(1e-25 * x, 1e-25 * (x + 1))
    assert float(function(1e-12 * x, 1e-12 * (x + 1))) > 0
    assert float(function(0 * x, 0 * x)) == pytest.approx(0, abs=1e-6)

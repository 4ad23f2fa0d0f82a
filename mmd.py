r"""Maximum mean discrepancy (MMD) of two samples, differentiable in both. Needs torch alone.

MMD is a distance between feature means (slide 40); the kernel trick never forms the features:
    MMD^2(P, Q) = |mu_P - mu_Q|^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                (M1)
    k(x, y) = sum_b exp(-|x - y|^2 / b), by default b = mean |z - z'|^2 times 1/4 ... 4  (M2)
    U = sum_{i != j} k(x_i, x_j) / (n (n-1)) + same of y - 2 sum k(x_i, y_j) / (nm)      (M3)
    exp(-2 d / b) = exp(-d / b)^2: bandwidths that halve need one exponential in all     (M4)
    d k(x, y) = -2 w (x - y) (dx - dy),  w = sum_b exp(-|x - y|^2 / b) / b               (M5)
    linear time: mean of k(x, x') + k(y, y') - k(x, y') - k(x', y), consecutive pairs    (M6)
    exp(-|x - y|^2 / b) = E cos(v (x - y)),  v ~ N(0, 2/b): random Fourier features      (M7)
    p-value: the share of random relabellings whose U is at least the one observed       (M8)
"""

import math

import torch
from torch import Tensor

BLOCK = 512  # rows and columns of a block of the kernel matrix, so that it stays in the cache


def mmd2_naive(x: Tensor, y: Tensor, bandwidths: list[float], unbiased: bool = True) -> Tensor:
    """(M1) to (M3) as they are defined, differentiable, with all pairs of samples in memory."""

    def mean_kernel(a, b, among=False):
        d2 = (a[:, None] - b).square().sum(2)
        k = sum(torch.exp(-d2 / width) for width in bandwidths)  # (M2)
        n, m = k.shape
        return (k.sum() - k.trace()) / (n * (n - 1)) if among and unbiased else k.sum() / (n * m)

    return mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y)  # (M1), (M3)


def _prepare(x, y, bandwidths, least=1):
    """Check; return both samples as z (n + m, D), centred, and the bandwidths, largest first."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise ValueError(f"got {type(x)} and {type(y)}; expected tensors: use torch.as_tensor(x)")
    for right, expected in (
        (x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1], "(n, D) and (m, D): reshape or embed"),
        (all(v.is_floating_point() for v in (x, y)), "floating point: use .float()"),
        (x.dtype == y.dtype and x.device == y.device, "one dtype and one device: use y.to(x)"),
        (all(v.numel() and v.shape >= (least,) for v in (x, y)), f"n, m >= {least}, D >= 1: add"),
        (x.is_meta or x.isfinite().all(), "no NaN or inf in x: drop those samples"),
        (y.is_meta or y.isfinite().all(), "no NaN or inf in y: drop those samples"),
    ):
        if not right:
            got = " and ".join(f"{tuple(v.shape)} {v.dtype} {v.device}" for v in (x, y))
            raise ValueError(f"got x and y {got}; expected {expected}")
    z = torch.cat([x, y]).to(torch.promote_types(x.dtype, torch.float32))
    z = z - z.detach().mean(0)  # careful: far from 0 digits are lost
    d2 = 2 * z.detach().square().sum(dtype=torch.float64).item()  # over n + m - 1: mean, i != j
    default = [d2 / (len(z) - 1) * 2.0**i or 1.0 for i in range(-2, 3)]  # (M2)
    b = sorted(map(float, default if bandwidths is None else bandwidths), reverse=True)
    reach, limits = float(z.detach().abs().max()), torch.finfo(z.dtype)
    small = 0 < reach and reach**2 < limits.tiny / limits.eps  # careful: squares lose their digits
    if small or not (b and b[-1] > 0 and 9 * (d2 + sum(b)) / b[-1] < limits.max):
        raise ValueError(f"got bandwidths={b}; expected positive numbers: scale x, y or pass None")
    return z, b


def mmd2(x: Tensor, y: Tensor, *, bandwidths=None, unbiased: bool = True) -> Tensor:
    """MMD^2 of two samples (M3) with its gradient (M5), but no second derivatives; slide 40.
    Args:
        x, y: (n, D) and (m, D), one floating dtype (half precision: float32 inside) and device.
        bandwidths: list of b > 0, squared distances, or None (M2); constants of the gradient.
        unbiased: U; False is V, which keeps i = j, divides by n^2 and is never negative. ORCA's
            release minimises V, of every target class by itself with all of the source:
            sum over c of share_c * mmd2(x_s, x_t[y_t == c], unbiased=False).
    Returns: Tensor, (). O((n + m)^2 D) time, memory of a few blocks.
    Raises: ValueError on any other input, on NaN or inf, or n, m < 2 (V: 1).
    Source: Gretton et al., A kernel two-sample test, 2012, lemma 6. Differs: a sum of kernels."""
    z, bandwidths = _prepare(x, y, bandwidths, 1 + unbiased)
    n, m, top, size = len(x), len(y), bandwidths[0], BLOCK * (8 if x.is_cuda else 1)
    z = z * math.sqrt(2 / top)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        half, one = z.square().sum(1, keepdim=True) / 2, torch.ones_like(z[:, :1])
        left, right = torch.cat([z, -half, one], 1), torch.cat([z, one, -half], 1)
        value, grad = 0, torch.zeros_like(left)
        L, R, G = ([*v[:n].split(size), *v[n:].split(size)] for v in (left, right, grad))
        side = [int(i >= math.ceil(n / size)) for i in range(len(L))]  # a block of x: 0, of y: 1
        share = [1 / (n * (n - unbiased)), -1 / (n * m), 1 / (m * (m - unbiased))]  # (M1), (M3)
        for i, j in torch.combinations(torch.arange(len(L)), with_replacement=True).tolist():
            c, e = share[side[i] + side[j]], (L[i] @ R[j].T).clamp_max_(0)  # e = -|x - y|^2 / top
            if i == j:
                e.fill_diagonal_(-math.inf if unbiased else 0.0)
            k, w = e, torch.zeros_like(e)
            for above, b in zip(bandwidths[:1] + bandwidths, bandwidths, strict=False):
                k = k.square_() if above == 2 * b else torch.exp(e * (top / b))  # (M4)
                value += k.sum(dtype=torch.float64) * (c if i == j else 2 * c)
                w.add_(k, alpha=top / b)
            for p, q, v in ((i, j, w), (j, i, w.T))[: 1 + (i != j)]:  # while they are in the cache
                if (x, y)[side[p]].requires_grad:
                    G[p].addmm_(v, L[q], alpha=c)  # (M5): sum w z, and in the last column sum w
        grad = 2 * (grad[:, :-2] - grad[:, -1:] * z)
    return value.to(z.dtype) + ((z - z.detach()) * grad).sum()  # the value, with this gradient


def mmd2_linear(x: Tensor, y: Tensor, *, bandwidths=None) -> Tensor:
    """Unbiased MMD^2 of the first 2 floor(min(n, m) / 2) points (M6): O(n D) time, but noisy.
    Args, Returns, Raises: as mmd2. Source: Gretton et al. 2012, sec. 6. Differs: as mmd2."""
    z, bandwidths = _prepare(x, y, bandwidths, 2)
    x, y = (v[: min(len(x), len(y)) // 2 * 2] for v in z.split([len(x), len(y)]))
    d = [x[::2] - x[1::2], y[::2] - y[1::2], x[::2] - y[1::2], x[1::2] - y[::2]]
    k = sum(torch.exp(-torch.stack(d).square().sum(2) / b) for b in bandwidths)
    return (k[0] + k[1] - k[2] - k[3]).mean()  # (M6)


def mmd2_features(x: Tensor, y: Tensor, *, bandwidths=None, features=1024, seed=0) -> Tensor:
    """V to within O(1 / sqrt(features)) by random features (M7): O(n D features) time.
    Args: features, in all; seed, of them; else as mmd2. Source: Rahimi, Recht 2007. Differs: no."""
    z, bandwidths = _prepare(x, y, bandwidths)
    each, rng = math.ceil(features / len(bandwidths)), torch.Generator().manual_seed(seed)
    if each < 1:
        raise ValueError(f"got {features=}; expected 1 or more: pass 1024")
    v = [torch.randn(z.shape[1], each, generator=rng) * math.sqrt(2 / b) for b in bandwidths]
    x, y = (z @ torch.cat(v, 1).to(z)).split([len(x), len(y)])  # (M7)
    return sum((f(x).mean(0) - f(y).mean(0)).square().sum() for f in (torch.cos, torch.sin)) / each


def two_sample_test(x: Tensor, y: Tensor, *, permutations=200, seed=0) -> tuple[Tensor, float]:
    """Permutation test of P = Q: U and its p-value (M8). O((n + m)^2) memory, one kernel matrix.
    Args: x, y as in mmd2; permutations of the labels, drawn from seed. Raises: as mmd2.
    Returns: U, a float64 Tensor, (), without gradient; p, at least 1 / (permutations + 1).
    Source: Gretton et al. 2012, sec. 5. Differs: permutations, all of one kernel matrix."""
    z, bandwidths = _prepare(x, y, None, 2)
    n, m, z, rng = len(x), len(y), z.detach().double(), torch.Generator().manual_seed(seed)
    K = sum(torch.exp(-torch.cdist(z, z).square() / b) for b in bandwidths).fill_diagonal_(0)
    first, others = torch.arange(n + m)[None], torch.rand(permutations, n + m, generator=rng)
    s = (torch.cat([first, others.argsort(1)]) < n).to(z)  # 1 where a point counts as an x
    t = 1 - s
    u = (s @ K * (s / (n * (n - 1)) - t * 2 / (n * m)) + t @ K * t / (m * (m - 1))).sum(1)
    return u[0], (u >= u[0] - 1e-12).double().mean().item()  # (M8)


if __name__ == "__main__":
    print(f"moved by 1: {mmd2(a := torch.randn(300, 4), a + 1):.3f}; unmoved: {mmd2(a, a):.3f}")

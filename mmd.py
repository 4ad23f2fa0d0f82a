r"""Maximum mean discrepancy (MMD) of two samples x (n, D) and y (m, D), differentiable in both.

MMD is a distance between feature means (slide 40); the kernel trick never forms the features:
    MMD^2(P, Q) = |mu_P - mu_Q|^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                (M1)
    k(x, y) = sum_b exp(-|x - y|^2 / b), by default b = mean |z - z'|^2 times 1/4 ... 4  (M2)
    U = sum_{i != j} k(x_i, x_j) / (n (n-1)) + same of y - 2 sum k(x_i, y_j) / (nm)      (M3)
        unbiased=True; False is V: it keeps i = j, divides by n^2, and is never negative
    exp(-2 d / b) = exp(-d / b)^2: bandwidths that halve need one exponential in all     (M4)
    d k(x, y) = -2 w (x - y) (dx - dy),  w = sum_b exp(-|x - y|^2 / b) / b               (M5)
    linear time: mean of k(x, x') + k(y, y') - k(x, y') - k(x', y), consecutive pairs    (M6)
    exp(-|x - y|^2 / b) = E cos(v (x - y)),  v ~ N(0, 2/b): random Fourier features      (M7)
    p-value: the share of random relabellings whose U is at least the one observed       (M8)
Bandwidths are constants of the gradient; half precision is computed in float32. Sources: Gretton
et al., A kernel two-sample test, 2012; Rahimi and Recht, Random features, 2007. Needs torch alone.
"""

import math

import torch
from torch import Tensor

BLOCK = 512  # rows and columns of a block of the kernel matrix, so that it stays in the cache


def _prepare(x, y, bandwidths, least=1):
    """Check; return both samples jointly centred and the bandwidths, largest first."""
    for right, expected in (
        (x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1], "(n, D) and (m, D): reshape or embed"),
        (all(v.is_floating_point() for v in (x, y)), "floating point: use .float()"),
        (x.dtype == y.dtype and x.device == y.device, "one dtype and one device: use y.to(x)"),
        (all(v.numel() and v.shape >= (least,) for v in (x, y)), f"n, m >= {least}, D >= 1: add"),
        (x.device != y.device or all(v.isfinite().all() for v in (x, y)), "no NaN or inf: drop"),
    ):
        if not right:
            got = " and ".join(f"{tuple(v.shape)} {v.dtype} {v.device}" for v in (x, y))
            raise ValueError(f"got x and y {got}; expected {expected}")
    x, y = (v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for v in (x, y))
    centre = torch.cat([x.detach(), y.detach()]).mean(0)  # careful: far from 0 digits are lost
    x, y = x - centre, y - centre
    if bandwidths is None:  # (M2): the mean over i != j is 2 sum |z - mean|^2 / (n + m - 1)
        total = sum(float(v.detach().square().sum(dtype=torch.float64)) for v in (x, y))
        bandwidths = [2 * total / (len(x) + len(y) - 1) * 2.0**i or 1.0 for i in range(-2, 3)]
    bandwidths = sorted((float(b) for b in bandwidths), reverse=True)
    if not (bandwidths and bandwidths[-1] > 0 and math.isfinite(sum(bandwidths))):
        raise ValueError(f"got bandwidths={bandwidths}; expected positive numbers: or pass None")
    return x, y, bandwidths


class _MMD2(torch.autograd.Function):
    """(M3) with its gradient, taken while a block is in the cache. No second derivatives."""

    @staticmethod
    def forward(ctx, x, y, bandwidths, unbiased):
        n, m, top, size = len(x), len(y), bandwidths[0], BLOCK * (8 if x.is_cuda else 1)
        z = torch.cat([x, y]) * math.sqrt(2 / top)
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
            for p, q, v in ((i, j, w), (j, i, w.T))[: 1 + (i != j)]:
                if ctx.needs_input_grad[side[p]]:
                    G[p].addmm_(v, L[q], alpha=c)  # (M5): sum w z, and in the last column sum w
        ctx.grads = (2 * math.sqrt(2 / top) * (grad[:, :-2] - grad[:, -1:] * z)).split([n, m])
        return value.to(z.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.grads[0], g * ctx.grads[1], None, None


def mmd2(x: Tensor, y: Tensor, *, bandwidths=None, unbiased: bool = True) -> Tensor:
    """MMD^2 (M3): O((n + m)^2 D) time, memory of a few blocks; bandwidths: a list, or None."""
    return _MMD2.apply(*_prepare(x, y, bandwidths, 1 + bool(unbiased)), bool(unbiased))


def mmd2_linear(x: Tensor, y: Tensor, *, bandwidths=None) -> Tensor:
    """Unbiased, from the first h = 2 floor(min(n, m) / 2) points: O(n D) time, but noisy."""
    x, y, bandwidths = _prepare(x, y, bandwidths, 2)
    x, y = (v[: min(len(x), len(y)) // 2 * 2] for v in (x, y))
    d = [x[::2] - x[1::2], y[::2] - y[1::2], x[::2] - y[1::2], x[1::2] - y[::2]]
    k = sum(torch.exp(-torch.stack(d).square().sum(2) / b) for b in bandwidths)
    return (k[0] + k[1] - k[2] - k[3]).mean()  # (M6)


def mmd2_features(x: Tensor, y: Tensor, *, bandwidths=None, features=1024, seed=0) -> Tensor:
    """V to within O(1 / sqrt(features)), in O(n D features); as many for each bandwidth."""
    x, y, bandwidths = _prepare(x, y, bandwidths)
    each, rng = math.ceil(features / len(bandwidths)), torch.Generator().manual_seed(seed)
    v = [torch.randn(x.shape[1], each, generator=rng) * math.sqrt(2 / b) for b in bandwidths]
    x, y = (z @ torch.cat(v, 1).to(z) for z in (x, y))  # (M7)
    return sum((f(x).mean(0) - f(y).mean(0)).square().sum() for f in (torch.cos, torch.sin)) / each


def two_sample_test(x: Tensor, y: Tensor, *, permutations=200, seed=0) -> tuple[Tensor, float]:
    """Permutation test of P = Q: mmd2(x, y), its p-value. The kernel matrix is formed once."""
    x, y, bandwidths = _prepare(x.detach(), y.detach(), None, 2)
    n, m, z, rng = len(x), len(y), torch.cat([x, y]).double(), torch.Generator().manual_seed(seed)
    K = sum(torch.exp(-torch.cdist(z, z).square() / b) for b in bandwidths).fill_diagonal_(0)
    first, others = torch.arange(n + m)[None], torch.rand(permutations, n + m, generator=rng)
    s = (torch.cat([first, others.argsort(1)]) < n).to(z)  # 1 where a point counts as an x
    t = 1 - s
    u = (s @ K * (s / (n * (n - 1)) - t * 2 / (n * m)) + t @ K * t / (m * (m - 1))).sum(1)
    return u[0], (u >= u[0] - 1e-12).double().mean().item()  # (M8)


if __name__ == "__main__":
    x, y = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(1))
    print(f"same {mmd2(x, y):.4f}, moved {mmd2(x, y + 1):.4f}, p {two_sample_test(x, y)[1]:.2f}")

r"""Optimal transport dataset distance (OTDD) of two labelled data sets, differentiable in both.

A label stands for the distribution alpha_y of its samples, so that labels of different data sets
can be compared. There are n source and m target samples, all of equal weight (slides 10 and 41):

    d_Z^p((x, y), (x', y')) = |x - x'|^p + W_p^p(alpha_y, alpha_y')                      (D1)
    OTDD = min over pi of <pi, d_Z^p>,   pi >= 0,  pi 1 = 1/n,  pi^T 1 = 1/m             (D2)
    W_p^p(alpha, beta) = min over pi of <pi, |x - x'|^p>         label_distance="exact"  (D3)
    W_2^2 = |m - m'|^2 + tr S + tr S' - 2 |L L'^T|_*,  S = L^T L              "gaussian" (D4)
    OT_eps = min over pi of <pi, c> + eps KL(pi | 1/n x 1/m)     "sinkhorn", or eps > 0  (D5)
    S_eps = OT_eps(s, t) - OT_eps(s, s)/2 - OT_eps(t, t)/2                  debias=True  (D6)
    d OT_eps = <pi, d c> + KL(pi | 1/n x 1/m) d eps              the envelope theorem    (D7)
    pi is optimal if c - f - g >= 0 everywhere and = 0 where pi > 0                      (D8)

`otdd_naive` is the definition, `otdd` its fast form, and `OTDD` that of many targets to one source.
Needs torch; exact plans also need POT (pip install pot). Source: Alvarez-Melis and Fusi, Geometric
dataset distances via optimal transport, 2020. Differs: no factor 1/2; labels act on the gradient.
"""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

# n, m samples; D features; C_s, C_t classes. Rows of cost matrices and plans: source samples.
DENSE = 2**26  # entropic plans of more entries are never stored: their rows are streamed ...
BLOCK = 2**22  # ... in blocks of so many entries, computed anew whenever they are needed


def otdd_naive(x_s: Tensor, y_s: Tensor, x_t: Tensor, y_t: Tensor, p: float = 2) -> Tensor:
    """OTDD as it is defined, differentiable, slow."""
    import ot

    def optimal_plan(cost):  # a constant of the gradient (D7)
        return torch.from_numpy(ot.emd([], [], cost.detach().double().numpy())).to(cost)

    cost = torch.cdist(x_s, x_t, compute_mode="donot_use_mm_for_euclid_dist") ** p
    d_Z = cost.clone()
    for a in y_s.unique():
        for b in y_t.unique():
            pair = (y_s == a).nonzero(), (y_t == b).nonzero().T
            W = (optimal_plan(cost[pair]) * cost[pair]).sum()  # (D3)
            d_Z[pair] = cost[pair] + W  # (D1)
    return (optimal_plan(d_Z) * d_Z).sum()  # (D2)


# ---- Data sets and costs -------------------------------------------------------------------------


class _Set:
    """A data set sorted by class: x (n, D), about the source's mean; y (n,) in 0..C-1; sizes of the
    C classes; their labels; order (n,), where the samples came from."""

    def __init__(self, x, y, name, source=None):
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        like = x if source is None else source.x
        same = x.dtype == like.dtype and x.device == y.device == like.device
        for right, expected in (
            (x.ndim == 2 and x.numel(), "x (n, D), n >= 1, D >= 1: reshape it or add samples"),
            (x.shape[-1:] == like.shape[-1:], "x_s and x_t of one width D: embed both alike"),
            (y.shape == x.shape[:1], "y (n,): give each sample one label"),
            (x.is_floating_point(), "x in floating point: use x.float()"),
            (not (y.is_floating_point() or y.is_complex()), "integers as labels: use y.long()"),
            (same, f"one dtype and device: use x.to({like.dtype}), .to('{like.device}')"),
            (x.is_meta or x.isfinite().all(), f"no NaN or inf in x_{name}: drop those samples"),
        ):
            if not right:
                got = " and ".join(f"{tuple(v.shape)} {v.dtype} {v.device}" for v in (x, y))
                raise ValueError(f"got x_{name}, y_{name} {got}; expected {expected}")
        self.labels, y, sizes = torch.unique(y, return_inverse=True, return_counts=True)
        self.order, self.sizes = y.argsort(stable=True), sizes.tolist()
        x, self.y = x[self.order], y[self.order]
        self.centre = x.detach().mean(0) if source is None else source.centre
        self.x = x - self.centre


@torch.no_grad()
def _costs(x, z, p=2):
    """|x_i - z_j|^p, (n, m), from one matrix product; z may be a batch of sets."""
    for u, v in ((x.to(dtype), z.to(dtype)) for dtype in (x.dtype, torch.float64)):
        cost = (u @ v.mT).mul_(-2).add_(v.square().sum(-1)[..., None, :])
        cost = cost.add_(u.square().sum(-1)[:, None]).clamp_(min=0)
        if u.dtype == torch.float64 or cost.min() > 1e-3 * cost.mean():
            break  # careful: near points lose their digits; once more in float64
    return (cost if p == 2 else cost.pow_(p / 2)).to(x.dtype)


def _mean_cost(s, t):
    """The mean of |x - x'|^2 over all pairs of samples, (), differentiable; never quite 0."""
    spreads = sum((v.x - v.x.mean(0)).square().sum(1).mean() for v in (s, t))
    gap = (s.x.mean(0) - t.x.mean(0)).square().sum()
    return spreads + gap + torch.finfo(gap.dtype).tiny


# ---- Transport -----------------------------------------------------------------------------------


class _Transport(torch.autograd.Function):
    """Transport from x (n, D) to each of the C sets that follow one another in z (m, D).

    Args:
        sizes: of the sets. eps: None is exact (D3), else a tensor, absolute (D5).
        labels: None or (W (n, k), y (m,)): the costs have W[:, y] on top (D1).
    Returns: values, (C,), differentiable in x, z and eps; plans, which yield blocks of rows: which
        rows these are, their plan (k, m), and w = pi |x - z|^(p - 2).
    """

    @staticmethod
    def forward(ctx, x, z, sizes, p, labels=None, eps=None, tol=None):
        y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(z.device)
        if eps is None:
            values, plans = _exact(x, z, y, sizes, p, labels)
        else:
            plans = _Entropic(x, z, sizes, labels)
            plans.solve(float(eps), tol)
            values = plans.values.clone()
        ctx.save_for_backward(x, z, y)
        ctx.plans, ctx.p = plans, p
        return values, plans

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope, _):
        """The gradient of the envelope theorem, in which plans are constant."""
        x, z, y = ctx.saved_tensors
        eps_grad = None
        if ctx.needs_input_grad[5]:
            KL = (ctx.plans.values - ctx.plans.linear()) / ctx.plans.eps
            eps_grad = (slope * KL).sum()  # (D7)
        x, z = (torch.cat([v, torch.ones_like(v[:, :1])], 1) for v in (x, z))
        wz, wx, slope = torch.zeros_like(x), torch.zeros_like(z), ctx.p * slope[y, None]
        for rows, _, w in ctx.plans:  # (D7)
            wz[rows] += w @ (slope * z)
            wx += slope * (w.T @ x[rows])
        x_grad, z_grad = (w[:, -1:] * v[:, :-1] - w[:, :-1] for v, w in ((x, wz), (z, wx)))
        return x_grad, z_grad, None, None, None, eps_grad, None


def _exact(x, z, y, sizes, p, labels):
    """Exact plans (D3): their values, (C,), and all of them as one sparse block."""
    costs = _costs(x, z, p)
    if labels:
        costs += labels[0][:, labels[1]]
    if len(x) == 1:  # every set has a single plan
        pi = 1 / torch.tensor(sizes).double()[None, y.cpu()]
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # POT releases Python's lock
            pi = torch.cat(list(pool.map(_solve, costs.cpu().split(sizes, dim=1))), dim=1)
    w = pi = pi.to(x).to_sparse()
    i, j = pi.indices()
    values = x.new_zeros(len(sizes)).index_add_(0, y[j], pi.values() * costs[i, j])
    if p != 2:
        d2 = (x[i] - z[j]).square().sum(1)
        slopes = pi.values() * torch.where(d2 > 0, d2 ** (p / 2 - 1), 0)
        w = torch.sparse_coo_tensor(pi.indices(), slopes, pi.shape, check_invariants=False)
    return values, [(slice(None), pi, w)]


def _solve(cost):
    """The plan of one exact programme, (n, m), in float64."""
    n, m = cost.shape
    if min(n, m) == 1:  # there is no choice
        return torch.full((n, m), 1 / (n * m), dtype=torch.double)
    import ot  # warns if it stops before the optimum

    c = cost / cost.mean().clamp_min(torch.finfo(cost.dtype).tiny)  # POT's tolerances are absolute
    f, u = c.amin(1, keepdim=True), torch.ones_like(c[:, :1])
    if n * m > 1e5 and (eps := 0.1 * c.std()) > 1e-6:
        K = (f - c).div_(eps).clamp_(min=-60).exp_()  # careful: denormals are very slow
        for _ in range(20):  # steps of Sinkhorn
            u = 1 / (K @ (1 / (K.T @ u)))
        f = f + eps * u.log()
    g = (c - f).amin(0)  # (D8): potentials near the optimum save much of the search
    start, c = (f[:, 0].double(), g.double()), c.double()
    a, b = c.new_full((n,), m), c.new_full((m,), n)  # whole numbers, which are not rounded
    plan = ot.emd(a, b, c, numItermax=10**9, check_marginals=False, potentials_init=start)
    return plan.div_(n * m)


class _Entropic:
    """Entropic plans (D5): pi = b exp((f + g - c) / eps) / n, with potentials f (C, n, 1) and
    g (C, 1, m'). The C sets are padded to m' samples, of weights b (C, 1, m').

    Sinkhorn's and Newton's steps take turns while eps comes down. The costs occur in sums over
    blocks of rows alone.
    """

    def __init__(self, x, z, sizes, labels):
        self.x, self.labels = x, labels
        cycle = torch.arange(max(sizes), device=z.device)
        self.sets = torch.stack([v[cycle % len(v)] for v in z.split(sizes)])
        self.b = pad_sequence([z.new_ones(k) / k for k in sizes], batch_first=True)[:, None]
        self.f, self.g = x.new_zeros(len(sizes), len(x), 1), torch.zeros_like(self.b)
        step = len(x) if len(x) * self.b.numel() <= DENSE else max(1, BLOCK // self.b.numel())
        self.rows = [slice(i, min(i + step, len(x))) for i in range(0, len(x), step)]
        self.whole = None  # the costs, if they are a single block
        self.whole = self.costs(self.rows[0]) if len(self.rows) == 1 else None

    def costs(self, rows):
        if self.whole is not None:
            return self.whole
        c = _costs(self.x[rows], self.sets)
        return c if self.labels is None else c + self.labels[0][rows][:, self.labels[1]]

    def kernel(self, rows):
        K = (self.f[:, rows] + self.g).sub_(self.costs(rows)).div_(self.eps)
        return K.clamp_(-60, 30).exp_()  # careful: denormals are very slow

    def plan(self, rows):
        return self.kernel(rows).mul_(self.b / len(self.x))

    def linear(self):  # <pi, c>, (C,)
        return sum((self.plan(rows) * self.costs(rows)).sum((1, 2)) for rows in self.rows)

    def __iter__(self):
        for rows in self.rows:
            pi = self.plan(rows).transpose(0, 1)[:, self.b[:, 0] > 0]
            yield rows, pi, pi

    def solve(self, eps, tol):
        """Find potentials, to within tol of the values; eps comes down from the mean cost."""
        self.eps = math.inf  # makes pi the product of its marginals
        mean, precision = float(self.linear().mean()), torch.finfo(self.b.dtype).eps
        levels = [eps * 4**k for k in range(20, 0, -1) if eps * 4**k < mean]
        for self.eps in [*levels, *[eps] * 50]:
            gap = self.improve()
            limit = max(tol, 8 * precision) * self.values + precision * eps
            if self.eps == eps and bool((gap <= limit).all()):
                return
        off = float((gap / self.values).max())
        warnings.warn(f"sinkhorn stopped {off:.0e} of the value short; raise eps", stacklevel=2)

    def dual(self, g):
        """The values of potentials g, (C,), with the best f to them; both are set."""
        self.g = g
        for rows in self.rows:
            exponent = (g - self.costs(rows)).div_(self.eps).add_(self.b.log())
            self.f[:, rows] = -self.eps * exponent.logsumexp(2, keepdim=True)
        return self.f.mean((1, 2)) + (self.b * g).sum((1, 2))

    def improve(self):
        """A step of Sinkhorn's, then one of Newton's by conjugate gradients; sets the values, which
        do not fall. Returns how much Newton's whole step adds to them, to second order, (C,)."""
        b, n, precision = self.b, len(self.x), torch.finfo(self.b.dtype).eps
        marginal = sum(self.kernel(rows).sum(1, keepdim=True) for rows in self.rows) / n
        values = self.dual(self.g - self.eps * marginal.log())
        whole = [self.kernel(rows) for rows in self.rows[:1] if len(self.rows) == 1]

        def kernels():
            return whole or map(self.kernel, self.rows)

        def dot(x, y):
            return (b * x * y).sum(2, keepdim=True)

        marginal = sum(k.sum(1, keepdim=True) for k in kernels()) / n  # the target's, over b
        step, slope = torch.zeros_like(b), 1 - marginal
        rest = slope - dot(slope, torch.ones_like(b))  # careful: constants change nothing
        direction = rest / marginal
        first = size = dot(rest, direction)
        active = size > 0
        for _ in range(50):
            curved = sum((k @ (b * direction).mT).mT @ k for k in kernels()) / n
            curved = marginal * direction - curved
            bend, least = dot(direction, curved), 64 * precision * size
            length = torch.where(active, size / bend.maximum(least), 0)
            active &= bend > least  # careful: what is below, or grows, is rounding
            step, rest = step + length * direction, rest - length * curved
            last, size = size, dot(rest, rest / marginal)
            active &= (size > 0.01 * first) & (size < 100 * first)
            if not active.any():
                break
            direction = rest / marginal + torch.where(active, size / last, 0) * direction
        g, gain = self.g, self.eps * dot(slope, step).flatten() / 2
        for _ in range(5):  # careful: far from the optimum whole steps of Newton may fail
            self.values = self.dual(g + self.eps * step.asinh())
            worse = (self.values < values - precision * values.abs())[:, None, None]
            if not worse.any():
                break
            step = torch.where(worse, step / 8, step)
        return gain


# ---- The distance --------------------------------------------------------------------------------


def _gaussians(s):
    """Of every class: the mean, and L with S = L^T L."""
    if min(s.sizes) < 2:
        label = int(s.labels[s.sizes.index(1)])
        raise ValueError(f"got 1 sample of class {label}, 'gaussian' needs 2; choose 'exact'")
    means = torch.stack([v.mean(0) for v in s.x.split(s.sizes)])
    scale = (torch.tensor(s.sizes).to(s.x) - 1).sqrt()
    rows = (s.x - means[s.y]) / scale[s.y, None]
    L = pad_sequence(rows.split(s.sizes), batch_first=True)
    # S = (Q^T L)^T (Q^T L) for an orthonormal basis Q of the columns of L: D rows are enough.
    return means, torch.linalg.qr(L.detach()).Q.mT @ L if L.shape[1] > L.shape[2] else L


class OTDD:
    """The distance of data sets to one source, as every step of an alignment needs it. Arguments as
    in `otdd`; detach x_s if it is constant. Nothing is carried over from one call to the next."""

    def __init__(self, x_s, y_s, *, p=2, label_distance="exact", eps=0.0, debias=False, tol=1e-7):
        self.s = _Set(x_s, y_s, "s")
        kinds, least = ("exact", "gaussian", "sinkhorn"), 8 * torch.finfo(self.s.x.dtype).eps
        power = p == 2 or (1 <= p < torch.inf and label_distance == "exact" and eps == 0)
        if not (label_distance in kinds and power and (eps == 0 or least <= eps < torch.inf)):
            want = f"one of {kinds}; p = 2, or p >= 1 if all is exact; eps = 0 or >= {least:.0e}"
            raise ValueError(f"got {label_distance=}, {p=}, {eps=}; expected {want}")
        self.p, self.label_distance, self.eps, self.tol = p, label_distance, eps, tol
        self.debias = debias and (eps > 0 or label_distance == "sinkhorn")  # exact: nothing to do

    def __call__(self, x_t, y_t, *, plan=False):
        s, t = self.s, self._target(x_t, y_t)
        with torch.autocast(t.x.device.type, enabled=False):
            mean = _mean_cost(s, t)
            W = self._labels(s, t, mean)
            mean_Z = mean + W[s.y].mean(0)[t.y].mean()
            value, plans = self._between(s, t, W, mean_Z)
            for v in (s, t) if self.debias else ():
                W = self._labels(v, v, mean)
                value = value - self._between(v, v, W, mean_Z)[0] / 2  # (D6)
        if not plan:
            return value
        pi = torch.cat([pi.to_dense() for _, pi, _ in plans])
        return value, pi[s.order.argsort()][:, t.order.argsort()]

    def _target(self, x_t, y_t):
        t = _Set(x_t, y_t, "t", self.s)
        reach = max(v.x.detach().abs().max().double() for v in (self.s, t))
        most = max(len(self.s.y), len(t.y)) * (4 * t.x.shape[1]) ** (self.p / 2)
        limits = torch.finfo(t.x.dtype)
        if reach and not limits.tiny / limits.eps < reach**self.p < limits.max / most:
            raise ValueError(f"got |x - x'|^{self.p} beyond {t.x.dtype}; scale the features to 1")
        return t

    def _labels(self, s, t, mean):
        """W_p^p between the classes, (C_s, C_t)."""
        if self.label_distance == "gaussian":
            (m_s, L_s), (m_t, L_t) = _gaussians(s), _gaussians(t)
            tr_s, tr_t = (L.square().sum((1, 2)) for L in (L_s, L_t))
            cross = torch.stack([torch.linalg.matrix_norm(L @ L_t.mT, "nuc") for L in L_s])
            return (m_s[:, None] - m_t).square().sum(-1) + tr_s[:, None] + tr_t - 2 * cross  # (D4)
        eps = (self.eps or 1e-2) * mean if self.label_distance == "sinkhorn" else None
        rows = [
            _Transport.apply(x, t.x, t.sizes, self.p, None, eps, self.tol)[0]
            for x in s.x.split(s.sizes)
        ]
        return torch.stack(rows)  # (D3), (D5)

    def _between(self, s, t, W, mean):
        """The programme over all samples (D2): its value, and its plan."""
        labels = W.detach()[s.y], t.y  # (D1)
        eps = self.eps * mean if self.eps else None
        value, plans = _Transport.apply(s.x, t.x, [len(t.y)], self.p, labels, eps, self.tol)
        mass = torch.zeros_like(W)  # from class to class
        for rows, pi, _ in plans:
            mass.index_add_(0, s.y[rows], pi @ one_hot(t.y).to(W))
        return value.sum() + (mass * (W - W.detach())).sum(), plans


def otdd(
    x_s, y_s, x_t, y_t, *, p=2, label_distance="exact", eps=0.0, debias=False, tol=1e-7, plan=False
):
    """Optimal transport dataset distance to the power p, min over pi of <pi, d_Z^p>; slide 10.

    Args:
        x_s, x_t: features, (n, D) and (m, D); y_s, y_t: labels, (n,) and (m,), any integers.
        p: the power, 2; another only if all is exact. label_distance: "exact" (D3), "gaussian"
            (D4; covariances over n_c - 1) or "sinkhorn" (D5). plan: return pi, too.
        eps: 0 is exact; else entropic (D5), a share of the mean cost ("sinkhorn" labels: of the
            mean feature cost, 1e-2 if eps is 0), as whose part it is differentiated.
        debias: the divergence (D6), 0 on itself, with the absolute eps of its first term in all.
        tol: error of an entropic value, relative to it; float32 reaches 1e-6.
    Returns: Tensor, () [, (n, m)]. Its p-th root is the metric.
    Raises: ValueError on NaN, empty or mismatched input, one-sample classes with "gaussian".
    With eps, more than DENSE pairs of samples are streamed: slower, in memory O(n + m)."""
    distance = OTDD(x_s, y_s, p=p, label_distance=label_distance, eps=eps, debias=debias, tol=tol)
    return distance(x_t, y_t, plan=plan)


def label_distances(x_s, y_s, x_t, y_t, *, p=2, label_distance="exact", eps=0.0, tol=1e-7):
    """W_p^p between the classes, (C_s, C_t), rows and columns by ascending label; as in `otdd`."""
    distance = OTDD(x_s, y_s, p=p, label_distance=label_distance, eps=eps, tol=tol)
    t = distance._target(x_t, y_t)
    return distance._labels(distance.s, t, _mean_cost(distance.s, t))


def wasserstein(x_s: Tensor, x_t: Tensor, *, p=2, eps=0.0, tol=1e-7) -> Tensor:
    """W_p = (min over pi of <pi, |x - x'|^p>)^(1/p) of point clouds (n, D), (m, D); slide 41. With
    eps, for p = 2, OT_eps^(1/2) (D5), KL term included, eps as a share of the mean cost."""
    y_s, y_t = (torch.zeros(v.shape[:1], dtype=torch.long, device=v.device) for v in (x_s, x_t))
    kind = "sinkhorn" if eps else "exact"
    cost = label_distances(x_s, y_s, x_t, y_t, p=p, label_distance=kind, eps=eps, tol=tol).sum()
    return cost ** (1 / p) if cost > 0 else cost * 0  # the root has no slope at 0


if __name__ == "__main__":
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    print(f"otdd(a, a) = {otdd(x, y, x, y):.4f}; otdd(a, a + 1) = {otdd(x, y, x + 1, y):.4f} = 2 D")

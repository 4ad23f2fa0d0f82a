r"""Optimal transport dataset distance (OTDD) of two labelled data sets, differentiable in both.

A label stands for the distribution alpha_y of its samples, so that labels of different data sets
can be compared. n source and m target samples, all of equal weight (slides 10 and 41):

    d_Z^p((x, y), (x', y')) = |x - x'|^p + W_p^p(alpha_y, alpha_y')                      (D1)
    OTDD = min_pi <pi, d_Z^p>,     pi >= 0,  pi 1 = 1/n,  pi^T 1 = 1/m                   (D2)
    W_p^p(alpha, beta) = min_pi <pi, |x - x'|^p>               label_distance="exact"    (D3)
    W_2^2 = |m - m'|^2 + tr S + tr S' - 2 |L L'^T|_*,  S = L^T L          "gaussian"     (D4)
    OT_eps = min_pi <pi, c> + eps KL(pi | 1/n x 1/m)           "sinkhorn", or eps > 0    (D5)
    S_eps = OT_eps(s, t) - OT_eps(s, s)/2 - OT_eps(t, t)/2     debias=True               (D6)
    d OTDD = <pi, d c>: solve without a graph, differentiate <pi, c> with pi constant    (D7)
    pi is optimal if c - f - g >= 0 everywhere and = 0 where pi > 0: few edges matter    (D8)

`otdd` compares two data sets once, `OTDD` many to one source. Needs torch, and POT (pip install
pot) for exact programmes. Source: Alvarez-Melis and Fusi, Geometric dataset distances via optimal
transport, 2020. Differs: no hidden 1/2, as in their package; labels act on the gradient."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# n, m samples; D features; C_s, C_t classes. Each pair of classes is a block of the (n, m) costs;
# all blocks are solved at once, with potentials f (n, C_t), g (C_s, m). (D2) is a single block.


class _Side:
    """A checked data set sorted by class: x (n, D) centred, y (n,), count (C,), E one-hot (n, C)"""

    def __init__(self, x, y, name, source=None):
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        like = source.x if source else x
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
        labels, y, self.count = torch.unique(y, return_inverse=True, return_counts=True)
        self.labels, self.order, self.gauss = labels.tolist(), y.argsort(stable=True), None
        self.centre = source.centre if source else x.detach().mean(0)
        self.x, self.y = x[self.order] - self.centre, y[self.order]
        self.E = torch.nn.functional.one_hot(self.y).to(x.dtype)

    def merged(self):  # into one class: f[:, y] and g[y] are then f and g, which broadcast
        one = copy.copy(self)
        one.y, one.E = slice(None), torch.ones_like(self.E[:, :1])
        one.count = self.count.sum()[None]
        return one


@torch.no_grad()
def _feature_costs(x, z, p):
    """|x_i - z_j|^p, (n, m), from one matrix product."""
    for u, v in ((x.to(dtype), z.to(dtype)) for dtype in (x.dtype, torch.float64)):
        cost = torch.addmm((v * v).sum(1).expand(len(u), -1), u, v.T, alpha=-2)
        cost = cost.add_((u * u).sum(1, keepdim=True)).clamp_(min=0)
        if u.dtype == torch.float64 or cost.min() > 1e-3 * cost.mean():
            break  # careful: near points lose their digits; once more in float64
    cost = cost.pow_(p / 2).to(x.dtype)
    if not (8 * cost.sum()).isfinite():  # room for (D1) and (D4)
        raise ValueError(f"got |x - x'|^{p} beyond {x.dtype}; scale the features down")
    return cost


def _envelope(value, x, z, cost, pi, p):
    """value, with the gradient of <pi, |x - z|^p> for constant pi (D7)."""
    w = p * pi if p == 2 else p * pi * torch.where(cost > 0, cost ** (1 - 2 / p), 0)
    w = w if w.count_nonzero() > 0.1 * w.numel() else w.to_sparse()
    for v, other, w_v in ((x, z, w), (z, x, w.T)):
        if v.requires_grad:
            wz = w_v @ torch.cat([other, torch.ones_like(other[:, :1])], 1).detach()
            slope = wz[:, -1:] * v.detach() - wz[:, :-1]  # diag(w 1) x - w z
            value = value + ((v - v.detach()) * slope).sum()  # (D7)
    return value


def _plans(cost, s, t, eps, f=None):
    """Plans of all blocks, f, and if eps > 0 OT_eps; from potentials f near the optimum, if any."""
    if eps:
        return _sinkhorn(cost, s, t, eps, f)
    n_s, n_t = s.count.tolist(), t.count.tolist()
    if f is None and len(n_s + n_t) == 2 and cost.numel() > 1e5 and cost.std() > 1e-5 * cost.max():
        f = _sinkhorn(cost, s, t, 0.1 * float(cost.std()), None, 20, torch.inf)[1]  # needs eps > 0
    f = cost.new_zeros(len(cost), len(n_t)) if f is None else f.clone()
    pi, f, views = torch.zeros_like(cost, device="cpu"), f.cpu(), []
    for v, widths in ((cost.cpu(), n_t), (pi, n_t), (f, 1)):
        views.append([b.numpy() for rows in v.split(n_s) for b in rows.split(widths, 1)])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # POT releases the interpreter lock
        list(pool.map(_solve, *views))
    return pi.to(cost), f.to(cost), None


def _solve(c, pi, f):
    """(D3) One exact programme in numpy, (n, m): writes its plan to pi and potentials to f. From an
    f near the optimum, edges of small slack (D8) and the north-west corner plan (there must be a
    solution) make a sparse programme; then all slacks are checked, and edges that fail join."""
    import numpy as np
    import ot  # warns if it stops before the optimum
    from scipy.sparse import coo_array

    n, m = c.shape
    a, b = np.full(n, float(m)), np.full(m, float(n))  # whole masses: no rounding in the flow
    options = dict(numItermax=10**9, log=True, center_dual=False, check_marginals=False)
    if not f.any() or n * m < 50 * (n + m):
        f[:] = c.mean(1, keepdims=True)
        c = (c - f).astype(float)
        c -= c.mean(0)  # same plan, a quarter fewer pivots
        plan, log = ot.emd(a, b, c, **options)
        pi[:], f[:] = plan / (n * m), f + log["u"][:, None]
        return
    slack = c - f
    slack -= slack.min(0)
    keep = slack <= np.quantile(slack.ravel()[:: 1 + n * m // 20_000], 0.015)
    i, j = np.arange(n), np.arange(m)
    keep[i, i * m // n] = keep[j * n // m, j] = bad = True
    while np.any(bad):  # (D8)
        i, j = np.nonzero(keep)
        edges = coo_array((slack[i, j].astype(float), (i, j)), c.shape)
        plan, log = ot.emd(a, b, edges, **options)
        u, v = log["u"][:, None].astype(c.dtype), log["v"].astype(c.dtype)
        f += u
        slack -= u
        slack -= v
        bad = (slack < -10 * np.finfo(c.dtype).eps * c.mean()) & ~keep
        keep |= bad
    pi[plan.row, plan.col] = plan.data / (n * m)


@torch.no_grad()
def _sinkhorn(cost, s, t, eps, f=None, sweeps=2000, tol=1e-3):
    """(D5) Plans of all blocks, rounded to their marginals, f, OT_eps (C_s, C_t). Scales the kernel
    K = exp((f + g - c)/eps) to the plan K u v, then absorbs u, v into f, g, while eps comes down
    from the spread of the costs. Exponents end at -60: denormals are very slow."""
    a, b = 1 / s.count[s.y, None].to(cost), 1 / t.count[t.y].to(cost)

    def sums(K, v, s=s, t=t):  # K v, block by block: (n, m), (C_s, m) -> (n, C_t)
        return K @ (v.T * t.E) if len(v) == 1 else (K * v[s.y]) @ t.E

    levels, spread = [eps] * (sweeps // 20), float(cost.std(correction=0))
    while f is None and levels[0] * 4 < spread:
        levels.insert(0, levels[0] * 4)
    f = cost.new_zeros(len(cost), len(t.count)) if f is None else f
    g = torch.stack([c.amin(0) for c in (cost - f[:, t.y]).split(s.count.tolist())])
    f = torch.stack([c.amin(1) for c in (cost - g[s.y]).split(t.count.tolist(), 1)], 1)
    for level in levels:
        K = (f[:, t.y] + g[s.y]).sub_(cost).div_(level).clamp_(-60, 60).exp_()
        u, v = a.expand_as(f), b.expand_as(g)
        for k in range(20 if level == eps else 10):
            omega = 1.5 if k else 1.0  # over-relaxation: two to three times fewer sweeps
            u = u ** (1 - omega) * (a / sums(K, v)) ** omega
            v = v ** (1 - omega) * (b / sums(K.T, u.T, t, s).T) ** omega
        v = b / sums(K.T, u.T, t, s).T
        f, g = f + level * (u / a).log(), g + level * (v / b).log()
        error = float((u / a * sums(K, v) - 1).abs().mean())
        if level == eps and error < tol:
            break
    if error != error:
        raise ValueError(f"got NaN in sinkhorn with an absolute eps of {eps:.1e}; raise eps")
    if error > tol:
        warnings.warn(f"sinkhorn is {error:.0e} off its marginals; raise eps", stacklevel=2)
    value = s.E.T @ (a * f) + (b * g) @ t.E  # <f, 1/n> + <g, 1/m>
    u = torch.minimum(u, a / sums(K, v))
    short_s, short_t = a - u * sums(K, v), b - v * sums(K.T, u.T, t, s).T
    pi = K.mul_(u[:, t.y]).mul_(v[s.y])
    pi += short_s[:, t.y] * (short_t / (s.E.T @ short_s @ t.E.T).clamp_(1e-30))[s.y]
    return pi, f, value


def _gaussians(side):
    """Per class: mean, trace of the covariance S, and L with S = L^T L, padded with zero rows."""
    if side.count.min() < 2:
        label = side.labels[side.count.argmin()]
        raise ValueError(f"got 1 sample of class {label}, 'gaussian' needs 2; choose 'exact'")
    mean = side.E.T @ side.x / side.count[:, None]
    L = (side.x - mean[side.y]) / (side.count - 1).to(mean).sqrt()[side.y, None]
    roots = L.split(side.count.tolist())  # D rows do, S = (Q^T L)^T (Q^T L), if there are more:
    roots = [torch.linalg.qr(v.detach()).Q.T @ v if len(v) > v.shape[1] else v for v in roots]
    return mean, side.E.T @ L.square().sum(1), pad_sequence(roots, batch_first=True)


def _cross_term(L_s, L_t):
    """|L L'^T|_* = max <U, L L'^T> over |U| <= 1, with the best U a constant, as in (D7)."""
    rows = []
    for L in L_s:
        M = L @ L_t.mT  # (C_t, r, r')
        with torch.no_grad():
            N = (M if M.shape[1] <= M.shape[2] else M.mT).double()  # careful: lam are squares
            lam, Q = torch.linalg.eigh(N @ N.mT)
            root = torch.where(lam > 1e-12 * lam[:, -1:], lam, torch.inf).rsqrt()
            U = ((Q * root[:, None]) @ Q.mT @ N).to(M.dtype)
        rows.append((M * (U if U.shape == M.shape else U.mT)).sum((1, 2)))
    return torch.stack(rows)


class OTDD:
    """The distance of data sets to one source, as needed at every alignment step. Arguments as in
    `otdd`; x_s is held constant. Call it with any x_t, y_t: the potentials of one call start the
    next, which changes the time, not the result."""

    def __init__(self, x_s, y_s, *, p=2, label_distance="exact", eps=0.0, debias=False):
        kinds, power = ("exact", "gaussian", "sinkhorn"), p == 2 or label_distance != "gaussian"
        if not (label_distance in kinds and power and 1 <= p < torch.inf and 0 <= eps < torch.inf):
            want = f"one of {kinds}; p >= 1, 2 for 'gaussian'; eps >= 0, a share of the mean cost"
            raise ValueError(f"got {label_distance=}, {p=}, {eps=}; expected {want}")
        self.p, self.label_distance, self.eps = p, label_distance, eps
        self.debias = debias and (eps > 0 or label_distance == "sinkhorn")  # exact: nothing to do
        self.s, self.warm = _Side(torch.as_tensor(x_s).detach(), y_s, "s"), {}

    def __call__(self, x_t, y_t, *, plan=False):
        t = _Side(x_t, y_t, "t", self.s)
        with torch.autocast(t.x.device.type, enabled=False):
            value, pi, eps = self._between(self.s, t)
            for v in (self.s, t) if self.debias else ():
                value = value - self._between(v, v, eps)[0] / 2  # (D6)
        return (value, pi[self.s.order.argsort()][:, t.order.argsort()]) if plan else value

    def _between(self, s, t, eps=None):
        """One outer problem -> value, plan, the absolute eps."""
        cost = _feature_costs(s.x, t.x, self.p)
        W, inner = self._labels(s, t, cost)
        total = cost + W.detach()[s.y][:, t.y]  # (D1)
        eps, warm = eps or self.eps * float(total.mean()), self.warm if s is self.s else {}
        pi, f, dual = _plans(total, s.merged(), t.merged(), eps, warm.get(t is s))  # (D2)
        value = dual.sum() if eps and self.debias else (pi * total).sum()
        mass, warm[t is s] = s.E.T @ pi @ t.E, f
        flow = pi if inner is None else inner.mul_(mass[s.y][:, t.y]).add_(pi)
        value = value + (mass * (W - W.detach())).sum()
        return _envelope(value, s.x, t.x, cost, flow, self.p), pi, eps

    def _labels(self, s, t, cost):
        """Distances between the classes, (C_s, C_t), and the plans inside the blocks, (n, m)."""
        if self.label_distance == "gaussian":  # (D4); differentiable, no plans
            for v in (s, t):
                v.gauss = v.gauss or _gaussians(v)
            (m_s, tr_s, L_s), (m_t, tr_t, L_t) = s.gauss, t.gauss
            means = (m_s[:, None] - m_t).square().sum(-1)
            return means + tr_s[:, None] + tr_t - 2 * _cross_term(L_s, L_t), None
        warm = self.warm.setdefault((t is s, "labels"), {}) if s is self.s else {}
        f = torch.stack([warm[k] for k in t.labels], 1) if warm.keys() >= {*t.labels} else None
        eps = (self.eps or 1e-2) * float(cost.mean()) if self.label_distance == "sinkhorn" else 0
        pi, f, _ = _plans(cost, s, t, eps, f)
        warm.update(zip(t.labels, f.T, strict=True))
        return s.E.T @ (pi * cost) @ t.E, pi  # (D3), (D5): the costs of the plans, block by block


def otdd(x_s, y_s, x_t, y_t, *, p=2, label_distance="exact", eps=0.0, debias=False, plan=False):
    """Optimal transport dataset distance to the power p, min_pi <pi, d_Z^p> (D2), slide 10.

    Args:
        x_s, x_t: features, (n, D) and (m, D); y_s, y_t: labels, (n,) and (m,), any integers.
        label_distance: see (D3), (D4) (covariances over n_c - 1), (D5). plan: return pi, too.
        eps: 0 is exact; else entropic, a share of the mean cost ("sinkhorn" labels: of the mean
            feature cost, 1e-2 if eps is 0). debias: divergence (D6), 0 on itself.
    Returns: Tensor, () [, (n, m)]; its p-th root is the metric. With eps and no debias the cost of
        the entropic plan, rounded to its marginals. All gradients hold pi constant (D7).
    Raises: ValueError on NaN, empty or mismatched input, one-sample classes with "gaussian".
    """
    distance = OTDD(x_s, y_s, p=p, label_distance=label_distance, eps=eps, debias=debias)
    distance.s = _Side(x_s, y_s, "s")
    return distance(x_t, y_t, plan=plan)


def label_distances(x_s, y_s, x_t, y_t, *, p=2, label_distance="exact", eps=0.0):
    """W_p^p between the classes, (C_s, C_t), rows and columns by ascending label; as in `otdd`."""
    distance = OTDD(x_s, y_s, p=p, label_distance=label_distance, eps=eps)
    s = _Side(x_s, y_s, "s")
    t = _Side(x_t, y_t, "t", s)
    W, inner = distance._labels(s, t, cost := _feature_costs(s.x, t.x, p))
    if inner is None:
        return W
    blocks = [(s.y == a, t.y == b) for a in range(len(s.count)) for b in range(len(t.count))]
    parts = [(s.x[i], t.x[j], cost[i][:, j], inner[i][:, j]) for i, j in blocks]
    values = [_envelope(w, *part, p) for w, part in zip(W.flatten(), parts, strict=True)]
    return torch.stack(values).view_as(W)


def wasserstein(x_s: Tensor, x_t: Tensor, *, p: float = 2, eps: float = 0.0) -> Tensor:
    """W_p = (min_pi <pi, |x - x'|^p>)^(1/p) of two point clouds (n, D), (m, D); slide 41."""
    y_s, y_t = (torch.zeros(v.shape[:1], dtype=torch.long, device=v.device) for v in (x_s, x_t))
    by = "sinkhorn" if eps else "exact"
    cost = label_distances(x_s, y_s, x_t, y_t, p=p, label_distance=by, eps=eps).sum()
    return cost ** (1 / p) if cost > 0 else cost * 0  # the root has no slope at 0


if __name__ == "__main__":
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    print(f"otdd(a, a) = {otdd(x, y, x, y):.4f}; otdd(a, a + 1) = {otdd(x, y, x + 1, y):.4f} = 2 D")

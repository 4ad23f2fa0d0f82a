r"""Noise of many scales on features, and a loss that draws the outputs of one label together.

The mathematics of the slides' proposal, for proposed.py and for anyone; needs torch alone. d are
features (B, M) of samples with labels y (B,), standardised, so that sigma is in units of their
deviations. z = h(d) are the outputs that are compared.

    (N1)  d^t = sqrt(1 - sigma^2) d^(t-1) + sigma noise, d^0 = d, t = 1..T       slide 34
    (N2)  d^t = a d^0 + s noise, a = (1 - sigma^2)^(t/2), a^2 + s^2 = 1     the same at once
    (N3)  L_Y = -log [ sum_(i in Y, j in Y) si_ij / sum_(i in Y, j) lambda_ij si_ij ],
          si_ij = P_l(d_i) P_l(d_j) cos(z_i, z_j), for every label Y             slides 35, 36
    (N4)  lambda_ij = (1 + eps) / (max(0, correlation(y_i, y_j)) + eps), 1 for equal labels
    (N5)  P_l(d~) = P(label(d~) = label(d)), about 1 - |d~ - d| |dh/dd| / C      slide 36
    (N7)  y = E[h(d~)] over perturbed d~                                         slide 37
Fine-tuning, which comes between the last two, is in proposed.py.

How the slides were read:
 - `literal` is (N3) as it stands. A cosine can be negative, and then its logarithm may not exist:
   such classes are left out, and their share is returned. `inner` replaces cos by exp(cos / tau)
   and drops the pairs of a point with itself, so that the loss exists and is never negative.
   `outer` takes the mean over pairs outside the logarithm.
 - P_l weighs pairs, outside the exponential: a doubtful pair counts less, it is not less alike. No
   gradient passes through it. `preserved_by_margin` is the default for classes, since the slide's
   form (`preserved_by_slope`) takes a change in any direction for one that uses up the margin;
   `preserved_by_jacobian` takes the change in the direction of the noise.
 - The mean (N7) is of probabilities where there are classes.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, M numbers of d, K classes, T steps of noise


# ---- Noise ---------------------------------------------------------------------------------------


def noise_like(d: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise on the device of d, determined by rng, a generator of the CPU."""
    if d.device.type != "cpu":
        seed = int(torch.randint(2**62, (), generator=rng))
        rng = torch.Generator(d.device).manual_seed(seed)
    return torch.randn(d.shape, generator=rng, device=d.device, dtype=d.dtype)


def chain(d: Tensor, sigma: float, T: int, rng: torch.Generator) -> Tensor:
    """d^1..d^T, each the one before with a little more noise (N1): (B, M) -> (T, B, M)."""
    steps = []
    for _ in range(T):
        d = math.sqrt(1 - sigma**2) * d + sigma * noise_like(d, rng)  # (N1)
        steps.append(d)
    return torch.stack(steps)


def noise_levels(sigmas: list[float], T: int) -> tuple[Tensor, Tensor]:
    """a and s of d^t = a d + s noise (N2): first no noise, then every sigma with t = 1..T.

    Returns: a, s, both (1 + len(sigmas) T,), a^2 + s^2 = 1.
    """
    sigma, t = torch.tensor(sigmas).double()[:, None], torch.arange(1, T + 1)
    a = (1 - sigma**2) ** (t / 2)  # (N2)
    a = torch.cat([torch.ones(1), a.flatten()])
    return a.float(), (1 - a**2).sqrt().float()


def perturb(d: Tensor, a: Tensor, s: Tensor, rng: torch.Generator) -> Tensor:
    """d^t in one step (N2), each row at its own level: (B, M), a and s (B,) -> (B, M)."""
    return a[:, None] * d + s[:, None] * noise_like(d, rng)  # (N2)


# ---- The contrastive loss ------------------------------------------------------------------------


def label_weights(u: Tensor, y: Tensor, eps: float) -> Tensor:
    """lambda_ij (N4): the less the labels of a pair correlate, the larger.

    Args:
        u: what is correlated of each label, as vectors of length 1, (B, d).
        y: labels, (B,). Correlations below 0 count as 0.
    Returns: (B, B), 1 for equal labels, otherwise between 1 and 1 + 1 / eps.
    Source: slide 35, which leaves a factor open: 1 + eps makes it 1 for labels that correlate by 1.
    """
    lam = (1 + eps) / ((u @ u.T).clamp(0, 1) + eps)  # (N4)
    return torch.where(y[:, None] == y, 1.0, lam)


def classes_of(y: Tensor) -> Tensor:
    """Members of each class that has two points or more, (K, B), bool.

    Raises: ValueError if there is none.
    """
    _, y, count = y.unique(return_inverse=True, return_counts=True)
    member = F.one_hot(y).T.bool()[count > 1]
    if not len(member):
        raise ValueError("no two points of the batch have one label; give a larger batch")
    return member


def literal(z: Tensor, y: Tensor, lam: Tensor, P: Tensor, tau: float = 0.0) -> tuple[Tensor, float]:
    """(N3) as on the slides, of cosines; tau plays no part. Arguments as those of `inner`.

    Returns: the mean over the classes whose loss exists; the share of the classes left out because
        theirs is the logarithm of no positive number, or a division by 0.
    """
    member, z = classes_of(y), F.normalize(z, dim=1)
    si = P[:, None] * P * (z @ z.T)  # (B, B)
    same = y[:, None] == y
    top = member.to(si) @ (si * same).sum(dim=1)  # (K,)
    bottom = member.to(si) @ (si * lam).sum(dim=1)
    defined = (top > 0) & (bottom > 0)
    if not defined.any():
        return 0 * si.sum(), 1.0
    loss = bottom[defined].log() - top[defined].log()  # (N3)
    return loss.mean(), 1 - float(defined.float().mean())


def _pairs(z: Tensor, P: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """P_i P_j without pairs of a point with itself, and (cos - 1) / tau, which overflows nowhere.

    The -1 divides numerator and denominator of (N3) by the same number.
    """
    P, z = P.clamp(min=1e-6), F.normalize(z, dim=1)
    return (P[:, None] * P).fill_diagonal_(0), (z @ z.T - 1) / tau


def inner(z: Tensor, y: Tensor, lam: Tensor, P: Tensor, tau: float) -> tuple[Tensor, float]:
    """(N3) with exp(cos / tau) in place of cos: the sum over pairs stays inside the logarithm.

    Args:
        z, y: outputs (B, d) and labels (B,); lam: (N4), (B, B); P: label preserved (N5), (B,).
        tau: temperature; 0.05 or more, since single precision does not reach further.
    Returns: the mean over the classes with two points or more, at least 0; and 0.0, the share of
        classes left out.
    Raises: ValueError if no class has two points.
    Source: slides 35 and 36; Khosla et al. 2020, Supervised Contrastive Learning, eq. 3.
    """
    member, (w, exponent), same = classes_of(y), _pairs(z, P, tau), y[:, None] == y
    si = w * exponent.exp()
    top, bottom = (si * same).sum(dim=1), (si * lam).sum(dim=1)  # (B,)
    top, bottom = member.to(si) @ top, member.to(si) @ bottom  # (K,)
    return (bottom.log() - top.log()).mean(), 0.0  # (N3)


def outer(z: Tensor, y: Tensor, lam: Tensor, P: Tensor, tau: float) -> tuple[Tensor, float]:
    """(N3) with the mean over pairs outside the logarithm, as in SupCon's L_out. As `inner`.

    Source: Khosla et al. 2020, eq. 2.
    """
    member, (w, exponent), same = classes_of(y), _pairs(z, P, tau), y[:, None] == y
    bottom = (w * exponent.exp() * lam).sum(dim=1)  # (B,)
    share = w * same / (w * same).sum(dim=1, keepdim=True).clamp(min=1e-30)
    top = (share * (torch.where(share > 0, w, 1.0).log() + exponent)).sum(dim=1)
    weight = member * P.clamp(min=1e-6)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return (weight @ (bottom.log() - top)).mean(), 0.0


# ---- Is the label preserved? ---------------------------------------------------------------------


def margin(scores: Tensor, y: Tensor) -> Tensor:
    """By how much the score of the label y exceeds the best other: (B, K), (B,) -> (B,)."""
    own = scores.gather(1, y[:, None])
    return (own - scores.scatter(1, y[:, None], -math.inf).amax(dim=1, keepdim=True)).squeeze(1)


def preserved_by_slope(h: Callable, d: Tensor, noisy: Tensor, C: Tensor | float) -> Tensor:
    """P_l as on slide 36: 1 - |d~ - d| |dh/dd| / C (N5), cut to [0, 1], without a gradient.

    Args:
        h: a function from features (B, M) to scores (B, K); |dh/dd| is the Frobenius norm of its
            Jacobian, K backward passes. d, noisy: d and d~, (B, M).
        C: the change that is too much: the margin of each, (B,), or one number.
    """
    with torch.enable_grad():
        point = d.detach().requires_grad_()
        rows = (torch.autograd.grad(v.sum(), point, retain_graph=True)[0] for v in h(point).T)
        slope = sum(row.square().sum(dim=1) for row in rows).sqrt()
    change = (noisy - d).norm(dim=1) * slope
    return (1 - change / torch.as_tensor(C).clamp(min=1e-12)).clamp(0, 1).detach()  # (N5)


def preserved_by_jacobian(h: Callable, d: Tensor, noisy: Tensor, C: Tensor | float, soft=False):
    """P_l by the first-order change |J (d~ - d)| of h in the direction of the noise (N5), (B,).

    Args: as those of preserved_by_slope; soft: exp(-change^2 / (2 C^2)), for outputs without
        labels, instead of 1 - change / C, cut to [0, 1]. Without a gradient.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.func, about itself
        _, change = torch.func.jvp(h, (d.detach(),), ((noisy - d).detach(),))
    ratio = change.norm(dim=1).detach() / torch.as_tensor(C).detach().clamp(min=1e-12)
    return torch.exp(-(ratio**2) / 2) if soft else (1 - ratio).clamp(0, 1)  # (N5)


def preserved_by_margin(scores: Callable, d: Tensor, y: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """P_l = Phi( m(a d) / (s |grad m(a d)|) ): the share of noise that leaves a margin m > 0 (N5).

    The margin is taken to be linear around a d, the mean of d~ = a d + s noise.

    Args:
        scores: a function from features (B, M) to the scores of K labels.
        d, y: features and labels (B,); a, s: the level of noise of each, (B,).
    Returns: (B,) in [0, 1], without a gradient; 1 where s is 0.
    """
    with torch.enable_grad():
        mean = (a[:, None] * d).detach().requires_grad_()
        m = margin(scores(mean), y)
        (slope,) = torch.autograd.grad(m.sum(), mean)
    P = torch.special.ndtr(m / (s * slope.norm(dim=1)).clamp(min=1e-12))  # (N5)
    return torch.where(s > 0, P, 1.0).detach()


# ---- Perturbed prediction ------------------------------------------------------------------------


def predict_perturbed(
    h: Callable, d: Tensor, a: Tensor, s: Tensor, draws: int, kind: str
) -> tuple[Tensor, Tensor]:
    """y = E[h(d~)] (N7): the mean over draws of noise, of probabilities where there are classes.

    Args:
        a, s: the levels of noise. Each gets the same number of draws, so `draws` is rounded up to a
            multiple of their number. The noise is the same for every sample and call, so that a
            prediction depends on x alone.
        kind: of the task; "classes", "labels" and "mask" are averaged as probabilities.
    Returns: predictions as h gives them (logarithms of the mean probabilities); the variance over
        the draws of what was averaged, of the same shape.
    """
    rng, total, squares = torch.Generator().manual_seed(0), 0.0, 0.0
    draws = math.ceil(draws / len(a)) * len(a)
    for i in range(draws):
        noise = torch.randn(d.shape[1], generator=rng).to(d)
        out = h(a[i % len(a)] * d + s[i % len(a)] * noise)
        if kind != "regression":
            out = out.softmax(dim=1) if kind == "classes" else out.sigmoid()
        total, squares = total + out, squares + out.square()
    mean = total / draws  # (N7)
    variance = (squares / draws - mean.square()).clamp(min=0)
    if kind != "regression":
        mean = mean.clamp(1e-7, 1).log() if kind == "classes" else mean.logit(1e-7)
    return mean, variance

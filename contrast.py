r"""Features under noise of many scales, and a contrast that draws those of one label together.

The mathematics of the slides' proposal, for proposed.py and anyone; needs torch alone. d are
features (B, M) of samples with labels y (B,), standardised, since sigma is in their deviations.
z = h(d) is what is contrasted of them.

    (N1)  d^0 = d, d^t = sqrt(1 - sigma^2) d^(t-1) + sigma noise, t = 1..T       slide 34
    (N2)  d^t = a d^0 + s noise, a = (1 - sigma^2)^(t/2), a^2 + s^2 = 1     the same at once
    (N3)  L_Y = -log [ sum_(i in Y, j in Y, j != i) w_ij e_ij                    slide 35
                       / sum_(i in Y, j != i) w_ij lambda_ij e_ij ],
          e_ij = exp(cos(z_i, z_j) / tau), for every label Y
    (N4)  lambda_ij = (1 + eps) / (max(0, correlation(y_i, y_j)) + eps)          slide 35
    (N5)  w_ij = P_i P_j, P = Phi( margin(a d) / (s |grad margin(a d)|) )        slide 36
    (N7)  y = E[h(d~)] over perturbed d~                                         slide 37

How the slides were read:
 - The slide's (N3) is of cosines, and with them the logarithm of a negative number at times
   ("literal": such classes are left out, and their share is returned). Here cosines are exponents,
   pairs of a point with itself are dropped, and the loss is never negative ("inner"); "outer" has
   the mean over pairs outside the logarithm.
 - P weighs pairs, outside the exponential: in doubt a pair counts less, it is not less alike. The
   slide's 1 - |d~ - d| |dh/dd| / C is kept_by_jacobian. No gradient passes through P.
 - The mean (N7) is of probabilities where there are classes.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, M numbers of d, K classes or scales sigma, T steps of noise


def noise_levels(sigmas: list[float], T: int) -> tuple[Tensor, Tensor]:
    """a and s of d^t = a d + s noise (N2): no noise first, then every sigma with t = 1..T.

    Returns: a, s, (1 + K T,), a^2 + s^2 = 1.
    """
    sigma, t = torch.tensor(sigmas).double()[:, None], torch.arange(1, T + 1)
    a = (1 - sigma**2) ** (t / 2)  # (N2)
    a = torch.cat([torch.ones(1), a.flatten()])
    return a.float(), (1 - a**2).sqrt().float()


def noise_like(d: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal, drawn on the CPU, so that every device has the same."""
    return torch.randn(d.shape, generator=rng).to(d)


def chain(d: Tensor, sigma: float, T: int, rng: torch.Generator) -> Tensor:
    """d^1..d^T, each the one before with a little more noise (N1): (B, M) -> (T, B, M)."""
    steps = []
    for _ in range(T):
        d = math.sqrt(1 - sigma**2) * d + sigma * noise_like(d, rng)  # (N1)
        steps.append(d)
    return torch.stack(steps)


def perturb(d: Tensor, a: Tensor, s: Tensor, rng: torch.Generator) -> Tensor:
    """d^t in one step (N2), of each row at its own level: (B, M), a and s (B,) -> (B, M)."""
    return a[:, None] * d + s[:, None] * noise_like(d, rng)  # (N2)


class Augmented:
    """The augmented training set of stage 1: every d at every level of noise.

    Drawn from on the fly, at levels picked at random (N2), so that N K T features are never in
    memory; with whole=True they are made beforehand, by the chain (N1).
    """

    def __init__(self, d: Tensor, sigmas: list[float], T: int, rng: torch.Generator, whole=False):
        self.d, self.rng, self.versions = d, rng, None
        self.a, self.s = (level.to(d.device) for level in noise_levels(sigmas, T))
        if whole:  # from the seed on, also where a broken run goes on
            rng = torch.Generator().manual_seed(rng.initial_seed())
            self.versions = torch.cat([d[None], *(chain(d, sigma, T, rng) for sigma in sigmas)])

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the given rows with noise, (B, M), and its level a, s, (B,)."""
        level = torch.randint(len(self.a), rows.shape, generator=self.rng).to(self.d.device)
        a, s = self.a[level], self.s[level]
        if self.versions is None:
            return perturb(self.d[rows], a, s, self.rng), a, s
        return self.versions[level, rows], a, s


def label_weights(u: Tensor, y: Tensor, eps: float) -> Tensor:
    """lambda_ij (N4), of a pair with different labels: the less these correlate, the larger.

    Args:
        u: what is correlated of each label, as vectors of length 1, (B, d).
        y: labels, (B,). Correlations below 0 count as 0.
    Returns: (B, B), 1 for equal labels, 1..(1 + 1 / eps) else.
    Source: slide 35, which leaves a factor open: 1 + eps makes it 1 for labels that correlate by 1.
    """
    lam = (1 + eps) / ((u @ u.T).clamp(0, 1) + eps)  # (N4)
    return torch.where(y[:, None] == y, 1.0, lam)


def contrastive_loss(
    z: Tensor, y: Tensor, lam: Tensor, P: Tensor, tau: float, kind: str = "inner"
) -> tuple[Tensor, float]:
    """The loss of stage 2 (N3): outputs alike for equal labels, unlike for different ones.

    Args:
        z, y: outputs (B, d) and labels (B,); lam: (N4), (B, B); P: label preserved (N5), (B,).
        kind: "inner": the sum over pairs inside the logarithm, as on the slide, of exp(cos / tau)
            and without pairs of a point with itself; "outer": the mean over pairs outside of it,
            SupCon's L_out; "literal": the slide's formula, of cosines, where tau plays no part.
        tau: 0.05 or more, else single precision does not reach.
    Returns: the mean over the classes with two points or more, 0 or more for "inner" and "outer";
        the share of classes left out as their "literal" loss is the logarithm of no positive
        number (cosines can be negative), or a division by none.
    Raises: ValueError if no class has two points.
    Source: slide 35; Khosla et al. 2020, Supervised Contrastive Learning, eq. 2 and 3.
    """
    _, y, count = y.unique(return_inverse=True, return_counts=True)
    member = F.one_hot(y).T.bool()[count > 1]  # (K, B)
    if not len(member):
        raise ValueError("no two points of the batch have one label; give a larger batch")
    z, w = F.normalize(z, dim=1), P[:, None] * P
    cos, same = z @ z.T, y[:, None] == y  # (B, B)
    if kind == "literal":
        e = w * cos
    else:  # without pairs of a point with itself; divided by exp(1 / tau), so that none overflows
        w = (P.clamp(min=1e-6)[:, None] * P.clamp(min=1e-6)).fill_diagonal_(0)
        e = w * ((cos - 1) / tau).exp()
    top, bottom = (e * same).sum(dim=1), (e * lam).sum(dim=1)  # (B,)
    if kind == "outer":
        share = w * same / (w * same).sum(dim=1, keepdim=True).clamp(min=1e-30)
        pairs = torch.where(share > 0, w, 1.0).log() + (cos - 1) / tau
        weight = member * P.clamp(min=1e-6)
        weight = weight / weight.sum(dim=1, keepdim=True)
        return (weight @ (bottom.log() - (share * pairs).sum(dim=1))).mean(), 0.0
    top, bottom = member.to(e) @ top, member.to(e) @ bottom  # (K,)
    defined = (top > 0) & (bottom > 0)
    if not defined.any():
        return 0 * cos.sum(), 1.0
    loss = bottom[defined].log() - top[defined].log()  # (N3)
    return loss.mean(), 1 - float(defined.float().mean())


def margin(scores: Tensor, y: Tensor) -> Tensor:
    """By how much the score of the label y exceeds the best other: (B, K), (B,) -> (B,)."""
    own = scores.gather(1, y[:, None])
    return (own - scores.scatter(1, y[:, None], -math.inf).amax(dim=1, keepdim=True)).squeeze(1)


def kept_by_margin(scores: Callable, d: Tensor, y: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """P that d~ = a d + s noise still has the label of d (N5): the share of noise that does not use
    up the margin, taken to be linear around a d, the mean of d~.

    Args:
        scores: a function from features (B, M) to the scores of K labels.
        d, y: features and labels (B,); a, s: the level of noise of each, (B,).
    Returns: (B,) in [0, 1], without a gradient; 1 where s is 0.
    Source: slide 36. Differs: the slide's form (kept_by_jacobian) takes a change of the scores in
        any direction for one that uses up the margin, and finds far too few labels kept.
    """
    with torch.enable_grad():
        mean = (a[:, None] * d).detach().requires_grad_()
        m = margin(scores(mean), y)
        (slope,) = torch.autograd.grad(m.sum(), mean)
    P = torch.special.ndtr(m / (s * slope.norm(dim=1)).clamp(min=1e-12))  # (N5)
    return torch.where(s > 0, P, 1.0).detach()


def kept_by_jacobian(h: Callable, d: Tensor, noisy: Tensor, C: Tensor | float, soft=False):
    """P by the first-order change |J (d~ - d)| of the output of h (N5), without a gradient.

    Args:
        C: the change that is too much: the margin of each (B,), or a tolerance.
        soft: exp(-change^2 / (2 C^2)), for outputs without labels; else 1 - change / C, cut to
            [0, 1], as slide 36 has it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.func, about itself
        _, change = torch.func.jvp(h, (d.detach(),), ((noisy - d).detach(),))
    ratio = change.norm(dim=1).detach() / torch.as_tensor(C).detach().clamp(min=1e-12)  # 0: clean
    return torch.exp(-(ratio**2) / 2) if soft else (1 - ratio).clamp(0, 1)  # (N5)


def predict_perturbed(
    h: Callable, d: Tensor, a: Tensor, s: Tensor, draws: int, kind: str
) -> tuple[Tensor, Tensor]:
    """y = E[h(d~)] (N7): the mean over draws of noise, of probabilities where there are classes.

    Args:
        a, s: the levels of noise; the draws go through them in turn. The noise is the same for
            every sample and call, so that a prediction depends on x alone.
        kind: of the task; "classes", "labels" and "mask" are averaged as probabilities.
    Returns: predictions as h gives them (logarithms of the mean probabilities); the variance over
        the draws of what was averaged, of the same shape.
    """
    rng, total, squares = torch.Generator().manual_seed(0), 0.0, 0.0
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


if __name__ == "__main__":
    rng, y = torch.Generator().manual_seed(0), torch.arange(64) % 4
    d = F.one_hot(y, 16) + 0.1 * torch.randn(64, 16, generator=rng)
    a, s = (level[torch.arange(64) % 5] for level in noise_levels([0.2], 4))
    for what, label in {"own": y, "foreign": torch.arange(64) // 16}.items():
        lam = label_weights(F.one_hot(label).float(), label, 1.0)
        loss, _ = contrastive_loss(perturb(d, a, s, rng), label, lam, torch.ones(64), 0.2)
        print(f"contrast by {what} labels: {loss:.3f}")

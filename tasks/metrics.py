"""The losses and errors of the two benchmarks. Every error is lower-is-better.

An error is computed once, on the predictions for all samples together: averages over chunks, as
the published code takes them, are another number for anything that is not a plain mean. What has
no value (no positive to rank, no pair to measure) is an error with a remedy, never NaN. In targets
that are dense or labels, NaN means unknown: no loss and no error is taken there.

Every loss is a mean over terms, and terms(loss, y) says how many there are. So the parts of a batch
add up to the batch, whatever is unknown in each:
    loss(batch) = sum over parts of terms(part) * loss(part) / sum over parts of terms(part)
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# n samples, K labels or classes, C channels, H x W pixels, B samples of a batch

# ---- losses: a scalar Tensor, differentiable -------------------------------------------------


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats. out: logits (B, C); y: classes (B,)."""
    return F.cross_entropy(out, y)


def bce(out: Tensor, y: Tensor, pos_weight: float = 1.0) -> Tensor:
    """Mean binary cross-entropy in nats over the known entries, positives weighted by pos_weight.

    out: logits; y: 0, 1 or NaN (left out), of the same shape. 0 if every entry is unknown.
    """
    known, y = _known(out, y)
    weight = out.new_full((), pos_weight)  # new_tensor() would wait for the GPU
    each = F.binary_cross_entropy_with_logits(out, y, pos_weight=weight, reduction="none")
    return _mean(each, known)


def mse(out: Tensor, y: Tensor, clip: float = float("inf"), scale: float = 1.0) -> Tensor:
    """Mean of (out - min(y, clip))^2 / scale^2 over the known entries; out and y of one shape.

    0 if every entry is unknown.
    """
    known, y = _known(out, y)
    return _mean(F.mse_loss(out / scale, y.clamp(max=clip) / scale, reduction="none"), known)


def relative_l2_loss(out: Tensor, y: Tensor) -> Tensor:
    """Mean of |out - y| / |y| over all channels of all samples: the nRMSE of PDEBench.

    The 2-norms are those of one channel of one sample, over its known points. The K numbers of y
    (B, K) count as one channel. A channel that is unknown everywhere is left out; 0 if all are.
    careful: infinite where a channel is known and zero everywhere; tasks.check refuses such data.

    Args:
        out, y: (B, K), (B, C, L) or (B, C, H, W), the same shape; NaN in y is unknown.
    Source: PDEBench, metrics.py, which averages over channels, too. Differs: known points only.
    """
    known, y = _known(out, y)
    gap = _norms(torch.where(known, out - y, 0))
    counted = _channels(known).any(dim=-1)
    size = torch.where(counted, _norms(y), 1)
    return _mean(gap / size, counted)


def terms(loss: Callable, y: Tensor) -> int:
    """How many terms a loss of this file is the mean of: 0 where nothing of y is known.

    Args:
        loss: one of the losses above, or a functools.partial of one.
        y: the targets of a batch or of a part of it.
    """
    loss = getattr(loss, "func", loss)
    if loss is cross_entropy:
        return len(y)
    known = ~y.isnan()
    if loss is relative_l2_loss:
        known = _channels(known).any(dim=-1)
    return int(known.sum())


# ---- errors: a float -------------------------------------------------------------------------


def zero_one(out: Tensor, y: Tensor) -> float:
    """0-1 error: the share of samples whose largest logit is not that of their class.

    Args:
        out: logits, (n, C).
        y: classes, (n,) int.
    Raises: ValueError if the shapes do not fit, FloatingPointError if a logit is not finite.
    """
    _check_classes(out, y, "0-1 error")
    return float((out.argmax(dim=1) != y).double().mean())


def macro_f1(out: Tensor, y: Tensor) -> float:
    """1 - the mean over classes of F1 = 2 TP / (2 TP + FP + FN), from the largest logit.

    A class that is in neither the labels nor the predictions has no F1 and is left out.

    Args:
        out: logits, (n, C).
        y: classes, (n,) int.
    Raises: as zero_one.
    """
    _check_classes(out, y, "macro F1")
    predicted = out.argmax(dim=1)
    hits, said, true = (
        v.bincount(minlength=out.shape[1]).double() for v in (y[predicted == y], predicted, y)
    )
    seen = said + true > 0
    return 1 - float((2 * hits / (said + true))[seen].mean())


def mean_ap(out: Tensor, y: Tensor) -> float:
    """1 - the mean over labels of the average precision, sum_k (R_k - R_{k-1}) P_k.

    P_k and R_k are precision and recall of all samples that score at least the k-th largest
    distinct score: equal scores are one step. A label without a positive is left out.

    Args:
        out: logits or scores, (n, K).
        y: 0, 1 or NaN, (n, K).
    Raises: ValueError if the shapes or labels do not fit or no label has a positive;
        FloatingPointError if a score is not finite.
    """
    values = []
    for score, positive in _rankings(out, y, "average precision"):
        if positive.any():
            score, order = score.sort(descending=True)
            last = F.pad(score[1:] != score[:-1], (0, 1), value=True)  # of a run of equal scores
            hits = positive[order].cumsum(0)[last].double()
            gained, above = hits.diff(prepend=hits.new_zeros(1)), 1 + last.nonzero()[:, 0]
            values.append(float((gained * hits / above).sum() / hits[-1]))
    if not values:
        raise ValueError("no label has a positive sample: average precision needs a larger set")
    return 1 - sum(values) / len(values)


def auroc(out: Tensor, y: Tensor) -> float:
    """1 - the area under the ROC curve: a positive outscores a negative, ties counted half.

    The mean over the labels (n, K) that have both a positive and a negative; of masks, (n, C, L)
    or (n, C, H, W), a channel with all its known points is one label. Exact, counted in integers.

    Args:
        out: logits or scores, (n, K), (n, C, L) or (n, C, H, W).
        y: 0, 1 or NaN, of the same shape.
    Raises: ValueError if the shapes or labels do not fit or no label has both kinds;
        FloatingPointError if a score is not finite.
    """
    values = []
    for score, positive in _rankings(out, y, "AUROC"):
        high, low = (score[v].sort().values for v in (positive, ~positive))
        if len(high) and len(low):
            ends = (torch.searchsorted(low, high, right=r) for r in (False, True))
            wins = sum(end.sum().item() for end in ends)  # twice: those below, and with the ties
            values.append(wins / (2 * len(high) * len(low)))
    if not values:
        raise ValueError("no label has a positive and a negative: AUROC needs a larger set")
    return 1 - sum(values) / len(values)


def relative_l2(out: Tensor, y: Tensor) -> float:
    """The relative_l2_loss of all samples: the nRMSE of PDEBench, per channel, then averaged.

    Args:
        out, y: (n, K), (n, C, L) or (n, C, H, W), the same shape; NaN in y is left out.
    Raises: ValueError if the shapes differ, a channel of a sample is zero everywhere, or nothing is
        known; FloatingPointError if a prediction is not finite.
    """
    _check_values(out, y)
    known = _channels(~y.isnan()).any(dim=-1)
    if not known.any() or not (_norms(y.nan_to_num())[known] > 0).all():
        raise ValueError("a target is zero or unknown everywhere; leave such samples out")
    return float(relative_l2_loss(out.double(), y.double()))


def relative_rmse(out: Tensor, y: Tensor) -> float:
    """RMSE / standard deviation of y, over all entries; 1 is predicting the mean.

    The deviation is about the mean over samples of each entry, so that a model which has learned
    nothing but the average picture gets 1, whatever that picture is.

    Args:
        out, y: (n, ...), the same shape; NaN in y is left out.
    Raises: ValueError if the shapes differ or y does not vary; FloatingPointError as relative_l2.
    """
    _check_values(out, y)
    out, y = out.double(), y.double()
    spread = (y - y.nanmean(dim=0)).square().nanmean()
    if not varies(y):  # careful: rounding makes the spread of 0.1, 0.1, 0.1 larger than 0
        raise ValueError("the targets do not vary from sample to sample; more samples are needed")
    return float(((out - y).square().nanmean() / spread).sqrt())


def mae8(out: Tensor, y: Tensor) -> float:
    """MAE_8: mean error of the distances of contacts that are far apart in the sequence, Angstrom.

    The prediction is symmetrised and floored at 0.01. The error is averaged over the pairs with
    j - i >= 24 and a true distance of at most 8, then over the proteins that have such a pair.

    Args:
        out, y: distance maps in Angstrom, (n, 1, L, L); NaN in y is padding.
    Raises: ValueError if the shapes do not fit or no protein has a pair;
        FloatingPointError if a prediction is not finite.
    """
    _check_values(out, y)
    if y.ndim != 4 or y.shape[1] != 1 or y.shape[2] != y.shape[3]:
        raise ValueError(f"MAE_8 needs distance maps (n, 1, L, L), got {tuple(y.shape)}")
    far, values = torch.ones_like(y[0, 0], dtype=torch.bool).triu(24), []
    for predicted, true in zip(out[:, 0], y[:, 0], strict=True):
        contact = far & (true <= 8)  # False for NaN
        if contact.any():
            predicted = ((predicted.double() + predicted.T.double()) / 2).clamp(min=0.01)
            values.append(float((predicted - true)[contact].abs().mean()))
    if not values:
        raise ValueError("no pair with j - i >= 24 within 8 Angstrom: MAE_8 needs larger proteins")
    return sum(values) / len(values)


# ---- of features ------------------------------------------------------------------------------


def separability(z: Tensor, y: Tensor, K: int) -> Tensor:
    """Share of the variance of z (m, D) between the K classes y (m,): 1 if each is a point; by
    chance (K - 1) / (m - 1)."""
    member = F.one_hot(y, K).to(z.dtype)  # (m, K)
    means = (member.T @ z) / member.sum(dim=0).clamp(min=1)[:, None]
    within = (z - means[y]).square().sum()
    return 1 - within / (z - z.mean(dim=0)).square().sum().clamp(min=1e-30)


# ---- what they share -------------------------------------------------------------------------


def varies(y: Tensor) -> bool:
    """Whether any entry of y, (n, ...), differs between the samples where it is known."""
    unknown = y.isnan()
    high, low = (torch.where(unknown, limit, y) for limit in (-torch.inf, torch.inf))
    return bool((high.amax(dim=0) > low.amin(dim=0)).any()) if len(y) else False


def _same_shape(out, y):
    if out.shape != y.shape:  # careful: they would broadcast
        raise ValueError(
            f"predictions and targets of one shape needed, got {tuple(out.shape)}, {tuple(y.shape)}"
        )


# careful: the losses take no rows out by a mask, which would make a GPU wait for the CPU
def _known(out, y):
    """Where y is known, and y with zeros where it is not."""
    _same_shape(out, y)
    known = ~y.isnan()
    return known, torch.where(known, y, 0)


def _mean(values, counted):
    """The mean of those values that count; 0 if none does."""
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


def _channels(values):
    """(n, K) -> (n, 1, K), (n, C, ...) -> (n, C, points): the points of each channel in a row."""
    return values.unsqueeze(1) if values.ndim == 2 else values.flatten(2)


def _norms(values):
    """The 2-norm of each channel of each sample: (n, C, ...) -> (n, C)."""
    return _channels(values).norm(dim=-1)


def _check_finite(out):
    if not torch.isfinite(out).all():
        raise FloatingPointError("the model's predictions are not finite")


def _check_classes(out, y, name):
    if out.ndim != 2 or y.shape != out.shape[:1] or not len(y):
        raise ValueError(
            f"{name} needs logits (n, C) and labels (n,), n >= 1, got {tuple(out.shape)}, "
            f"{tuple(y.shape)}"
        )
    if y.is_floating_point() or y.min() < 0 or y.max() >= out.shape[1]:
        raise ValueError(f"{name} needs integer labels 0..{out.shape[1] - 1}, got others")
    _check_finite(out)


def _check_values(out, y):
    _same_shape(out, y)
    if y.isinf().any():
        raise ValueError("the targets hold infinite values: repair them, or mark them by NaN")
    _check_finite(out)


def _rankings(out, y, name):
    """Scores and positives (bool) of each label or channel of masks, known entries only."""
    _same_shape(out, y)
    if y.ndim < 2:
        raise ValueError(f"{name} needs labels (n, K) or masks (n, C, ...), got {tuple(y.shape)}")
    if not ((y == 0) | (y == 1) | y.isnan()).all():
        raise ValueError(f"{name} needs labels that are 0, 1 or NaN (unknown), got others")
    _check_finite(out)
    rows = (values.movedim(1, 0).flatten(1) for values in (out, y))
    for score, label in zip(*rows, strict=True):
        known = ~label.isnan()
        yield score[known], label[known] == 1

"""The losses and errors of the two benchmarks. Every error is lower-is-better.

An error is computed once, on the predictions for all samples together: averages over chunks, as
the published code takes them, are another number for anything that is not a plain mean.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats. out: logits (B, C); y: classes (B,)."""
    return F.cross_entropy(out, y)


def zero_one(out: Tensor, y: Tensor) -> float:
    """0-1 error: the share of samples whose largest logit is not that of their class.

    Args:
        out: logits, (n, C).
        y: classes, (n,) int.
    Raises: ValueError if the shapes do not fit, FloatingPointError if a logit is not finite.
    """
    if out.ndim != 2 or y.shape != out.shape[:1]:
        raise ValueError(
            f"0-1 error needs logits (n, C) and labels (n,), got {out.shape}, {y.shape}"
        )
    if not torch.isfinite(out).all():
        raise FloatingPointError("the model's predictions are not finite")
    return float((out.argmax(dim=1) != y).double().mean())

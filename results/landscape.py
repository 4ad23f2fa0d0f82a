"""The loss around a solution (slide 23): how much it rises in random directions. For notebook 05.

Each filter (row of a weight) of a direction has the norm of that filter of the solution; biases and
LayerNorms stay. Without that, a net whose weights are large would look flat (Li et al. 2018,
Visualizing the Loss Landscape of Neural Nets). Sharpness is the mean over directions d of
L(theta + r d) - L(theta).
"""

import torch
from torch import Tensor, nn

import tasks


def direction(model: nn.Module, rng: torch.Generator) -> dict[str, Tensor]:
    """A random direction whose filters have the norms of the model's: {name: like the weight}."""
    found = {}
    for name, w in model.named_parameters():
        if w.ndim > 1:
            d = torch.randn(w.shape, generator=rng)
            norms = w.detach().flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1).clamp(min=1e-12)
            found[name] = d * norms.view(-1, *[1] * (w.ndim - 1))
    return found


@torch.no_grad()
def loss_at(model: nn.Module, task: tasks.Task, x: Tensor, y: Tensor, steps: list[tuple]) -> float:
    """The task's loss with weights theta + sum of a d, for steps (a, d); the weights come back."""
    weights, theta = dict(model.named_parameters()), {}
    for a, d in steps:
        for name in d:
            theta.setdefault(name, weights[name].clone())
            weights[name] += a * d[name]
    parts = [task.loss(model(x[i : i + 256]), y[i : i + 256]) for i in range(0, len(x), 256)]
    sizes = [len(x[i : i + 256]) for i in range(0, len(x), 256)]
    for name, w in theta.items():
        weights[name].copy_(w)
    return sum(float(p) * n for p, n in zip(parts, sizes, strict=True)) / len(x)

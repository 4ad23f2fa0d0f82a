#!/usr/bin/env python
r"""The slides' own proposal: perturb the outputs of the body, and train the predictor on them.

As in ORCA, a target model h o g o f is put together from an embedder, a pretrained body and a new
predictor. Before everything is fine-tuned, the predictor alone is trained on the body's outputs d,
to which noise of many scales is added: its outputs for one label are to point in one direction,
those for different labels in different ones. That costs one pass of the body over the training set.

    (N1), (N2)  d^t = a g(f(x)) + s noise, at many scales sigma            slide 34, stage 1
    (N3)        contrastive loss of z = h(d^t), over pairs of outputs      slide 35, stage 2
    (N4), (N5)  in it, lambda: how unlike two labels are; P_l: the         slides 35 and 36
                probability that noise preserves the label
    (N6)        min over f, g and h of the mean of L(h(g(f(x))), y)        slide 37, stage 3
    (N7)        y = E[h(d~)] over perturbed d~, or h(d)                    slide 37
All but (N6) are functions of contrast.py.

    python proposed.py --task satellite                 simulated data, tiny body, no network
    python proposed.py --task darcy                     images to a field
    python proposed.py --task satellite --contrast none without stage 2
    python proposed.py --task ecg --prediction perturbed    prediction as the mean over noise
    python proposed.py --task satellite --f-t RUN       f aligned beforehand, by orca.py in RUN
    python proposed.py --task mine.npz --device cuda    arrays x_train, y_train, x_test, y_test

You should see the contrastive loss fall and "preserved", the mean of P_l, rise in stage "contrast",
then the error fall in stage "finetune". The last line is the result, with the errors of both
predictions of (N7); everything is written to runs/proposed-TASK-SEED. The baselines are settings of
orca.py.

How the slides were read where they leave something open:
 1. The slides' own (N3) and (N5) are --contrast literal and --preserve slope; contrast.py says what
    is wrong with them.
 2. Features are standardised first, since sigma has no unit otherwise. The N K T perturbed features
    are drawn when they are needed; those without noise are among them.
 3. h has a hidden layer, since noise changes nothing in the mean (N7) of a linear h. z is a
    projection of that layer; --contrast-at output takes the outputs, as the slide has it.
 4. Classes correlate (N4) as their mean features do; several labels, and values, as they are.
    Values and fields are labelled by clusters (k-means), and have a tolerance in place of a margin.
 5. h gives a point the label whose mean z is nearest (N5).
 6. "Pretrained model + linear projection" (slide 33) is ORCA's f^t: the body's own norm and
    positions, or patches, around a linear projection. --finetune projection trains only that and h.
"""

import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bodies
import contrast
import run
import tasks
from run import Record, Settings, opt
from tasks import balanced_rows, papers
from tasks.metrics import separability

# B batch, C channels, L length or H x W, N patches, D width of the body, M numbers of d, K classes
METHOD = "proposed"
LOSSES = {"inner": contrast.inner, "outer": contrast.outer, "literal": contrast.literal}
PRESERVE = ("margin", "jacobian", "slope", "none")
FINETUNE = ("embedder", "frozen-embedder", "projection")
NARROW = 32  # numbers of a patch from which, all patches together, h^t makes points
HIDDEN = 256  # largest width of the hidden layer of h^t
OUTPUT = 64  # numbers that are contrasted; targets are correlated on about as many
TOLERANCE = 0.5  # C of P_l for values: the change of z, whose length is 1, that is too much
CACHE = 2**29  # numbers of d that are kept in memory: 2 GiB


# ---- 1. Configuration ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Settings):
    """The settings of the proposal, beside those that all methods share (run.Settings)."""

    # stage 1, augmentation (slide 34)
    sigmas: str = opt("0.05,0.1,0.2", "scales sigma_i of the noise, each from 0 to 1")
    noise_steps: int = opt(4, "steps of noise T at each scale", low=1)
    # stage 2, contrastive training of h^t (slides 35 and 36)
    contrast: str = opt("inner", "form of the contrastive loss", (*LOSSES, "none"))
    contrast_at: str = opt("hidden", "layer of h^t that is contrasted", ("hidden", "output"))
    contrast_epochs: int = opt(5, "epochs of stage 2", low=1)
    contrast_steps_per_epoch: int = opt(20, "steps in each of these epochs", low=1)
    contrast_lr: float = opt(3e-4, "learning rate of stage 2", low=0)
    tau: float = opt(0.2, "temperature of the cosines; literal has none", low=0.05)
    lambda_eps: float = opt(1.0, "epsilon of lambda, which is at most (1 + eps) / eps", low=1e-6)
    preserve: str = opt("", "form of P_l; default: margin with labels, jacobian without", PRESERVE)
    # stage 3, fine-tuning, and prediction (slide 37)
    finetune: str = opt("embedder", "part of f that stage 3 trains", FINETUNE)
    prediction: str = opt("normal", "prediction: h(d) or E[h(d~)]", ("normal", "perturbed"))
    draws: int = opt(36, "draws of d~ in that mean", low=1)
    f_t: str = opt("", "folder of a run of orca.py, from whose aligned f^t to start (slide 38)")


def configure(**given) -> Config:
    """The settings: defaults, then ORCA's published values with paper=True, then what is given."""
    return run.configure(Config, papers.ORCA, given)


# ---- 2. Data: run.load_parts(), which asks tasks/ ------------------------------------------------
# ---- 3. Embedder f^t -----------------------------------------------------------------------------


# Copied from orca.SeriesEmbedder
class SeriesEmbedder(nn.Module):
    """f^t: standardise, cut into patches by a convolution, normalise, add positions (slide 8).

    LayerNorm and positions start from the body's own tables, the convolution from random numbers;
    with init "random", all three do.
    """

    def __init__(self, net: nn.Module, x_shape: tuple, patches: int, init: str = "body"):
        super().__init__()
        C, L = x_shape
        self.patch = bodies.patch_length(L, patches)
        self.grid = (math.ceil(L / self.patch),)
        self.register_buffer("mean", torch.zeros(C, 1))
        self.register_buffer("std", torch.ones(C, 1))
        self.conv = nn.Conv1d(C, net.config.hidden_size, self.patch, stride=self.patch)
        nn.init.xavier_uniform_(self.conv.weight, gain=math.sqrt(2))
        self.norm, self.position = bodies.norm_and_positions(net, self.grid, init)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = F.pad(x, (0, -x.shape[-1] % self.patch))  # zeros are the mean
        z = self.conv(x).transpose(1, 2)  # (B, C, L) -> (B, D, N) -> (B, N, D)
        return self.norm(z) + self.position


# Copied from orca.ImageEmbedder
class ImageEmbedder(nn.Module):
    """f^t: standardise, resize, cut into patches by a convolution, normalise (slide 8).

    Starts as the body's own patch embedding, its three channels repeated for all C; with init
    "random", from random numbers. A ViT's positions are added; Swin has relative ones, in g.
    """

    def __init__(self, net: nn.Module, x_shape: tuple, patches: int = 0, init: str = "body"):
        super().__init__()
        C, own = x_shape[0], net.patch_embed
        self.size, self.grid = own.img_size, own.grid_size  # pixels and patches, (H, W) each
        self.register_buffer("mean", torch.zeros(C, 1, 1))
        self.register_buffer("std", torch.ones(C, 1, 1))
        self.conv = nn.Conv2d(C, own.proj.out_channels, own.patch_size, own.patch_size)
        nn.init.xavier_uniform_(self.conv.weight, gain=math.sqrt(2))
        if init == "body":
            bodies.copy_channels(own.proj, self.conv)
        self.norm, self.position = bodies.norm_and_positions(net, self.grid, init)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        z = self.conv(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, D, N) -> (B, N, D)
        z = self.norm(z)
        return z if self.position is None else z + self.position


# ---- 4. Body g: bodies.adapt(), the layers of the pretrained model -------------------------------
# ---- 5. Predictor h^t ----------------------------------------------------------------------------


# Adapted from orca.Predictor: from the features of g in one row, d, through a hidden layer
class Predictor(nn.Module):
    """h: from d, the features of g in one row, to predictions, in the units of y (slide 33).

    For a sample, (K,): d is the mean of the last patches, and h has a hidden layer, since noise of
    mean 0 would only rescale what a linear h makes of d. For every point, (C, L) or (C, H, W): d
    holds all patches of all stages, for the layers that ORCA has there, in 2D with a hidden one.
    d is standardised by the training set, so that noise has a scale. `inner` makes the hidden layer
    of the parts of d, and `last` makes points of it; `width` is that of the hidden layer, pooled.
    """

    def __init__(self, maps: list, out_shape: tuple):
        super().__init__()
        self.out_shape, (C, *size) = tuple(out_shape), out_shape
        self.register_buffer("mean", torch.zeros(self.out_shape))
        self.register_buffer("std", torch.ones(self.out_shape))
        # of every part of d: patches, width
        self.tokens = [(math.prod(grid), D) for grid, D in maps] if size else [(1, maps[-1][1])]
        (N, D), widths = self.tokens[-1], [D for _, D in self.tokens]
        self.register_buffer("d_mean", torch.zeros(sum(widths)))
        self.register_buffer("d_std", torch.ones(sum(widths)))
        if not size:
            self.width = HIDDEN
            inner, last = [nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU())], [nn.Linear(HIDDEN, C)]
        elif len(size) == 1:
            self.width = N * NARROW
            inner = [bodies.normed_linear(D, NARROW) for D in widths]
            last = [nn.Linear(self.width, C * size[0])]
        else:
            self.grids, self.sides = [grid for grid, _ in maps], bodies.tile_sides(maps, size)
            slim = [min(D, HIDDEN) for D in widths]
            self.width = sum(slim) + NARROW
            inner = map(bodies.normed_linear, widths, slim)
            inner = [nn.Sequential(layer, nn.GELU()) for layer in inner]
            inner.append(bodies.normed_linear(D, NARROW))  # for the coarse picture
            last = [nn.Linear(d, C * p * p) for d, p in zip(slim, self.sides, strict=True)]
            last.append(nn.Linear(N * NARROW, C * math.prod(self.grids[0])))
        self.inner, self.last = nn.ModuleList(inner), nn.ModuleList(last)
        if size:
            bodies.zeros(self.last)

    def features(self, stages: list[Tensor]) -> Tensor:
        """d, standardised: [(B, N, D), ...] or [(B, h, w, D), ...] -> (B, M)."""
        parts = [z.flatten(1, -2) for z in stages]
        if len(self.out_shape) == 1:
            parts = [parts[-1].mean(dim=1, keepdim=True)]
        rows = [((z - mean) / std).flatten(1) for z, mean, std in self.scales(parts)]
        return torch.cat(rows, dim=1)

    def scales(self, parts: list[Tensor]) -> zip:
        """Each part of d with the means and the deviations of its channels."""
        widths = [D for _, D in self.tokens]
        return zip(parts, self.d_mean.split(widths), self.d_std.split(widths), strict=True)

    def split(self, d: Tensor) -> list[Tensor]:
        """The parts of d: (B, M) -> [(B, N, D), ...]."""
        sizes = [N * D for N, D in self.tokens]
        parts = zip(d.split(sizes, dim=1), self.tokens, strict=True)
        return [z.unflatten(1, shape) for z, shape in parts]

    def hidden(self, d: Tensor) -> list[Tensor]:
        """The hidden layer, by parts: (B, M) -> [(B, N, width), ...]."""
        z = self.split(d)
        if len(self.out_shape) > 1:  # a LayerNorm follows, of channels as g has them
            z = [mean + std * part for part, mean, std in self.scales(z)]
        z += [z[-1]] * (len(self.inner) - len(z))  # in 2D the last stage has two layers
        return [layer(part) for layer, part in zip(self.inner, z, strict=True)]

    def pooled(self, d: Tensor) -> Tensor:
        """The hidden layer as one row: (B, M) -> (B, width)."""
        z = self.hidden(d)
        if len(self.out_shape) == 2:
            return sum(z).flatten(1)
        return torch.cat([part.mean(dim=1) for part in z], dim=1)

    def output(self, d: Tensor) -> Tensor:
        """Predictions, standardised: (B, M) -> (B, *out_shape)."""
        z = self.hidden(d)
        if len(self.out_shape) == 1:
            return self.last[0](z[0].squeeze(1))  # (B, 1, d) -> (B, K)
        if len(self.out_shape) == 2:
            return self.whole(sum(z)).unflatten(1, self.out_shape)  # (B, N, d) -> (B, C, L)
        *z, last = z
        tiles = zip(self.last[:-1], z, self.grids, self.sides, strict=True)
        # (B, N, d) -> (B, C p p, N) -> (B, C p p, h, w) -> (B, C, h p, w p)
        maps = ((t(z).transpose(1, 2).unflatten(2, grid), p) for t, z, grid, p in tiles)
        out = sum(F.pixel_shuffle(tile, p) for tile, p in maps)
        coarse = self.whole(last).unflatten(1, (self.out_shape[0], *self.grids[0]))
        out = out + F.interpolate(coarse, out.shape[2:], mode="bilinear")
        return F.interpolate(out, self.out_shape[1:], mode="bilinear", antialias=True)

    def whole(self, z: Tensor) -> Tensor:
        """Points that depend on all patches, (B, N, d) -> (B, points), as in orca.Predictor."""
        return 0.1 * self.last[-1](z.flatten(1))

    def forward(self, d: Tensor) -> Tensor:
        return self.mean + self.std * self.output(d)


# Adapted from orca.Model: d lies between g and h^t, and predictions can be those of perturbed d
class Model(nn.Module):
    """m^t = h^t o g o f^t: what is trained, saved and used; x to predictions.

    Args:
        kind: of the task; noise: the scales sigma_i and the number of steps T (N1).
        prediction: "normal" or "perturbed" (N7), and the number of draws; normal in training.
    """

    def __init__(
        self, net: nn.Module, x_shape: tuple, out_shape: tuple, patches: int,
        kind: str, noise: tuple, prediction: tuple, init="body",
    ):  # fmt: skip
        super().__init__()
        embedder = SeriesEmbedder if len(x_shape) == 2 else ImageEmbedder
        self.f_t = embedder(net, x_shape, patches, init)
        self.g = bodies.adapt(net, self.f_t.grid)
        self.h_t = Predictor(self.g.maps, out_shape)
        self.kind, self.levels = kind, contrast.noise_levels(*noise)  # (N1)
        self.prediction, self.draws = prediction

    def features(self, x: Tensor) -> Tensor:
        """d = g(f(x)), standardised: (B, M)."""
        return self.h_t.features(self.g(self.f_t(x)))

    def perturbed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions from perturbed features, and their variance over the draws (N7)."""
        a, s = (level[1:] for level in self.levels)  # without the clean d
        d = self.features(x)
        return contrast.predict_perturbed(self.h_t, d, a, s, self.draws, self.kind)  # (N7)

    def forward(self, x: Tensor) -> Tensor:
        if self.prediction == "normal" or self.training:
            return self.h_t(self.features(x))
        return self.perturbed(x)[0]


# ---- 6. The method -------------------------------------------------------------------------------


def coarse(y: Tensor) -> Tensor:
    """A target or output as about OUTPUT numbers: (B, K), (B, C, L), (B, C, H, W) -> (B, d)."""
    if y.ndim == 3:
        y = F.adaptive_avg_pool1d(y, min(OUTPUT, y.shape[2]))
    if y.ndim == 4:
        y = F.adaptive_avg_pool2d(y, math.isqrt(OUTPUT))
    return y.flatten(1)


def directions(task: tasks.Task, rows: list[int], y: Tensor, d: Tensor) -> Tensor:
    """What correlates of the labels (N4), as vectors of length 1: (n, d).

    Classes are names, which correlate with nothing: their mean features stand for them. Several
    labels at once, and values, are taken as they are, less their mean and over their deviation.
    """
    if task.kind == "classes":
        member = F.one_hot(y).T.float()
        v = ((member @ d) / member.sum(dim=1, keepdim=True))[y]
    else:
        v = torch.stack([torch.as_tensor(task.train[row][1]) for row in rows])
        v = coarse(torch.nan_to_num(v.float())).to(d.device)
        v = (v - v.mean(dim=0)) / v.std(dim=0, correction=0).clamp(min=1e-6)
    return F.normalize(v, dim=1)


class Contrast(nn.Module):
    """What stage 2 adds to h^t: the part of it that is contrasted, and the probabilities P_l.

    z is a small projection of h's hidden layer (contrast_at "hidden"). The outputs themselves
    ("output", slide 35) are few where classes are few, a single one has no direction to learn, and
    what is learnt there stage 3 has to unlearn: nothing says which output belongs to which label.
    """

    def __init__(self, h_t: Predictor, cfg: Config, kind: str):
        super().__init__()
        self.h_t, self.cfg, self.values = h_t, cfg, kind in ("regression", "mask")
        self.at_output = cfg.contrast_at == "output"
        self.project = nn.Identity() if self.at_output else nn.Linear(h_t.width, OUTPUT)
        if self.at_output:  # a last layer of zeros has no direction
            for layer in h_t.last:
                layer.reset_parameters()

    def trained(self) -> list[nn.Parameter]:
        part = self.h_t if self.at_output else self.h_t.inner
        return [*part.parameters(), *self.project.parameters()]

    def forward(self, d: Tensor) -> Tensor:
        """z, of length 1: (B, M) -> (B, d)."""
        if self.at_output:
            return F.normalize(coarse(self.h_t.output(d)), dim=1)
        return F.normalize(self.project(self.h_t.pooled(d)), dim=1)

    @torch.no_grad()
    def centres(self, d: Tensor, y: Tensor) -> Tensor:
        """Directions of the mean z of each label: the label of a point is that nearest to its z."""
        z = torch.cat([self(part) for part in d.split(256)])
        return F.normalize(F.one_hot(y).T.float() @ z, dim=1)  # (K, d)

    def preserved(self, d: Tensor, noisy: Tensor, y: Tensor, a: Tensor, s: Tensor, centres: Tensor):
        """P_l that each noisy point has the label y of the clean d (N5), (B,)."""
        scores = lambda d: self(d) @ centres.T  # noqa: E731
        if self.cfg.preserve == "none":
            return torch.ones_like(s)
        if self.cfg.preserve == "margin":
            return contrast.preserved_by_margin(scores, d, y, a, s)
        with torch.no_grad():
            h, C = (self, TOLERANCE) if self.values else (scores, contrast.margin(scores(d), y))
            if self.cfg.preserve == "slope":
                return contrast.preserved_by_slope(h, d, noisy, C)
            return contrast.preserved_by_jacobian(h, d, noisy, C, soft=self.values)


# Adapted from orca.freeze: the three options of slide 37
def freeze(model: Model, what: str) -> None:
    """Fix the weights that stage 3 is to leave as they are (slide 37)."""
    if what in ("frozen-embedder", "projection"):
        model.f_t.requires_grad_(False)
    if what == "projection":
        model.g.requires_grad_(False)
        model.f_t.conv.requires_grad_(True)


# ---- 7. Training ---------------------------------------------------------------------------------


@torch.no_grad()
def features(model: Model, task: tasks.Task, rows: list[int]) -> Tensor:
    """Stage 1: d = g(f(x)) of training samples, once and for all; h^t takes over its scale.

    Returns: (n, M), standardised, on the device of the model.
    """
    device, h_t = next(model.parameters()).device, model.h_t
    model.eval()
    h_t.d_mean.zero_()
    h_t.d_std.fill_(1)
    d = torch.empty(len(rows), sum(N * D for N, D in h_t.tokens), device=device)
    for i in range(0, len(rows), 64):
        x = torch.stack([task.train[row][0] for row in rows[i : i + 64]])
        d[i : i + 64] = model.features(x.to(device))
    parts = h_t.split(d)  # views of d: what follows needs little memory beside it
    h_t.d_mean = torch.cat([z.mean(dim=(0, 1)) for z in parts])
    std = torch.cat([z.std(dim=(0, 1), correction=0) for z in parts])
    h_t.d_std = torch.where(std > 0, std, 1.0)
    for z, mean, std in h_t.scales(parts):
        z.sub_(mean).div_(std)
    return d


def labelled(model: Model, task: tasks.Task, cfg: Config) -> tuple[list[int], Tensor]:
    """Rows of the training set for stages 1 and 2, as many as CACHE has room for; their labels.

    Targets that are no classes have the labels of their clusters (tasks.some_classes).
    Raises: ValueError if all have one label, or z would be a single number.
    """
    rows, y = tasks.some_classes(task, cfg.seed)
    room = max(2, CACHE // sum(N * D for N, D in model.h_t.tokens))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed))[:room]
    rows, (values, y) = [rows[i] for i in order.tolist()], y[order].unique(return_inverse=True)
    if cfg.contrast == "none":
        return rows, y
    if len(values) < 2:
        raise ValueError(
            f"--contrast {cfg.contrast}: all targets of task '{cfg.task}' are of one class or "
            "cluster, so that there is nothing to contrast; give --contrast none"
        )
    if cfg.contrast_at == "output" and math.prod(task.out_shape) == 1:
        raise ValueError("--contrast-at output: a single output has no direction; give hidden")
    if len(rows) < len(task.train):
        print(f"note: stages 1 and 2 use {len(rows)} of the {len(task.train)} training samples")
    return rows, y


def train_predictor(
    model: Model, task: tasks.Task, rows: list[int], labels: Tensor, cfg: Config, record: Record
) -> None:
    """Stages 1 and 2: train h^t alone (N3), on features that are computed once, and perturbed.

    f^t and g take part in no step. Nor does the last layer of h^t, unless outputs are contrasted.

    Args:
        rows, labels: of the training set, from labelled().
    """
    device = next(model.parameters()).device
    if cfg.contrast == "none":
        features(model, task, rows)
        return
    rng, head = torch.Generator().manual_seed(cfg.seed), Contrast(model.h_t, cfg, task.kind)
    head, d, y = head.to(device), None, labels.to(device)
    a, s = (level.to(device) for level in model.levels)
    size, K = 256 if len(task.out_shape) == 1 else 64, int(labels.max()) + 1  # two of each row
    optimizer = run.optimizer_of([{"params": head.trained()}], cfg, cfg.contrast_lr, 0.0)
    changing = {"model": model, "project": head.project, "optimizer": optimizer, "rng": rng}
    for _ in record.begin("contrast", cfg.contrast_epochs, **changing):
        if d is None:  # only now the model is that of a run which was stopped
            d = features(model, task, rows)
            u = directions(task, rows, y, d)
        centres = head.centres(d, y)
        for _ in range(cfg.contrast_steps_per_epoch):
            some = balanced_rows(labels, size, rng).repeat(2).to(device)
            level = torch.randint(len(a), some.shape, generator=rng).to(device)
            noisy = contrast.perturb(d[some], a[level], s[level], rng)  # (N2)
            P = head.preserved(d[some], noisy, y[some], a[level], s[level], centres)  # (N5)
            lam = contrast.label_weights(u[some], y[some], cfg.lambda_eps)  # (N4)
            z = head(noisy)
            loss, undefined = LOSSES[cfg.contrast](z, y[some], lam, P, cfg.tau)  # (N3)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(head.trained(), cfg.clip or math.inf)
            optimizer.step()
            apart = separability(z.detach(), y[some], K)
            shown = {"separability": apart, "preserved": P.mean(), "undefined": undefined}
            record.step(cfg.contrast_lr, contrast=loss, grad_norm=norm, **shown)
        record.log(cfg.contrast_epochs, **record.means())
        record.end_epoch()
    missing = [row["undefined"] for row in record.rows if row["stage"] == "contrast"]
    if any(missing):
        share = sum(missing) / len(missing)
        text = f"--contrast literal was undefined for {share:.1%} of the classes of its batches"
        warnings.warn(f"{text}, which were left out; inner is always defined", stacklevel=2)
    run.synchronise(model.h_t)


# Adapted from orca.finetune: what is frozen is chosen on slide 37
def finetune(model: Model, task: tasks.Task, cfg: Config, record: Record) -> float:
    """Stage 3 (N6): fine-tune all that is not frozen; the record keeps the best epoch's weights.

    Returns: the error of that epoch on validation data.
    """
    device = next(model.parameters()).device
    freeze(model, cfg.finetune)
    new, body = [*model.f_t.parameters(), *model.h_t.parameters()], list(model.g.parameters())
    groups = [{"params": new}, {"params": body, "lr": cfg.body_lr}]
    optimizer = run.optimizer_of(groups, cfg, cfg.lr, cfg.weight_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    loader = run.batches(task.train, cfg, cfg.seed)
    schedule = run.schedule_of(optimizer, cfg, len(loader))
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    changing = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    for _ in record.begin("finetune", cfg.epochs, **changing):
        model.train()
        for batch in record.batches(loader):
            lr, loss = schedule.get_last_lr()[0], torch.zeros((), device=device)
            optimizer.zero_grad()
            for x, y, weight, _ in run.parts(batch, cfg.accumulate, task.weight):
                with run.autocast(device, cfg.precision):
                    part = weight * task.loss(model(x), y)  # (N6)
                scaler.scale(part).backward()
                loss += part.detach()
            run.sum_gradients(trained)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            record.step(lr, loss=loss, grad_norm=norm)
        error, means = evaluate(model, "val", task, cfg), record.means()
        shown = {"lr": lr, "train_loss": means["loss"], "grad_norm": means["grad_norm"]}
        record.log(cfg.epochs, **shown, val_error=error)
        record.end_epoch(error, model)
    return record.best


# ---- 8. Evaluation -------------------------------------------------------------------------------


# Copied from orca.evaluate
@torch.no_grad()
def evaluate(model: nn.Module, split: str, task: tasks.Task, cfg: Config) -> float | None:
    """The task's error on all predictions for a split together; None if test data have none."""
    dataset, device = getattr(task, split), next(model.parameters()).device
    model.eval()
    out, labels = [], []
    for x, y in run.split(dataset):
        with run.autocast(device, cfg.precision):
            out.append(model(x.to(device)).float().cpu())
        labels.append(y)
    return run.error_of(task, split, out, labels)


@torch.no_grad()
def evaluate_both(model: Model, task: tasks.Task, cfg: Config) -> dict[str, float]:
    """Test errors of both predictions of slide 37, and how far the draws of (N7) are apart.

    That is the root of the mean of their variance: of probabilities, or of values in units of the
    deviation of y.
    """
    errors, device, variance = {}, next(model.parameters()).device, []
    for kind in ("normal", "perturbed"):
        model.prediction = kind
        errors[f"test_error_{kind}"] = evaluate(model, "test", task, cfg)
    model.prediction = cfg.prediction
    scale = model.h_t.std.clamp(min=1e-12) if task.kind == "regression" else 1.0
    for x, _ in run.split(task.test):
        with run.autocast(device, cfg.precision):
            variance.append((model.perturbed(x.to(device))[1] / scale**2).float().cpu())
    variance = run.whole(variance, len(task.test))
    return {**errors, "std_perturbed": math.sqrt(variance.mean())}


# ---- 9. Main -------------------------------------------------------------------------------------


# Copied from orca.load
def load(folder: str | Path) -> Model:
    """The model of a finished run, in evaluation mode: a batch of x to predictions."""
    return run.load_model(folder, Model)


def main(cfg: Config) -> dict:
    """Run all stages. Returns the result, which is also printed and written with the rest."""
    if cfg.predict:
        return {"predictions": run.predict(cfg, load)}
    start = time.time()
    cfg, task, net, tokenize, model, shape = build(cfg)
    rows, labels = labelled(model, task, cfg)
    record = Record(run.open_run(cfg, METHOD), cfg, METHOD, start)
    if record.result:
        return record.result
    run.describe(cfg, METHOD, task, model, record.out, shape, "none")

    train_predictor(model, task, rows, labels, cfg, record)  # stages 1 and 2
    val_error = finetune(model, task, cfg, record)  # stage 3
    record.restore_best(model)
    both = evaluate_both(model, task, cfg)
    errors = {"test_error": both[f"test_error_{cfg.prediction}"], "val_error": val_error, **both}
    return run.finish(cfg, METHOD, task, model, record, errors, "none")


# Adapted from orca.build: the model knows the noise, and f^t may be one that orca.py has aligned
def build(cfg: Config) -> tuple:
    """Settings without gaps, task, body, its tokenizer, model, and its description."""
    sigmas = scales(cfg)
    cfg, task, net, tokenize = run.load_parts(cfg)
    preserve = "margin" if task.kind in ("classes", "labels") else "jacobian"
    cfg = replace(cfg, preserve=cfg.preserve or preserve)
    shape = {"x_shape": task.x_shape, "out_shape": task.out_shape, "patches": cfg.patches}
    shape |= {"kind": task.kind, "noise": (sigmas, cfg.noise_steps)}
    shape |= {"prediction": (cfg.prediction, cfg.draws)}
    model = Model(net, **shape, init=cfg.embedder_init)
    f_t, h_t = model.f_t, model.h_t
    f_t.mean, f_t.std, h_t.mean, h_t.std = tasks.statistics(task)
    if cfg.f_t:
        run.load_weights(f_t, Path(cfg.f_t) / "f_t.safetensors")
    shape |= {"body": bodies.describe(net)}
    return cfg, task, net, tokenize, run.on_device(model, cfg), shape


def scales(cfg: Config) -> list[float]:
    """The sigma_i of --sigmas."""
    try:
        sigmas = [float(part) for part in cfg.sigmas.split(",")]
    except ValueError:
        sigmas = [math.nan]
    if not all(0 <= sigma < 1 for sigma in sigmas):
        raise ValueError(
            f"--sigmas {cfg.sigmas}: expected numbers from 0 to below 1, such as 0.05,0.1"
        )
    return sigmas


# Copied from orca.parse_args
def parse_args(argv: list[str] | None = None) -> Config:
    return run.parse(Config, configure, __doc__, argv)


# Copied from orca.cli
def cli(argv: list[str] | None = None) -> int:
    return run.cli(METHOD, parse_args, main, argv)


if __name__ == "__main__":
    sys.exit(cli())

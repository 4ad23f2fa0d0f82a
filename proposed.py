#!/usr/bin/env python
r"""The slides' own proposal: perturb what the body says, contrast what the predictor makes of it.

As in ORCA, a target model h o g o f is put together from an embedder, a pretrained body and a new
predictor. Before it is fine-tuned, the predictor alone is trained on the outputs d of the body,
under noise of many scales: predictions of one label are to point the same way, those of different
labels elsewhere. That costs one pass of the body over the training set.

    (N1), (N2)  d^t = a g(f(x)) + s noise, at many scales sigma            slide 34, stage 1
    (N3)        contrast of z = h(d^t) over pairs, by exp(cos(z_i, z_j) / tau)     35, stage 2
    (N4), (N5)  in it, lambda: how unlike labels are, and P: noise keeps them      35, 36
    (N6)        min over f, g and h of the mean of L(h(g(f(x))), y)                37, stage 3
    (N7)        y = E[h(d~)] over perturbed d~, or h(d)                            37
All but (N6) stand in full in contrast.py. What is as in ORCA comes from orca.py, baselines too.

    python proposed.py --task satellite                 simulated data, tiny body, no network
    python proposed.py --task darcy                     images to a field
    python proposed.py --task satellite --contrast none without stage 2
    python proposed.py --task ecg --prediction perturbed    the mean over noise as prediction
    python proposed.py --task satellite --align otdd    after ORCA's alignment of f (slide 38)
    python proposed.py --task mine.npz --device cuda    arrays x_train, y_train, x_test, y_test

You should see the contrastive loss fall and "preserved", the mean of P, rise in stage "contrast",
then the error fall in stage "finetune"; the last line is the result, with the errors of both
predictions of (N7). Everything is written to runs/proposed-TASK-SEED.

How the slides were read where they leave things open:
 1. --contrast literal is (N3) as on the slide, of cosines; contrast.py says what is wrong with it.
 2. Features are standardised first, else sigma has no unit. N K T features are drawn on the fly,
    those without noise among them; --materialise makes them all.
 3. h has a hidden layer, since noise changes nothing in the mean (N7) of a linear one. z is a
    projection of it; --contrast-at output takes the outputs (class Contrast).
 4. Classes correlate (N4) as their mean features do; several labels, and values, as they are.
    Values and fields have the labels of their clusters (k-means), for P a tolerance instead of a
    margin: P = exp(-|J (d~ - d)|^2 / (2 C^2)), J the Jacobian of z.
 5. h gives a point the label whose mean z is nearest. --preserve jacobian is the slide's P.
 6. "Pretrained model + linear projection" (slide 33) is ORCA's f^t: the body's own norm and
    positions, or patches, around a linear projection. --encoder frozen reads it as a frozen encoder
    before a projection; --finetune projection trains that and h alone in stage 3.
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bodies
import orca
import run
import tasks
from contrast import (
    Augmented,
    contrastive_loss,
    kept_by_jacobian,
    kept_by_margin,
    label_weights,
    margin,
    noise_levels,
    predict_perturbed,
)
from run import Record, Settings, autocast, opt

# B batch, C channels, L length or H x W, N patches, D width of the body, M numbers of d, K classes
METHOD = "proposed"
ENCODER = ("task", "frozen")
CONTRAST = ("inner", "outer", "literal", "none")
PRESERVE = ("margin", "jacobian", "none")
FINETUNE = ("embedder", "frozen-embedder", "projection")
NARROW = 32  # numbers of a patch from which h^t makes the points of a series
HIDDEN = 256  # width of the hidden layer of h^t, at most
OUTPUT = 64  # numbers that are contrasted; targets are correlated on about as many
CACHE = 2**29  # numbers of d that are kept in memory: 2 GiB
READ = (-4.0, 4.0, 81, 8)  # numbers read as words: from, to, how many, components kept


# ---- 1. Configuration ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Settings):
    """Every setting of a run. The command line wins over a task's preset, and that over these."""

    # what to run on
    task: str = opt("satellite", f"{', '.join(tasks.NAMES)}, or your own FILE.npz")
    data: str = opt("simulated", "where the task's data come from", ("simulated", "real"))
    data_dir: str = opt("data", "directory of the real data")
    published: bool = opt(False, "PDE tasks: the papers' grid, times and inputs")
    train_size: int = opt(0, "training samples; 0: the task's own number", low=0)
    paper: bool = opt(False, "the paper's setting: real data, large bodies, ORCA's fine-tuning")
    # the parts (slides 6 to 8 and 33)
    body: str = opt("", "folder or hub name of g; random:NAME: untrained; default: the tiny one")
    source: str = opt("", "source data set of --align; default: the task's", tasks.SOURCES)
    source_size: int = opt(2000, "source samples", low=2)
    patches: int = opt(0, "N at most, 0: 32 for series, 256 (16 x 16) for images", low=0)
    encoder: str = opt("task", "f: ORCA's f^t, or a frozen encoder and a projection", ENCODER)
    embedder_init: str = opt("body", "what f^t starts from", ("body", "random"))
    coordinates: bool = opt(False, "give f^t the place of each point, as further channels of x")
    # alignment of f^t beforehand, as in orca.py (slides 9 and 38)
    align: str = opt("none", "distance D to minimise", orca.ALIGN)
    align_features: str = opt("mean", "what D sees of a sample", ("mean", "random-patch"))
    align_epochs: int = opt(20, "epochs of it", low=1)
    align_steps_per_epoch: int = opt(3, "steps in each", low=1)
    align_lr: float = opt(0.0, "its learning rate, 0: 1e-3 for series, 1e-4 for images", low=0)
    align_drop: int = opt(0, "epochs after which that falls to a fifth, again and again", low=0)
    align_samples: int = opt(384, "target samples a step, balanced over the classes", low=2)
    # stage 1, augmentation (slide 34)
    sigmas: str = opt("0.05,0.1,0.2", "scales sigma_i of the noise, 0..1, of standardised features")
    noise_steps: int = opt(4, "T, steps of noise at each scale", low=1)
    materialise: bool = opt(False, "make all N K T features beforehand (small training sets)")
    # stage 2, contrastive training of h^t (slides 35 and 36)
    contrast: str = opt("inner", "form of the loss; none: no stage 2", CONTRAST)
    contrast_at: str = opt("hidden", "what of h^t is contrasted", ("hidden", "output"))
    contrast_epochs: int = opt(5, "epochs of stage 2", low=1)
    contrast_steps_per_epoch: int = opt(20, "steps in each", low=1)
    contrast_batch: int = opt(0, "features a step; 0: 512, or 128 if they are those of all patches")
    contrast_lr: float = opt(3e-4, "its learning rate", low=0)
    tau: float = opt(0.2, "temperature of the cosines", low=0.05)
    lambda_eps: float = opt(1.0, "epsilon of lambda: unlike labels weigh (1 + eps) / eps", low=1e-6)
    preserve: str = opt("", "P that noise keeps y; default: margin, for values jacobian", PRESERVE)
    tolerance: float = opt(0.5, "C of P for values: change of z (of length 1) to count", low=1e-6)
    # stage 3, fine-tuning, and prediction (slide 37)
    finetune: str = opt("embedder", "what is trained of f and g", FINETUNE)
    prediction: str = opt("normal", "h(d), or the mean of h(d~)", ("normal", "perturbed"))
    draws: int = opt(32, "draws of d~ in that mean", low=1)
    epochs: int = opt(18, "epochs of stage 3", low=1)
    batch_size: int = opt(32, "samples a step, of all processes and parts together", low=1)
    accumulate: int = opt(1, "parts in which a process takes its batch, to save memory", low=1)
    optimizer: str = opt("adamw", "of all stages", ("adamw", "adam", "sgd"))
    lr: float = opt(2e-3, "peak learning rate", low=0)
    weight_decay: float = opt(0.01, "of the optimiser", low=0)
    momentum: float = opt(0.9, "of SGD", low=0)
    beta2: float = opt(0.999, "of AdamW and Adam", low=0)
    warmup: float = opt(0.1, "share of the schedule in which the learning rate rises", low=0)
    schedule_epochs: int = opt(0, "epochs until it would be 0 again; 0: `epochs`", low=0)
    clip: float = opt(1.0, "largest norm of a gradient; 0: any", low=0)


# What a task changes: a tenth fewer epochs than ORCA, in whose time stages 1 and 2 take place. The
# slides give no numbers for the real data: these are ORCA's.
EPOCHS = {task: (9 * epochs + 4) // 10 for task, epochs in orca.EPOCHS.items()}
PATCHES, ALIGN_SAMPLES, PRESETS = orca.PATCHES, orca.ALIGN_SAMPLES, orca.PRESETS


# Copied from orca.configure
def configure(**given) -> Config:
    """Defaults < preset of the task, with paper=True < what is given."""
    task, paper = given.get("task", "satellite"), given.get("paper")
    embedded = {"epochs": EPOCHS.get(task, Config.epochs), "patches": PATCHES.get(task, 0)}
    embedded |= {"align_samples": ALIGN_SAMPLES.get(task, Config.align_samples)}
    if paper and task not in PRESETS:
        raise ValueError(f"--paper has no settings for '{task}'; it has {', '.join(PRESETS)}")
    return Config(**{**(PRESETS[task] if paper else embedded), **given})


# ---- 2. Data -------------------------------------------------------------------------------------


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


# ---- 3. Embedder f^t -----------------------------------------------------------------------------


class FrozenEmbedder(nn.Module):
    """f^t as a frozen pretrained encoder and a linear projection (slide 33, --encoder frozen).

    Images: the body's own patch embedding reads them; the projection starts as the identity.
    Series: f^s of a language model reads numbers as words ("-1.2"). Of these vectors the first
    principal components are kept, and values between two words are in between. The projection takes
    all values of a patch together, and the body's LayerNorm and positions follow, frozen as well.
    """

    def __init__(self, x_shape: tuple, net: nn.Module, patches: int, **embedder):
        super().__init__()
        series = len(x_shape) == 2
        own = orca.SeriesEmbedder if series else orca.ImageEmbedder
        own = own(x_shape, net, patches, **embedder)
        self.own, self.grid, self.coordinates = own, own.grid, own.coordinates
        D = own.conv.out_channels
        self.register_buffer("mean", own.mean.clone())
        self.register_buffer("std", own.std.clone())
        own.requires_grad_(False)
        if series:
            self.register_buffer("words", torch.zeros(READ[2], READ[3]))
            self.linear = nn.Linear(own.conv.in_channels * own.patch * READ[3], D)
            own.conv = nn.Identity()  # the projection is in its place
        else:
            self.linear = nn.Linear(D, D)
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def read_numbers(self, net: nn.Module, tokenize: Callable) -> None:
        """Make the table of words for numbers, from the word embeddings of the body."""
        texts = [f"{value:.1f}" for value in torch.linspace(*READ[:3]).tolist()]
        table = net.embeddings.word_embeddings.weight.detach()
        words = torch.stack([table[ids].mean(dim=0) for ids in tokenize(texts)])
        u, scale, _ = torch.linalg.svd(words - words.mean(dim=0), full_matrices=False)
        self.words = (u * scale)[:, : READ[3]]
        self.words = self.words / self.words.std()

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        if x.ndim == 4:
            return self.linear(self.own(x))
        x = orca.with_coordinates(x) if self.coordinates else x
        x = F.pad(x, (0, -x.shape[-1] % self.own.patch))
        low, high, count, _ = READ
        place = (x.clamp(low, high) - low) * ((count - 1) / (high - low))
        below = place.long().clamp(max=count - 2)
        part = (place - below).unsqueeze(-1)
        z = self.words[below] * (1 - part) + self.words[below + 1] * part  # (B, C, L, d)
        z = z.unflatten(2, (-1, self.own.patch)).transpose(1, 2).flatten(2)  # (B, N, C patch d)
        return self.own.norm(self.linear(z)) + self.own.position


# ---- 4. Body g: bodies.adapt(), the layers of the pretrained model -------------------------------


# ---- 5. Predictor h^t ----------------------------------------------------------------------------


# Adapted from orca.Predictor: from the features of g in a row, d, through a hidden layer
class Predictor(nn.Module):
    """h: from d, the features of g in a row, to predictions, in the units of y (slide 33).

    For a sample, (K,): d is the mean of the last patches, and h has a hidden layer, since noise of
    mean 0 would only rescale what a linear h makes of d. For every point, (C, L) or (C, H, W): d is
    all patches of all stages, for the layers that ORCA has there, in 2D with a hidden one. d is
    standardised by the training set, as noise needs a scale.
    """

    def __init__(self, maps: list, out_shape: tuple):
        super().__init__()
        self.out_shape, (C, *size) = tuple(out_shape), out_shape
        self.register_buffer("mean", torch.zeros(self.out_shape))
        self.register_buffer("std", torch.ones(self.out_shape))
        # of every part of d: patches, width
        self.tokens = [(math.prod(grid), D) for grid, D in maps] if size else [(1, maps[-1][1])]
        widths = [D for _, D in self.tokens]
        self.register_buffer("d_mean", torch.zeros(sum(widths)))
        self.register_buffer("d_std", torch.ones(sum(widths)))
        if len(size) == 0:
            self.inner = nn.ModuleList([nn.Sequential(nn.Linear(widths[0], HIDDEN), nn.GELU())])
            self.width, self.last = HIDDEN, nn.ModuleList([nn.Linear(HIDDEN, C)])
        elif len(size) == 1:
            self.inner = nn.ModuleList(orca.normed_linear(D, NARROW) for D in widths)
            self.width = NARROW * maps[0][0][0]
            linear = nn.Linear(maps[0][0][0] * NARROW, math.prod(out_shape))
            self.last = nn.ModuleList([orca.zeros(linear)])
        else:
            self.grids, fine = [grid for grid, _ in maps], maps[0][0][0]
            points = max(math.ceil(p / n) for p, n in zip(size, maps[0][0], strict=True))
            self.sides = [points * fine // grid[0] for grid in self.grids]
            slim = [min(D, HIDDEN) for D in widths]
            inner = map(orca.normed_linear, widths, slim)
            self.inner = nn.ModuleList(nn.Sequential(layer, nn.GELU()) for layer in inner)
            last = (nn.Linear(d, C * p * p) for d, p in zip(slim, self.sides, strict=True))
            self.last, self.width = nn.ModuleList(map(orca.zeros, last)), sum(slim)

    def features(self, stages: list[Tensor]) -> Tensor:
        """d, standardised: [(B, N, D), ...] or [(B, h, w, D), ...] -> (B, M)."""
        parts = [z.flatten(1, -2) for z in stages]
        if len(self.out_shape) == 1:
            parts = [parts[-1].mean(dim=1, keepdim=True)]
        return self.standardised(parts)

    def scales(self, parts: list[Tensor]) -> zip:
        widths = [D for _, D in self.tokens]
        return zip(parts, self.d_mean.split(widths), self.d_std.split(widths), strict=True)

    def standardised(self, parts: list[Tensor]) -> Tensor:
        rows = [((z - mean) / std).flatten(1) for z, mean, std in self.scales(parts)]
        return torch.cat(rows, dim=1)

    def split(self, d: Tensor) -> list[Tensor]:
        """The parts of d: (B, M) -> [(B, N, D), ...]."""
        sizes = [N * D for N, D in self.tokens]
        parts = zip(d.split(sizes, dim=1), self.tokens, strict=True)
        return [z.unflatten(1, shape) for z, shape in parts]

    def measure(self, d: Tensor) -> Tensor:
        """Take over mean and deviation of every channel of d; d as they were 0 and 1 before."""
        parts = self.split(d)
        self.d_mean = torch.cat([z.mean(dim=(0, 1)) for z in parts])
        std = torch.cat([z.std(dim=(0, 1), correction=0) for z in parts])
        self.d_std = torch.where(std > 0, std, 1.0)
        return self.standardised(parts)

    def hidden(self, d: Tensor) -> list[Tensor]:
        z = self.split(d)
        if len(self.out_shape) > 1:  # the next is a LayerNorm, of channels as g has them
            z = [mean + std * part for part, mean, std in self.scales(z)]
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
            return self.last[0](sum(z).flatten(1)).unflatten(1, self.out_shape)  # -> (B, C, L)
        tiles = zip(self.last, z, self.grids, self.sides, strict=True)
        # (B, N, d) -> (B, C p p, N) -> (B, C p p, h, w) -> (B, C, h p, w p)
        maps = ((t(z).transpose(1, 2).unflatten(2, grid), p) for t, z, grid, p in tiles)
        out = sum(F.pixel_shuffle(tile, p) for tile, p in maps)
        return F.interpolate(out, self.out_shape[1:], mode="bilinear", antialias=True)

    def forward(self, d: Tensor) -> Tensor:
        return self.mean + self.std * self.output(d)


# Adapted from orca.Model: d lies between g and h^t, and predictions can be those of perturbed d
class Model(nn.Module):
    """m^t = h^t o g o f^t: what is trained, saved and used; x to predictions.

    Args:
        kind: of the task; encoder: "task" for an f^t as ORCA's, "frozen" for FrozenEmbedder.
        noise: the scales sigma_i and the number of steps T (N1).
        prediction: "normal" or "perturbed" (N7), and the number of draws; normal in training.
    """

    def __init__(
        self, net: nn.Module, x_shape: tuple, out_shape: tuple, patches: int,
        kind: str, encoder: str, noise: tuple, prediction: tuple, **embedder
    ):  # fmt: skip
        super().__init__()
        own = orca.SeriesEmbedder if len(x_shape) == 2 else orca.ImageEmbedder
        f_t = own if encoder == "task" else FrozenEmbedder
        self.f_t = f_t(x_shape, net, patches, **embedder)
        self.g = bodies.adapt(net, self.f_t.grid)
        self.h_t = Predictor(self.g.maps, out_shape)
        self.kind, self.levels = kind, noise_levels(*noise)
        self.prediction, self.draws = prediction

    def standardise(self, x_mean: Tensor, x_std: Tensor, y_mean: Tensor, y_std: Tensor) -> None:
        """Take over the statistics of the training set, of tasks.statistics()."""
        self.f_t.mean, self.f_t.std, self.h_t.mean, self.h_t.std = x_mean, x_std, y_mean, y_std

    def features(self, x: Tensor) -> Tensor:
        """d = g(f(x)), standardised: (B, M)."""
        return self.h_t.features(self.g(self.f_t(x)))

    def perturbed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions from perturbed features, and their variance over the draws (N7)."""
        a, s = (level[1:] for level in self.levels)
        return predict_perturbed(self.h_t, self.features(x), a, s, self.draws, self.kind)  # (N7)

    def forward(self, x: Tensor) -> Tensor:
        if self.prediction == "normal" or self.training:
            return self.h_t(self.features(x))
        return self.perturbed(x)[0]


# ---- 6. The method -------------------------------------------------------------------------------


class Contrast(nn.Module):
    """What stage 2 adds to h^t: what of it is contrasted, and the probabilities P.

    z is a small projection of h's hidden layer (contrast_at "hidden"). The outputs themselves
    ("output", as slide 35 has it) are few where classes are few, a single one has no direction to
    learn, and what is learnt there stage 3 has to unlearn: nothing says which output is for which
    label.
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

    def kept(self, d: Tensor, noisy: Tensor, y: Tensor, a: Tensor, s: Tensor, centres: Tensor):
        """P that each noisy point has the label y of the clean d (N5), (B,)."""
        scores = lambda d: self(d) @ centres.T  # noqa: E731
        if self.cfg.preserve == "none":
            return torch.ones_like(s)
        if self.cfg.preserve == "margin":
            return kept_by_margin(scores, d, y, a, s)
        with torch.no_grad():
            if self.values:
                return kept_by_jacobian(self, d, noisy, self.cfg.tolerance, soft=True)
            return kept_by_jacobian(scores, d, noisy, margin(scores(d), y))


# Adapted from orca.freeze: the three options of slide 37
def freeze(model: Model, what: str) -> None:
    """Fix the weights that stage 3 is to leave as they are (slide 37)."""
    if what in ("frozen-embedder", "projection"):
        model.f_t.requires_grad_(False)
    if what == "projection":
        model.g.requires_grad_(False)
        projection = model.f_t.linear if hasattr(model.f_t, "linear") else model.f_t.conv
        projection.requires_grad_(True)


# ---- 7. Training ---------------------------------------------------------------------------------


@torch.no_grad()
def features(model: Model, task: tasks.Task, rows: list[int]) -> Tensor:
    """Stage 1: d = g(f(x)) of training samples, once and for all; h^t takes over its scale.

    Returns: (n, M), standardised, on the device of the model.
    """
    device = next(model.parameters()).device
    model.eval()
    model.h_t.d_mean.zero_()
    model.h_t.d_std.fill_(1)
    d = []
    for i in range(0, len(rows), 64):
        x = torch.stack([task.train[row][0] for row in rows[i : i + 64]])
        d.append(model.features(x.to(device)))
    return model.h_t.measure(torch.cat(d))


def labelled(model: Model, task: tasks.Task, cfg: Config) -> tuple[list[int], Tensor]:
    """Rows of the training set for stages 1 and 2, as many as CACHE has room for; their labels.

    Targets that are no classes have those of their cluster (tasks.some_classes).
    Raises: ValueError if there is but one, or one output, or no room for all of --materialise.
    """
    rows, y = tasks.some_classes(task, cfg.seed)
    versions = len(model.levels[0]) if cfg.materialise else 1
    room = max(2, CACHE // (versions * sum(N * D for N, D in model.h_t.tokens)))
    if cfg.materialise and room < len(rows):
        raise ValueError(
            f"--materialise: memory has no room for {versions} versions of {len(rows)} samples; "
            f"leave it out, or give --train-size {room}"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed))[:room]
    rows, (values, y) = [rows[i] for i in order.tolist()], y[order].unique(return_inverse=True)
    if cfg.contrast != "none" and len(values) < 2:
        raise ValueError(
            f"--contrast {cfg.contrast}: all targets of task '{cfg.task}' are of one class or "
            "cluster, so that there is nothing to contrast; give --contrast none"
        )
    if cfg.contrast != "none" and cfg.contrast_at == "output" and math.prod(task.out_shape) == 1:
        raise ValueError("--contrast-at output: a single output has no direction; give hidden")
    return rows, y


def contrast(
    model: Model, task: tasks.Task, rows: list[int], labels: Tensor, cfg: Config, record: Record
) -> None:
    """Stages 1 and 2: train h^t alone (N3), on features that are made once, and perturbed.

    f^t and g take part in no step. Nor does the last layer of h^t, unless outputs are contrasted.

    Args:
        rows, labels: of the training set, from labelled().
    """
    device = next(model.parameters()).device
    if cfg.contrast == "none":
        features(model, task, rows)
        return
    rng, head = torch.Generator().manual_seed(cfg.seed), Contrast(model.h_t, cfg, task.kind)
    head, data, y, missing = head.to(device), None, labels.to(device), 0.0
    trained = head.trained()
    optimizer = run.optimizer_of(trained, cfg, cfg.contrast_lr, weight_decay=0.0)
    changing = {"model": model, "project": head.project, "optimizer": optimizer, "rng": rng}
    for epoch in record.begin("contrast", cfg.contrast_epochs, **changing):
        if data is None:  # only now model is what a broken run had
            d = features(model, task, rows)
            data = Augmented(d, scales(cfg), cfg.noise_steps, rng, cfg.materialise)  # (N1)
            u = directions(task, rows, y, d)
        centres, sums = head.centres(data.d, y), torch.zeros(5)
        for _ in range(cfg.contrast_steps_per_epoch):
            some = orca.balanced_rows(labels, cfg.contrast_batch // 2, rng).repeat(2).to(device)
            noisy, a, s = data.draw(some)  # (N2)
            P = head.kept(data.d[some], noisy, y[some], a, s, centres)  # (N5)
            lam, z = label_weights(u[some], y[some], cfg.lambda_eps), head(noisy)  # (N4)
            loss, undefined = contrastive_loss(z, y[some], lam, P, cfg.tau, cfg.contrast)  # (N3)
            optimizer.zero_grad()
            run.finite(loss.item(), "contrastive loss", epoch, cfg.contrast_lr)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
            run.finite(norm.item(), "gradient norm", epoch, cfg.contrast_lr)
            optimizer.step()
            apart = orca.separability(z.detach(), y[some])
            values = (loss.detach(), norm, apart, P.mean(), undefined)
            sums += torch.tensor([float(value) for value in values])
        names = ("contrast", "grad_norm", "separability", "preserved", "undefined")
        values = dict(zip(names, (sums / cfg.contrast_steps_per_epoch).tolist(), strict=True))
        record.log(epoch + 1, cfg.contrast_epochs, "contrast", **values)
        record.end_epoch()
        missing += values["undefined"] / cfg.contrast_epochs
    if missing:
        text = f"--contrast literal was undefined for {missing:.1%} of the classes of its batches"
        warnings.warn(f"{text}, which were left out; inner is always defined", stacklevel=2)
    run.synchronise(model.h_t)


# Adapted from orca.finetune: what is frozen is that of slide 37
def finetune(model: Model, task: tasks.Task, cfg: Config, record: Record) -> float:
    """Stage 3 (N6): fine-tune all that is not frozen; the record keeps the best epoch's weights.

    Returns: the error of that epoch on validation data.
    """
    device = next(model.parameters()).device
    freeze(model, cfg.finetune)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = run.optimizer_of(trained, cfg, cfg.lr, cfg.weight_decay)
    loader = run.batches(task.train, cfg, cfg.seed)
    steps = (cfg.schedule_epochs or cfg.epochs) * len(loader)
    factor = lambda step: run.rate(step, steps, cfg.warmup)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    changing = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    for epoch in record.begin("finetune", cfg.epochs, **changing):
        model.train()
        for batch in record.batches(loader):
            lr, loss = schedule.get_last_lr()[0], 0.0
            optimizer.zero_grad()
            for x, y, weight in run.parts(batch, cfg.accumulate, device):
                with autocast(device, cfg.precision):
                    part = weight * task.loss(model(x), y)  # (N6)
                scaler.scale(part).backward()
                loss += part.item()
            loss, norm = run.update(trained, optimizer, schedule, scaler, loss, cfg.clip)
            record.step(schedule.last_epoch - 1, lr, loss, norm)
            record.add(loss=loss / len(loader), norm=norm / len(loader))
        error = orca.evaluate(model, "val", task, cfg)
        means = {"train_loss": record.sums["loss"], "grad_norm": record.sums["norm"]}
        record.log(epoch + 1, cfg.epochs, "finetune", lr=lr, **means, val_error=error)
        record.end_epoch(error, model)
    return record.best


# ---- 8. Evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_both(model: Model, task: tasks.Task, cfg: Config) -> dict[str, float]:
    """Test errors of both predictions of slide 37, and how far the draws of (N7) are apart.

    That is the root of the mean of their variance: of probabilities, or of values in units of the
    deviation of y.
    """
    errors, device, variance = {}, next(model.parameters()).device, []
    for kind in ("normal", "perturbed"):
        model.prediction = kind
        errors[f"test_error_{kind}"] = orca.evaluate(model, "test", task, cfg)
    model.prediction = cfg.prediction
    scale = model.h_t.std.clamp(min=1e-12) if task.kind == "regression" else 1.0
    for x, _ in run.split(task.test):
        with autocast(device, cfg.precision):
            variance.append((model.perturbed(x.to(device))[1] / scale**2).float().cpu())
    variance = run.whole(torch.cat(variance), len(task.test))
    return {**errors, "std_perturbed": math.sqrt(variance.mean())}


# ---- 9. Main -------------------------------------------------------------------------------------


# Copied from orca.load
def load(directory: str | Path) -> Model:
    """The model of a finished run, in evaluation mode: a batch of x to predictions.

    Raises: FileNotFoundError if the directory holds no run.
    """
    saved = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))["model"]
    model = Model(bodies.rebuild(saved.pop("body")), **saved)
    run.load_weights(model, Path(directory) / "model.safetensors")
    return model.eval()


def main(cfg: Config) -> dict:
    """Run all stages. Returns the result, which is also printed and written with the rest."""
    if cfg.predict:
        return {"predictions": run.predict(cfg, load)}
    start = time.time()
    cfg, task, net, tokenize, model, shape = build(cfg)
    device = next(model.parameters()).device
    rows, labels = labelled(model, task, cfg)
    if cfg.align != "none":
        source = orca.load_source(cfg.source, cfg, tokenize)
    out = run.open_run(cfg, METHOD)
    record = Record(out, cfg, METHOD, start)
    if record.result:
        return record.result
    run.describe(cfg, METHOD, task, model, out, {**shape, "body": bodies.describe(net)})

    if cfg.align != "none":
        f_s = orca.source_embedder(net).to(device)
        z_s = orca.source_features(f_s, source, device, cfg.align_features)
        orca.align(model, z_s, source.y.to(device), task, cfg, record)
    contrast(model, task, rows, labels, cfg, record)  # stages 1 and 2
    val_error = finetune(model, task, cfg, record)  # stage 3
    run.load_weights(model, out / "model.safetensors")
    both = evaluate_both(model, task, cfg)
    errors = {"test_error": both[f"test_error_{cfg.prediction}"], "val_error": val_error, **both}
    used = cfg.source if cfg.align != "none" else "none"
    return run.finish(cfg, METHOD, task, model, record, errors, used)


# Adapted from orca.build: the model knows the noise; what depends on the kind of task
def build(cfg: Config) -> tuple:
    """cfg without gaps, task, body, its tokenizer, model, and what load() needs."""
    device, sigmas = run.start(cfg), scales(cfg)
    which = (cfg.task, cfg.data, cfg.data_dir, cfg.seed, cfg.train_size or None, cfg.published)
    task = tasks.load_task(*which)
    cfg = orca.resolve(cfg, task)
    batch = 512 if len(task.out_shape) == 1 else 128
    preserve = "margin" if task.kind in ("classes", "labels") else "jacobian"
    given = {"contrast_batch": batch, "preserve": preserve}
    given["align_lr"] = orca.ALIGN_LR[len(task.x_shape)]
    cfg = replace(cfg, **{key: getattr(cfg, key) or value for key, value in given.items()})
    net, tokenize = bodies.load_body(cfg.body, task.x_shape, cfg.patches)
    shape = {"x_shape": task.x_shape, "out_shape": task.out_shape, "patches": cfg.patches}
    shape |= {"coordinates": cfg.coordinates, "kind": task.kind, "encoder": cfg.encoder}
    shape |= {"noise": (sigmas, cfg.noise_steps), "prediction": (cfg.prediction, cfg.draws)}
    model = Model(net, **shape, init=cfg.embedder_init)
    model.standardise(*tasks.statistics(task))
    if cfg.encoder == "frozen" and tokenize:
        model.f_t.read_numbers(net, tokenize)
    model.g.recompute = cfg.recompute
    if cfg.compile:
        model.g.compile()
    return cfg, task, net, tokenize, model.to(device), shape


def scales(cfg: Config) -> list[float]:
    """The sigma_i of --sigmas."""
    try:
        sigmas = [float(part) for part in cfg.sigmas.split(",")]
    except ValueError:
        sigmas = [math.nan]
    if not all(0 <= sigma < 1 for sigma in sigmas):
        raise ValueError(f"--sigmas {cfg.sigmas}: expected numbers of 0..1, not 1, as 0.05,0.1")
    return sigmas


# Copied from orca.parse_args
def parse_args(argv: list[str] | None = None) -> Config:
    return run.parse(Config, configure, __doc__, argv)


# Copied from orca.cli
def cli(argv: list[str] | None = None) -> int:
    return run.cli(METHOD, parse_args, main, argv)


if __name__ == "__main__":
    sys.exit(cli())

#!/usr/bin/env python
r"""ORCA: align, then refine. Carry a pretrained transformer over to data it has never seen.

A target model is put together from a new embedder f^t, a pretrained body g and a new predictor
h^t. The embedder is first trained until embedded target data look like embedded source data, which
the body knows; then everything is fine-tuned.

    (O1)  m^t = h^t o g o f^t                                           slides 6-8, stage 1
    (O2)  min over f^t of D( P(f^t(x^t), y^t) || P(f^s(x^s), y^s) )     slide 9, stage 2
          D is OTDD (otdd.py, slide 10), MMD (mmd.py, slide 40) or L2, each of a sample's mean patch
    (O3)  min over f^t, g and h^t of the mean of L(m^t(x^t), y^t)       slide 6, stage 3
    (O4)  D = sum_c n_c / n [ W_2^2(f^t(x^t | y^t = c), f^s(x^s)) + const ]     the released D

Source: Shen et al., Cross-Modal Fine-Tuning: Align then Refine, ICML 2023 (arXiv 2302.05738).

    python orca.py --task satellite                     simulated data, tiny body, no network
    python orca.py --task darcy --align mmd             images to a field; another distance
    python orca.py --task mine.npz --device cuda        arrays x_train, y_train, x_test, y_test
    python orca.py --task satellite --rank-sources      which source is near? (slide 31)
    python orca.py --task satellite --paper             real data, roberta-base, published settings
Baselines:
    --align none                                        naive fine-tuning (NFT)
    --align none --freeze layernorm-only                frozen pretrained transformer (FPT)
    --align none --body random:tiny_roberta             from scratch (images: random:tiny_swin)

You should see the distance fall in stage "align", then the error in stage "finetune"; the last
line is the result. Everything is written to runs/orca-TASK-SEED.

Differences from the published code:
 1. OTDD is one problem over all target classes, so that labels act. The released loop has one
    class a call, where they have no influence on the gradient: --align otdd-classwise (O4), here
    with exact transport.
 2. The best epoch is chosen on validation data; the released settings choose it on the test set.
 3. Inputs are standardised per channel, and regression targets per point, by the training set.
 4. The optimiser of the embedded setting is AdamW throughout; --paper takes the published ones.
 5. Predictions for every point come from linear layers on every stage of the body. The release
    averages hidden units in 1D, without a parameter, and three channels of the last stage in 2D.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bodies
import run
import tasks
from mmd import mmd2
from otdd import OTDD, label_distances, wasserstein
from run import Record, Settings, autocast, opt
from tasks import papers

# B batch, C channels, L length or H x W, N patches, D width of the body, K classes
METHOD = "orca"
ALIGN = ("otdd", "otdd-classwise", "otdd-gaussian", "mmd", "l2", "none")
WINDOW = 64  # tokens of a source sample
NARROW = 32  # numbers of a patch from which h^t makes the points of a series


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
    paper: bool = opt(False, "the paper's setting: real data, large bodies, published values")
    # the parts (slides 6 to 8)
    body: str = opt("", "folder or hub name of g; random:NAME: untrained; default: the tiny one")
    source: str = opt("", "source data set; default: the task's", tasks.SOURCES)
    source_size: int = opt(2000, "source samples", low=2)
    patches: int = opt(0, "N at most, 0: 32 for series, 256 (16 x 16) for images", low=0)
    embedder_init: str = opt("body", "what f^t starts from", ("body", "random"))
    coordinates: bool = opt(False, "give f^t the place of each point, as further channels of x")
    # stage 2, alignment of f^t (slide 9)
    align: str = opt("otdd", "distance D to minimise", ALIGN)
    align_features: str = opt("mean", "what D sees of a sample", ("mean", "random-patch"))
    align_epochs: int = opt(20, "epochs of stage 2 (the paper: 60)", low=1)
    align_steps_per_epoch: int = opt(3, "steps in each (the paper: 1)", low=1)
    align_lr: float = opt(0.0, "its learning rate, 0: 1e-3 for series, 1e-4 for images", low=0)
    align_drop: int = opt(0, "epochs after which that falls to a fifth, again and again", low=0)
    align_samples: int = opt(384, "target samples a step, balanced over the classes", low=2)
    rank_sources: bool = opt(False, "only print how far each source is, before and after stage 2")
    # stage 3, fine-tuning (slide 6)
    freeze: str = opt(
        "none",
        "what stage 3 leaves as it is; layernorm-only: all of g but its LayerNorms",
        ("none", "embedder", "body", "both", "layernorm-only"),
    )
    epochs: int = opt(20, "epochs of stage 3", low=1)
    batch_size: int = opt(32, "samples a step, of all processes and parts together", low=1)
    accumulate: int = opt(1, "parts in which a process takes its batch, to save memory", low=1)
    optimizer: str = opt("adamw", "of both stages", ("adamw", "adam", "sgd"))
    lr: float = opt(2e-3, "peak learning rate", low=0)
    weight_decay: float = opt(0.01, "of the optimiser", low=0)
    momentum: float = opt(0.9, "of SGD", low=0)
    beta2: float = opt(0.999, "of AdamW and Adam", low=0)
    warmup: float = opt(0.1, "share of the schedule in which the learning rate rises", (), 0, 1)
    schedule_epochs: int = opt(0, "epochs until it would be 0 again; 0: `epochs`", low=0)
    clip: float = opt(1.0, "largest norm of a gradient; 0: any", low=0)


# What a task changes: here on the embedded data, below in the paper's setting.
EPOCHS = {"cifar100": 12, "spherical": 12, "darcy": 15, "psicov": 40, "cosmic": 10}
EPOCHS |= {"ninapro": 12, "fsd50k": 12, "ecg": 15, "deepsea": 6}
EPOCHS |= dict.fromkeys(tasks.PDES, 30)
EPOCHS |= dict.fromkeys(("darcy_2d", "shallow_water", "diffusion_reaction_2d"), 20)
PATCHES = {"cosmic": 1024, "ecg": 50, "deepsea": 50}
ALIGN_SAMPLES = {"psicov": 96}  # of 57 channels: more would take longer than stage 3
# An image's f^t starts as the body's own embedder: larger steps undo more than they align.
ALIGN_LR = {2: 1e-3, 3: 1e-4}  # by the length of x_shape

BODY = {True: {"body": bodies.ROBERTA_BASE}, False: {"body": bodies.SWIN_BASE}}
PRESETS = {task: row | BODY[task in papers.SERIES] for task, row in papers.ORCA.items()}


def configure(**given) -> Config:
    """Defaults < preset of the task, with paper=True < what is given."""
    task, paper = given.get("task", "satellite"), given.get("paper")
    embedded = {"epochs": EPOCHS.get(task, Config.epochs), "patches": PATCHES.get(task, 0)}
    embedded |= {"align_samples": ALIGN_SAMPLES.get(task, Config.align_samples)}
    if paper and task not in PRESETS:
        raise ValueError(f"--paper has no settings for '{task}'; it has {', '.join(PRESETS)}")
    return Config(**{**(PRESETS[task] if paper else embedded), **given})


def resolve(cfg: Config, task: tasks.Task) -> Config:
    """Body, source and number of patches as they suit the task, where none was asked for."""
    axes = len(task.x_shape)
    parts = {"body": bodies.TINY[axes], "source": task.sources["embedded"]}
    parts["patches"] = bodies.PATCHES[axes]
    return replace(cfg, **{key: getattr(cfg, key) or value for key, value in parts.items()})


# ---- 2. Data -------------------------------------------------------------------------------------


def balanced_rows(labels: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Rows of about `size` samples, as many of each class as of any other, at least 2 of each."""
    per_class = max(2, size // len(labels.unique()))
    order = torch.randperm(len(labels), generator=rng)
    return torch.cat([order[labels[order] == k][:per_class] for k in labels.unique()])


def one_vector(z: Tensor, how: str) -> Tensor:
    """What D sees of each sample: its mean patch, as published, or one of them: -> (B, D)."""
    if how == "mean":
        return z.mean(dim=1)
    return z[torch.arange(len(z)), torch.randint(z.shape[1], (len(z),))]


@torch.no_grad()
def source_features(f_s: nn.Module, source: tasks.Source, device: torch.device, how="mean"):
    """Embedded source samples, one vector each: (n, D). f^s is frozen."""
    return torch.cat([one_vector(f_s(x.to(device)), how) for x in source.x.split(500)])


# ---- 3. Embedder f^t -----------------------------------------------------------------------------


def patch_length(L: int, most: int) -> int:
    """ORCA's rule: the smallest length that divides L and gives at most `most` patches.

    Where that is over twice what is needed (a prime L, say), the series is padded instead.
    """
    need = math.ceil(L / most)
    exact = next(p for p in range(need, L + 1) if L % p == 0)
    return exact if exact <= 2 * need else need


def with_coordinates(x: Tensor) -> Tensor:
    """Where each point is, -1..1 along each axis, as further channels: (B, C, H, W) -> C + 2."""
    axes = [torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.cat([x, places.expand(len(x), *places.shape)], dim=1)


class SeriesEmbedder(nn.Module):
    """f^t: standardise, cut into patches by a convolution, normalise, add positions (slide 8).

    LayerNorm and positions start from the body's own tables, the convolution from random numbers;
    with init "random", all do.
    """

    def __init__(
        self, x_shape: tuple, roberta: nn.Module, patches: int, init="body", coordinates=False
    ):
        super().__init__()
        (C, L), table = x_shape, roberta.embeddings
        self.coordinates, self.patch = coordinates, patch_length(L, patches)
        N, first = math.ceil(L / self.patch), table.padding_idx + 1
        D = table.position_embeddings.embedding_dim
        room = table.position_embeddings.num_embeddings - first
        if N > room:
            raise ValueError(f"--patches: {N} patches exceed the body's {room} positions")
        self.grid = (N,)
        self.register_buffer("mean", torch.zeros(C, 1))
        self.register_buffer("std", torch.ones(C, 1))
        self.conv = nn.Conv1d(C + coordinates, D, kernel_size=self.patch, stride=self.patch)
        nn.init.xavier_uniform_(self.conv.weight, gain=math.sqrt(2))
        self.norm = copy.deepcopy(table.LayerNorm)
        position = table.position_embeddings.weight.detach()[first : first + N]
        self.position = nn.Parameter(position.clone())
        if init == "random":
            self.norm.reset_parameters()
            nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = with_coordinates(x) if self.coordinates else x
        x = F.pad(x, (0, -x.shape[-1] % self.patch))  # zeros are the mean
        z = self.conv(x).transpose(1, 2)  # (B, C, L) -> (B, D, N) -> (B, N, D)
        return self.norm(z) + self.position


class ImageEmbedder(nn.Module):
    """f^t: standardise, resize, cut into patches by a convolution, normalise (slide 8).

    Starts as the body's own patch embedding, its three channels repeated for all C; with init
    "random", from random numbers. A ViT's positions are added; Swin has relative ones, in g.
    """

    def __init__(self, x_shape: tuple, net: nn.Module, patches=0, init="body", coordinates=False):
        super().__init__()
        C, own, self.coordinates = x_shape[0], net.patch_embed, coordinates
        channels = C + 2 * coordinates
        self.size, self.grid = own.img_size, own.grid_size  # pixels and patches, (H, W) each
        self.register_buffer("mean", torch.zeros(C, 1, 1))
        self.register_buffer("std", torch.ones(C, 1, 1))
        self.conv = nn.Conv2d(channels, own.proj.out_channels, own.patch_size, own.patch_size)
        nn.init.xavier_uniform_(self.conv.weight, gain=math.sqrt(2))
        self.norm, self.position = copy.deepcopy(own.norm), None
        if hasattr(net, "pos_embed"):  # of its prefix, the class token, first
            self.position = nn.Parameter(net.pos_embed.detach()[0, -math.prod(self.grid) :].clone())
        if init == "random":
            for start in (self.norm, self.position):
                if isinstance(start, nn.LayerNorm):
                    start.reset_parameters()
                elif isinstance(start, nn.Parameter):
                    nn.init.normal_(start, std=0.02)
        else:
            repeated = own.proj.weight.detach().repeat(1, math.ceil(C / 3), 1, 1)[:, :C]
            self.conv.weight.data = F.pad(repeated, (0, 0, 0, 0, 0, channels - C))
            bias = torch.zeros(len(repeated)) if own.proj.bias is None else own.proj.bias.detach()
            self.conv.bias.data.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = with_coordinates(x) if self.coordinates else x
        x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        z = self.conv(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, D, N) -> (B, N, D)
        return self.norm(z) if self.position is None else self.norm(z) + self.position


def source_embedder(net: nn.Module) -> nn.Module:
    """f^s: the body's own, frozen: token ids (B, L) or images (B, 3, S, S) in 0..1 -> (B, N, D)."""
    if hasattr(net, "embeddings"):
        return net.embeddings.requires_grad_(False).eval()
    f_s = ImageEmbedder((3,), net)
    mean, std = (torch.tensor(net.pretrained_cfg[key]) for key in ("mean", "std"))
    f_s.mean, f_s.std = mean[:, None, None], std[:, None, None]
    return f_s.requires_grad_(False).eval()


# ---- 4. Body g: bodies.adapt(), the layers of the pretrained model -------------------------------


# ---- 5. Predictor h^t ----------------------------------------------------------------------------


class Predictor(nn.Module):
    """h: from the features of g to predictions, in the units of y (slide 8).

    For a sample, (K,): the mean over the last patches, then a linear layer. For every point, (C, L)
    or (C, H, W), all stages of g add up: in 1D to a few numbers of every patch, from all of which
    a linear layer makes all points (a wave may end far from where it was); in 2D each patch gives
    its own points.
    """

    def __init__(self, maps: list, out_shape: tuple):
        super().__init__()
        self.out_shape = tuple(out_shape)
        self.register_buffer("mean", torch.zeros(self.out_shape))
        self.register_buffer("std", torch.ones(self.out_shape))
        if len(out_shape) == 1:
            self.linear = nn.Linear(maps[-1][1], out_shape[0])
        elif len(out_shape) == 2:
            self.narrow = nn.ModuleList(normed_linear(D, NARROW) for _, D in maps)
            self.linear = zeros(nn.Linear(maps[0][0][0] * NARROW, math.prod(out_shape)))
        else:
            fine = maps[0][0][0]  # patches along the first axis in the finest stage
            points = max(math.ceil(p / n) for p, n in zip(out_shape[1:], maps[0][0], strict=True))
            sizes = [(D, points * fine // grid[0]) for grid, D in maps]
            self.tiles = nn.ModuleList(normed_linear(D, out_shape[0] * p * p) for D, p in sizes)
            self.sides = [p for _, p in sizes]
            for tile in self.tiles:
                zeros(tile[1])

    def forward(self, features: list[Tensor]) -> Tensor:
        if len(self.out_shape) == 1:
            out = self.linear(features[-1].flatten(1, -2).mean(dim=1))  # (B, N, D) -> (B, K)
        elif len(self.out_shape) == 2:
            z = sum(narrow(z) for narrow, z in zip(self.narrow, features, strict=True))
            out = self.linear(z.flatten(1)).unflatten(1, self.out_shape)  # (B, N, d) -> (B, C, L)
        else:
            tiles = zip(self.tiles, features, self.sides, strict=True)
            # (B, h, w, D) -> (B, C p p, h, w) -> (B, C, h p, w p)
            out = sum(F.pixel_shuffle(t(z).permute(0, 3, 1, 2), p) for t, z, p in tiles)
            out = F.interpolate(out, self.out_shape[1:], mode="bilinear", antialias=True)
        return self.mean + self.std * out


def normed_linear(D: int, d: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, d))


def zeros(linear: nn.Linear) -> nn.Linear:
    """Its weights set to 0, so that training starts from the mean of y."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Model(nn.Module):
    """m^t = h^t o g o f^t (O1): what is trained, saved and used; x to predictions."""

    def __init__(self, net: nn.Module, x_shape: tuple, out_shape: tuple, patches: int, **embedder):
        super().__init__()
        series = len(x_shape) == 2
        self.f_t = (SeriesEmbedder if series else ImageEmbedder)(x_shape, net, patches, **embedder)
        self.g = bodies.adapt(net, self.f_t.grid)
        self.h_t = Predictor(self.g.maps, out_shape)

    def standardise(self, x_mean: Tensor, x_std: Tensor, y_mean: Tensor, y_std: Tensor) -> None:
        """Take over the statistics of the training set, of tasks.statistics()."""
        self.f_t.mean, self.f_t.std, self.h_t.mean, self.h_t.std = x_mean, x_std, y_mean, y_std

    def forward(self, x: Tensor) -> Tensor:
        return self.h_t(self.g(self.f_t(x)))  # (O1)


# ---- 6. The method -------------------------------------------------------------------------------


def distance_to(
    name: str, z_s: Tensor, y_s: Tensor, share: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """D of (O2): a function of the target's features and labels that knows the source's.

    Args:
        name: "otdd" (features and labels, slide 10), "otdd-gaussian" (labels as Gaussians),
            "otdd-classwise" (as released), "mmd" (features, slide 40), or "l2" (the mean distance
            of random pairs, as ORCA's baseline has it; not a distance of distributions).
        z_s, y_s: source features (n, D) and classes (n,).
        share: of each target class, (K,), adding up to 1; only "otdd-classwise" needs it.
    Returns: a function (z_t (m, D), y_t (m,)) -> scalar, differentiable in z_t.
    """
    if name == "otdd":
        return OTDD(z_s, y_s)
    if name == "otdd-gaussian":
        D = OTDD(z_s, y_s, label_distance="gaussian")
        several = lambda y_t: y_t.bincount()[y_t] > 1  # noqa: E731 (one sample has no covariance)
        return lambda z_t, y_t: D(z_t[several(y_t)], y_t[several(y_t)])
    if name == "otdd-classwise":
        return lambda z_t, y_t: classwise(z_s, y_s, z_t, y_t, share)
    if name == "mmd":
        return lambda z_t, y_t: mmd2(z_s, z_t)

    def l2(z_t: Tensor, y_t: Tensor) -> Tensor:
        pairs = torch.randint(len(z_s), (len(z_t),)).to(z_s.device)
        return (z_t - z_s[pairs]).norm(dim=1).mean()

    return l2


def classwise(z_s: Tensor, y_s: Tensor, z_t: Tensor, y_t: Tensor, share: Tensor) -> Tensor:
    """The released D (O4): OTDD of each target class by itself with all of the source.

    With a single target class c, the label term of d_Z is W(y_i, c): it depends on the source
    sample alone, whose weight in any plan is 1/n. So it adds the same to all plans: pi, and with it
    the gradient, is that of the features, whatever the labels of the source are.
    """
    total = z_t.new_zeros(())
    for c in y_t.unique():
        z_c = z_t[y_t == c]
        with torch.no_grad():  # detached, as released
            const = label_distances(z_s, y_s, z_c, torch.zeros_like(y_t[: len(z_c)]))
            const = const[y_s.unique(return_inverse=True)[1]].mean()
        total = total + share[c] * (wasserstein(z_s, z_c) ** 2 + const)  # (O4)
    return total


def separability(z: Tensor, y: Tensor) -> float:
    """Share of the variance of z (m, D) between the classes: 1 if each is a point; by chance
    (K - 1) / (m - 1)."""
    means = torch.stack([z[y == c].mean(dim=0) for c in y.unique()])
    within = (z - means[y.unique(return_inverse=True)[1]]).square().sum()
    return float(1 - within / (z - z.mean(dim=0)).square().sum().clamp(min=1e-30))


def freeze(model: Model, what: str) -> None:
    """Fix the weights that stage 3 is to leave as they are (slide 17)."""
    if what in ("embedder", "both"):
        model.f_t.requires_grad_(False)
    if what in ("body", "both", "layernorm-only"):
        model.g.requires_grad_(False)
    if what == "layernorm-only":
        for module in model.g.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)


# ---- 7. Training ---------------------------------------------------------------------------------


def align(
    model: Model, z_s: Tensor, y_s: Tensor, task: tasks.Task, cfg: Config, record: Record
) -> None:
    """Stage 2 (O2): train f^t alone so that its features come close to the source's.

    Args:
        z_s, y_s: source features (n, D) and classes (n,), on the device of the model.
        task: the target; without classes it lends those that k-means makes of y.
    """
    rng = torch.Generator().manual_seed(cfg.seed)
    pool, labels = tasks.some_classes(task, cfg.seed)
    D = distance_to(cfg.align, z_s, y_s, labels.bincount() / len(labels))
    optimizer = run.optimizer_of(model.f_t.parameters(), cfg, cfg.align_lr, weight_decay=0.0)
    drop = torch.optim.lr_scheduler.StepLR(optimizer, cfg.align_drop or cfg.align_epochs, gamma=0.2)
    changing = {"f_t": model.f_t, "optimizer": optimizer, "drop": drop, "rng": rng}
    for epoch in record.begin("align", cfg.align_epochs, **changing):
        sums = torch.zeros(3)
        for _ in range(cfg.align_steps_per_epoch):
            rows = balanced_rows(labels, cfg.align_samples, rng)
            z_t = embedded(model.f_t, task, [pool[row] for row in rows.tolist()], cfg)
            y_t = labels[rows].to(z_s.device)
            run.finite(float(z_t.detach().sum()), "embedded target", epoch, cfg.align_lr)
            loss = D(z_t, y_t)  # (O2)
            optimizer.zero_grad()
            run.finite(loss.item(), "distance", epoch, cfg.align_lr)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.f_t.parameters(), math.inf)
            run.finite(norm.item(), "gradient norm", epoch, cfg.align_lr)
            optimizer.step()
            sums += torch.tensor([loss.item(), norm.item(), separability(z_t.detach(), y_t)])
        drop.step()
        names = ("distance", "grad_norm", "separability")
        values = dict(zip(names, (sums / cfg.align_steps_per_epoch).tolist(), strict=True))
        record.log(epoch + 1, cfg.align_epochs, "align", **values)
        record.end_epoch()
    run.synchronise(model.f_t)


def embedded(f_t: nn.Module, task: tasks.Task, rows: list[int], cfg: Config) -> Tensor:
    """What D sees of the given training samples: (m, D)."""
    x_t = torch.stack([task.train[row][0] for row in rows])
    return one_vector(f_t(x_t.to(next(f_t.parameters()).device)), cfg.align_features)


def finetune(model: Model, task: tasks.Task, cfg: Config, record: Record) -> float:
    """Stage 3 (O3): fine-tune all that is not frozen; the record keeps the best epoch's weights.

    Returns: the error of that epoch on validation data.
    """
    device = next(model.parameters()).device
    freeze(model, cfg.freeze)
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
                    part = weight * task.loss(model(x), y)  # (O3)
                scaler.scale(part).backward()
                loss += part.item()
            loss, norm = run.update(trained, optimizer, schedule, scaler, loss, cfg.clip)
            record.step(schedule.last_epoch - 1, lr, loss, norm)
            record.add(loss=loss / len(loader), norm=norm / len(loader))
        error = evaluate(model, "val", task, cfg)
        means = {"train_loss": record.sums["loss"], "grad_norm": record.sums["norm"]}
        record.log(epoch + 1, cfg.epochs, "finetune", lr=lr, **means, val_error=error)
        record.end_epoch(error, model)
    return record.best


# ---- 8. Evaluation -------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, split: str, task: tasks.Task, cfg: Config) -> float:
    """The task's error on all predictions for a split at once."""
    dataset, device = getattr(task, split), next(model.parameters()).device
    model.eval()
    out, labels = [], []
    for x, y in run.split(dataset):
        with autocast(device, cfg.precision):
            out.append(model(x.to(device)).float().cpu())
        labels.append(y)
    out, labels = (run.whole(torch.cat(part), len(dataset)) for part in (out, labels))
    return task.metric(*tasks.pooled(dataset, out, labels))


# ---- 9. Main -------------------------------------------------------------------------------------


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
    if cfg.rank_sources:
        return {"sources": rank_sources(cfg)}
    start = time.time()
    cfg, task, net, tokenize, model, shape = build(cfg)  # stage 1 (O1)
    device = next(model.parameters()).device
    if cfg.align != "none":
        source = load_source(cfg.source, cfg, tokenize)
    out = run.open_run(cfg, METHOD)
    record = Record(out, cfg, METHOD, start)
    if record.result:
        return record.result
    run.describe(cfg, METHOD, task, model, out, {**shape, "body": bodies.describe(net)})

    if cfg.align != "none":  # stage 2 (O2)
        z_s = source_features(source_embedder(net).to(device), source, device, cfg.align_features)
        align(model, z_s, source.y.to(device), task, cfg, record)
    val_error = finetune(model, task, cfg, record)  # stage 3 (O3)
    run.load_weights(model, out / "model.safetensors")
    errors = {"test_error": evaluate(model, "test", task, cfg), "val_error": val_error}
    used = cfg.source if cfg.align != "none" else "none"
    return run.finish(cfg, METHOD, task, model, record, errors, used)


def build(cfg: Config) -> tuple:
    """Stage 1 (O1): cfg without gaps, task, body, its tokenizer, model, and what load() needs."""
    device = run.start(cfg)
    which = (cfg.task, cfg.data, cfg.data_dir, cfg.seed, cfg.train_size or None, cfg.published)
    task = tasks.load_task(*which)
    cfg = resolve(cfg, task)
    cfg = replace(cfg, align_lr=cfg.align_lr or ALIGN_LR[len(task.x_shape)])
    net, tokenize = bodies.load_body(cfg.body, task.x_shape, cfg.patches)
    shape = {"x_shape": task.x_shape, "out_shape": task.out_shape, "patches": cfg.patches}
    shape |= {"coordinates": cfg.coordinates}
    model = Model(net, **shape, init=cfg.embedder_init)
    model.standardise(*tasks.statistics(task))
    model.g.recompute = cfg.recompute
    if cfg.compile:
        model.g.compile()
    return cfg, task, net, tokenize, model.to(device), shape


def load_source(name: str, cfg: Config, tokenize: Callable | None) -> tasks.Source:
    """Samples of a source, of the size that suits the body."""
    size = {"length": WINDOW, "size": 4 * math.isqrt(cfg.patches)}
    rest = (cfg.source_size, cfg.seed, cfg.data_dir)
    return tasks.load_source(name, *rest, tokenize=tokenize, **size)


def rank_sources(cfg: Config) -> list[dict]:
    """How far every source is from the embedded target, before and after stage 2 with OTDD.

    "Determining the most suitable proxy remains a challenge" (slide 31). Sources whose files are
    not there are left out, not downloaded, and it is said. Returns and prints a row for each, the
    nearest first.
    """
    cfg, task, net, tokenize, model, _ = build(replace(cfg, align="otdd"))
    f_s, device = source_embedder(net), next(model.parameters()).device
    pool, labels = tasks.some_classes(task, cfg.seed)
    held = balanced_rows(labels, 4 * cfg.align_samples, torch.Generator().manual_seed(cfg.seed + 1))
    rows = []
    for name in tasks.IMAGES if tokenize is None else tasks.TEXTS:
        start, copied = time.time(), copy.deepcopy(model)
        try:
            with tasks.download.off():
                source = load_source(name, cfg, tokenize)
        except (ValueError, OSError) as error:
            print(f"{name}: left out: {error}")
            continue
        z_s = source_features(f_s.to(device), source, device, cfg.align_features)
        y_s, row = source.y.to(device), {"source": name}
        for when in ("before", "after"):
            with torch.no_grad():
                z_t = embedded(copied.f_t, task, [pool[i] for i in held.tolist()], cfg)
            row[f"otdd_{when}"] = float(distance_to("otdd", z_s, y_s)(z_t, labels[held].to(device)))
            row[f"mmd_{when}"] = float(mmd2(z_s, z_t).clamp(min=0).sqrt())
            if when == "before":
                align(copied, z_s, y_s, task, cfg, Record(None))
        rows.append({**row, "time_s": round(time.time() - start, 1)})
    rows.sort(key=lambda row: row["otdd_after"])
    for place, row in enumerate(rows, 1):
        shown = " ".join(f"{key}={run.number(value)}" for key, value in row.items())
        print(f"rank {place}", shown, flush=True)
    return rows


def parse_args(argv: list[str] | None = None) -> Config:
    return run.parse(Config, configure, __doc__, argv)


def cli(argv: list[str] | None = None) -> int:
    return run.cli(METHOD, parse_args, main, argv)


if __name__ == "__main__":
    sys.exit(cli())

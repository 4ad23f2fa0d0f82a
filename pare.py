#!/usr/bin/env python
r"""PaRe: patch replacement. Fine-tune through a modality halfway between source and target.

As in ORCA, a target model m^t = h^t o g o f^t is put together from a new embedder, a pretrained
body and a new predictor. While it is fine-tuned, a gate scores the patches of source and target,
and the k least important target patches make way for the k most important source patches. The
mixture has to be recognised as both. k falls from k0 to 0 over the epochs, so that the body moves
from what it knows to what it is to learn.

    (P1)  s = sigmoid(F_C(z)), a score for every patch of z^s and z^t            slide 25
    (P2)  k = k_end + (k0 - k_end) (1 - e/E), epochs e = 0..E, k_end = 0         slide 26
    (P3)  z^m: z^t with its k lowest-scored patches replaced by the k            slide 26
          highest-scored patches of z^s, the others kept where they are
    (P4)  lambda = k / k0                                                        slide 27
    (P5)  L_mix = (1 - lambda) L_tar(p^mt, y^t) + lambda L_src(p^ms, y^s),       slide 27
          p^mt = h^t(g(z^m)), p^ms = h^s(g(z^m))
    (P6)  L = L_tar(m^t(x^t), y^t) + w L_mix                                     published code

Source: Cai et al., Enhancing Cross-Modal Fine-Tuning with Gradually Intermediate Modality
Generation, ICML 2024 (arXiv 2406.09003).

    python pare.py --task satellite                     simulated data, tiny body, no network
    python pare.py --task satellite --k0 0              without replacement: plain fine-tuning
    python pare.py --task cosmic                        images with a mask to predict
    python pare.py --task satellite --align otdd        after ORCA's alignment of f^t
    python pare.py --task mine.npz --device cuda        arrays x_train, y_train, x_test, y_test
    python pare.py --task satellite --paper             real data, roberta-base, published settings
Baselines are settings of orca.py, from which --align is imported; f^t and h^t are repeated here.

You should see k and lambda fall to 0 while the error falls; the last line is the result. Everything
is written to runs/pare-TASK-SEED. Gate, f^s and h^s are needed for training alone: the saved model
is m^t.

Differences from the published code:
 1. The k lowest-scored target patches are replaced, as the paper says; after its first epochs the
    released code replaces the highest-scored (--replace highest).
 2. The gate has a gradient in every epoch (straight-through); the released one stops learning
    after a few epochs. Its first epochs sample with noise that drowns the scores; --select gumbel
    samples with noise of their spread.
 3. lambda = k/k0 as on the slide; --lam k/N gives the released code's share of source patches.
 4. k ends at 0 in the last epoch, which trains on the target alone.
 5. The best epoch is chosen on validation data; the released code has no selection.
 6. Inputs are standardised per channel, and regression targets per point, by the training set.
 7. The released 1D script crashes; here series and images, classes and fields take one path.
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
from orca import ALIGN, ALIGN_LR, align, source_features
from run import Record, Settings, autocast, opt
from tasks import papers

# B batch, C channels, L length or H x W, N patches, D width of the body, K classes
METHOD = "pare"
GATES = ("shared", "separate", "random", "none")
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
    # alignment of f^t beforehand, as in orca.py (slide 9)
    align: str = opt("none", "distance D to minimise", ALIGN)
    align_features: str = opt("mean", "what D sees of a sample", ("mean", "random-patch"))
    align_epochs: int = opt(20, "epochs of it", low=1)
    align_steps_per_epoch: int = opt(3, "steps in each", low=1)
    align_lr: float = opt(0.0, "its learning rate, 0: 1e-3 for series, 1e-4 for images", low=0)
    align_drop: int = opt(0, "epochs after which that falls to a fifth, again and again", low=0)
    align_samples: int = opt(384, "target samples a step, balanced over the classes", low=2)
    # patch replacement (slides 25 to 27)
    gate: str = opt("shared", "F_C: one for both, two; random or no scores", GATES)
    select: str = opt("top", "the k best, or sampled by their scores", ("top", "gumbel"))
    replace: str = opt("lowest", "which target patches make way", ("lowest", "highest"))
    k0: int = opt(-1, "patches replaced in the first epoch; 0: none; -1: 70 % of them", low=-1)
    k_end: int = opt(0, "and in the last", low=0)
    k_by: str = opt("epoch", "how often k changes", ("epoch", "step"))
    lam: str = opt("k/k0", "weight lambda of the source's loss in L_mix", ("k/k0", "k/N"))
    mix_weight: float = opt(0.3, "weight w of L_mix beside the plain target loss", low=0)
    plain_target_loss: str = opt("on", "off: L_mix alone, as slide 27 has it", ("on", "off"))
    source_labels: str = opt("on", "off: L_mix without L_src", ("on", "off"))
    # fine-tuning (slide 6)
    epochs: int = opt(15, "epochs", low=1)
    batch_size: int = opt(32, "samples a step, of all processes and parts together", low=1)
    accumulate: int = opt(1, "parts in which a process takes its batch, to save memory", low=1)
    optimizer: str = opt("adamw", "of all stages", ("adamw", "adam", "sgd"))
    lr: float = opt(2e-3, "peak learning rate", low=0)
    weight_decay: float = opt(0.01, "of the optimiser", low=0)
    momentum: float = opt(0.9, "of SGD", low=0)
    beta2: float = opt(0.999, "of AdamW and Adam", low=0)
    warmup: float = opt(0.1, "share of the schedule in which the learning rate rises", (), 0, 1)
    schedule_epochs: int = opt(0, "epochs until it would be 0 again; 0: `epochs`", low=0)
    clip: float = opt(1.0, "largest norm of a gradient; 0: any", low=0)


# What a task changes: here on the embedded data, below in the paper's setting.
EPOCHS = {"cifar100": 8, "spherical": 8, "darcy": 10, "psicov": 27, "cosmic": 7}
EPOCHS |= {"ninapro": 8, "fsd50k": 8, "ecg": 10, "deepsea": 4}
EPOCHS |= dict.fromkeys(tasks.PDES, 20)
EPOCHS |= dict.fromkeys(("darcy_2d", "shallow_water", "diffusion_reaction_2d"), 13)
PATCHES = {"cosmic": 1024, "ecg": 50, "deepsea": 50}
ALIGN_SAMPLES = {"psicov": 96}

# The published settings: ORCA's but for these. k0, k_end and w are the source's share in training.
BODY = {True: {"body": bodies.ROBERTA_BASE}, False: {"body": bodies.SWIN_BASE}}
CLASSES = {"k0": 2000, "k_end": 525, "mix_weight": 1.0}  # images with classes or labels
FIELDS = {"k0": 1000, "k_end": 505, "mix_weight": 0.3}  # images with dense targets
FIELDS |= {"source": "voc", "source_size": 1464}  # all images of its training set that have masks
TEXT = {"k0": 32, "k_end": 0, "mix_weight": 0.1}  # series
PARE = {
    "cifar100": CLASSES,
    "spherical": CLASSES | {"source": "tiny_imagenet", "accumulate": 8},
    "darcy": FIELDS,
    "psicov": FIELDS,  # k0 and k_end were not published
    "cosmic": FIELDS | {"k0": 500, "k_end": 8},
    "ninapro": CLASSES
    | {"accumulate": 2, "weight_decay": 1e-5 / 2, "clip": 0.5},  # of a sum of two
    "fsd50k": CLASSES | {"lr": 3e-5, "k_end": 515},
    "ecg": TEXT
    | {"optimizer": "adamw", "lr": 3e-5, "weight_decay": 0.1, "accumulate": 1, "k_end": 2},
    "satellite": TEXT | {"accumulate": 1},
    "deepsea": TEXT | {"epochs": 25, "k_end": 1},
    # PaRe's settings for PDEs were not published: those of the same kind of task
    **dict.fromkeys(("advection", "burgers", "diffusion_reaction_1d", "navier_stokes_1d"), TEXT),
    "diffusion_sorption": TEXT | {"k0": 22},  # of 32 patches
    **dict.fromkeys(("darcy_2d", "shallow_water", "diffusion_reaction_2d"), FIELDS),
}
PRESETS = {
    task: row | BODY[task in papers.SERIES] | {"lam": "k/N"} | PARE[task]
    for task, row in papers.ORCA.items()
}


# Copied from orca.configure
def configure(**given) -> Config:
    """Defaults < preset of the task, with paper=True < what is given."""
    task, paper = given.get("task", "satellite"), given.get("paper")
    embedded = {"epochs": EPOCHS.get(task, Config.epochs), "patches": PATCHES.get(task, 0)}
    embedded |= {"align_samples": ALIGN_SAMPLES.get(task, Config.align_samples)}
    if paper and task not in PRESETS:
        raise ValueError(f"--paper has no settings for '{task}'; it has {', '.join(PRESETS)}")
    return Config(**{**(PRESETS[task] if paper else embedded), **given})


# Copied from orca.resolve
def resolve(cfg: Config, task: tasks.Task) -> Config:
    """Body, source and number of patches as they suit the task, where none was asked for."""
    axes = len(task.x_shape)
    parts = {"body": bodies.TINY[axes], "source": task.sources["embedded"]}
    parts["patches"] = bodies.PATCHES[axes]
    return replace(cfg, **{key: getattr(cfg, key) or value for key, value in parts.items()})


# ---- 2. Data: tasks.load_task(), and load_source() below -----------------------------------------


# ---- 3. Embedder f^t -----------------------------------------------------------------------------


# Copied from orca.patch_length
def patch_length(L: int, most: int) -> int:
    """ORCA's rule: the smallest length that divides L and gives at most `most` patches.

    Where that is over twice what is needed (a prime L, say), the series is padded instead.
    """
    need = math.ceil(L / most)
    exact = next(p for p in range(need, L + 1) if L % p == 0)
    return exact if exact <= 2 * need else need


# Copied from orca.with_coordinates
def with_coordinates(x: Tensor) -> Tensor:
    """Where each point is, -1..1 along each axis, as further channels: (B, C, H, W) -> C + 2."""
    axes = [torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.cat([x, places.expand(len(x), *places.shape)], dim=1)


# Copied from orca.SeriesEmbedder
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


# Copied from orca.ImageEmbedder
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


# Copied from orca.source_embedder
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


# Copied from orca.Predictor
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


# Copied from orca.normed_linear
def normed_linear(D: int, d: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, d))


# Copied from orca.zeros
def zeros(linear: nn.Linear) -> nn.Linear:
    """Its weights set to 0, so that training starts from the mean of y."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


# Copied from orca.Model
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


class Gate(nn.Module):
    """F_C: a score for each patch, (B, N, D) -> (B, N) in (0, 1) (P1).

    kind: "shared": one F_C for source and target, as published; "separate": one each; "random":
        scores that mean nothing; "none": no scores at all, the last target patches make way for
        the first source patches. The last two are what a gate has to be better than.
    """

    def __init__(self, D: int, kind: str = "shared"):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(D, 1)
        self.linear_s = nn.Linear(D, 1) if kind == "separate" else self.linear

    def forward(self, z: Tensor, source: bool = False) -> Tensor:
        if self.kind == "random":
            return torch.rand(z.shape[:2], device=z.device)
        if self.kind == "none":
            N = z.shape[1]
            return torch.linspace(1, 0, N + 2, device=z.device)[1:-1].expand(len(z), N)
        linear = self.linear_s if source else self.linear
        return torch.sigmoid(linear(z)).squeeze(-1)  # (P1)


def patches_to_replace(k0: int, epoch: int, epochs: int, k_end: int = 0) -> int:
    """k of an epoch (P2): k0 in the first, falling linearly, k_end in the last.

    Args:
        epoch, epochs: epochs are numbered 0..epochs - 1, so slide 26's total E is epochs - 1. Or
            steps, likewise.
    Source: slide 26, whose denominator is cut off; read as the number of the last epoch.
    """
    return round(k_end + (k0 - k_end) * (1 - epoch / max(1, epochs - 1)))  # (P2)


def first_k(cfg: Config, N: int) -> int:
    """k0 for N patches: what is asked for, or 70 % of them (as the paper's 32 of 46)."""
    if cfg.k0 > N:
        raise ValueError(
            f"--k0 {cfg.k0} exceeds the {N} patches of task '{cfg.task}'; choose 0..{N}"
        )
    k0 = cfg.k0 if cfg.k0 >= 0 else round(0.7 * N)
    if cfg.k_end > k0:
        raise ValueError(f"--k-end {cfg.k_end} exceeds k0 = {k0}; choose 0..{k0}")
    return k0


def straight_through(s: Tensor) -> Tensor:
    """Exactly 1, with the gradient of s: top-k has no gradient, so the gate learns through this."""
    return 1 + (s - s.detach())


def sampled(s: Tensor) -> Tensor:
    """Scores with Gumbel noise of their own spread: their top k is a sample without replacement.

    Source: Kool et al. 2019, Stochastic beams. Differs from the release, whose noise has a spread
    of 1.28 whatever that of the scores is, so that its choice is nearly random.
    """
    noise = -torch.log(-torch.log(torch.rand_like(s).clamp(1e-7, 1 - 1e-7)))
    return s.detach() + s.detach().std(dim=1, keepdim=True) * noise


def replace_patches(
    z_t: Tensor, z_s: Tensor, s_t: Tensor, s_s: Tensor, k: int, select="top", lowest=True
) -> Tensor:
    """Replace the k lowest-scored target patches by the k highest-scored source patches (P3).

    Args:
        z_t, z_s: patch embeddings, (B, N, D) and (B, N_s, D).
        s_t, s_s: their scores, (B, N) and (B, N_s).
        k: how many, 0 <= k <= min(N, N_s).
        select: "top", or "gumbel" to sample by the scores; lowest: False to replace the highest.
    Returns: z_mix, (B, N, D), a new tensor. The best source patch takes the place of the worst
        target patch, and so on; all other patches stay where they are. In value a copy of the
        patches, in gradient weighted by their scores.
    Raises: ValueError if there are not k patches on both sides.
    Source: PaRe; slide 26. Differs from the release, which replaces the highest-scored.
    """
    (B, N, D), N_s = z_t.shape, z_s.shape[1]
    if not 0 <= k <= min(N, N_s):
        raise ValueError(f"k={k} patches cannot be replaced: target has {N}, source has {N_s}")
    rank_t, rank_s = (sampled(s_t), sampled(s_s)) if select == "gumbel" else (s_t, s_s)
    worst = rank_t.topk(k, dim=1, largest=not lowest).indices  # (B, k)
    best = rank_s.topk(k, dim=1).indices  # (B, k)
    first = torch.arange(B, device=z_t.device)[:, None]  # whole rows are faster than gather's items
    from_s, to_t = (best + N_s * first).flatten(), (worst + N * first).flatten()
    taken = z_s.flatten(0, 1).index_select(0, from_s)  # (B, N_s, D) -> (B k, D)
    taken = taken * straight_through(s_s.gather(1, best)).view(-1, 1)
    kept = z_t * straight_through(s_t).unsqueeze(-1)
    return kept.flatten(0, 1).index_copy(0, to_t, taken).view(B, N, D)  # (P3)


def mixing_weight(kind: str, k: int, k0: int, N: int) -> float:
    """lambda (P4): "k/k0" as on slide 27, or "k/N", the share of source patches in the mixture."""
    return k / max(1, k0 if kind == "k/k0" else N)  # (P4)


class Mixer(nn.Module):
    """What training adds to the target model: the gate, and the source's f^s, data and h^s."""

    def __init__(self, f_s: nn.Module, source: tasks.Source, maps: list, seed: int, gate="shared"):
        super().__init__()
        self.f_s, self.source = f_s.requires_grad_(False).eval(), source
        self.gate = Gate(maps[0][1], gate)
        self.h_s = Predictor(maps, source.out_shape)
        self.rng = torch.Generator().manual_seed(seed)

    def draw(self, size: int) -> Tensor:
        """Source samples to go with this process' share of a batch, of `size` target samples."""
        size = int(run.summed(torch.tensor(size)))
        return run.share(torch.randint(len(self.source.y), (size,), generator=self.rng))

    def loss(
        self,
        model: Model,
        task: tasks.Task,
        x_t: Tensor,
        y_t: Tensor,
        k: int,
        cfg: Config,
        rows=None,
    ) -> Tensor:
        """The loss of a batch (P6). One pass of the body takes [target; mixture] together.

        Args:
            x_t, y_t: target batch and its labels, on the device of the model.
            k: patches to replace; with 0 the mixture is the target itself, and the loss plain.
            rows: source samples to take, of draw(); None: drawn here.
        """
        z_t = model.f_t(x_t)  # (B, N, D)
        if k == 0:
            return task.loss(model.h_t(model.g(z_t)), y_t)
        rows = self.draw(len(x_t)) if rows is None else rows[: len(x_t)]
        x_s, y_s = self.source.x[rows].to(x_t.device), self.source.y[rows].to(x_t.device)
        z_s = self.f_s(x_s)  # (B, N_s, D)
        scores = self.gate(z_t), self.gate(z_s, source=True)
        z_mix = replace_patches(z_t, z_s, *scores, k, cfg.select, cfg.replace == "lowest")
        plain = cfg.plain_target_loss == "on"
        stages = model.g(torch.cat([z_t, z_mix]) if plain else z_mix)  # 2B samples, or B
        mixed = [z[-len(z_mix) :] for z in stages]
        lam = mixing_weight(cfg.lam, k, cfg.k0, z_t.shape[1])
        mix = (1 - lam) * task.loss(model.h_t(mixed), y_t)
        if cfg.source_labels == "on":
            mix = mix + lam * self.source.loss(self.h_s(mixed), y_s)  # (P5)
        loss = cfg.mix_weight * mix
        if plain:
            loss = loss + task.loss(model.h_t([z[: len(z_mix)] for z in stages]), y_t)
        return loss  # (P6)


# ---- 7. Training ---------------------------------------------------------------------------------


# Adapted from orca.finetune: the loss of the mixture, with k by the epoch; nothing is frozen
def finetune(model: Model, mixer: Mixer, task: tasks.Task, cfg: Config, record: Record) -> float:
    """Fine-tune everything on the loss (P6), with k falling from epoch to epoch (P2).

    Returns: the error of the best epoch on validation data; the record keeps its weights.
    """
    device = next(model.parameters()).device
    trained = [p for p in (*model.parameters(), *mixer.parameters()) if p.requires_grad]
    optimizer = run.optimizer_of(trained, cfg, cfg.lr, cfg.weight_decay)
    loader = run.batches(task.train, cfg, cfg.seed)
    steps = (cfg.schedule_epochs or cfg.epochs) * len(loader)
    factor = lambda step: run.rate(step, steps, cfg.warmup)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    changing = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    changing |= {"gate": mixer.gate, "h_s": mixer.h_s, "draws": mixer.rng}
    for epoch in record.begin("finetune", cfg.epochs, **changing):
        k = patches_to_replace(cfg.k0, epoch, cfg.epochs, cfg.k_end)
        model.train()
        for batch in record.batches(loader):
            lr, loss = schedule.get_last_lr()[0], 0.0
            if cfg.k_by == "step":
                total = cfg.epochs * len(loader)
                k = patches_to_replace(cfg.k0, schedule.last_epoch, total, cfg.k_end)
            optimizer.zero_grad()
            rows = mixer.draw(len(batch[0]) if batch else 0) if k else None
            for x, y, weight in run.parts(batch, cfg.accumulate, device):
                with autocast(device, cfg.precision):
                    part = weight * mixer.loss(model, task, x, y, k, cfg, rows)
                rows = rows[len(x) :] if k else None
                scaler.scale(part).backward()
                loss += part.item()
            loss, norm = run.update(trained, optimizer, schedule, scaler, loss, cfg.clip)
            record.step(schedule.last_epoch - 1, lr, loss, norm)
            record.add(loss=loss / len(loader), norm=norm / len(loader))
        error = evaluate(model, "val", task, cfg)
        means = {"train_loss": record.sums["loss"], "grad_norm": record.sums["norm"]}
        lam = mixing_weight(cfg.lam, k, cfg.k0, math.prod(model.f_t.grid))
        shown = {"k": k, "lam": lam, "lr": lr, **means, "val_error": error}
        record.log(epoch + 1, cfg.epochs, "finetune", **shown)
        record.end_epoch(error, model)
    return record.best


# ---- 8. Evaluation -------------------------------------------------------------------------------


# Copied from orca.evaluate
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
    device, f_s = next(model.parameters()).device, source_embedder(net)
    cfg = replace(cfg, k0=first_k(cfg, N=math.prod(model.f_t.grid)))
    source = load_source(cfg, tokenize, masks=len(task.out_shape) == 3)
    mixer = Mixer(f_s, source, model.g.maps, cfg.seed, cfg.gate).to(device)
    out = run.open_run(cfg, METHOD)
    record = Record(out, cfg, METHOD, start)
    if record.result:
        return record.result
    run.describe(cfg, METHOD, task, model, out, {**shape, "body": bodies.describe(net)})

    if cfg.align != "none":
        classes = load_source(cfg, tokenize, masks=False)
        z_s = source_features(f_s, classes, device, cfg.align_features)
        align(model, z_s, classes.y.to(device), task, cfg, record)
    val_error = finetune(model, mixer, task, cfg, record)
    run.load_weights(model, out / "model.safetensors")
    errors = {"test_error": evaluate(model, "test", task, cfg), "val_error": val_error}
    return run.finish(cfg, METHOD, task, model, record, errors, cfg.source)


# Copied from orca.build
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


# Adapted from orca.load_source: of masks for images with a dense target, and k0 tokens at least
def load_source(cfg: Config, tokenize: Callable | None, masks: bool) -> tasks.Source:
    """Samples of the source, of the size that suits the body, with classes or masks."""
    size = {"length": max(WINDOW, cfg.k0), "size": 4 * math.isqrt(cfg.patches), "masks": masks}
    rest = (cfg.source_size, cfg.seed, cfg.data_dir)
    return tasks.load_source(cfg.source, *rest, tokenize=tokenize, **size)


# Copied from orca.parse_args
def parse_args(argv: list[str] | None = None) -> Config:
    return run.parse(Config, configure, __doc__, argv)


# Copied from orca.cli
def cli(argv: list[str] | None = None) -> int:
    return run.cli(METHOD, parse_args, main, argv)


if __name__ == "__main__":
    sys.exit(cli())

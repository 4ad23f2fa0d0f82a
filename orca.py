#!/usr/bin/env python
r"""ORCA: align, then refine. Carry a pretrained transformer over to data it has never seen.

A target model is put together from a new embedder f^t, a pretrained body g and a new predictor
h^t. First the embedder alone is trained, until embedded target data resemble embedded source data,
which the body knows. Then everything is fine-tuned.

    (O1)  m^t = h^t o g o f^t                                           slides 6-8, stage 1
    (O2)  min over f^t of D( P(f^t(x^t), y^t) || P(f^s(x^s), y^s) )     slide 9, stage 2
          D is OTDD (otdd.py, slide 10), MMD (mmd.py, slide 40) or L2, each of a sample's mean patch
    (O3)  min over f^t, g and h^t of the mean of L(m^t(x^t), y^t)       slide 6, stage 3
    (O4)  D = sum_c n_c / n [ W_2^2(f^t(x^t | y^t = c), f^s(x^s)) + const ]     the released D

Source: Shen et al., Cross-Modal Fine-Tuning: Align then Refine, ICML 2023 (arXiv 2302.05738).

    python orca.py --task satellite                     simulated data, tiny body, no network
    python orca.py --task darcy --align mmd             images to a field; another distance
    python orca.py --task mine.npz --device cuda        arrays x_train, y_train, x_test, y_test
    python orca.py --task satellite --epochs 0          stages 1 and 2 only; f^t for pare.py --f-t
    python orca.py --task satellite --paper             real data, roberta-base, published settings
Baselines:
    --align none                                        naive fine-tuning (NFT)
    --align none --freeze layernorm-only                frozen pretrained transformer (FPT)
    --align none --body random:tiny_roberta             from scratch (images: random:tiny_swin)

You should see the distance fall in stage "align", then the error in stage "finetune". The last line
is the result; everything is written to runs/orca-TASK-SEED.

Differences from the published code:
 1. OTDD is one problem over all target classes, so that labels act. The released loop solves one
    per class, where they have no influence on the gradient: --align otdd-classwise (O4).
 2. A step of stage 2 sees equally many samples of each class: P(y^t) in (O2) is made uniform.
 3. MMD is the unbiased estimate over all samples; the release's is biased, and class by class.
 4. The best epoch is chosen on validation data; the released settings choose it on the test set.
 5. Inputs are standardised per channel, and regression targets per point, by the training set.
 6. Fields come from linear layers on every stage of the body. In the release, 1D fields are means
    of hidden units, without a parameter, and 2D fields see three channels of the last stage.
"""

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
from run import Record, Settings, opt
from tasks import balanced_rows, papers
from tasks.metrics import separability

# B batch, C channels, L length or H x W, N patches, D width of the body, K classes
METHOD = "orca"
ALIGN = ("otdd", "otdd-classwise", "otdd-gaussian", "mmd", "l2", "none")
FREEZE = ("none", "embedder", "body", "both", "layernorm-only")
WINDOW = 64  # tokens of a source sample
NARROW = 32  # numbers of a patch from which, all patches together, h^t makes points


# ---- 1. Configuration ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Settings):
    """The settings of ORCA, beside those that all methods share (run.Settings)."""

    # stage 2, alignment of f^t (slide 9)
    align: str = opt("otdd", "distance D that stage 2 minimises", ALIGN)
    align_epochs: int = opt(20, "epochs of stage 2 (the paper: 60)", low=1)
    align_steps_per_epoch: int = opt(3, "steps in each of these epochs (the paper: 1)", low=1)
    align_lr: float = opt(1e-4, "learning rate of stage 2", low=0)
    align_drop: int = opt(0, "epochs between two divisions of that rate by 5; 0: never", low=0)
    align_samples: int = opt(0, "target samples in a step of stage 2; 0: 384", low=0)
    # stage 3, fine-tuning (slides 6 and 17)
    freeze: str = opt("none", "part that stage 3 leaves as it is", FREEZE)


def configure(**given) -> Config:
    """The settings: defaults, then the papers' values with paper=True, then what is given."""
    return run.configure(Config, papers.ORCA, given)


# ---- 2. Data: run.load_parts() and run.load_source(), which ask tasks/ ---------------------------
# ---- 3. Embedder f^t -----------------------------------------------------------------------------


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


def source_embedder(net: nn.Module) -> nn.Module:
    """f^s: the body's own, frozen: token ids (B, L) or images (B, 3, S, S) in 0..1 -> (B, N, D)."""
    if hasattr(net, "embeddings"):
        return net.embeddings.requires_grad_(False).eval()
    f_s = ImageEmbedder(net, (3,))
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
    its own points, and the last stage adds a coarse picture, made from all patches as in 1D.
    """

    def __init__(self, maps: list, out_shape: tuple):
        super().__init__()
        self.out_shape, (C, *size) = tuple(out_shape), out_shape
        self.register_buffer("mean", torch.zeros(self.out_shape))
        self.register_buffer("std", torch.ones(self.out_shape))
        (fine, _), (grid, D) = maps[0], maps[-1]  # first, last stage: patches per axis, width
        if not size:
            self.linear = nn.Linear(D, C)
        elif len(size) == 1:
            self.narrow = nn.ModuleList(bodies.normed_linear(D, NARROW) for _, D in maps)
            self.linear = bodies.zeros(nn.Linear(math.prod(grid) * NARROW, C * size[0]))
        else:
            self.sides = bodies.tile_sides(maps, size)  # a patch of the stage gives p x p points
            stages = zip(maps, self.sides, strict=True)
            self.tiles = nn.ModuleList(bodies.normed_linear(D, C * p * p) for (_, D), p in stages)
            bodies.zeros(self.tiles)
            self.narrow = nn.ModuleList([bodies.normed_linear(D, NARROW)])
            coarse = C * math.prod(fine)  # a point for each patch of the finest stage
            self.linear = bodies.zeros(nn.Linear(math.prod(grid) * NARROW, coarse))

    def forward(self, features: list[Tensor]) -> Tensor:
        if len(self.out_shape) == 1:
            out = self.linear(features[-1].flatten(1, -2).mean(dim=1))  # (B, N, D) -> (B, K)
        elif len(self.out_shape) == 2:
            z = sum(narrow(z) for narrow, z in zip(self.narrow, features, strict=True))
            out = self.whole(z).unflatten(1, self.out_shape)  # (B, N, d) -> (B, C, L)
        else:
            tiles = zip(self.tiles, features, self.sides, strict=True)
            # (B, h, w, D) -> (B, C p p, h, w) -> (B, C, h p, w p)
            out = sum(F.pixel_shuffle(t(z).permute(0, 3, 1, 2), p) for t, z, p in tiles)
            coarse = self.whole(self.narrow[0](features[-1]))  # (B, h, w, D) -> (B, C N)
            coarse = coarse.unflatten(1, (self.out_shape[0], *features[0].shape[1:3]))
            out = out + F.interpolate(coarse, out.shape[2:], mode="bilinear")
            out = F.interpolate(out, self.out_shape[1:], mode="bilinear", antialias=True)
        return self.mean + self.std * out

    def whole(self, z: Tensor) -> Tensor:
        """Points that depend on all patches, (B, ..., d) -> (B, points), learnt in small steps."""
        # AdamW moves each weight by the learning rate; without the factor, a sum of a thousand
        # terms would move too far.
        return 0.1 * self.linear(z.flatten(1))


class Model(nn.Module):
    """m^t = h^t o g o f^t (O1): what is trained, saved and used; x to predictions."""

    def __init__(self, net: nn.Module, x_shape: tuple, out_shape: tuple, patches: int, init="body"):
        super().__init__()
        kind = SeriesEmbedder if len(x_shape) == 2 else ImageEmbedder
        self.f_t = kind(net, x_shape, patches, init)
        self.g = bodies.adapt(net, self.f_t.grid)
        self.h_t = Predictor(self.g.maps, out_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.h_t(self.g(self.f_t(x)))  # (O1)


# ---- 6. The method -------------------------------------------------------------------------------


@torch.no_grad()
def source_features(f_s: nn.Module, source: tasks.Source, device: torch.device) -> Tensor:
    """The mean patch of every embedded source sample, (n, D), on the device."""
    return torch.cat([f_s(x.to(device)).mean(dim=1) for x in source.x.split(500)])


def target_features(f_t: nn.Module, task: tasks.Task, rows: list[int]) -> Tensor:
    """The mean patch of the given training samples, embedded: (m, D)."""
    x_t = torch.stack([task.train[row][0] for row in rows])
    return f_t(x_t.to(next(f_t.parameters()).device)).mean(dim=1)


def distance_to(
    name: str, z_s: Tensor, y_s: Tensor, share: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """D of (O2): a function of the target's features and labels that knows the source's.

    Args:
        name: "otdd" (features and labels, slide 10), "otdd-gaussian" (labels as Gaussians),
            "otdd-classwise" (as released), "mmd" (features, slide 40), or "l2" (mean distance of
            random pairs, with replacement, as in the release: no distance of distributions).
        z_s, y_s: source features (n, D) and classes (n,).
        share: of each target class, (K,), adding up to 1; only "otdd-classwise" needs it.
    Returns: a function (z_t (m, D), y_t (m,)) -> scalar, differentiable in z_t.
    """
    if name == "otdd":
        return OTDD(z_s, y_s)
    if name == "otdd-gaussian":
        distance = OTDD(z_s, y_s, label_distance="gaussian")

        def gaussian(z_t: Tensor, y_t: Tensor) -> Tensor:
            several = y_t.bincount()[y_t] > 1  # one sample has no covariance
            if not several.any():
                raise ValueError("no class has two samples in a step; choose --align otdd")
            return distance(z_t[several], y_t[several])

        return gaussian
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
        task: the target; if it has no classes, it gets those that k-means makes of y.
    """
    rng = torch.Generator().manual_seed(cfg.seed)
    pool, labels = tasks.some_classes(task, cfg.seed)
    count = labels.bincount()
    distance = distance_to(cfg.align, z_s, y_s, count / len(labels))
    groups = [{"params": list(model.f_t.parameters())}]
    decay = cfg.weight_decay if cfg.paper else 0.0
    optimizer = run.optimizer_of(groups, cfg, cfg.align_lr, decay)
    drop = torch.optim.lr_scheduler.StepLR(optimizer, cfg.align_drop or cfg.align_epochs, gamma=0.2)
    changing = {"f_t": model.f_t, "optimizer": optimizer, "drop": drop, "rng": rng}
    for _ in record.begin("align", cfg.align_epochs, **changing):
        for _ in range(cfg.align_steps_per_epoch):
            rows = balanced_rows(labels, cfg.align_samples, rng)
            z_t = target_features(model.f_t, task, [pool[row] for row in rows.tolist()])
            y_t = labels[rows].to(z_s.device)
            if not z_t.isfinite().all():
                record.read()  # it names the step, if the distance was not finite before
                raise FloatingPointError("the embedded target is not finite in stage align")
            loss = distance(z_t, y_t)  # (O2)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.f_t.parameters(), math.inf)
            optimizer.step()
            apart = separability(z_t.detach(), y_t, len(count))
            record.step(cfg.align_lr, distance=loss, grad_norm=norm, separability=apart)
        drop.step()
        record.log(cfg.align_epochs, **record.means())
        record.end_epoch()
    run.synchronise(model.f_t)


def finetune(model: Model, task: tasks.Task, cfg: Config, record: Record) -> float:
    """Stage 3 (O3): fine-tune all that is not frozen; the record keeps the best epoch's weights.

    Returns: the error of that epoch on validation data.
    """
    device = next(model.parameters()).device
    freeze(model, cfg.freeze)
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
                    part = weight * task.loss(model(x), y)  # (O3)
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


# ---- 9. Main -------------------------------------------------------------------------------------


def load(folder: str | Path) -> Model:
    """The model of a finished run, in evaluation mode: a batch of x to predictions."""
    return run.load_model(folder, Model)


def main(cfg: Config) -> dict:
    """Run all stages. Returns the result, which is also printed and written with the rest."""
    if cfg.predict:
        return {"predictions": run.predict(cfg, load)}
    start = time.time()
    cfg, task, net, tokenize, model, shape = build(cfg)  # stage 1 (O1)
    device, aligned = next(model.parameters()).device, cfg.align != "none"
    source = run.load_source(cfg, tokenize, WINDOW, bodies.image_size(net)) if aligned else None
    record = Record(run.open_run(cfg, METHOD), cfg, METHOD, start)
    if record.result:
        return record.result
    used = cfg.source if aligned else "none"
    run.describe(cfg, METHOD, task, model, record.out, shape, used)

    if aligned:  # stage 2 (O2)
        z_s = source_features(source_embedder(net).to(device), source, device)
        align(model, z_s, source.y.to(device), task, cfg, record)
        record.keep(model.f_t, "f_t")
    val_error = finetune(model, task, cfg, record)  # stage 3 (O3)
    record.restore_best(model)
    errors = {"test_error": evaluate(model, "test", task, cfg), "val_error": val_error}
    return run.finish(cfg, METHOD, task, model, record, errors, used)


def build(cfg: Config) -> tuple:
    """Stage 1 (O1): settings without gaps, task, body, its tokenizer, model, its description."""
    cfg, task, net, tokenize = run.load_parts(cfg)
    cfg = replace(cfg, align_samples=cfg.align_samples or 384)
    shape = {"x_shape": task.x_shape, "out_shape": task.out_shape, "patches": cfg.patches}
    model = Model(net, **shape, init=cfg.embedder_init)
    f_t, h_t = model.f_t, model.h_t
    f_t.mean, f_t.std, h_t.mean, h_t.std = tasks.statistics(task)
    shape |= {"body": bodies.describe(net)}
    return cfg, task, net, tokenize, run.on_device(model, cfg), shape


def parse_args(argv: list[str] | None = None) -> Config:
    return run.parse(Config, configure, __doc__, argv)


def cli(argv: list[str] | None = None) -> int:
    return run.cli(METHOD, parse_args, main, argv)


if __name__ == "__main__":
    sys.exit(cli())

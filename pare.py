#!/usr/bin/env python
r"""PaRe: patch replacement. Fine-tune through a modality halfway between source and target.

As in ORCA, a target model m^t = h^t o g o f^t is put together from a new embedder, a pretrained
body and a new predictor. While it is fine-tuned, a gate scores the patches of source and target,
and the k target patches with the lowest scores are replaced by the k source patches with the
highest. From the mixture, both labels are to be predicted. k falls from k0 to 0 over the epochs, so
that the body moves from what it knows to what it has to learn.

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
    python pare.py --task satellite --k0 0              without replacement
    python pare.py --task cosmic                        images with a mask to predict
    python pare.py --task satellite --f-t RUN           f^t aligned beforehand, by orca.py in RUN
    python pare.py --task mine.npz --device cuda        arrays x_train, y_train, x_test, y_test
    python pare.py --task satellite --paper             real data, roberta-base, published settings

You should see k and lambda fall to 0 while the error falls. The last line is the result; everything
is written to runs/pare-TASK-SEED. Only training needs the gate, f^s and h^s: the saved model is
m^t. The baselines are settings of orca.py.

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

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bodies
import run
import tasks
from run import Record, Settings, opt
from tasks import papers

# B batch, C channels, L length or H x W, N patches, D width of the body, K classes
METHOD = "pare"
GATES = ("shared", "separate", "random", "none")
SWITCH = ("on", "off")
WINDOW = 64  # tokens of a source sample
NARROW = 32  # numbers of a patch from which, all patches together, h^t makes points


# ---- 1. Configuration ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Settings):
    """The settings of PaRe, beside those that all methods share (run.Settings)."""

    # patch replacement (slides 25 to 27)
    k0: int = opt(-1, "patches replaced in the first epoch; -1: 70 % of them", low=-1)
    k_end: int = opt(0, "patches replaced in the last epoch", low=0)
    gate: str = opt("shared", "form of the gate F_C; random and none are its baselines", GATES)
    select: str = opt("top", "choice of the k best: exact or by sampling", ("top", "gumbel"))
    replace: str = opt("lowest", "scores of the patches that are replaced", ("lowest", "highest"))
    lam: str = opt("k/k0", "weight lambda of the source's loss in L_mix", ("k/k0", "k/N"))
    mix_weight: float = opt(0.3, "weight w of L_mix beside the plain target loss", low=0)
    plain_target_loss: str = opt("on", "plain target loss; off: L_mix alone (slide 27)", SWITCH)
    source_labels: str = opt("on", "loss of the source labels in L_mix", SWITCH)
    f_t: str = opt("", "folder of a run of orca.py, from whose aligned f^t to start (slide 38)")

    def __post_init__(self):
        super().__post_init__()
        if self.plain_target_loss == self.source_labels == "off" and self.lam == "k/k0":
            what = "--plain-target-loss off with --source-labels off leaves no loss"
            raise ValueError(f"{what} in the first epoch, where k/k0 is 1; give --lam k/N")


def configure(**given) -> Config:
    """The settings: defaults, then the papers' values with paper=True, then what is given."""
    return run.configure(Config, papers.PARE, given)


# ---- 2. Data: run.load_parts() and run.load_source(), which ask tasks/ ---------------------------
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


# Copied from orca.source_embedder
def source_embedder(net: nn.Module) -> nn.Module:
    """f^s: the body's own, frozen: token ids (B, L) or images (B, 3, S, S) in 0..1 -> (B, N, D)."""
    if hasattr(net, "embeddings"):
        return net.embeddings.requires_grad_(False).eval()
    f_s = ImageEmbedder(net, (3,))
    mean, std = (torch.tensor(net.pretrained_cfg[key]) for key in ("mean", "std"))
    f_s.mean, f_s.std = mean[:, None, None], std[:, None, None]
    return f_s.requires_grad_(False).eval()


# ---- 4. Body g: bodies.adapt(), the layers of the pretrained model -------------------------------
# ---- 5. Predictors h^t and h^s -------------------------------------------------------------------


# Copied from orca.Predictor
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


# Copied from orca.Model
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

    Epochs (or steps, likewise) are numbered 0..epochs - 1, so slide 26's total E is epochs - 1.
    Source: slide 26, whose denominator is cut off; read as the number of the last epoch.
    """
    return round(k_end + (k0 - k_end) * (1 - epoch / max(1, epochs - 1)))  # (P2)


def first_k(cfg: Config, N: int) -> int:
    """k0 for N patches: what is asked for, or 70 % of them (as the paper's 32 of 46)."""
    k0 = cfg.k0 if cfg.k0 >= 0 else round(0.7 * N)
    if k0 > N:
        raise ValueError(f"--k0 {k0} exceeds the {N} patches of task '{cfg.task}'; choose 0..{N}")
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
    if s.shape[1] == 1:  # one score has no spread
        return s.detach()
    noise = -torch.log(-torch.log(torch.rand_like(s).clamp(1e-7, 1 - 1e-7)))
    return s.detach() + s.detach().std(dim=1, keepdim=True) * noise


def replace_patches(
    z_t: Tensor, z_s: Tensor, s_t: Tensor, s_s: Tensor, k: int, select="top", lowest=True
) -> Tensor:
    """Replace the k lowest-scored target patches by the k highest-scored source patches (P3).

    Args:
        z_t, z_s: patch embeddings, (B, N, D) and (B, N_s, D).
        s_t, s_s: their scores, (B, N) and (B, N_s).
        k: how many; there have to be as many on both sides.
        select: "top", or "gumbel" to sample by the scores; lowest: False to replace the highest.
    Returns: z_mix, (B, N, D), a new tensor. The best source patch takes the place of the worst
        target patch, and so on; all other patches stay where they are. In value a copy of the
        patches, in gradient weighted by their scores.
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
        size = int(run.summed(torch.tensor(float(size))))
        return run.share(torch.randint(len(self.source.y), (size,), generator=self.rng))

    def losses(
        self, model: Model, task: tasks.Task, x_t: Tensor, y_t: Tensor, rows: Tensor, k: int, cfg
    ) -> tuple[Tensor, Tensor]:
        """The two parts of the loss of a batch (P6): that of target and that of source labels.

        Args:
            x_t, y_t: target batch and its labels, on the device of the model.
            rows: the source samples, of draw(), as many as the batch has.
            k: patches to replace; with 0 the mixture is the target itself, and the loss is plain.
        """
        plain = cfg.plain_target_loss == "on"
        w = cfg.mix_weight if plain else 1.0
        z_t = model.f_t(x_t)  # (B, N, D)
        if k == 0:  # the limit of what follows: both losses are of the same z_t
            return (plain + w) * task.loss(model.h_t(model.g(z_t)), y_t), z_t.new_zeros(())
        x_s, y_s = (run.moved(v[rows]) for v in (self.source.x, self.source.y))
        z_s = self.f_s(x_s)  # (B, N_s, D)
        s_t, s_s = self.gate(z_t), self.gate(z_s, source=True)
        z_mix = replace_patches(z_t, z_s, s_t, s_s, k, cfg.select, cfg.replace == "lowest")
        stages = model.g(torch.cat([z_t, z_mix]) if plain else z_mix)  # 2B samples, or B
        mixed = [z[-len(z_mix) :] for z in stages]
        lam = mixing_weight(cfg.lam, k, cfg.k0, z_t.shape[1])
        target = w * (1 - lam) * task.loss(model.h_t(mixed), y_t)  # (P5)
        source = w * lam * self.source.loss(self.h_s(mixed), y_s)
        if plain:
            target = target + task.loss(model.h_t([z[: len(z_mix)] for z in stages]), y_t)  # (P6)
        return target, source if cfg.source_labels == "on" else 0 * source


# ---- 7. Training ---------------------------------------------------------------------------------


# Adapted from orca.finetune: the loss of the mixture, with k by the epoch; nothing is frozen
def finetune(model: Model, mixer: Mixer, task: tasks.Task, cfg: Config, record: Record) -> float:
    """Fine-tune everything on the loss (P6), with k falling from epoch to epoch (P2).

    Returns: the error of the best epoch on validation data; the record keeps its weights.
    """
    device, N = next(model.parameters()).device, math.prod(model.f_t.grid)
    new = [*model.f_t.parameters(), *model.h_t.parameters(), *mixer.parameters()]
    groups = [{"params": new}, {"params": list(model.g.parameters()), "lr": cfg.body_lr}]
    optimizer = run.optimizer_of(groups, cfg, cfg.lr, cfg.weight_decay)
    trained = [p for p in (*model.parameters(), *mixer.parameters()) if p.requires_grad]
    loader = run.batches(task.train, cfg, cfg.seed)
    schedule = run.schedule_of(optimizer, cfg, len(loader))
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    changing = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    changing |= {"gate": mixer.gate, "h_s": mixer.h_s, "draws": mixer.rng}
    for epoch in record.begin("finetune", cfg.epochs, **changing):
        k = patches_to_replace(cfg.k0, epoch, cfg.epochs, cfg.k_end)
        model.train()
        for batch in record.batches(loader):
            lr, loss = schedule.get_last_lr()[0], torch.zeros((), device=device)
            optimizer.zero_grad()
            rows = mixer.draw(len(batch[0]) if batch else 0) if k else torch.empty(0)
            for x, y, weight, portion in run.parts(batch, cfg.accumulate, task.weight):
                with run.autocast(device, cfg.precision):
                    some, rows = rows[: len(x)], rows[len(x) :]
                    target, source = mixer.losses(model, task, x, y, some, k, cfg)
                    part = weight * target + portion * source  # (P6)
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
        shown = {"k": k, "lam": mixing_weight(cfg.lam, k, cfg.k0, N), "lr": lr}
        shown |= {"train_loss": means["loss"], "grad_norm": means["grad_norm"]}
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
    device, f_s = next(model.parameters()).device, source_embedder(net)
    cfg = replace(cfg, k0=first_k(cfg, N=math.prod(model.f_t.grid)))
    sizes, masks = (max(WINDOW, cfg.k0), bodies.image_size(net)), len(task.out_shape) == 3
    source = run.load_source(cfg, tokenize, *sizes, masks)
    mixer = Mixer(f_s, source, model.g.maps, cfg.seed, cfg.gate).to(device)
    record = Record(run.open_run(cfg, METHOD), cfg, METHOD, start)
    if record.result:
        return record.result
    run.describe(cfg, METHOD, task, model, record.out, shape, cfg.source)

    val_error = finetune(model, mixer, task, cfg, record)
    record.restore_best(model)
    errors = {"test_error": evaluate(model, "test", task, cfg), "val_error": val_error}
    return run.finish(cfg, METHOD, task, model, record, errors, cfg.source)


# Adapted from orca.build: f^t may be one that orca.py has aligned
def build(cfg: Config) -> tuple:
    """Settings without gaps, task, body, its tokenizer, model, and its description."""
    cfg, task, net, tokenize = run.load_parts(cfg)
    shape = {"x_shape": task.x_shape, "out_shape": task.out_shape, "patches": cfg.patches}
    model = Model(net, **shape, init=cfg.embedder_init)
    f_t, h_t = model.f_t, model.h_t
    f_t.mean, f_t.std, h_t.mean, h_t.std = tasks.statistics(task)
    if cfg.f_t:
        run.load_weights(f_t, Path(cfg.f_t) / "f_t.safetensors")
    if cfg.paper and cfg.task == "darcy":  # as published
        bodies.freeze_queries_and_keys(model.g)
    shape |= {"body": bodies.describe(net)}
    return cfg, task, net, tokenize, run.on_device(model, cfg), shape


# Copied from orca.parse_args
def parse_args(argv: list[str] | None = None) -> Config:
    return run.parse(Config, configure, __doc__, argv)


# Copied from orca.cli
def cli(argv: list[str] | None = None) -> int:
    return run.cli(METHOD, parse_args, main, argv)


if __name__ == "__main__":
    sys.exit(cli())

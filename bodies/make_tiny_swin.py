"""Make bodies/tiny_swin: a small Swin transformer, pretrained on the images of sources/shapes.py.

Supervised, as Swin-base was on ImageNet-22k (Liu et al. 2021, Swin Transformer): say which outline
or fractal the object is, which texture fills it, and where it is, in images that are drawn anew for
every step, so that none is seen twice. Without the last question, which every pixel answers, a
model of this size learns nothing for hundreds of steps. Some pairs of outline and texture and some
fractals are never shown: the probe on the model card is about those. The result is a folder in
timm's form, so that timm.create_model("local-dir:bodies/tiny_swin", pretrained=True) is the very
code path of a model on the hub; its README.md is the model card that this script writes.

    python bodies/make_tiny_swin.py                 # about 30 minutes on one CPU core
    python bodies/make_tiny_swin.py --steps 20 --out somewhere     # a look at the machinery

The state is saved beside the result every --save-every steps; run the script again to resume.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bodies import spread  # noqa: E402 (the repository's root has to be on the path first)
from tasks.sources import shapes  # noqa: E402

# B batch, S pixels of a side, D width of the last stage, K classes
ARCHITECTURE = "swin_tiny_patch4_window7_224"  # timm's name of the family; the sizes are below
SIZES = {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (2, 2, 2)}
SIZES |= {"num_heads": (2, 4, 8)}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # what the images are standardised by


def classes() -> tuple[np.ndarray, np.ndarray]:
    """The classes as (outline, texture), -1 for any texture: (K, 2) seen and (40, 2) held out."""
    outlines, textures = len(shapes.OUTLINES), len(shapes.TEXTURES)
    pairs = np.array([(o, t) for o in range(outlines) for t in range(textures)])
    fractals = np.array([(outlines + i, -1) for i in range(shapes.FRACTALS)])
    new = pairs.sum(axis=1) % textures == 0  # each outline and each texture once
    seen, held_out = [pairs[~new], fractals[:-30]], [pairs[new], fractals[-30:]]
    return np.concatenate(seen), np.concatenate(held_out)


def images_of(kinds: np.ndarray, y: np.ndarray, rng: np.random.Generator):
    """An image of each kind y: x (B, 3, S, S), mask (B, 1, S, S), outline and texture (B,)."""
    outline, texture = kinds[y].T
    texture = np.where(texture < 0, rng.integers(len(shapes.TEXTURES), size=len(y)), texture)
    x, mask = shapes.draw(outline, texture, SIZES["img_size"], rng)
    x = (torch.from_numpy(x) - MEAN[0]) / STD[0]
    return x, torch.from_numpy(mask), torch.from_numpy(outline), torch.from_numpy(texture)


def make_body() -> nn.Module:
    """The untrained Swin."""
    import timm

    return spread(timm.create_model(ARCHITECTURE, num_classes=0, drop_path_rate=0.0, **SIZES))


class Namer(nn.Module):
    """The body with three heads: outline (B, 120), texture (B, 10) and mask (B, 1, S, S)."""

    def __init__(self):
        super().__init__()
        self.body = make_body()
        D = self.body.num_features
        self.outline = nn.Linear(D, len(shapes.OUTLINES) + shapes.FRACTALS - 30)
        self.texture = nn.Linear(D, len(shapes.TEXTURES))
        widths = [(D // 4, 4), (D // 2, 8), (D, 16)]  # of a stage: channels, pixels to a patch
        self.mask = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, r * r), nn.Unflatten(-1, (r, r)))
            for d, r in widths
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, mask = self.body.patch_embed(x), 0.0
        for layer, head in zip(self.body.layers, self.mask, strict=True):
            z = layer(z)  # (B, h, w, D)
            tiles = head(z)  # (B, h, w, D) -> (B, h, w, r, r)
            mask = mask + tiles.permute(0, 1, 3, 2, 4).reshape(len(x), 1, *x.shape[2:])
        features = self.body.norm(z).mean(dim=(1, 2))
        return self.outline(features), self.texture(features), mask


def loss_of(model: Namer, x: Tensor, mask: Tensor, outline: Tensor, texture: Tensor) -> Tensor:
    """Cross-entropies of outline and texture, and three times that of the pixels."""
    out_outline, out_texture, out_mask = model(x)
    where = F.binary_cross_entropy_with_logits(out_mask, mask)
    return F.cross_entropy(out_outline, outline) + F.cross_entropy(out_texture, texture) + 3 * where


@torch.no_grad()
def accuracy(model: Namer, kinds: np.ndarray, n: int = 2000) -> tuple[float, float]:
    """Accuracy in naming outline (or fractal) and texture, in n new images of seen classes."""
    model.eval()
    x, _, outline, texture = images_of(kinds, np.arange(n) % len(kinds), np.random.default_rng(1))
    answers = [model(part)[:2] for part in x.split(250)]
    model.train()
    guesses = [torch.cat(parts).argmax(dim=1) for parts in zip(*answers, strict=True)]
    truth = (outline, texture)
    right = [float((g == t).float().mean()) for g, t in zip(guesses, truth, strict=True)]
    return right[0], right[1]


def probe(body: nn.Module) -> float:
    """Accuracy of multinomial logistic regression on the mean last features of held-out classes.

    2000 images to fit, 1000 to score, of the 40 classes that were never shown; ridge 1e-3.
    """
    kinds, sets = classes()[1], []
    body.eval()
    for seed, n in ((2, 2000), (3, 1000)):
        y = np.arange(n) % len(kinds)
        with torch.no_grad():
            parts = images_of(kinds, y, np.random.default_rng(seed))[0].split(250)
            features = [body.forward_features(part).mean(dim=(1, 2)) for part in parts]
        sets.append((torch.cat(features), torch.from_numpy(y)))
    (x, y), (x_val, y_val) = sets
    mean, std = x.mean(0), x.std(0) + 1e-6
    head = torch.nn.Linear(x.shape[1], len(kinds))
    solver = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        ridge = 1e-3 * head.weight.square().sum()
        loss = F.cross_entropy(head((x - mean) / std), y) + ridge
        loss.backward()
        return loss

    solver.step(closure)
    return float((head((x_val - mean) / std).argmax(1) == y_val).float().mean())


def train(model: Namer, kinds: np.ndarray, args, work: Path) -> list[dict]:
    """AdamW with linear warm-up and decay. Returns the log; resumes from work/state.pt."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    warmup = max(1, args.steps // 15)
    rate = lambda s: min((s + 1) / warmup, (args.steps - s) / max(1, args.steps - warmup))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    log, state = [], work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        log = saved["log"]
    start = time.time() - (log[-1]["time_s"] if log else 0)
    model.train()
    for step in range(log[-1]["step"] if log else 0, args.steps):
        rng = np.random.default_rng([args.seed, step])  # a step's images depend on its number only
        y = rng.integers(len(kinds), size=args.batch)
        loss = loss_of(model, *images_of(kinds, y, rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            row = {"step": step + 1, "train_loss": loss.item()}
            row["outline"], row["texture"] = accuracy(model, kinds)
            log.append({**row, "time_s": time.time() - start})
            print(json.dumps(log[-1]), flush=True)
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            saved = {name: part.state_dict() for name, part in parts.items()} | {"log": log}
            torch.save(saved, work / "state.tmp")
            (work / "state.tmp").replace(state)
    return log


def card(args, log: list[dict], probes: dict, num_classes: int, params: int, size_mb: float) -> str:
    """The model card: what it was trained on, for how long, and what it is worth."""
    import timm

    minutes, shown = log[-1]["time_s"] / 60, args.steps * args.batch / 1e3
    rows = {
        "data": f"images of 64 x 64 of `tasks/sources/shapes.py`: {num_classes} classes (pairs of "
        "outline and texture; fractals), each image drawn anew; 10 pairs and 30 fractals held out",
        "objective": "classification of outline or fractal and of texture, segmentation of the "
        "object; cross-entropies",
        "training": f"{args.steps} steps of {args.batch} images ({shown:.0f} k images); AdamW, "
        f"learning rate {args.lr:g} with linear warm-up and decay; seed {args.seed}; torch "
        f"{torch.__version__.split('+')[0]}, timm {timm.__version__}; {minutes:.0f} minutes on "
        f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}",
        "accuracy on new images": f"{log[-1]['outline']:.3f} of outline or fractal (120), "
        f"{log[-1]['texture']:.3f} of texture (10)",
        "linear probe on held-out classes": f"accuracy {probes['pretrained']:.3f} from its "
        "features (40 classes, chance 0.025)",
        "the same on a random body": f"accuracy {probes['random']:.3f} (same architecture, "
        "untrained)",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    return f"""# tiny_swin

A small Swin transformer for two CPU cores: images of 64 x 64 in patches of 4 x 4, three stages of
two layers, widths 48, 96 and 192, windows of 4 x 4; {params / 1e6:.2f} M parameters,
{size_mb:.1f} MB of safetensors. It stands in for Swin-base where nothing can be downloaded, and
takes images of any size that is a multiple of 32. Inputs were scaled to 0..1, then to mean 0.5 and
deviation 0.25. Made by `python bodies/make_tiny_swin.py`; nothing of it comes from anywhere else.

| | |
|---|---|
{table}

It has seen nothing but drawn shapes, and is good for nothing but this project. The weights are
under this project's licence.
"""


def main(args) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    work = args.out.parent / f".{args.out.name}.work"
    work.mkdir(parents=True, exist_ok=True)
    kinds, _ = classes()
    model, body = Namer(), make_body()
    probes = {"random": probe(body)}
    log = train(model, kinds, args, work)
    body.load_state_dict(model.body.state_dict())
    probes["pretrained"] = probe(body)
    body.pretrained_cfg |= {"mean": MEAN, "std": STD, "interpolation": "bilinear", "tag": "shapes"}
    save_for_hf(body, args.out, model_args=SIZES, safe_serialization=True)
    size_mb = (args.out / "model.safetensors").stat().st_size / 1e6
    params = sum(p.numel() for p in body.parameters())
    text = card(args, log, probes, len(kinds), params, size_mb)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps({**probes, "size_mb": size_mb}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "bodies" / "tiny_swin")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250)
    main(parser.parse_args())

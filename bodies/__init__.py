"""The only door to pretrained bodies: load_body() from a name, rebuild() from a run's config.json,
adapt() for the body g of slide 7.

A body is what the libraries call a model: a RobertaModel of transformers for series (or one of its
twins, CamemBERT and XLM-RoBERTa), a SwinTransformer or VisionTransformer of timm for images, of any
width and depth. The methods take their embedders and g out of it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks import download

FOLDER = Path(__file__).resolve().parent
TINY = {2: "tiny_roberta", 3: "tiny_swin"}  # len(x_shape): the body that comes with the project
PATCHES = {2: 32, 3: 256}  # and how many patches suit it
ROBERTA_BASE = "FacebookAI/roberta-base@e2da8e2f811d1448a5b465c236feacd80ffbac7b"
SWIN_BASE = "swin_base_patch4_window7_224.ms_in22k"  # its bare name would be another checkpoint
SIZES = {"FacebookAI/roberta-base": 0.50e9, f"timm/{SWIN_BASE}": 0.44e9}  # bytes to download
ROBERTAS = ("roberta", "xlm-roberta", "camembert")  # of one and the same form


def load_body(
    name: str, x_shape: tuple[int, ...], patches: int
) -> tuple[nn.Module, Callable | None]:
    """The pretrained model around g, and its tokenizer, from a folder or from a hub.

    Args:
        name: a folder, in bodies/ or anywhere, or a hub's name: of transformers for series (with
            a "/" in it; NAME@REVISION pins a commit), of timm for images; random:NAME takes only
            the architecture of NAME.
        x_shape: (C, L) of series or (C, H, W) of images; decides which kind of body it must be.
        patches: that images are cut into, by the body's own patch size (Swin 4 x 4 pixels, ViT
            often 16 x 16): sets the size they are brought to.
    Returns: the model, without dropout; for series a function from texts to lists of token ids,
        for images None.
    Raises: ValueError if there is no such body, it cannot be had, or it is of another kind.
    """
    wanted = name.removeprefix("random:")
    untrained = wanted != name
    folders = [path for path in (FOLDER / wanted, Path(wanted)) if wanted and path.is_dir()]
    place = str(folders[0]) if folders else wanted
    series = len(x_shape) == 2
    if not folders and not (wanted.count("/") == 1 or (not series and _timm_knows(wanted))):
        raise ValueError(
            f"--body {name}: no folder bodies/{wanted} or {wanted}; give {TINY[len(x_shape)]}, a "
            f"folder, or a hub name such as "
            f"{'FacebookAI/roberta-base' if series else 'swin_base_patch4_window7_224.ms_in22k'}"
        )
    problem = ""
    try:
        with contextlib.ExitStack() as stack:
            if not folders and (series or not untrained or "/" in wanted):
                problem = stack.enter_context(_hub())
            if series:
                return _roberta(place, untrained)
            return _vision(place, untrained, patches), None
    except (OSError, ValueError, RuntimeError, AssertionError, TypeError, KeyError) as error:
        if problem and isinstance(error, OSError):
            repository, _ = _address(wanted)
            size = download.bytes_of(None if untrained else SIZES.get(repository))
            raise ValueError(
                f"--body {name} is not on this machine ({size}, https://huggingface.co/"
                f"{repository}), and cannot be had: {problem}; go online once, or run with "
                f"--body {TINY[len(x_shape)]}, which needs no download"
            ) from None
        reason = str(error).split("\n")[0]
        holds = "config.json, model.safetensors" + (" and a tokenizer" if series else "")
        raise ValueError(
            f"--body {name} cannot be loaded ({reason}); give a folder that holds {holds}, or go "
            "online for a hub name"
        ) from error


@contextlib.contextmanager
def _hub() -> Iterator[str]:
    """Inside, the libraries ask the hub if it can be reached, else take what they have of earlier.

    Left alone, they would try again for up to a minute. Gives the reason; "" if it can be reached.
    """
    from huggingface_hub import constants

    before, problem = constants.HF_HUB_OFFLINE, ""
    if before:
        problem = "HF_HUB_OFFLINE is set"
    elif constants.ENDPOINT.startswith("https://"):  # else it is a mirror nearby
        try:
            download.reach(constants.ENDPOINT)
        except download.Unavailable as error:
            problem = str(error)
    constants.HF_HUB_OFFLINE = before or bool(problem)
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = before


def _address(name: str) -> tuple[str, str | None]:
    """Where a hub has the body: the repository; the revision asked for, if any."""
    repository, _, revision = name.partition("@")
    return repository if "/" in repository else f"timm/{repository}", revision or None


def _commit(repository: str, revision: str | None = None) -> str | None:
    """The commit of a hub's files that were loaded: their folder in the cache is named by it."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _timm_knows(name: str) -> bool:
    import timm

    return timm.is_model(name.split(".")[0])


def _roberta(place: str, untrained: bool) -> tuple[nn.Module, Callable]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = Path(place).is_dir()
    name, revision = (place, None) if local else _address(place)
    which = {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(name, **which)
    if config.model_type not in ROBERTAS:
        raise ValueError(f"it is a {config.model_type}; series take a RoBERTa")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    tokenizer = AutoTokenizer.from_pretrained(name, **which)
    kind = {"config": config, "add_pooling_layer": False}
    if untrained:
        model = AutoModel.from_config(**kind)
    else:
        model = AutoModel.from_pretrained(name, **kind, **which)
    model.commit = None if local else _commit(name, revision)

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return model, tokenize


def _vision(place: str, untrained: bool, patches: int) -> nn.Module:
    import timm
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    local, name = Path(place).is_dir(), place
    if local:
        place = f"local-dir:{place}"
    elif "/" in place:
        place = f"hf-hub:{place}"
    with torch.device("meta"):  # a look at it, without weights
        kind = timm.create_model(place, pretrained=False, num_classes=0)
    if not isinstance(kind, SwinTransformer | VisionTransformer) or (
        isinstance(kind, VisionTransformer) and kind.pos_embed is None
    ):
        raise ValueError(f"it is a {type(kind).__name__}; images take a Swin transformer or a ViT")
    model = timm.create_model(
        place,
        pretrained=not untrained,
        num_classes=0,
        drop_path_rate=0.0,
        img_size=kind.patch_embed.patch_size[0] * math.isqrt(patches),
    )
    if not local and not untrained:  # a name without a tag is completed by timm
        where = _address(name if "/" in name else model.pretrained_cfg.get("hf_hub_id") or name)
        model.commit = _commit(*where)
    return spread(model) if untrained else model


def spread(model: nn.Module) -> nn.Module:
    """Untrained linear layers drawn anew, as wide as keeps the variance of what passes (Xavier).

    careful: timm draws them with a deviation of 0.02, from which narrow bodies do not get going.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def describe(model: nn.Module) -> dict:
    """What rebuild() needs to know, as plain data; and the commit of a body from a hub."""
    commit = {"commit": getattr(model, "commit", None)}
    if hasattr(model, "encoder"):
        return {"library": "transformers", "config": model.config.to_dict(), **commit}
    sizes = {key: value for key, value in model._model_args.items() if key != "num_classes"}
    name = model.pretrained_cfg["architecture"]
    return {"library": "timm", "name": name, "sizes": sizes, **commit}


def rebuild(saved: dict) -> nn.Module:
    """The architecture that describe() told of, untrained."""
    if saved["library"] == "transformers":
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(**saved["config"])
        return AutoModel.from_config(config, add_pooling_layer=False)
    import timm

    return timm.create_model(saved["name"], pretrained=False, num_classes=0, **saved["sizes"])


# ---- g: the layers of a pretrained model, as the methods call them ----


def adapt(model: nn.Module, grid: tuple) -> nn.Module:
    """g: a list of what each layer makes of tokens (B, N, D), of `grid` patches along each axis.

    Its attribute maps says of each layer: the patches along each axis, and their width. With
    recompute = True, layers are computed again in the backward pass, which saves memory.
    """
    if hasattr(model, "encoder"):
        return SeriesBody(model, grid)
    return (ImageBody if hasattr(model, "layers") else PlainBody)(model, grid)


def _through(layer: nn.Module, z: Tensor, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, z, use_reentrant=False)
    return layer(z)


class SeriesBody(nn.Module):
    """g: the layers of a RoBERTa, (B, N, D) -> [(B, N, D), ...], what each returns (slide 7)."""

    recompute = False

    def __init__(self, roberta: nn.Module, grid: tuple):
        super().__init__()
        self.encoder = roberta.encoder
        # of what it returns: patches, width
        self.maps = [(grid, roberta.config.hidden_size)] * len(self.encoder.layer)

    def forward(self, z: Tensor) -> list[Tensor]:
        features = []
        for layer in self.encoder.layer:
            z = _through(layer, z, self.recompute)
            features.append(z)
        return features


class ImageBody(nn.Module):
    """g: the stages of a Swin transformer, (B, N, D) -> [(B, h, w, D), (B, h/2, w/2, 2D), ...]."""

    recompute = False

    def __init__(self, swin: nn.Module, grid: tuple):
        super().__init__()
        self.layers, self.norm, self.grid = swin.layers, swin.norm, grid
        scales = [(i["num_chs"], i["reduction"]) for i in swin.feature_info]
        size = swin.patch_embed.img_size
        self.maps = [((size[0] // r, size[1] // r), D) for D, r in scales]

    def forward(self, z: Tensor) -> list[Tensor]:
        z, features = z.unflatten(1, self.grid), []  # (B, N, D) -> (B, h, w, D)
        for layer in self.layers:
            z = _through(layer, z, self.recompute)
            features.append(z)
        return [*features[:-1], self.norm(z)]


class PlainBody(nn.Module):
    """g: the blocks of a ViT, (B, N, D) -> [(B, h, w, D), ...], what each returns."""

    recompute = False

    def __init__(self, vit: nn.Module, grid: tuple):
        super().__init__()
        self.blocks, self.first, self.grid = vit.blocks, vit.norm_pre, grid
        self.norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
        names = ("cls_token", "dist_token", "reg_token")  # in timm's order
        tokens = [t for t in (getattr(vit, name, None) for name in names) if t is not None]
        prefix = torch.cat(tokens, dim=1).detach() if tokens else torch.zeros(1, 0, vit.embed_dim)
        own = vit.pos_embed.detach()[:, : -math.prod(grid)]  # the positions of the prefix, or none
        prefix[:, : own.shape[1]] += own
        self.prefix = nn.Parameter(prefix)  # (1, P, D)
        self.maps = [(grid, vit.embed_dim)] * len(self.blocks)

    def forward(self, z: Tensor) -> list[Tensor]:
        P, features = self.prefix.shape[1], []
        z = self.first(torch.cat([self.prefix.expand(len(z), -1, -1), z], dim=1))
        for block in self.blocks:
            z = _through(block, z, self.recompute)
            features.append(z[:, P:].unflatten(1, self.grid))  # (B, P + N, D) -> (B, h, w, D)
        return [*features[:-1], self.norm(features[-1])]

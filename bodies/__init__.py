"""The only door to pretrained bodies: load_body() from a name, rebuild() from a run's config.json.

A body is what the libraries call a model: a RobertaModel or BertModel of transformers for series, a
SwinTransformer or VisionTransformer of timm for images, of any width and depth. The methods take
their embedders out of it, and adapt() makes the body g of slide 7 of its layers (layers.py).
bodies/README.md says which bodies are taken and how they are named.
"""

import contextlib
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from bodies import hub
from bodies.layers import (
    ImageBody,
    PlainBody,
    SeriesBody,
    adapt,
    copy_channels,
    first_position,
    freeze_queries_and_keys,
    image_size,
    norm_and_positions,
    normed_linear,
    patch_length,
    tile_sides,
    zeros,
)
from tasks import download

__all__ = ["ImageBody", "PlainBody", "SeriesBody", "adapt", "copy_channels", "describe"]
__all__ += ["first_position", "freeze_queries_and_keys", "image_size", "load_body"]
__all__ += ["norm_and_positions", "normed_linear", "patch_length", "rebuild", "spread"]
__all__ += ["tile_sides", "zeros"]

FOLDER = Path(__file__).resolve().parent
TINY = {2: "tiny_roberta", 3: "tiny_swin"}  # len(x_shape): the body that comes with the project
PATCHES = {2: 32, 3: 256}  # and how many patches suit it
ROBERTA_BASE = "FacebookAI/roberta-base@e2da8e2f811d1448a5b465c236feacd80ffbac7b"
SWIN_BASE = "swin_base_patch4_window7_224.ms_in22k"  # its bare name would be another checkpoint
SERIES = ("bert", "roberta", "xlm-roberta", "camembert")  # model types of one and the same form
WINDOW = 64  # tokens in a window of a source's text, which a body must have positions for
TAKEN = {
    2: "series take a RoBERTa or a BERT of transformers (model_type bert, roberta, xlm-roberta or "
    "camembert)",
    3: f"images take a Swin transformer or a ViT of timm, such as {SWIN_BASE}",
}


def load_body(
    name: str, x_shape: tuple[int, ...], patches: int, drop_path: float = 0.0, dropout: float = 0.0
) -> tuple[nn.Module, Callable | None]:
    """The pretrained model around g, and its tokenizer, from a folder or from a hub.

    Args:
        name: a folder, in bodies/ or anywhere, or a hub's name: of transformers for series
            (OWNER/NAME; NAME@REVISION pins a commit), of timm for images; random:NAME takes only
            the architecture of NAME.
        x_shape: (C, L) of series or (C, H, W) of images; decides which kind of body it must be.
        patches: number of patches that images are cut into, by the body's own patch size (Swin
            4 x 4 pixels, ViT often 16 x 16): sets the size they are resized to.
        drop_path: rate of stochastic depth at the last block of an image body, in [0, 1).
        dropout: rate of hidden and attention dropout in the layers of a series body, in [0, 1).
    Returns: the model, in float32; for series a function from texts to lists of token ids, for
        images None.
    Raises: ValueError of one line if there is no such body, if it is not available, of another
        kind, or if its weights or its tokenizer do not fit it.
    """
    wanted = name.removeprefix("random:")
    untrained, axes = wanted != name, len(x_shape)
    folders = [path for path in (FOLDER / wanted, Path(wanted)) if wanted and path.is_dir()]
    place = str(folders[0]) if folders else hub.full_name(wanted)
    if not folders and place.count("/") != 1 and not _timm_knows(place):
        raise ValueError(
            f"--body {name}: no folder bodies/{wanted} or {wanted}; give {TINY[axes]}, a folder, "
            f"or a hub name such as {'FacebookAI/roberta-base' if axes == 2 else SWIN_BASE}"
        )
    problem = ""
    try:
        with contextlib.ExitStack() as stack:
            if not folders and ("/" in place or (axes == 3 and not untrained)):
                problem = stack.enter_context(hub.connection())
            _check_kind(place, axes)
            if axes == 2:
                return _series(place, untrained, dropout)
            return _image(place, untrained, patches, drop_path), None
    except Exception as error:  # the libraries raise all kinds of them
        if problem and isinstance(error, OSError):
            repository, _ = hub.address(place)
            size = download.bytes_of(None if untrained else hub.SIZES.get(repository))
            raise ValueError(
                f"--body {name} is not on this machine ({size}, https://huggingface.co/"
                f"{repository}), and cannot be had: {problem}; go online once, or run with "
                f"--body {TINY[axes]}, which needs no download"
            ) from None
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"--body {name} cannot be loaded ({reason})") from error


def _timm_knows(name: str) -> bool:
    import timm

    return timm.is_model(name.split(".")[0])


def _check_kind(place: str, axes: int) -> None:
    """Raise ValueError if the config.json of a body says that it is none for data of these axes."""
    if Path(place).is_dir():
        path = Path(place, "config.json")
        if not path.is_file():
            raise ValueError(f"it holds no config.json; {TAKEN[axes]}")
    elif "/" in place:
        from huggingface_hub import hf_hub_download

        repository, revision = hub.address(place)
        path = Path(hf_hub_download(repository, "config.json", revision=revision))
    elif axes == 2:
        raise ValueError(f"it is a {place} of timm, for images; {TAKEN[2]}")
    else:
        return  # a name that timm knows
    config = json.loads(path.read_text(encoding="utf-8"))
    of_timm, kind = "architecture" in config, config.get("model_type", "model of no model_type")
    if axes == 2 and of_timm:
        raise ValueError(f"it is a {config['architecture']} of timm, for images; {TAKEN[2]}")
    if axes == 2 and kind not in SERIES:
        raise ValueError(f"it is a {kind}; {TAKEN[2]}")
    if axes == 3 and not of_timm:
        raise ValueError(f"it is a {kind} of transformers; {TAKEN[3]}")


def _check_weights(model: nn.Module, wrong: Iterable[str]) -> None:
    """Raise ValueError if the file of a body left out weights, by name, or holds NaN."""
    names = sorted(wrong)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(
            f"{len(names)} of its weights are not in its file, or have another shape there: "
            f"{shown}; the file must fit config.json"
        )
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"its weight {name} holds NaN or infinite values; get the file anew")


def _series(place: str, untrained: bool, dropout: float) -> tuple[nn.Module, Callable]:
    """A model of transformers without its pooler, and its tokenizer."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging as messages

    messages.set_verbosity_error()
    messages.disable_progress_bar()
    local = Path(place).is_dir()
    name, revision = (place, None) if local else hub.address(place)
    which = {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(name, **which)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    tokenize = _tokenizer(name, config.vocab_size, **which)
    kind = {"config": config, "add_pooling_layer": False, "dtype": torch.float32}
    if untrained:
        model = AutoModel.from_config(**kind)
    else:
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # told, not hidden
        model, found = AutoModel.from_pretrained(name, **kind, **which, **options)
        _check_weights(
            model, {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        )
    model.embeddings.dropout.p = 0.0  # f^s stays the same from call to call
    room = config.max_position_embeddings - first_position(model)
    if room < WINDOW:
        raise ValueError(
            f"it has {room} positions, but a window of a source's text has {WINDOW} tokens"
        )
    model.commit = None if local else hub.commit(name, revision)
    return model, tokenize


def _tokenizer(name: str, vocabulary: int, **which: str) -> Callable:
    """A function from texts to lists of token ids, each below the size of the vocabulary."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **which)

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    special = set(tokenizer.all_special_ids)
    # careful: where there are no files, transformers makes a tokenizer that knows no word
    if not set(tokenize(["the quick brown fox, 0 1 2"])[0]) - special:
        raise FileNotFoundError("it has no tokenizer; put its tokenizer.json beside config.json")
    last = max(set(tokenizer.get_vocab().values()) - special)
    if last >= vocabulary:
        raise ValueError(
            f"its tokenizer is larger than its vocabulary: ids up to {last}, but vocab_size is "
            f"{vocabulary}; it is the tokenizer of another model"
        )
    return tokenize


def _image(place: str, untrained: bool, patches: int, drop_path: float) -> nn.Module:
    """A model of timm without its classifier."""
    import timm
    from timm.layers import PatchEmbed
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    local, name = Path(place).is_dir(), place
    if local:
        place = f"local-dir:{place}"
    elif "/" in place:
        place = f"hf-hub:{place}"
    with torch.device("meta"):  # a look at it, without weights
        kind = timm.create_model(place, pretrained=False, num_classes=0)
    plain = isinstance(kind, VisionTransformer) and kind.pos_embed is not None
    if not plain and not isinstance(kind, SwinTransformer):
        raise ValueError(f"it is a {type(kind).__name__}; {TAKEN[3]}")
    if not isinstance(kind.patch_embed, PatchEmbed):
        raise ValueError(f"it is a ViT on the features of a convolutional network; {TAKEN[3]}")
    side = kind.patch_embed.patch_size[0] * math.isqrt(patches)
    sizes = {"num_classes": 0, "drop_path_rate": drop_path, "img_size": side}
    model = timm.create_model(place, pretrained=False, **sizes)
    model.arguments = {**_arguments(name), "img_size": side}  # for describe()
    if untrained:
        return spread(model)
    _load_timm(model)
    if not local:  # a name without a tag is completed by timm
        of_timm = model.pretrained_cfg.get("hf_hub_id")
        model.commit = hub.commit(*hub.address(name if "/" in name else of_timm or name))
    return model


def _arguments(name: str) -> dict:
    """The arguments of timm's own function that config.json changes, of a folder or hub name."""
    from timm.models import load_model_config_from_hf

    if Path(name).is_dir():
        config = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
        return config.get("model_args", {})
    return load_model_config_from_hf(name)[2] if "/" in name else {}


def _load_timm(model: nn.Module) -> None:
    """Load the pretrained weights of a model of timm. Raises: ValueError if they do not fit it.

    careful: into a model without classifier, timm loads what it finds, and keeps silent about the
    rest, which stays at random.
    """
    import timm

    def convert(weights: dict, model: nn.Module) -> dict:
        headless = {name: w for name, w in weights.items() if not name.startswith("head.")}
        if "layers.0.downsample.reduction.weight" not in weights:
            # careful: timm before 1.0.31 takes a file without classifier for one of another layout
            weights = {**headless, "head.fc.weight": torch.empty(0)}
        try:
            weights = sys.modules[type(model).__module__].checkpoint_filter_fn(weights, model)
        except AttributeError:  # a name that the model does not have
            return headless
        return {name: w for name, w in weights.items() if not name.startswith("head.")}

    logging.getLogger("timm").setLevel(logging.ERROR)  # else all names that have no place here
    wrong: list[str] = []
    hook = model.register_load_state_dict_post_hook(lambda _, keys: wrong.extend(keys.missing_keys))
    try:
        timm.models.load_pretrained(model, num_classes=0, filter_fn=convert, strict=False)
    except RuntimeError as error:
        shapes = re.findall(r"size mismatch for ([\w.]+):", str(error))
        if not shapes:
            raise
        wrong += shapes
    hook.remove()
    _check_weights(model, wrong)


def spread(model: nn.Module) -> nn.Module:
    """Draw untrained linear layers anew, so wide that the variance of features is kept (Xavier).

    careful: timm draws them with a deviation of 0.02, with which narrow bodies fail to train.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return model


def describe(model: nn.Module) -> dict:
    """What rebuild() needs to know, as plain data; and the commit of a body from a hub."""
    commit = {"commit": getattr(model, "commit", None)}
    if hasattr(model, "encoder"):
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return {"library": "transformers", "config": model.config.to_dict() | rates, **commit}
    name = model.pretrained_cfg["architecture"]
    return {"library": "timm", "name": name, "sizes": model.arguments, **commit}


def rebuild(saved: dict) -> nn.Module:
    """The architecture that describe() told of: untrained, without dropout or stochastic depth."""
    if saved["library"] == "transformers":
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.for_model(**saved["config"])
        return AutoModel.from_config(config, add_pooling_layer=False, dtype=torch.float32)
    import timm

    sizes = saved["sizes"] | {"num_classes": 0, "drop_path_rate": 0.0}
    return timm.create_model(saved["name"], pretrained=False, **sizes)

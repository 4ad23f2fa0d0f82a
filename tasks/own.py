"""Data of your own: what kind of task a FILE.npz is follows from its arrays.

x_train, y_train, x_test, y_test and, optionally, x_val, y_val. x is a series, (n, L) or (n, C, L),
or an image, (n, C, H, W). y is one of

    text or whole numbers (n,) or (n, 1)       classes, whatever they are called
    zeros and ones (n, K)                      multi-label
    zeros and ones (n, H, W) or (n, C, H, W)   masks; for series (n, C, L), or (n, L) as long as x
    floats (n,) or (n, K)                      regression, K numbers a sample
    floats (n, C, L) or (n, [C,] H, W)         a field; for series also (n, L) as long as x

Text, whole numbers and booleans are categories and floats are quantities, whatever their values;
kind="classes" or "regression" decides otherwise. Any two numbers serve as zero and one. What was
taken for what is said in the record's notices. `encoding` is what --predict needs to know of it:

    classes   the names of the classes 0..K-1, sorted, as scikit-learn's LabelEncoder has them
    x, y      {"shift": [...], "scale": [...]} of each channel, where float32 does not suffice: the
              model sees (x - shift) / scale, computed in float64
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tasks import files, metrics

MEASURES = {  # kind: (loss, metric, name of the metric)
    "classes": (metrics.cross_entropy, metrics.zero_one, "0-1 error"),
    "labels": (metrics.bce, metrics.mean_ap, "1 - mAP"),
    "mask": (metrics.bce, metrics.auroc, "1 - AUROC"),
    "regression": (metrics.mse, metrics.relative_rmse, "RMSE / deviation"),
}
KINDS = ("classes", "regression")  # that can be asked for
FAR, TINY = 1e3, 1e-30  # a channel is centred if its mean is FAR deviations away, or TINY scaled up
FEW = 100  # different whole numbers that may be classes; more are quantities


def read(path: Path, kind: str = "") -> tuple[dict, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The record of a task, and its splits (x, y): x float32; y int64 for classes, else float32.

    Args: kind: "classes" (categories of any shape) or "regression"; "": as the type of y says.
    Raises: ValueError, one line that names the file, the array and what was expected.
    """
    if kind and kind not in KINDS:
        raise ValueError(f"no kind '{kind}'; choose one of {', '.join(KINDS)}")
    required, optional = ("x_train", "y_train", "x_test", "y_test"), ("x_val", "y_val")
    text = ("y_train", "y_val", "y_test")
    arrays = files.read_npz(path, required, optional, text)
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise ValueError(f"{path}: x_val and y_val go together; give both or neither")
    names = [split for split in ("train", "val", "test") if f"x_{split}" in arrays]
    categories, notices = _categories(path, arrays["y_train"], kind)
    splits = {s: _split(path, s, arrays[f"x_{s}"], arrays[f"y_{s}"], categories) for s in names}
    for i, name in enumerate("xy"):
        shapes = {split: pair[i].shape[1:] for split, pair in splits.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{path}: {name} differs in shape between the splits: {shapes}")
    xs, ys = ({s: pair[i] for s, pair in splits.items()} for i in (0, 1))
    _check_types(path, ys, kind)
    encoding = {}
    if not categories:
        found = "regression"
        ys = _float32(path, "y", ys, encoding, notices)
    elif ys["train"].ndim == 1:
        found = "classes"
        ys, encoding["classes"] = _classes(path, ys, notices)
    else:
        found = "labels" if ys["train"].ndim == 2 else "mask"
        ys = _zeros_and_ones(path, ys, notices)
    xs = _float32(path, "x", xs, encoding, notices)
    x, y = xs["train"], ys["train"]
    loss, metric, metric_name = MEASURES[found]
    if found == "regression":
        loss = partial(loss, scale=float(y.std(dtype=np.float64)) or 1.0)
    series = {"embedded": "words", "paper": "conll2003"}
    dense = "voc" if y.ndim > 2 else "cifar10"
    record = {
        "title": f"your data: {path.name}",
        "x_shape": x.shape[1:],
        "y_shape": y.shape[1:],
        "kind": found,
        "num_classes": len(encoding["classes"]) if found == "classes" else y.shape[1],
        "loss": loss,
        "metric": metric,
        "metric_name": metric_name,
        "sources": series if x.ndim == 3 else {"embedded": "shapes", "paper": dense},
        "published": {},
        "encoding": encoding,
        "notices": (*_layout(arrays["x_train"].shape, arrays["y_train"].shape), *notices),
    }
    return record, {s: (xs[s], ys[s]) for s in names}


# ---- what is what ----


def _categories(path: Path, y: np.ndarray, kind: str) -> tuple[bool, list[str]]:
    """Whether y_train holds categories rather than quantities, and what to say of it."""
    if y.dtype.kind == "U":
        if kind == "regression":
            raise ValueError(f"{path}: y_train holds text; --kind regression needs numbers")
        return True, []
    if kind:
        return kind == "classes", []
    values = np.unique(y)
    few, said = len(values) <= min(FEW, y.size // 2), f"y: {len(values)} different whole numbers"
    if y.dtype.kind == "f":
        asked = few and (values == np.round(values)).all()
        said += ", stored as floats, taken as quantities; --kind classes takes them as classes"
        return False, [said] if asked else []
    said += " taken as classes; --kind regression takes them as quantities"
    return True, [] if few else [said]


def _check_types(path: Path, ys: dict[str, np.ndarray], kind: str) -> None:
    if len({y.dtype.kind == "U" for y in ys.values()}) > 1:
        raise ValueError(f"{path}: y holds text in one split and numbers in another")
    if len({y.dtype.kind == "f" for y in ys.values()}) > 1 and not kind:
        raise ValueError(
            f"{path}: y holds floats in one split and whole numbers in another; save them alike, "
            "or give --kind classes or --kind regression"
        )


def _split(path: Path, split: str, x: np.ndarray, y: np.ndarray, categories: bool) -> tuple:
    """One split with its channels in place: x (n, C, ...), y (n,), (n, K) or (n, C, ...)."""
    if x.ndim not in (2, 3, 4):
        raise ValueError(
            f"{path}: x_{split} has shape {x.shape}, expected series, (n, L) or (n, C, L), or "
            "images, (n, C, H, W)"
        )
    x = x[:, None] if x.ndim == 2 else x
    if len(x) != len(y):
        raise ValueError(f"{path}: x_{split} has {len(x)} samples but y_{split} has {len(y)}")
    if y.ndim == 3 and x.ndim == 4:
        y = y[:, None]  # (n, H, W) -> (n, 1, H, W)
    elif x.ndim == 3 and y.ndim == 2 and y.shape[1] == x.shape[2] > 1:
        y = y[:, None]  # (n, L) -> (n, 1, L)
    elif categories and y.shape[1:] == (1,):
        y = y[:, 0]  # (n, 1) -> (n,)
    elif not categories and y.ndim == 1:
        y = y[:, None]  # (n,) -> (n, 1)
    if y.ndim not in (1, 2, x.ndim):
        raise ValueError(
            f"{path}: y_{split} has shape {y.shape}, expected (n,), (n, K), or for every point of "
            f"x {'(n, C, L)' if x.ndim == 3 else '(n, H, W) or (n, C, H, W)'}"
        )
    return x, y


def _layout(shape: tuple[int, ...], of_y: tuple[int, ...]) -> list[str]:
    """What looks as if the axes of x or y were in another order, or one were missing."""
    axes = shape[2:] or shape[1:]  # of x: (L,) or (H, W)
    if len(of_y) == len(axes) + 2 and of_y[1:-1] == axes != of_y[2:]:
        first = f"y: {of_y[1]} channels of {' x '.join(map(str, of_y[2:]))} points"
        return [f"{first}; if its last axis is that of the channels, save np.moveaxis(y, -1, 1)"]
    if len(shape) == 4 and shape[3] <= 4 < min(shape[1:3]):
        n, H, W, C = shape
        return [
            f"x: {H} channels of {W} x {C} pixels; if it is (n, H, W, C), save "
            "x.transpose(0, 3, 1, 2)"
        ]
    if len(shape) != 3:
        return []
    _, C, L = shape
    said = f"x: series of {L} points with {C} channels"
    if C >= 16 and C / 2 <= L <= 2 * C:
        return [f"{said}; if it is images (n, H, W), save x[:, None]"]
    return [f"{said}; if it is (n, L, C), save x.transpose(0, 2, 1)"] * (C > 2 * L)


# ---- classes, labels, quantities ----


def _classes(path: Path, ys: dict[str, np.ndarray], notices: list[str]) -> tuple[dict, list]:
    """y in 0..K-1, and the names of the K classes; as scikit-learn's LabelEncoder does it."""
    names = np.unique(ys["train"])
    if len(names) == 1:
        raise ValueError(f"{path}: y_train holds a single class, {names[0]}; nothing to learn")
    for split, y in ys.items():
        strange = np.setdiff1d(y, names)
        if len(strange):
            numbers = "" if y.dtype.kind == "U" else " (or give --kind regression for quantities)"
            raise ValueError(
                f"{path}: y_{split} holds the class {strange[0]}, which y_train lacks; put samples "
                f"of every class into the training set{numbers}"
            )
    K = len(names)
    if names.tolist() != list(range(K)):
        some = ", ".join(map(str, names[:5])) + (f", ..., {names[-1]}" if K > 5 else "")
        notices.append(f"y: the classes {some} are numbered 0..{K - 1}")
    numbered = {s: np.searchsorted(names, y).astype(np.int64) for s, y in ys.items()}
    return numbered, names.tolist()


def _zeros_and_ones(path: Path, ys: dict[str, np.ndarray], notices: list[str]) -> dict:
    """Labels or masks as float32 zeros and ones, whichever two numbers they were."""
    two = np.unique(ys["train"])
    if two.dtype.kind == "U" or len(two) != 2 or np.isin(two, (0, 1)).all():
        two = np.array([0, 1])
    for split, y in ys.items():
        if y.dtype.kind == "U" or not np.isin(y, two).all():
            what = {"U": "text", "f": "numbers"}.get(y.dtype.kind, "whole numbers")
            raise ValueError(
                f"{path}: y_{split} of shape {y.shape} holds {what} besides {two[0]} and {two[1]}; "
                "give zeros and ones (labels or masks), or floats (regression)"
            )
    if two.tolist() != [0, 1]:
        notices.append(f"y: {two[0]} and {two[1]} are taken as 0 and 1")
    ys = {s: (y == two[1]).astype(np.float32) for s, y in ys.items()}
    K = ys["train"].shape[1]
    if ys["train"].ndim == 2 and K > 1 and (ys["train"].sum(axis=1) == 1).all():
        notices.append(f"y: one 1 in every row, taken as {K} labels; for classes save y.argmax(1)")
    return ys


def _float32(
    path: Path, name: str, arrays: dict[str, np.ndarray], encoding: dict, notices: list[str]
) -> dict[str, np.ndarray]:
    """The arrays of all splits as float32, centred and scaled before that where it has to be.

    What was done to which channels, by the training set, is added to encoding[name] and notices.
    Raises: ValueError, naming the array, if values are beyond float32.
    """
    for split, array in arrays.items():
        _check_range(f"{path}: {name}_{split}", array)
    shift, scale = [], []
    for c in range(arrays["train"].shape[1]):
        values = arrays["train"][:, c].astype(np.float64)
        _check_whole(f"{path}: {name}_train", arrays["train"][:, c])
        mean, spread = float(values.mean()), float(np.ptp(values))
        std = float(values.std()) or spread  # careful: squares of what is tiny are 0
        varies = spread > 0
        shift.append(mean if varies and abs(mean) > FAR * std else 0.0)
        scale.append(std if varies and std < TINY else 1.0)
    changed = [c for c in range(len(shift)) if shift[c] != 0 or scale[c] != 1]
    if changed:
        encoding[name] = {"shift": shift, "scale": scale}
        c = changed[0]
        notices.append(
            f"{name}: {len(changed)} of {len(shift)} channels centred in float64, the first, "
            f"{c}, as ({name} - {shift[c]:g}) / {scale[c]:g}"
        )
    how = encoding.get(name)
    return {s: _encoded(f"{path}: {name}_{s}", array, how) for s, array in arrays.items()}


def _check_range(what: str, array: np.ndarray) -> None:
    most = np.finfo(np.float32).max
    if array.dtype.kind == "f" and array.dtype.itemsize > 4 and np.abs(array).max() > most:
        raise ValueError(f"{what} holds values beyond {most:.2g}, the largest of float32; rescale")


def _check_whole(what: str, values: np.ndarray) -> None:
    """Refuse a channel of whole numbers whose differences are lost in float64, as beyond 2^53."""
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if high > low and np.spacing(float(max(-low, high))) > 1e-3 * (high - low):
            raise ValueError(
                f"{what} holds whole numbers from {low} to {high}, which float64 cannot tell "
                "apart; subtract the smallest"
            )


def _encoded(what: str, array: np.ndarray, how: dict | None) -> np.ndarray:
    """(array - shift) / scale of each channel, (n, C, ...), in float64, then as float32."""
    if not how:
        return np.ascontiguousarray(array, dtype=np.float32)
    out = np.empty(array.shape, np.float32)
    with np.errstate(over="ignore"):
        for c, (shift, scale) in enumerate(zip(how["shift"], how["scale"], strict=True)):
            out[:, c] = (array[:, c].astype(np.float64) - shift) / scale
    if not np.isfinite(out).all():
        raise ValueError(f"{what} holds values too far from those of training for float32; rescale")
    return out


# ---- predictions for new inputs ----


def read_run(folder: Path) -> dict:
    """The config.json of a finished run."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {folder} holds no run")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def read_inputs(path: str | Path, x_shape: tuple[int, ...], encoding: dict) -> np.ndarray:
    """The inputs to predict for, from a .npy file, as the model takes them.

    Args:
        path: of an array of samples, (n, *x_shape), or a single one, x_shape; the axis of a single
            channel may be left out.
        x_shape, encoding: what the model was trained on, from the Task.
    Returns: float32, (n, *x_shape).
    Raises: ValueError or FileNotFoundError, one line that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; expected an array saved with numpy.save")
    try:
        x = np.load(path, allow_pickle=False)
    except Exception as error:  # not numpy's, or damaged: it can fail in many ways
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a readable .npy file ({reason})") from None
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected an array of numbers, saved with numpy.save")
    found, x_shape = x.shape, tuple(x_shape)
    if found == x_shape or (x_shape[0] == 1 and found == x_shape[1:]):
        x = x.reshape(1, *x_shape)
    elif x_shape[0] == 1 and found[1:] == x_shape[1:]:
        x = x[:, None]
    if x.shape[1:] != x_shape or not len(x):
        one = " or ".join(map(str, [x_shape] + [x_shape[1:]] * (x_shape[0] == 1)))
        raise ValueError(f"{path}: got shape {found}, expected n samples of shape {one}, or one")
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: holds NaN or infinite values; fill them in")
    _check_range(str(path), x)
    return _encoded(str(path), x, encoding.get("x"))


def output(path: str | Path) -> Path:
    """The file that predictions are written to: its name ends in .npy, and its folder is there."""
    path = Path(path)
    path = path if path.suffix == ".npy" else path.with_name(path.name + ".npy")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(
            f"--out {path} cannot be written; name a file in a folder that exists"
        )
    return path


def check_predictions(path: str | Path, predictions: torch.Tensor) -> None:
    """Raises: ValueError if a prediction, (n, ...), is not finite; without a word it would be 0."""
    bad = (~predictions.flatten(1).isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(
            f"{path}: {len(bad)} of {len(predictions)} predictions are not finite, the first of "
            f"sample {int(bad[0])}; its values are too far from those of training"
        )


@torch.no_grad()
def predictions(
    model: nn.Module, path: str | Path, x: np.ndarray, kind: str, encoding: dict
) -> np.ndarray:
    """What a model predicts for inputs, as the user has it.

    Args:
        path, x: the file of the inputs, and what read_inputs() makes of it, (n, *x_shape).
        kind, encoding: of the Task.
    Returns: classes, (n,), by their own names; probabilities of labels and masks; or values in the
        units of y.
    Raises: ValueError if one is not finite.
    """
    device = next(model.parameters()).device
    parts = torch.from_numpy(x).split(256)
    found = torch.cat([model(part.to(device)).float().cpu() for part in parts])
    check_predictions(path, found)
    if kind == "classes":
        found = found.argmax(dim=1)
    elif kind in ("labels", "mask"):
        found = found.sigmoid()
    return decode(found.numpy(), encoding)


def decode(predictions: np.ndarray, encoding: dict) -> np.ndarray:
    """Predictions in the terms of the file: the classes' names, or quantities in the units of y.

    Args: predictions: classes (n,) int, or what the model gives, (n, K) or (n, C, ...).
    Returns: an array that numpy.save writes without pickling; probabilities stay as they are.
    """
    if "classes" in encoding:
        return np.array(encoding["classes"])[predictions]
    if "y" not in encoding:
        return predictions
    axes = (-1,) + (1,) * (predictions.ndim - 2)
    shift, scale = (np.reshape(encoding["y"][key], axes) for key in ("shift", "scale"))
    return predictions.astype(np.float64) * scale + shift

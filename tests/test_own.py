"""tasks/own.py: what a file of one's own is taken for, how it is encoded, and what is refused."""

import json
import math
import re

import numpy as np
import pytest
import torch

import tasks
from tasks import own

NAN = math.nan


def saved(path, x, y, x_test=None, y_test=None, **more):
    """FILE.npz with these arrays, the test set a copy of the training set if none is given."""
    x_test, y_test = x if x_test is None else x_test, y if y_test is None else y_test
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test, **more)
    return str(path)


@pytest.fixture
def load(tmp_path):
    return lambda *arrays, kind="", **more: tasks.load_task(
        saved(tmp_path / "my.npz", *arrays, **more), kind=kind
    )


def series(n=40, C=1, L=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, C, L))


def labels(task, split="test"):
    return torch.stack([y for _, y in getattr(task, split)])


# ---- numbers that float32 cannot hold ----


@pytest.mark.parametrize("scale", [1.0, 1e-40])
def test_x_and_y_are_centred_and_scaled_in_float64(scale, load):
    x, y = series(C=2) * scale, np.random.default_rng(1).normal(size=(40, 1, 12)) * scale
    plain = load(x, y) if scale == 1 else None
    offset = 1e8 * scale
    task = load(x + [[offset], [0.0]], y + 3 * offset)
    got = torch.stack([a for a, _ in task.test]).numpy().astype(np.float64)
    how = task.encoding["x"]
    assert (how["shift"][0] == 0) is False and how["shift"][1] == 0
    back = got * np.reshape(how["scale"], (2, 1)) + np.reshape(how["shift"], (2, 1))
    np.testing.assert_allclose(back - [[offset], [0.0]], x, atol=1e-6 * scale)
    assert got[:, 0].std() > 0.5 * min(1, x.std() / scale) and np.isfinite(got).all()
    decoded = own.decode(labels(task).numpy(), task.encoding)
    np.testing.assert_allclose(decoded - 3 * offset, y, atol=1e-6 * scale)
    assert "x: " in " ".join(task.notices) and "centred in float64" in " ".join(task.notices)
    if plain:  # the error of the same predictions is the same
        assert plain.encoding == {}
        errors = [t.metric(0.5 * labels(t), labels(t)) for t in (plain,)]
        shifted = 0.5 * torch.from_numpy(y) - torch.tensor(task.encoding["y"]["shift"]) + 3 * offset
        assert task.metric(shifted.float(), labels(task)) == pytest.approx(errors[0], rel=1e-4)


def test_ordinary_and_constant_channels_stay_as_they_are(load):
    x = series(C=3) * [[1.0], [50.0], [0.0]] + [[0.0], [900.0], [0.1]]
    task = load(x, np.arange(40) % 2)
    np.testing.assert_array_equal(torch.stack([a for a, _ in task.test]), x.astype(np.float32))
    assert task.encoding == {"classes": [0, 1]} and task.notices == ()


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test", "x_val"])
def test_values_beyond_float32_are_refused(name, tmp_path):
    x, y = series(), np.random.default_rng(1).normal(size=40)
    arrays = {
        f"{v}_{s}": a.copy() for s in ("train", "val", "test") for v, a in (("x", x), ("y", y))
    }
    arrays[name].flat[3] = -1e39
    np.savez(tmp_path / "far.npz", **arrays)
    with pytest.raises(ValueError, match=f"far.npz: {name} holds values beyond 3.4e.38") as caught:
        tasks.load_task(str(tmp_path / "far.npz"))
    assert "\n" not in str(caught.value)


def test_test_values_that_the_training_scale_cannot_hold_are_refused(load):
    with pytest.raises(ValueError, match="x_test holds values too far from those of training"):
        load(series() * 1e-38, np.arange(40) % 2, series() * 1e10)


# ---- fields, layouts and the header ----


@pytest.mark.parametrize(
    ("x", "y", "want"),
    [
        ((40, 64), (40, 64), "x=series 1x64 y=field 1x64"),
        ((40, 2, 64), (40, 64), "x=series 2x64 y=field 1x64"),
        ((40, 1, 64), (40, 1, 64), "x=series 1x64 y=field 1x64"),
        ((40, 64), (40, 63), "x=series 1x64 y=63 numbers"),
        ((40, 64), (40,), "x=series 1x64 y=1 number"),
        ((40, 1), (40, 1), "x=series 1x1 y=1 number"),
        ((40, 3, 8, 8), (40, 8, 8), "x=image 3x8x8 y=field 1x8x8"),
        ((40, 3, 8, 8), (40, 8), "x=image 3x8x8 y=8 numbers"),
    ],
)
def test_a_field_is_known_by_the_length_of_x(x, y, want, load):
    rng = np.random.default_rng(0)
    task = load(rng.normal(size=x), rng.normal(size=y))
    assert tasks.describe(task) == want


def test_zeros_and_ones_as_long_as_x_are_a_mask_and_others_labels(load):
    rng = np.random.default_rng(0)
    mask, few = rng.integers(0, 2, (40, 12)), rng.integers(0, 2, (40, 3))
    assert tasks.describe(load(series(), mask)) == "x=series 1x12 y=mask 1x12"
    assert tasks.describe(load(series(), few)) == "x=series 1x12 y=3 labels"
    assert tasks.describe(tasks.load_task("satellite", train_size=48)) == (
        "x=series 1x46 y=24 classes"
    )


def test_what_was_read_as_a_field_is_learnt_as_one(load):
    x = series(L=16)
    flat, full = load(x[:, 0], -x[:, 0]), load(x, -x)
    assert flat.out_shape == full.out_shape == (1, 16) and flat.kind == "regression"
    assert torch.equal(labels(flat), labels(full))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((40, 100, 4), r"series of 4 points with 100 channels; if it is \(n, L, C\)"),
        ((40, 28, 28), r"with 28 channels; if it is images \(n, H, W\), save x\[:, None\]"),
        ((40, 24, 30, 3), r"24 channels of 30 x 3 pixels; if it is \(n, H, W, C\)"),
        ((40, 3, 24, 30), ""),
        ((40, 16, 52), ""),
        ((40, 4, 100), ""),
        ((40, 100), ""),
        ((40, 1, 16, 52), ""),
    ],
)
def test_a_layout_that_looks_transposed_is_said(shape, message, load):
    notices = " ".join(load(np.random.default_rng(0).normal(size=shape), np.arange(40) % 2).notices)
    assert re.search(message, notices) if message else notices == ""


# ---- classes and their names ----

NAMED = {
    "text": (np.array(["wheat", "corn", "pea"]), ["corn", "pea", "wheat"]),
    "objects": (np.array(["wheat", "corn", "pea"], dtype=object), ["corn", "pea", "wheat"]),
    "from 1": (np.array([1, 2, 3]), [1, 2, 3]),
    "signs": (np.array([-1, 1]), [-1, 1]),
    "a gap": (np.array([0, 2, 7], dtype=np.uint8), [0, 2, 7]),
    "objects that are numbers": (np.array([5, 9], dtype=object), [5, 9]),
    "booleans": (np.array([False, True]), [False, True]),
}


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("case", list(NAMED))
def test_classes_are_numbered_as_scikit_learn_does_and_named_again(case, column, load):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    values, names = NAMED[case]
    y = values[np.arange(40) % len(values)]
    task = load(series(), y[:, None] if column else y)
    assert (task.kind, task.num_classes, task.y_shape) == ("classes", len(names), ())
    want = preprocessing.LabelEncoder().fit_transform(y)
    np.testing.assert_array_equal(labels(task), want)
    encoding = json.loads(json.dumps(task.encoding))  # as config.json keeps it
    assert encoding["classes"] == names
    back = own.decode(labels(task).numpy(), encoding)
    assert back.tolist() == y.tolist() and back.dtype.kind != "O"
    said = any("numbered 0.." in line for line in task.notices)
    assert said == (case != "booleans")


def test_one_class_or_one_that_training_lacks_is_refused_with_the_true_reason(load):
    y = np.arange(40) % 3
    with pytest.raises(ValueError, match="my.npz: y_test holds the class 7, which y_train lacks"):
        load(series(), y, series(), np.where(y == 1, 7, y))
    with pytest.raises(
        ValueError, match="y_val holds the class pea, which y_train lacks"
    ) as caught:
        names = np.array(["corn", "pea", "wheat"])
        load(series(), names[y % 2 * 2], y_test=names[y % 2 * 2], x_val=series(), y_val=names[y])
    assert "regression" not in str(caught.value)
    with pytest.raises(ValueError, match="my.npz: y_train holds a single class"):
        load(series(), np.zeros(40, int))


def test_floats_that_are_whole_numbers_are_asked_about(load):
    y = np.arange(40) % 3 * 1.0
    task = load(series(), y)
    assert task.kind == "regression"
    assert "3 different whole numbers, stored as floats" in task.notices[0]
    assert "--kind classes" in task.notices[0]
    task = load(series(), y, kind="classes")
    assert (task.kind, task.encoding["classes"], task.notices) == (
        "classes",
        [0, 1, 2],
        (),
    )
    task = load(series(), y, kind="regression")
    assert (task.kind, task.notices) == ("regression", ())
    assert load(series(), y + 0.5).notices == ()


def test_whole_numbers_can_be_quantities(load):
    y = np.arange(40)
    task = load(series(), y, kind="regression")
    assert (task.kind, task.y_shape) == ("regression", (1,))
    assert labels(task)[:, 0].tolist() == y.tolist()
    np.testing.assert_array_equal(load(series(), y % 2 + 0.0, kind="classes").num_classes, 2)
    with pytest.raises(
        ValueError, match="40 training samples of 40 classes are too few .*--kind regression"
    ):
        load(series(), y)
    task = load(series(), y, x_val=series(), y_val=y)
    assert task.kind == "classes" and "--kind regression" in task.notices[0]


@pytest.mark.parametrize("two", [(-1, 1), (0, 255), (1, 2)])
def test_any_two_numbers_are_labels_and_masks(two, load):
    bits = np.random.default_rng(0).integers(0, 2, (40, 1, 8, 8))
    x = np.random.default_rng(1).normal(size=(40, 2, 8, 8))
    task = load(x, np.array(two)[bits])
    assert task.kind == "mask" and torch.equal(labels(task), torch.from_numpy(bits).float())
    assert f"{two[0]} and {two[1]} are taken as 0 and 1" in task.notices[0]
    task = load(x, np.array(two)[bits[:, 0, 0]] * 1.0, kind="classes")
    assert task.kind == "labels" and torch.equal(
        labels(task), torch.from_numpy(bits[:, 0, 0]).float()
    )


def test_one_hot_rows_are_said(load):
    task = load(series(), np.eye(3, dtype=int)[np.arange(40) % 3])
    assert task.kind == "labels" and "taken as 3 labels; for classes" in task.notices[0]


HALVES = np.arange(80).reshape(40, 2) % 3 / 2
REFUSED = {
    "kind": ({"kind": "image"}, "no kind 'image'; choose one of classes, regression"),
    "text as numbers": (
        {"y": np.array(["a", "b"])[np.arange(40) % 2], "kind": "regression"},
        "y_train holds text",
    ),
    "text and numbers": ({"y": np.array(["a", "b"])[np.arange(40) % 2]}, "y holds text in one"),
    "text labels": (
        {"y": np.array([["a", "b"]] * 40), "y_test": np.array([["a", "b"]] * 40)},
        r"y_train of shape \(40, 2\) holds text besides 0 and 1",
    ),
    "bytes": ({"y": np.array([b"a", b"b"])[np.arange(40) % 2]}, "y_train has dtype .S1; .*astype"),
    "mixed objects": (
        {"y": np.array(["a", 1] * 20, dtype=object)},
        "y_train holds Python objects .they are not all text, or all whole numbers.; save text "
        "with y_train.astype.str",
    ),
    "floats as classes": (
        {"y": HALVES, "y_test": HALVES, "kind": "classes"},
        r"y_train of shape \(40, 2\) holds numbers besides 0 and 1",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_makes_no_task_is_refused_in_one_line(case, load):
    change, message = REFUSED[case]
    given = {"y": np.arange(40) % 2, "y_test": np.arange(40) % 2, "kind": ""} | change
    with pytest.raises(ValueError, match=message) as caught:
        load(series(), given["y"], y_test=given["y_test"], kind=given["kind"])
    assert "\n" not in str(caught.value)


def test_objects_are_read_without_executing_them(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    y = np.array([Bomb()] * 40, dtype=object)
    path = saved(tmp_path / "my.npz", series(), y)
    with pytest.raises(ValueError, match="y_train holds Python objects .it asks for"):
        tasks.load_task(path)
    assert not (tmp_path / "executed").exists()


def test_a_kind_is_for_own_data_only():
    with pytest.raises(ValueError, match="kind 'classes' is for a FILE.npz of your own"):
        tasks.load_task("satellite", kind="classes")


# ---- new inputs, and what is made of them ----


def test_inputs_to_predict_for_are_encoded_as_those_of_training(load, tmp_path):
    x = series(C=2) + [[1e9], [0.0]]
    task = load(x, np.arange(40) % 2)
    np.save(tmp_path / "new.npy", x)
    new = own.read_inputs(tmp_path / "new.npy", task.x_shape, json.loads(json.dumps(task.encoding)))
    assert new.dtype == np.float32
    np.testing.assert_array_equal(new, torch.stack([a for a, _ in task.test]))


@pytest.mark.parametrize(
    ("found", "x_shape"),
    [
        ((5, 2, 12), (2, 12)),
        ((2, 12), (2, 12)),
        ((1, 12), (1, 12)),
        ((12,), (1, 12)),
        ((5, 12), (1, 12)),
        ((5, 1, 12), (1, 12)),
        ((8, 9), (1, 8, 9)),
        ((5, 8, 9), (1, 8, 9)),
        ((3, 8, 9), (3, 8, 9)),
    ],
)
def test_one_sample_or_several_with_or_without_a_single_channel(found, x_shape, tmp_path):
    x = np.random.default_rng(0).normal(size=found)
    np.save(tmp_path / "x.npy", x)
    got = own.read_inputs(tmp_path / "x.npy", x_shape, {})
    n = x.size // math.prod(x_shape)
    np.testing.assert_array_equal(got, x.reshape(n, *x_shape).astype(np.float32))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.zeros((5, 11)),
            r"got shape \(5, 11\), expected n samples of shape \(1, 12\) or \(12,\)",
        ),
        (np.zeros((0, 12)), "got shape"),
        (np.zeros(()), "got shape"),
        (np.full((5, 12), NAN), "holds NaN or infinite"),
        (np.full((5, 12), 1e39), "holds values beyond 3.4e.38"),
        (np.array(["a"] * 12), "expected an array of numbers"),
    ],
)
def test_other_inputs_are_refused(x, message, tmp_path):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=f"x.npy:? {message}"):
        own.read_inputs(tmp_path / "x.npy", (1, 12), {})
    (tmp_path / "y.npy").write_text("hello")
    with pytest.raises(ValueError, match="y.npy: not a readable .npy"):
        own.read_inputs(tmp_path / "y.npy", (1, 12), {})
    with pytest.raises(FileNotFoundError, match="no file .*z.npy; expected an array"):
        own.read_inputs(tmp_path / "z.npy", (1, 12), {})


def test_what_has_no_encoding_is_given_back_as_it_is():
    out = np.random.default_rng(0).random((4, 3)).astype(np.float32)
    assert own.decode(out, {}) is out


# ---- further instances of these kinds ----


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((40, 3, 8, 9), (40, 8, 9, 2), "y: 8 channels of 9 x 2 points; if its last axis"),
        ((40, 2, 12), (40, 12, 2), "y: 12 channels of 2 points; if its last axis"),
        ((40, 12), (40, 12, 1), "y: 12 channels of 1 points; if its last axis"),
        ((40, 3, 8, 8), (40, 8, 8, 8), ""),
        ((40, 2, 12), (40, 2, 12), ""),
    ],
)
def test_a_field_whose_channels_come_last_is_said(x, y, message, load):
    rng = np.random.default_rng(0)
    assert message in " ".join(load(rng.normal(size=x), rng.normal(size=y)).notices)
    if not message:
        assert load(rng.normal(size=x), rng.normal(size=y)).notices == ()


def test_objects_that_are_whole_numbers_of_numpy_are_classes(load):
    """As pandas gives them; "they are not all whole numbers" was said of these."""
    y = np.array([np.int64(5), np.uint8(9)] * 20, dtype=object)
    assert load(series(), y).encoding["classes"] == [5, 9]


def test_whole_numbers_that_float64_cannot_tell_apart_are_refused(load):
    """As float64 they are constant, and nothing was said."""
    whole = np.arange(40 * 12).reshape(40, 12)
    with pytest.raises(ValueError, match="x_train holds whole numbers from 9223.* subtract the"):
        load(2**63 + whole.astype(np.uint64), np.arange(40) % 2)
    task = load(10**18 + 10**9 * whole, np.arange(40) % 2)  # nanoseconds, seconds apart
    assert task.encoding["x"]["shift"][0] == pytest.approx(1e18, rel=1e-6)


def test_values_whose_squares_are_0_are_scaled_up(load):
    task = load(series() * 1e-200, np.arange(40) % 2)
    x = torch.stack([a for a, _ in task.test])
    assert x.isfinite().all() and 0.1 < float(x.std()) < 1


def test_a_training_set_without_some_classes_is_said(tmp_path):
    path = saved(tmp_path / "my.npz", series(), np.arange(40) % 8)
    assert "4 training samples hold 4 of the 8 classes" in " ".join(
        tasks.load_task(path, train_size=4).notices
    )
    assert tasks.load_task(path, train_size=8).notices == ()

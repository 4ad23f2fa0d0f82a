"""The data: what is simulated, what is read, what is held out."""

import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bodies
import tasks
from tasks import metrics, papers, satellite
from tasks.sources import words

CALENDAR = {name: row for row, name in enumerate(satellite.COVER)}


def test_satellite_is_simulated_in_the_real_shape():
    x, y = satellite.simulate(240, 0)
    assert x.shape == (240, 1, 46) and x.dtype == np.float32 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [10] * 24
    assert np.isfinite(x).all() and x.min() >= -0.2 and x.max() <= 1.0
    again, other = satellite.simulate(240, 0), satellite.simulate(240, 1)
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0])


def test_satellite_seasons_follow_the_double_logistic():
    t = np.array([1.0, 75.0, 125.0, 175.0, 365.0])
    v = satellite.season(t, 0.2, 0.85, 75, 175, 0.08, 0.12)
    assert v[0] == pytest.approx(0.2, abs=0.01) and v[-1] == pytest.approx(0.2, abs=0.01)
    assert v[1] == pytest.approx((0.2 + 0.85) / 2, abs=0.01)  # half way up at S, down at A
    assert v[3] == pytest.approx((0.2 + 0.85) / 2, abs=0.01)
    assert v[2] == pytest.approx(0.85, abs=0.02)


def test_satellite_classes_differ_as_their_calendars_do():
    x, y = satellite.simulate(4800, 0)
    mean = np.stack([x[y == k, 0].mean(axis=0) for k in range(24)])
    day = lambda d: int(np.abs(satellite.DATES - d).argmin())  # noqa: E731
    wheat, corn = mean[CALENDAR["wheat"]], mean[CALENDAR["irrigated corn"]]
    assert wheat[day(120)] > corn[day(120)] + 0.3 and corn[day(220)] > wheat[day(220)] + 0.3
    assert mean[CALENDAR["water"]].max() < 0.0
    alfalfa, grass = mean[CALENDAR["alfalfa"]], mean[CALENDAR["permanent grass"]]
    assert alfalfa[day(185)] < alfalfa[day(170)] and abs(grass[day(185)] - grass[day(170)]) < 0.03
    double = mean[CALENDAR["double crop"]]
    assert double[day(190)] < min(double[day(120)], double[day(240)])


def test_satellite_reads_the_real_layout(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "satellite"
    folder.mkdir()
    made = {}
    for split, n in (("train", 300), ("test", 50)):
        made[split] = {"data": rng.normal(size=(n, 46)), "label": np.arange(n) % 24 + 1}
        np.save(folder / f"satellite_{split}.npy", made[split])  # a pickled dict, as the real one
    x, y = satellite.read(tmp_path, "test")
    assert x.shape == (50, 1, 46) and x.dtype == np.float32
    np.testing.assert_array_equal(y, made["test"]["label"] - 1)
    np.testing.assert_allclose(x[:, 0], made["test"]["data"], rtol=1e-6)
    task = tasks.load_task("satellite", data="real", root=tmp_path)
    assert (len(task.train), len(task.val), len(task.test)) == (271, 29, 50)
    assert task.data == "real" and task.published["PaRe"] == 0.1118


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 46)), "expected a pickled dict"),
        ({"data": np.zeros((3, 46))}, "expected a pickled dict"),
        ({"data": np.zeros((3, 45)), "label": np.ones(3, int)}, r"shapes \(3, 45\) and \(3,\)"),
        ({"data": np.zeros((3, 46)), "label": np.zeros(3, int)}, "other labels"),
        ({"data": np.full((3, 46), np.nan), "label": np.ones(3, int)}, "not finite"),
    ],
)
def test_satellite_refuses_other_layouts(content, message, tmp_path):
    (tmp_path / "satellite").mkdir()
    np.save(tmp_path / "satellite" / "satellite_train.npy", content)
    with pytest.raises(ValueError, match=f"satellite_train.npy.*{message}"):
        satellite.read(tmp_path, "train")


def test_splits_differ_and_follow_the_seed():
    a, b, c = (tasks.load_task("satellite", seed=s, train_size=48) for s in (0, 0, 1))
    same = lambda p, q: all(torch.equal(s, t) for s, t in zip(p.tensors, q.tensors))  # noqa: B905, E731
    assert same(a.train, b.train) and same(a.test, b.test)
    assert not same(a.train, c.train) and not same(a.test, c.test)
    first = {x.numpy().tobytes() for x in a.train.tensors[0]}
    assert not first & {x.numpy().tobytes() for x in a.test.tensors[0]}
    assert len(a.train) == 48 and a.data == "simulated"


def test_hold_out_takes_a_tenth_of_each_class():
    y = np.array([0] * 100 + [1] * 20 + [2] * 3)
    kept, held = tasks.hold_out(y, seed=0)
    assert np.bincount(y[held]).tolist() == [10, 2] and len(kept) == 111
    assert sorted([*kept, *held]) == list(range(123))
    pairs = np.arange(24) // 2  # two of each class: each keeps one
    kept, held = tasks.hold_out(pairs, seed=0)
    assert set(pairs[kept]) == set(range(12)) and len(held) > 0


def test_hold_out_finds_a_sample_that_is_not_the_only_one_of_its_class():
    y = np.array([*range(23), *[23] * 5])  # every tenth sample is the only one of its class
    kept, held = tasks.hold_out(y, seed=0)
    assert y[held].tolist() == [23, 23] and set(y[kept]) == set(range(24))
    with pytest.raises(ValueError, match="24 training samples of 24 classes are too few .* class"):
        tasks.hold_out(np.arange(24), seed=0)
    with pytest.raises(ValueError, match="9 training samples are too few .* at least 10 samples"):
        tasks.hold_out(np.zeros(9), seed=0)


def test_part_of_a_training_set_has_every_class_if_it_is_large_enough(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(500, 7)), np.arange(500) % 24
    y[y > 20] = 0  # classes 21 to 23 are rare
    y[:6] = [21, 22, 23, 21, 22, 23]
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y, x_val=x, y_val=y)
    labels = lambda size: [  # noqa: E731
        int(y) for _, y in tasks.load_task(str(tmp_path / "a.npz"), train_size=size).train
    ]
    for size in (24, 30, 60):
        assert len(labels(size)) == size and set(labels(size)) == set(range(24))
    assert len(labels(10)) == len(set(labels(10))) == 10  # not enough for all of them
    order = np.random.default_rng(0).permutation(500)[:480].tolist()
    assert set(range(24)) == set(y[order]) and labels(480) == y[order].tolist()  # as it comes


# ---- what is checked before training ----


def own_file(path, kind, **change):
    """A file with 20 training, 5 validation and 5 test samples, in which some arrays differ."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 20), ("val", 5), ("test", 5)):
        arrays[f"x_{split}"] = rng.normal(size=(n, 2, 8, 8))
        bits = rng.integers(0, 2, (n, 1, 8, 8))
        arrays[f"y_{split}"] = {
            "classes": np.arange(n) % 3,
            "labels": bits[:, 0, 0],
            "mask": bits,
            "numbers": rng.normal(size=(n, 2)),
            "field": rng.normal(size=(n, 1, 8, 8)),
        }[kind]
    for name, of in change.items():
        arrays[name] = of(arrays[name])
    arrays["x_val"], arrays["x_test"] = (
        arrays[f"x_{s}"][: len(arrays[f"y_{s}"])] for s in ("val", "test")
    )
    np.savez(path, **arrays)
    return str(path)


NOTHING = {  # kind of y, how an array is changed, the array, what is said
    "one class": ("classes", np.zeros_like, "train", "holds a single class"),
    "constant numbers": ("numbers", lambda y: 0 * y + 0.1, "train", "is constant"),
    "constant field": ("field", lambda y: 0 * y + y[:1], "train", "is constant"),
    "no label": ("labels", np.zeros_like, "train", "is constant"),
    "empty masks": ("mask", np.zeros_like, "train", "is constant"),
    "no label in val": ("labels", np.zeros_like, "val", "no 1 - mAP: no label has a positive"),
    "empty masks in val": ("mask", np.zeros_like, "val", "no 1 - AUROC: no label has a positive"),
    "full masks in test": ("mask", np.ones_like, "test", "no 1 - AUROC: no label has a positive"),
    "one sample in val": ("numbers", lambda y: y[:1], "val", "1 samples. has no RMSE"),
    "one sample in test": ("field", lambda y: y[:1], "test", "1 samples. has no RMSE"),
    "constant val": ("numbers", lambda y: 0 * y + 0.1, "val", "no RMSE .*: the targets do not"),
}


@pytest.mark.parametrize("case", list(NOTHING))
def test_what_would_end_a_run_late_is_known_at_the_start(case, tmp_path):
    kind, change, split, message = NOTHING[case]
    path = own_file(tmp_path / "my.npz", kind, **{f"y_{split}": change})
    if split == "test":  # no reason not to train
        task = tasks.load_task(path)
        assert len(task.notices) == 1 and re.search(f"y_test .*{message}", task.notices[0])
        return
    with pytest.raises(ValueError, match=f"my.npz: y_{split} .*{message}") as caught:
        tasks.load_task(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["classes", "labels", "mask", "numbers", "field"])
def test_sound_data_have_nothing_to_notice(kind, tmp_path):
    assert tasks.load_task(own_file(tmp_path / "my.npz", kind)).notices == ()
    classes = own_file(tmp_path / "one.npz", "classes", y_val=lambda y: y[:1])
    assert tasks.load_task(classes).notices == ()  # a single sample has a 0-1 error


def test_a_validation_part_without_an_error_is_said_to_be_held_out(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 9)), np.zeros((20, 2), int)
    kept, _ = tasks.hold_out(np.zeros(20), seed=0)
    y[kept[:3]] = 1  # the part that is held out has no positive
    np.savez(tmp_path / "my.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match="the part of y_train that validates .2 samples. has no"):
        tasks.load_task(str(tmp_path / "my.npz"))


def test_a_field_whose_relative_error_is_not_defined_is_refused():
    task, _, y = counted(50)
    y = torch.where(torch.arange(50)[:, None, None] == 7, 0.0, y.nan_to_num(1.0))
    data = torch.utils.data.TensorDataset(torch.zeros(50, 3, 5, 4), y)
    task = dataclasses.replace(
        task, name="t", train=data, loss=metrics.relative_l2_loss, notices=()
    )
    with pytest.raises(ValueError, match="t: y_train holds samples whose error is not defined"):
        tasks.check(task)


def test_settings_of_a_task_are_fields_of_every_script():
    assert tasks.settings("cosmic") == {"patches": 1024} and tasks.settings("satellite") == {}
    assert tasks.settings("mine.npz") == {}
    given = {key for name in tasks.NAMES for key in tasks.settings(name)}
    assert given == {"patches", "align_samples"}
    assert tasks.load_task("deepsea", train_size=20).settings == tasks.settings("deepsea")


def test_the_papers_rows_are_whole():
    assert set(papers.ORCA) == set(papers.PARE) == set(tasks.NAMES)
    for name, row in papers.PARE.items():
        assert set(row) == set(papers.ORCA[name]) | {"k0", "k_end", "mix_weight", "lam"}
        assert row["lam"] == "k/N" and row["k_end"] < row["k0"] <= row["patches"]
        assert row["body"] == (bodies.ROBERTA_BASE if name in papers.SERIES else bodies.SWIN_BASE)


def test_own_data_with_and_without_a_validation_set(tmp_path):
    x, y = satellite.simulate(96, 0)
    arrays = {"x_train": x, "y_train": y, "x_test": x[:24, 0], "y_test": y[:24]}
    arrays["x_test"] = x[:24]
    np.savez(tmp_path / "a.npz", **arrays)
    task = tasks.load_task(str(tmp_path / "a.npz"))
    assert (task.kind, task.num_classes, task.x_shape) == ("classes", 24, (1, 46))
    assert len(task.train) + len(task.val) == 96 and task.data == "file"
    np.savez(tmp_path / "b.npz", **arrays, x_val=x[:5], y_val=y[:5])
    task = tasks.load_task(str(tmp_path / "b.npz"), train_size=50)
    assert (len(task.train), len(task.val)) == (50, 5)
    flat = {**arrays, "x_train": x[:, 0], "x_test": x[:24, 0]}
    np.savez(tmp_path / "c.npz", **flat)
    got = tasks.load_task(str(tmp_path / "c.npz")).test[3][0]
    assert torch.equal(got, torch.from_numpy(x[3]))


def test_zero_one_error():
    out = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0]])
    assert metrics.zero_one(out, torch.tensor([0, 1, 0])) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="needs logits"):
        metrics.zero_one(out, torch.tensor([[0], [1], [0]]))
    with pytest.raises(FloatingPointError, match="not finite"):
        metrics.zero_one(out * float("nan"), torch.tensor([0, 1, 0]))


class Counted(torch.utils.data.TensorDataset):
    """A data set that knows which of its samples were asked for."""

    def __getitem__(self, i):
        self.asked = [*getattr(self, "asked", []), i]
        return super().__getitem__(i)


def counted(n, channels=3):
    """A regression task of n samples, with a constant channel and unknown targets."""
    rng = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(n, channels, 5, 4, generator=rng)
    x[:, 1] = 0.1
    y = torch.randn(n, 2, 6, generator=rng) * torch.arange(1, 7)
    y[torch.rand(y.shape, generator=rng) < 0.3] = float("nan")
    y[:, 0, 0] = float("nan")
    fields = {"x_shape": (channels, 5, 4), "y_shape": (2, 6), "kind": "regression"}
    fields |= {"num_classes": 2, "train": Counted(x, y)}
    return tasks.Task(**dict.fromkeys(tasks.Task.__dataclass_fields__) | fields), x, y


@pytest.mark.parametrize("memory", [2**26, 72 * 7, 1])
def test_statistics_are_the_same_in_parts(memory, monkeypatch):
    monkeypatch.setattr(tasks, "MEMORY", memory)
    task, x, y = counted(50)
    x_mean, x_std, y_mean, y_std = tasks.statistics(task)
    x, y = x.double().numpy(), y.double().numpy()
    want = x.std(axis=(0, 2, 3))
    want[1] = 1  # of a constant channel
    np.testing.assert_allclose(x_mean.ravel(), x.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(x_std.ravel(), want, rtol=1e-6)
    y[:, 0, 0] = 0  # nowhere known
    np.testing.assert_allclose(y_mean, np.nanmean(y, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y_std, np.nanstd(y, axis=0), rtol=1e-5)
    assert x_mean.shape == x_std.shape == (3, 1, 1)


def test_of_large_samples_few_are_read(monkeypatch):
    monkeypatch.setattr(tasks, "MOST", 60 * 12)
    task, _, _ = counted(50)
    tasks.statistics(task, seed=1)
    assert len(task.train.asked) == 12 == len(set(task.train.asked))
    assert tasks.some_classes(task, seed=1)[0] == sorted(task.train.asked[:12])


def letters(texts):
    """A tokenizer that needs no body: one token a character."""
    return [[ord(c) % 500 for c in text] for text in texts]


def test_words_are_balanced_windows_of_the_right_text():
    x, y, names = words.load(letters, 80, 50, seed=0)
    assert x.shape == (80, 50) and np.bincount(y).tolist() == [10] * 8 and len(names) == 8
    for window, label in zip(x[:20], y[:20], strict=True):
        text = words.texts()[names[label]]
        stream = np.array(letters([text[: int(0.9 * len(text))]])[0])
        found = np.lib.stride_tricks.sliding_window_view(stream, 50)
        assert (found == window).all(axis=1).any()


def test_words_follow_the_seed_and_keep_the_held_out_text_apart():
    a, b, c = (words.load(letters, 40, 50, seed=s)[0] for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    held_out = words.load(letters, 40, 50, seed=0, split="val")[0]
    assert not {w.tobytes() for w in a} & {w.tobytes() for w in held_out}


def test_words_say_when_python_was_stripped_of_its_docs(tmp_path, monkeypatch):
    monkeypatch.setattr(words.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    words.texts.cache_clear()
    try:
        with pytest.raises(ValueError, match="needs Python's own documentation"):
            words.texts()
    finally:
        words.texts.cache_clear()


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="no task 'x'; choose one of cifar100, .*, deepsea, advection, .* or"
    ):
        tasks.load_task("x")
    with pytest.raises(ValueError, match="no source 'x'; choose one of words, code, conll2003"):
        tasks.load_source("x")
    with pytest.raises(
        ValueError, match="'words' does not suit this task, whose body takes images"
    ):
        tasks.load_source("words")
    with pytest.raises(ValueError, match="'shapes' does not suit this task, whose body takes text"):
        tasks.load_source("shapes", tokenize=letters)
    with pytest.raises(ValueError, match="no data 'fake'"):
        tasks.load_task("satellite", data="fake")


def test_a_task_and_a_source_weigh_the_parts_of_a_batch_by_what_is_known():
    task, _, y = counted(50)
    task = dataclasses.replace(task, loss=metrics.mse)
    assert task.weight(y[:7]) == int(y[:7].isfinite().sum()) < y[:7].numel()
    task = dataclasses.replace(task, loss=metrics.relative_l2_loss)
    assert task.weight(y[:7]) == 7 * 2  # channels
    classes = tasks.Source("s", y, torch.arange(50) % 3, ["a", "b", "c"])
    masks = tasks.Source("s", y, torch.ones(50, 1, 4, 4), ["thing"])
    assert classes.weight(classes.y[:9]) == 9 and masks.weight(masks.y[:9]) == 9 * 16


def test_the_page_of_the_tasks_says_what_their_records_say():
    page = (Path(tasks.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 250
    for name in tasks.NAMES:
        module = importlib.import_module(f"tasks.{name}")
        task = module.TASK
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` | "))
        sizes = " / ".join(str(task["sizes"][split]) for split in ("train", "val", "test"))
        for cell in ("x".join(map(str, task["x_shape"])), sizes, task["metric_name"]):
            assert cell in row, (name, cell)
        for file in module.FILES:
            assert file.split("/")[0] + "/" in page, file
    for name in tasks.SOURCES:
        assert f"| `{name}` | " in page, name

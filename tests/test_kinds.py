"""Every kind of task, in 1D and 2D: embedders, bodies and predictors that suit it; whole runs."""

import copy
import importlib
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import bodies
import orca
import pare
import proposed
import tasks


@pytest.fixture(scope="module")
def roberta():
    return bodies.load_body("tiny_roberta", (1, 46), 32)[0]


@pytest.fixture(scope="module")
def swin():
    return bodies.load_body("tiny_swin", (1, 20, 20), 256)[0]


# ---- the parts on images ----


@pytest.mark.parametrize("C", [1, 3, 5])
def test_O1_shapes_of_the_parts_on_images(swin, C):
    model = orca.Model(copy.deepcopy(swin), (C, 20, 24), (7,), 256)
    x = torch.randn(2, C, 20, 24)
    z = model.f_t(x)
    assert z.shape == (2, 256, 48)
    stages = [(2, 16, 16, 48), (2, 8, 8, 96), (2, 4, 4, 192)]
    assert [features.shape for features in model.g(z)] == stages
    assert model.g.maps == [((16, 16), 48), ((8, 8), 96), ((4, 4), 192)]
    assert model(x).shape == (2, 7)


def test_O1_image_body_and_source_embedder_are_the_library_s_own(swin):
    """g(f^s(image)) is what timm computes for the standardised image."""
    images = torch.rand(2, 3, 64, 64)
    f_s = orca.source_embedder(swin)
    with torch.no_grad():
        ours = bodies.ImageBody(swin, (16, 16))(f_s(images))[-1]
        theirs = swin.eval().forward_features((images - 0.5) / 0.25)
    torch.testing.assert_close(ours, theirs)
    assert not any(p.requires_grad for p in f_s.parameters())


def test_image_embedder_starts_from_the_body_s_or_at_random(swin):
    own = swin.patch_embed
    f_t = orca.ImageEmbedder(swin, (5, 30, 30))
    tiled = torch.cat([own.proj.weight, own.proj.weight[:, :2]], dim=1)
    torch.testing.assert_close(f_t.conv.weight, tiled)
    torch.testing.assert_close(f_t.norm.weight, own.norm.weight)
    other = orca.ImageEmbedder(swin, (5, 30, 30), init="random")
    assert not torch.allclose(other.conv.weight, tiled)
    assert torch.equal(other.norm.weight, torch.ones(48))


def test_series_embedder_at_random_shares_nothing_with_the_body(roberta):
    f_t = orca.SeriesEmbedder(roberta, (1, 46), 46, init="random")
    assert torch.equal(f_t.norm.weight, torch.ones(128))
    table = roberta.embeddings.position_embeddings.weight[2:48]
    assert not torch.allclose(f_t.position, table)


def test_another_image_size_has_other_grids_and_the_same_weights():
    large = bodies.load_body("tiny_swin", (1, 128, 128), 1024)[0]
    model = orca.Model(large, (1, 128, 128), (1, 128, 128), 1024)
    assert model.f_t.grid == (32, 32) and model(torch.randn(1, 1, 128, 128)).shape[-1] == 128


# ---- the predictor ----


def test_points_of_a_series_come_from_all_patches_of_all_layers():
    maps = [((5,), 6)] * 3
    h_t = orca.Predictor(maps, (2, 15))
    torch.nn.init.normal_(h_t.linear.weight)
    features = [torch.randn(4, 5, 6, requires_grad=True) for _ in maps]
    out = h_t(features)
    assert out.shape == (4, 2, 15)
    for z in features:
        (slope,) = torch.autograd.grad(out[:, 1, 0].sum(), z, retain_graph=True)
        assert slope.norm(dim=-1).min() > 0  # the first point depends on every patch


def test_each_patch_of_an_image_predicts_its_own_points():
    h_t = orca.Predictor([((5, 4), 6)], (2, 15, 12))
    tile = h_t.tiles[0]
    torch.nn.init.normal_(tile[1].weight)
    z = torch.randn(4, 5, 4, 6)
    out = h_t([z])
    for i in range(5):
        for j in range(4):
            own = tile(z[:, i, j]).view(4, 2, 3, 3)  # (B, D) -> (B, C, p, p)
            torch.testing.assert_close(out[..., 3 * i : 3 * i + 3, 3 * j : 3 * j + 3], own)


@pytest.mark.parametrize("out_shape", [(1, 85, 85), (2, 20, 24), (3, 128, 128), (1, 7, 64)])
def test_a_dense_predictor_gives_the_shape_asked_for(swin, out_shape):
    maps = bodies.ImageBody(swin, (16, 16)).maps
    h_t = orca.Predictor(maps, out_shape)
    features = [torch.randn(2, *grid, D) for grid, D in maps]
    assert h_t(features).shape == (2, *out_shape)


def test_predictions_start_at_the_mean_and_have_the_units_of_y(roberta):
    model = orca.Model(copy.deepcopy(roberta), (1, 46), (1, 46), 32)
    mean, std = torch.linspace(100, 200, 46)[None], torch.linspace(0, 3, 46)[None]
    model.h_t.mean, model.h_t.std = mean, std
    x = torch.randn(3, 1, 46)
    torch.testing.assert_close(model(x), mean.expand(3, 1, 46))
    torch.nn.init.normal_(model.h_t.linear.weight)
    moved = (model(x) - mean).abs().mean(dim=0)[0]
    assert moved[0] == 0 and moved[1:].min() > 0  # where y never varies the mean is certain


# ---- what tasks/ computes of a task ----


def arrays(n=64, axes=1, kind="classes"):
    """A task that can be learnt: y depends on the mean of x, or pixel by pixel on x."""
    rng = np.random.default_rng(n)
    shape = {1: (2, 30), 2: (2, 16, 16)}[axes]
    x = rng.normal(size=(n, *shape)) + rng.normal(size=(n, *(1 for _ in shape)))
    level = x.mean(axis=tuple(range(1, x.ndim)))
    y = {
        "classes": (level > 0).astype(int),
        "labels": np.stack([level > 0, level > 0.5, level < 0.2], axis=1).astype(int),
        "scalar": 50 + 9 * level,
        "vector": np.stack([level, -level], axis=1),
        "dense": 3 + x[:, :1] * np.sign(x[:, 1:]),
        "mask": (x[:, :1] > 0).astype(int),
    }[kind]
    return x.astype(np.float32), y


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")

    def make(axes, kind):
        path = folder / f"{kind}-{axes}.npz"
        (x, y), (x_test, y_test) = arrays(64, axes, kind), arrays(48, axes, kind)
        np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
        return str(path)

    return make


OWN = {  # kind of y: (kind of the task, shape of the prediction in 1D, in 2D, metric)
    "classes": ("classes", (2,), (2,), "0-1 error"),
    "labels": ("labels", (3,), (3,), "1 - mAP"),
    "scalar": ("regression", (1,), (1,), "RMSE / deviation"),
    "vector": ("regression", (2,), (2,), "RMSE / deviation"),
    "dense": ("regression", (1, 30), (1, 16, 16), "RMSE / deviation"),
    "mask": ("mask", (1, 30), (1, 16, 16), "1 - AUROC"),
}


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("kind", list(OWN))
def test_the_kind_of_one_s_own_data_follows_from_its_arrays(kind, axes, file):
    task = tasks.load_task(file(axes, kind))
    want = (OWN[kind][0], OWN[kind][axes], OWN[kind][3])
    assert (task.kind, task.out_shape, task.metric_name) == want
    assert task.sources["embedded"] == ("words" if axes == 1 else "shapes")
    x, y = task.train[0]
    assert x.dtype == torch.float32 and tuple(y.shape) == task.y_shape


def test_images_with_a_map_each_get_a_channel(tmp_path):
    x, y = arrays(40, 2, "mask")
    np.savez(tmp_path / "m.npz", x_train=x, y_train=y[:, 0], x_test=x, y_test=y[:, 0])
    assert tasks.load_task(str(tmp_path / "m.npz")).out_shape == (1, 16, 16)


BAD = {
    "counts": (
        {"y_train": np.full((40, 3), 2), "y_test": np.ones((40, 3), int)},
        "y_train of shape .40, 3. holds whole numbers besides 0 and 1; give zeros",
    ),
    "shape": (
        {"y_train": np.zeros((40, 5, 6, 7))},
        "y_train has shape .40, 5, 6, 7., expected .n,., .n, K.",
    ),
    "types": (
        {"y_train": np.zeros((40, 2)), "y_test": np.zeros((40, 2), int)},
        "y holds floats in one split and whole numbers in another",
    ),
    "axes": ({"x_train": np.zeros((40, 1, 2, 3, 4))}, "x_train has shape .*, expected series"),
    "sizes": ({"x_test": np.zeros((40, 2, 31))}, "x differs in shape between the splits"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_arrays_that_make_no_task_are_refused(case, tmp_path):
    x, y = arrays(40)
    change, message = BAD[case]
    content = {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | change
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(ValueError, match=f"bad.npz: {message}"):
        tasks.load_task(str(tmp_path / "bad.npz"))


def toy(y, kind, train=None):
    """A task around targets y."""
    x = torch.arange(len(y)).float()[:, None, None].expand(-1, 2, 3)
    train = train or torch.utils.data.TensorDataset(x, y)
    shape = tuple(y.shape[1:])
    fields = {"x_shape": (2, 3), "y_shape": shape, "kind": kind, "num_classes": 2, "train": train}
    rest = dict.fromkeys(set(tasks.Task.__dataclass_fields__) - set(fields))
    return tasks.Task(**fields, **rest)


def test_statistics_are_per_channel_and_per_entry_and_skip_the_unknown():
    y = torch.tensor([[1.0, 5.0], [3.0, float("nan")], [5.0, 5.0]])
    x_mean, x_std, y_mean, y_std = tasks.statistics(toy(y, "regression"))
    torch.testing.assert_close(x_mean, torch.ones(2, 1))
    torch.testing.assert_close(x_std, torch.full((2, 1), (2 / 3) ** 0.5))
    torch.testing.assert_close(y_mean, torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(y_std, torch.tensor([(8 / 3) ** 0.5, 0.0]))


def test_targets_without_classes_get_them_from_k_means():
    rng = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 10
    y = 5.0 * F.one_hot(truth, 10).float().repeat_interleave(4, dim=1).view(300, 1, 8, 5)
    y = y + 0.1 * torch.randn(y.shape, generator=rng)
    y[0, 0, 0, 0] = float("nan")
    rows, label = tasks.some_classes(toy(y, "regression"), seed=0)
    assert rows == list(range(300)) and label.dtype == torch.int64
    assert label.unique().numel() <= 10
    pairs = {(int(a), int(b)) for a, b in zip(truth, label, strict=True)}
    assert len(pairs) <= 12  # k-means may split or join a cluster, not scatter them
    again = tasks.some_classes(toy(y, "regression"), seed=0)[1]
    assert torch.equal(label, again)
    classes = toy(truth, "classes")
    assert torch.equal(tasks.some_classes(classes)[1], truth)


def test_large_training_sets_are_sampled(monkeypatch):
    monkeypatch.setattr(tasks, "ENOUGH", 20)
    rows, label = tasks.some_classes(toy(torch.arange(50) % 2, "classes"), seed=1)
    assert len(set(rows)) == 20 == len(label) and rows == sorted(rows)


def test_chunks_of_a_clip_are_averaged():
    dataset = torch.utils.data.TensorDataset(torch.zeros(5, 1))
    dataset.groups = torch.tensor([7, 3, 7, 3, 9])
    out = torch.arange(10.0).view(5, 2)
    y = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 1]])
    mean, label = tasks.pooled(dataset, out, y)
    torch.testing.assert_close(
        mean, torch.stack([out[[1, 3]].mean(0), out[[0, 2]].mean(0), out[4]])
    )
    torch.testing.assert_close(label, y[[1, 0, 4]])
    assert tasks.pooled(torch.utils.data.TensorDataset(out), out, y) == (out, y)


def test_validation_held_out_of_a_varying_set_is_fixed(monkeypatch):
    class Varying(torch.utils.data.Dataset):
        fixed = False

        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.full((1, 4), float(i)), torch.zeros(1, 4)

    train, val = tasks._held_out(Varying(), 0)
    assert val.dataset.fixed and not train.dataset.fixed and (len(train), len(val)) == (36, 4)


# ---- whole runs ----


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("kind", list(OWN))
@pytest.mark.parametrize("method", [orca, pare, proposed], ids=lambda m: m.METHOD)
def test_every_kind_runs_and_its_loss_falls(method, kind, axes, file, tmp_path):
    small = {"epochs": 3, "source_size": 60, "batch_size": 16, "out": str(tmp_path / "run")}
    small |= {"patches": 64 if axes == 2 else 0}
    if method is orca:
        small |= {"align_epochs": 1, "align_steps_per_epoch": 1, "align_samples": 32}
    if method is proposed:
        small |= {"contrast_epochs": 1, "contrast_steps_per_epoch": 2}
    task = tasks.load_task(file(axes, kind))
    result = method.main(method.configure(task=file(axes, kind), **small))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]
    assert losses[-1] < losses[0] and result["metric"] == OWN[kind][3]
    model = method.load(tmp_path / "run")
    x, y = task.test[:]
    with torch.no_grad():
        out = model(x)
    assert tuple(out.shape[1:]) == task.out_shape
    assert round(task.metric(out, y), 4) == pytest.approx(result["test_error"], abs=2e-4)


def test_pare_takes_masks_of_the_source_where_the_target_is_dense(file, tmp_path, monkeypatch):
    seen = []
    load = tasks.load_source
    monkeypatch.setattr(tasks, "load_source", lambda *a, **k: seen.append(load(*a, **k)) or seen[0])
    common = {"epochs": 1, "source_size": 20, "patches": 64, "out": str(tmp_path / "run")}
    pare.main(pare.configure(task=file(2, "dense"), **common))
    assert seen[0].out_shape == (1, 32, 32) and seen[0].x.shape == (20, 3, 32, 32)


def test_random_swin_has_the_shape_but_not_the_weights(swin):
    other = bodies.load_body("random:tiny_swin", (1, 20, 20), 256)[0]
    for (name, a), b in zip(swin.named_parameters(), other.parameters(), strict=True):
        assert a.shape == b.shape, name
    a, b = (s.layers[0].blocks[0].mlp.fc1.weight for s in (swin, other))
    assert not torch.equal(a, b) and float(b.detach().std()) == pytest.approx(
        (2 / 240) ** 0.5, rel=0.1
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_swin", "no folder bodies/no_such_swin or no_such_swin; give tiny_swin"),
        ("tiny_roberta", "tiny_roberta cannot be loaded"),
        ("random:resnet18", "random:resnet18 cannot be loaded"),
        ("random:convnext_tiny", "it is a ConvNeXt; images take a Swin transformer or a ViT"),
    ],
)
def test_what_is_no_swin_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        bodies.load_body(name, (3, 32, 32), 256)


SMALL = {"train": 40, "val": 30, "test": 30}


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.NAMES)
def test_every_task_runs(name, tmp_path, monkeypatch):
    """The methods by turns; test_device.py runs every method on every kind of task."""
    method = (orca, pare, proposed)[tasks.NAMES.index(name) % 3]
    module = importlib.import_module(f"tasks.{name}")
    monkeypatch.setitem(module.TASK, "sizes", SMALL)
    common = {"task": name, "epochs": 1, "source_size": 40, "out": str(tmp_path / "run")}
    common |= {"patches": 64 if len(module.TASK["x_shape"]) == 3 else 0}
    if method is orca:
        common |= {"align_epochs": 1, "align_steps_per_epoch": 1, "align_samples": 24}
    if method is proposed:
        common |= {"contrast_epochs": 1, "contrast_steps_per_epoch": 1}
    result = method.main(method.configure(**common))
    assert (result["task"], result["train_size"]) == (name, 40)
    assert result["metric"] == module.TASK["metric_name"] and np.isfinite(result["test_error"])
    model, (x, y) = method.load(tmp_path / "run"), module.simulate(3, 1)
    with torch.no_grad():
        out = model(torch.from_numpy(x))
    assert torch.isfinite(module.TASK["loss"](out, torch.from_numpy(y)))


@pytest.mark.parametrize("name", tasks.NAMES)
def test_records_say_what_the_simulators_make(name):
    module = importlib.import_module(f"tasks.{name}")
    record, (x, y) = module.TASK, module.simulate(4, 0)
    assert (x.shape[1:], y.shape[1:]) == (record["x_shape"], record["y_shape"])
    assert x.dtype == np.float32 and y.dtype == (
        np.int64 if record["kind"] == "classes" else np.float32
    )
    assert {"ORCA", "PaRe"} <= set(record["published"])
    assert set(record["sources"].values()) <= set(tasks.SOURCES)
    assert {"train", "test"} <= set(record["splits"])


@pytest.mark.parametrize("name", tasks.PDES)
def test_published_problems_have_the_papers_shapes(name):
    module = importlib.import_module(f"tasks.{name}")
    record, (x, y) = module.TASK | module.PUBLISHED, module.simulate(2, 0, published=True)
    assert (x.shape[1:], y.shape[1:]) == (record["x_shape"], record["y_shape"])
    assert np.isfinite(x).all() and np.isfinite(y).all()


def test_only_equations_have_other_published_problems():
    with pytest.raises(ValueError, match="'ecg' has no other published problem; those are adv"):
        tasks.load_task("ecg", published=True)
    with pytest.raises(ValueError, match="'mine.npz' has no other published problem"):
        tasks.load_task("mine.npz", published=True)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_real_data_that_are_not_there_are_one_line_that_helps(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}.*--data simulated") as error:
        tasks.load_task(name, "real", tmp_path, published=name in tasks.PDES)
    assert "\n" not in str(error.value)

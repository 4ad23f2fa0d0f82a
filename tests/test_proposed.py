"""The proposal: its predictor, its stages, what is frozen, runs. The rest: test_contrast.py."""

import json
import math
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import contrast
import orca
import proposed
import run as plumbing
import tasks


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- what contrast.py is given ----


def test_sigmas_are_checked():
    assert proposed.scales(proposed.Config(sigmas="0,0.5")) == [0.0, 0.5]
    for bad in ("x", "0.1,", "1", "-0.1", "nan"):
        with pytest.raises(ValueError, match=f"--sigmas {bad}: expected numbers from 0 to below 1"):
            proposed.scales(proposed.Config(sigmas=bad))


@pytest.mark.parametrize("kind", ["classes", "labels", "vector", "field", "image"])
def test_N4_what_correlates_is_the_label_or_the_mean_feature(kind, tmp_path):
    task = tasks.load_task(str(data_of(kind, tmp_path)))
    rows, y = tasks.some_classes(task)
    d = torch.randn(len(rows), 6, generator=rng())
    u = proposed.directions(task, rows, y, d)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(len(rows)))
    if kind == "classes":
        mean = F.normalize(torch.stack([d[y == c].mean(dim=0) for c in range(3)]), dim=1)
        torch.testing.assert_close(u, mean[y])
        return
    v = torch.stack([task.train[row][1] for row in rows]).double().flatten(1)
    if kind in ("labels", "vector"):  # small enough to be taken as they are
        v = (v - v.mean(dim=0)) / v.std(dim=0, correction=0)
        torch.testing.assert_close(u @ u.T, (F.normalize(v) @ F.normalize(v).T).float())
    shuffled = proposed.directions(task, rows, y, torch.randn_like(d))
    assert torch.equal(u, shuffled)  # of values, features have no say


# ---- the predictor ----


MAPS_1D, MAPS_2D = [((6,), 8)] * 2, [((4, 4), 8), ((2, 2), 16)]
SHAPES = [(MAPS_1D, (3,)), (MAPS_1D, (2, 10)), (MAPS_2D, (3,)), (MAPS_2D, (2, 9, 9))]


def stages(maps, B=32, seed=0):
    make = rng(seed)
    return [2 + 3 * torch.randn(B, *grid, D, generator=make) for grid, D in maps]


class Ready(torch.nn.Module):
    """A model whose g(f(x)) for x = 0, 1, ... are the features given."""

    def __init__(self, features, h_t):
        super().__init__()
        self.given, self.h_t = features, h_t

    def features(self, x):
        return self.h_t.features([z[x[:, 0].long()] for z in self.given])


def measured(h_t, given):
    """d of the features given, whose scale h_t takes over: stage 1."""
    rows = torch.arange(len(given[0]))
    task = type("task", (), {"train": [(row[None].float(), 0) for row in rows]})
    return proposed.features(Ready(given, h_t), task, rows.tolist())


@pytest.mark.parametrize(("maps", "out_shape"), SHAPES)
def test_predictor_standardises_and_maps_features_to_outputs(maps, out_shape):
    h_t, features = proposed.Predictor(maps, out_shape), stages(maps)
    d = h_t.features(features)
    M = sum(math.prod(grid) * D for grid, D in maps) if len(out_shape) > 1 else maps[-1][1]
    assert d.shape == (32, M)
    d = measured(h_t, features)
    torch.testing.assert_close(h_t.features(features), d)  # from now on
    for z in h_t.split(d):
        flat = z.flatten(0, 1)
        torch.testing.assert_close(flat.mean(dim=0), torch.zeros(z.shape[2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(flat.std(dim=0, correction=0), torch.ones(z.shape[2]))
    assert h_t(d).shape == (32, *out_shape)
    h_t.mean, h_t.std = torch.full(out_shape, 7.0), torch.full(out_shape, 2.0)
    torch.testing.assert_close(h_t(d), 7 + 2 * h_t.output(d))
    if len(out_shape) > 1:  # training starts from the mean of y
        assert (h_t(d) == 7).all()


def test_a_channel_that_is_constant_is_left_at_0():
    h_t = proposed.Predictor(MAPS_1D, (3,))
    features = stages(MAPS_1D)
    features[-1][..., 2] = 5.0
    d = measured(h_t, features)
    assert d.isfinite().all() and (d[:, 2] == 0).all()


@pytest.mark.parametrize("at", ["hidden", "output"])
@pytest.mark.parametrize(("maps", "out_shape"), SHAPES)
def test_what_is_contrasted_has_length_1_and_a_gradient(maps, out_shape, at):
    torch.manual_seed(0)
    h_t = proposed.Predictor(maps, out_shape)
    d = measured(h_t, stages(maps))
    head = proposed.Contrast(h_t, proposed.Config(contrast_at=at), "classes")
    z, y = head(d), torch.arange(32) % 3
    torch.testing.assert_close(z.norm(dim=1), torch.ones(32))
    loss, _ = contrast.inner(z, y, torch.ones(32, 32), torch.ones(32), 0.2)
    loss.backward()
    assert all(w.grad is not None for w in head.trained())
    learns = any(w.grad is not None for w in h_t.last.parameters())
    assert learns == (at == "output")
    centres = head.centres(d, y)
    want = F.normalize(torch.stack([z[y == c].mean(dim=0) for c in range(3)]), dim=1)
    torch.testing.assert_close(centres, want.detach())


# ---- the stages ----


def data_of(kind, folder, n=60):
    """A file with a target of the kind, which depends on the inputs."""
    make = np.random.default_rng(0)
    two = kind.startswith("image")
    x = make.normal(size=(n, 1, 16, 16) if two else (n, 1, 40)).astype(np.float32)
    y = {
        "classes": lambda: np.arange(n) % 3,
        "image classes": lambda: np.arange(n) % 3,
        "labels": lambda: make.integers(0, 2, (n, 4)),
        "vector": lambda: x[:, 0, :2] * 3,
        "field": lambda: x * 2,
        "image": lambda: x * 2,
    }[kind]()
    if kind.endswith("classes"):
        x += y.reshape(-1, *[1] * (x.ndim - 1))
    path = folder / "data.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[: n // 3], y_test=y[: n // 3])
    return path


def built(path, **given):
    cfg, task, _, _, model, _ = proposed.build(proposed.configure(task=str(path), **given))
    return cfg, task, model


def state(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def changed(model, before):
    return {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}


SMALL = {"contrast_epochs": 2, "contrast_steps_per_epoch": 3}


@pytest.mark.parametrize("at", ["hidden", "output"])
@pytest.mark.parametrize("kind", ["classes", "image"])
def test_stage_2_trains_h_alone_on_one_pass_of_the_body(kind, at, tmp_path):
    cfg, task, model = built(data_of(kind, tmp_path), contrast_at=at, **SMALL)
    before, passes, seen = state(model), [], model.g.forward
    model.g.forward = lambda z: passes.append(len(z)) or seen(z)
    record = plumbing.Record(None)
    proposed.train_predictor(model, task, *proposed.labelled(model, task, cfg), cfg, record)
    assert sum(passes) == len(task.train)  # features are made once
    parts = {name.rsplit(".", 1)[0].split(".0")[0] for name in changed(model, before)}
    assert all(name.startswith(("h_t.inner", "h_t.last", "h_t")) for name in parts)
    touched = {name.split(".")[1] for name in changed(model, before)}
    assert touched == {"d_mean", "d_std", "inner"} | ({"last"} if at == "output" else set())
    row = record.rows[-1]
    assert 0 < row["preserved"] <= 1 and row["contrast"] > 0 and row["undefined"] == 0


def test_stage_2_separates_classes(tmp_path):
    given = {**SMALL, "contrast_epochs": 6}
    cfg, task, model = built(data_of("classes", tmp_path), **given)
    record = plumbing.Record(None)
    proposed.train_predictor(model, task, *proposed.labelled(model, task, cfg), cfg, record)
    assert record.rows[-1]["contrast"] < 0.8 * record.rows[0]["contrast"]
    assert record.rows[-1]["separability"] > record.rows[0]["separability"]


@pytest.mark.parametrize("kind", ["classes", "image classes"])
@pytest.mark.parametrize("what", proposed.FINETUNE)
def test_N6_frozen_weights_stay_bit_for_bit(what, kind, tmp_path):
    given = {"contrast": "none", "finetune": what, "epochs": 1}
    cfg, task, model = built(data_of(kind, tmp_path), **given)
    rows, y = proposed.labelled(model, task, cfg)
    proposed.train_predictor(model, task, rows, y, cfg, plumbing.Record(None))
    before = state(model)
    proposed.finetune(model, task, cfg, plumbing.Record(None))
    moved = changed(model, before)
    parts = {"embedder": {"f_t", "g", "h_t"}, "frozen-embedder": {"g", "h_t"}}
    parts["projection"] = {"f_t", "h_t"}
    assert {name.split(".")[0] for name in moved} == parts[what]
    own = {name for name in moved if name.startswith("f_t")}
    if what == "projection":
        assert own <= {"f_t.conv.weight", "f_t.conv.bias"}
    assert ("f_t.conv.weight" in own) == (what != "frozen-embedder")


@pytest.mark.parametrize("preserve", ["", *proposed.PRESERVE])
@pytest.mark.parametrize("kind", ["classes", "vector"])
def test_N5_which_P_is_taken(kind, preserve, tmp_path):
    cfg, task, model = built(data_of(kind, tmp_path), preserve=preserve, **SMALL)
    rows, y = proposed.labelled(model, task, cfg)
    d = proposed.features(model, task, rows)
    head = proposed.Contrast(model.h_t, cfg, task.kind)
    a, s = contrast.noise_levels([0.3], 1)
    level, centres = torch.arange(len(d)) % 2, head.centres(d, y)
    a, s = a[level], s[level]
    noisy = contrast.perturb(d, a, s, rng())
    P = head.preserved(d, noisy, y, a, s, centres)
    scores = lambda d: head(d) @ centres.T  # noqa: E731
    C = contrast.margin(scores(d), y).detach()
    want = {
        "none": lambda: torch.ones_like(s),
        "margin": lambda: contrast.preserved_by_margin(scores, d, y, a, s),
        "jacobian": lambda: contrast.preserved_by_jacobian(scores, d, noisy, C),
        "slope": lambda: contrast.preserved_by_slope(scores, d, noisy, C),
    }
    if kind == "vector":  # no labels to keep: a tolerance
        C = proposed.TOLERANCE
        want["jacobian"] = lambda: contrast.preserved_by_jacobian(head, d, noisy, C, soft=True)
        want["slope"] = lambda: contrast.preserved_by_slope(head, d, noisy, C)
    want[""] = want["jacobian" if kind == "vector" else "margin"]
    torch.testing.assert_close(P, want[preserve]())
    assert 0 <= P.min() and P.max() <= 1
    if preserve == "none" or kind == "vector":
        assert (P[s == 0] == 1).all()


def test_one_cluster_or_class_cannot_be_contrasted(tmp_path, monkeypatch):
    """Rare: tasks refuses a training set whose targets are all one, but few rows can be."""
    monkeypatch.setattr(tasks, "some_classes", lambda *_: (list(range(9)), torch.zeros(9).long()))
    cfg = proposed.configure(task=str(data_of("vector", tmp_path)), out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="of one class or cluster, .* give --contrast none"):
        proposed.main(cfg)
    assert not (tmp_path / "run").exists()


def test_a_single_output_has_no_direction(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 1, 20)).astype(np.float32)
    y = x[:, 0, :1]
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    cfg, task, model = built(tmp_path / "d.npz", contrast_at="output")
    with pytest.raises(ValueError, match="a single output has no direction; give hidden"):
        proposed.labelled(model, task, cfg)
    cfg, task, model = built(tmp_path / "d.npz", **SMALL)
    record = plumbing.Record(None)
    proposed.train_predictor(model, task, *proposed.labelled(model, task, cfg), cfg, record)
    assert record.rows[-1]["contrast"] < record.rows[0]["contrast"]


def test_features_that_memory_has_no_room_for_are_fewer_and_it_is_said(
    tmp_path, monkeypatch, capsys
):
    cfg, task, model = built(data_of("field", tmp_path))
    M = sum(N * D for N, D in model.h_t.tokens)
    assert len(proposed.labelled(model, task, cfg)[0]) == len(task.train) == 54
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(proposed, "CACHE", 20 * M)
    rows, y = proposed.labelled(model, task, cfg)
    assert len(rows) == len(y) == len(set(rows)) == 20
    assert "stages 1 and 2 use 20 of the 54 training samples" in capsys.readouterr().out


# ---- whole runs ----


KEYS = "method task data body source seed metric test_error val_error test_error_normal "
KEYS += "test_error_perturbed std_perturbed epochs train_size spikes time_s params_m device "
KEYS += "precision converged baselines"


@pytest.mark.parametrize("kind", ["classes", "labels", "vector", "field", "image classes", "image"])
def test_a_run_on_every_kind_of_task(kind, tmp_path):
    given = {"task": str(data_of(kind, tmp_path)), "epochs": 2, "draws": 3}
    given |= {"patches": 64 if "image" in kind else 0}
    prediction = "perturbed" if kind in ("classes", "image") else "normal"
    cfg = proposed.configure(**given, **SMALL, prediction=prediction, out=str(tmp_path / "run"))
    result = proposed.main(cfg)
    assert list(result) == KEYS.split()
    assert result["test_error"] == result[f"test_error_{prediction}"]
    assert result["std_perturbed"] > 0 and np.isfinite(list(result.values())[7:12]).all()
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["contrast"] * 2 + ["finetune"] * 2
    model, task = proposed.load(tmp_path / "run"), tasks.load_task(given["task"])
    x, y = (torch.stack(part) for part in zip(*task.test, strict=True))
    with torch.no_grad():
        out = model(x)
    assert task.metric(out, y) == pytest.approx(result["test_error"], abs=2e-6)


def test_without_stage_2_a_series_to_a_series_is_naive_fine_tuning(tmp_path):
    """There h^t is ORCA's but for the place of the standardisation, which it takes back."""
    common = {"task": str(data_of("field", tmp_path)), "epochs": 2}
    a = {"contrast": "none", "draws": 1, "out": str(tmp_path / "proposed")}
    a = proposed.main(proposed.configure(**common, **a))
    b = orca.main(orca.configure(**common, align="none", out=str(tmp_path / "orca")))
    assert a["test_error"] == pytest.approx(b["test_error"], rel=1e-3)


@pytest.fixture(scope="module")
def whole(series, tmp_path_factory):
    """A short run on four classes of series."""
    out = tmp_path_factory.mktemp("runs") / "proposed"
    cfg = proposed.configure(
        task=str(series), epochs=3, draws=4, body_lr=2e-3, out=str(out), **SMALL
    )
    return cfg, proposed.main(cfg), out


def test_a_run_learns_and_the_same_seed_gives_the_same(whole, tmp_path):
    cfg, result, out = whole
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < 0.8 * rows[2]["train_loss"]
    assert result["test_error"] < 0.5  # four classes: chance is 0.75
    again = proposed.main(proposed.configure(**{**vars(cfg), "out": str(tmp_path / "again")}))
    assert {**again, "time_s": 0} == {**result, "time_s": 0}


FLAGS = ["--contrast none", "--contrast outer", "--contrast literal", "--contrast-at output"]
FLAGS += ["--contrast-epochs 1", "--contrast-steps-per-epoch 2", "--contrast-lr 1e-2"]
FLAGS += ["--tau 0.5", "--lambda-eps 0.1", "--preserve jacobian", "--preserve slope"]
FLAGS += ["--preserve none", "--sigmas 0.3", "--noise-steps 2"]
FLAGS += ["--finetune projection", "--finetune frozen-embedder"]


@pytest.mark.filterwarnings("ignore:--contrast literal")
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_changes_the_run(flag, whole, series, tmp_path):
    cfg, plain, out = whole
    argv = f"--task {series} --epochs 1 --schedule-epochs 3 --draws 4 --body-lr 2e-3"
    argv += f" --contrast-epochs 2 --contrast-steps-per-epoch 3 {flag} --out {tmp_path / 'run'}"
    proposed.main(proposed.parse_args(argv.split()))
    losses = [
        next(json.loads(row) for row in lines if '"finetune"' in row)["train_loss"]
        for lines in (
            (p / "metrics.jsonl").read_text().splitlines() for p in (tmp_path / "run", out)
        )
    ]
    assert losses[0] != losses[1]


def test_the_number_of_draws_acts_on_the_perturbed_prediction_alone(tmp_path):
    path, found = data_of("vector", tmp_path), []
    for draws in (12, 24):  # of 12 levels
        given = {"task": str(path), "epochs": 1, "draws": draws, "out": str(tmp_path / str(draws))}
        found.append(proposed.main(proposed.configure(**given, **SMALL)))
    assert found[0]["test_error_normal"] == found[1]["test_error_normal"]
    assert found[0]["test_error_perturbed"] != found[1]["test_error_perturbed"]


def test_literal_form_warns_when_it_was_undefined(series, tmp_path):
    flags = f"--task {series} --contrast literal --contrast-at output --epochs 1 --draws 2"
    flags += f" --contrast-lr 0.05 --out {tmp_path / 'run'}"
    with pytest.warns(UserWarning, match="--contrast literal was undefined for .* inner is always"):
        proposed.main(proposed.parse_args(flags.split()))


def test_a_run_broken_in_stage_2_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch):
    cfg, result, out = whole
    given = {**vars(cfg), "out": str(tmp_path / "run")}
    log, calls = plumbing.Record.log, []

    def broken(self, *args, **values):
        calls.append(args)
        if len(calls) == 2:  # in the second epoch of stage 2
            raise KeyboardInterrupt
        log(self, *args, **values)

    monkeypatch.setattr(plumbing.Record, "log", broken)
    with pytest.raises(KeyboardInterrupt):
        proposed.main(proposed.configure(**given))
    monkeypatch.undo()
    again = proposed.main(proposed.configure(**{**given, "resume": True}))
    assert {**again, "time_s": 0} == {**result, "time_s": 0}


@pytest.mark.slow
def test_a_batch_of_512_contrasts_takes_less_than_30_ms():
    """On two cores, with nothing else to do: in time of the processor, 60 ms."""
    h_t = proposed.Predictor([((32,), 128)], (24,))
    head = proposed.Contrast(h_t, proposed.Config(), "classes")
    d, y, times = torch.randn(512, 128), torch.arange(512) % 24, []
    lam = contrast.label_weights(F.normalize(d), y, 1.0)
    for _ in range(30):
        start = time.process_time()
        loss, _ = contrast.inner(head(d), y, lam, torch.ones(512), 0.2)
        loss.backward()
        times.append(time.process_time() - start)
    assert sorted(times)[15] < 0.06


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(whole, tmp_path, precision):
    cfg, result, out = whole
    gpu = {**vars(cfg), "out": str(tmp_path), "precision": precision, "device": "cuda"}
    assert abs(proposed.main(proposed.configure(**gpu))["val_error"] - result["val_error"]) < 0.3

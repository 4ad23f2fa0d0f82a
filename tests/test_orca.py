"""ORCA: the parts, the alignment, what freezing freezes, and a whole run."""

import copy
import json

import numpy as np
import pytest
import torch

import bodies
import orca
import run as plumbing
import tasks


@pytest.fixture(scope="module")
def body():
    return bodies.load_body("tiny_roberta", (1, 46), 32)


@pytest.fixture(scope="module")
def source(body):
    return tasks.load_source("words", 200, tokenize=body[1], length=32)


def fresh(body, x_shape=(1, 46), num_classes=4, patches=512):
    torch.manual_seed(0)
    return orca.Model(copy.deepcopy(body[0]), x_shape, (num_classes,), patches)


def state(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def changed(model, before):
    return {n.split(".")[0] for n, w in model.state_dict().items() if not torch.equal(w, before[n])}


@pytest.mark.parametrize(
    ("L", "most", "length"),
    [(46, 512, 1), (1000, 64, 20), (3072, 128, 24), (1024, 32, 32), (46, 23, 2), (1009, 512, 2)],
)
def test_patch_length_is_the_smallest_divisor_or_pads(L, most, length):
    assert bodies.patch_length(L, most) == length


@pytest.mark.parametrize(
    ("C", "L", "patches", "N"), [(1, 46, 512, 46), (3, 100, 30, 25), (2, 47, 30, 24)]
)
def test_O1_shapes_of_the_parts(body, C, L, patches, N):
    model = fresh(body, (C, L), patches=patches)
    x = torch.randn(5, C, L)
    z = model.f_t(x)
    assert z.shape == (5, N, 128)
    assert [features.shape for features in model.g(z)] == [(5, N, 128)] * 4
    assert model.h_t(model.g(z)).shape == (5, 4)
    torch.testing.assert_close(model(x), model.h_t(model.g(model.f_t(x))))  # (O1)


def test_O1_body_and_source_embedder_are_the_library_s_own(body):
    """g(f^s(tokens)) is what transformers computes for the same tokens."""
    roberta = copy.deepcopy(body[0]).eval()
    ids = torch.randint(5, 4000, (3, 20))
    with torch.no_grad():
        ours = bodies.SeriesBody(roberta, (20,))(orca.source_embedder(roberta)(ids))
        theirs = roberta(ids, output_hidden_states=True)
        torch.testing.assert_close(ours[-1], theirs.last_hidden_state)
        for mine, other in zip(ours, theirs.hidden_states[1:], strict=True):
            torch.testing.assert_close(mine, other)


def test_embedder_starts_from_the_body_s_norm_and_positions(body):
    table, f_t = body[0].embeddings, fresh(body).f_t
    torch.testing.assert_close(f_t.norm.weight, table.LayerNorm.weight)
    torch.testing.assert_close(f_t.position, table.position_embeddings.weight[2:48])
    x = torch.randn(2, 1, 46)
    z = table.LayerNorm(f_t.conv(x).transpose(1, 2)) + table.position_embeddings.weight[2:48]
    torch.testing.assert_close(f_t(x), z)


def test_embedder_standardises_by_the_training_set(series):
    task = tasks.load_task(str(series))
    mean, std, y_mean, y_std = tasks.statistics(task)
    x = torch.stack([x for x, _ in task.train])
    assert torch.equal(y_mean, torch.zeros(4)) and torch.equal(y_std, torch.ones(4))
    torch.testing.assert_close(mean, x.mean().view(1, 1))
    torch.testing.assert_close(std, x.std(correction=0).view(1, 1))


def test_more_patches_than_positions_is_refused(body):
    with pytest.raises(ValueError, match="600 patches exceed the body's 512 positions"):
        fresh(body, (1, 600), patches=600)


def test_random_body_has_the_shape_but_not_the_weights(body):
    roberta, _ = bodies.load_body("random:tiny_roberta", (1, 46), 32)
    for (name, a), b in zip(body[0].named_parameters(), roberta.parameters(), strict=True):
        assert a.shape == b.shape, name
    a, b = (r.encoder.layer[0].attention.self.query.weight for r in (body[0], roberta))
    assert not torch.equal(a, b)


def test_another_kind_of_body_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="cannot be loaded .it is a gpt2; series take a RoBERTa"):
        bodies.load_body(str(tmp_path), (1, 46), 32)


def test_balanced_rows_take_as_many_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 9 + [2] * 3)
    rows = orca.balanced_rows(labels, 30, torch.Generator().manual_seed(0))
    assert labels[rows].bincount().tolist() == [10, 9, 3] and len(rows.unique()) == len(rows)


@pytest.mark.parametrize("kind", [name for name in orca.ALIGN if name != "none"])
def test_O2_lowers_its_distance_and_trains_f_t_alone(kind, body, source, series, tmp_path):
    task = tasks.load_task(str(series))
    model = fresh(body)
    before, embeddings = state(model), copy.deepcopy(body[0].embeddings.state_dict())
    z_s = orca.source_features(body[0].embeddings, source, torch.device("cpu"))
    assert z_s.shape == (200, 128) and not z_s.requires_grad
    how = {"align": kind, "align_samples": 64, "align_lr": 5e-3}
    cfg = orca.configure(**how, align_epochs=10, align_steps_per_epoch=3)
    record = orca.Record(tmp_path)
    orca.align(model, z_s, source.y, task, cfg, record)
    distance = [row["distance"] for row in record.rows]
    assert distance[-1] < 0.85 * distance[0] and len(record.rows) == 10
    assert all(row["grad_norm"] > 0 and 0 < row["separability"] < 1 for row in record.rows)
    assert changed(model, before) == {"f_t"}
    for name, w in body[0].embeddings.state_dict().items():
        assert torch.equal(w, embeddings[name]), name  # source features are frozen


def test_O2_distances_are_those_of_the_shared_files(body, source):
    from mmd import mmd2
    from otdd import otdd

    z_s = orca.source_features(body[0].embeddings, source, torch.device("cpu"))
    z_t, y_t = torch.randn(40, 128), torch.arange(40) % 4
    D = orca.distance_to("otdd", z_s, source.y)
    torch.testing.assert_close(D(z_t, y_t), otdd(z_s, source.y, z_t, y_t), rtol=1e-4, atol=0)
    torch.testing.assert_close(orca.distance_to("mmd", z_s, source.y)(z_t, y_t), mmd2(z_s, z_t))
    same = orca.distance_to("l2", torch.ones(9, 128), source.y[:9])
    assert float(same(torch.zeros(5, 128), y_t[:5])) == pytest.approx(128**0.5)


def test_O2_otdd_sees_labels_and_mmd_does_not(body, source):
    z_s = orca.source_features(body[0].embeddings, source, torch.device("cpu"))
    z_t = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    y_t = torch.arange(40) % 4
    z_t = z_t + 3 * torch.nn.functional.one_hot(y_t, 128)  # classes that differ
    other = y_t[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    for kind, same in (("otdd", False), ("mmd", True)):
        D = orca.distance_to(kind, z_s, source.y)
        assert torch.allclose(D(z_t, y_t), D(z_t, other)) == same


def test_separability_is_the_share_of_the_variance_between_classes():
    y = torch.arange(300) % 3
    points = torch.eye(3)[y]
    assert orca.separability(points, y, 3) == pytest.approx(1)
    noise = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    assert orca.separability(noise, y, 3) < 0.03
    mixed = points * 6**0.5 + noise  # between: 6 * 2/9 * 3 = 4, within: 3
    assert orca.separability(mixed, y, 3) == pytest.approx(4 / 7, abs=0.05)


@pytest.fixture()
def clouds(body, source):
    """Source features with classes, target features with three classes, shares of these."""
    z_s = orca.source_features(body[0].embeddings, source, torch.device("cpu")).double()
    y_t = torch.arange(45) % 3
    noise = torch.randn(45, 128, generator=torch.Generator().manual_seed(0)).double()
    z_t = (noise + 3 * torch.nn.functional.one_hot(y_t, 128)).requires_grad_()
    return z_s, source.y, z_t, y_t, torch.tensor([0.5, 0.3, 0.2]).double()


def slope(kind, clouds, permuted=None):
    z_s, y_s, z_t, y_t, share = clouds
    y_s = y_s if permuted is None else y_s[permuted]
    value = orca.distance_to(kind, z_s, y_s, share)(z_t, y_t)
    return value.item(), torch.autograd.grad(value, z_t)[0]


@pytest.mark.parametrize("kind", ["otdd", "otdd-gaussian", "otdd-classwise"])
def test_O4_labels_of_the_source_act_on_otdd_but_not_on_the_released_one(kind, clouds):
    order = torch.randperm(len(clouds[0]), generator=torch.Generator().manual_seed(1))
    value, gradient = slope(kind, clouds)
    other_value, other_gradient = slope(kind, clouds, order)
    assert value != pytest.approx(other_value, rel=1e-4)  # the number changes in any case
    moved = (gradient - other_gradient).norm() / gradient.norm()
    assert moved < 1e-9 if kind == "otdd-classwise" else moved > 0.01


def test_O4_is_otdd_class_by_class_with_a_constant_label_term(clouds):
    from otdd import label_distances, otdd

    z_s, y_s, z_t, y_t, share = clouds
    want, gradient = 0.0, torch.zeros_like(z_t)
    for c in range(3):
        z_c, y_c = z_t[y_t == c].detach().requires_grad_(), torch.zeros(15).long()
        value, pi = otdd(z_s, y_s, z_c, y_c, plan=True)
        want += float(share[c]) * value.item()
        # with the label term held constant only |x - x'|^2 has a gradient, and pi is its plan
        cost = (pi * torch.cdist(z_s, z_c).square()).sum()
        gradient[y_t == c] = share[c] * torch.autograd.grad(cost, z_c)[0]
        const = label_distances(z_s, y_s, z_c, y_c)[y_s.unique(return_inverse=True)[1]].mean()
        assert value.item() == pytest.approx((cost + const).item(), rel=1e-9)
    value, got = slope("otdd-classwise", clouds)
    assert value == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["classes", "labels", "field"])
@pytest.mark.parametrize("align", ["otdd-classwise", "otdd-gaussian"])
def test_every_alignment_takes_every_kind_of_target(kind, align, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3, 16, 16)).astype(np.float32)
    y = {
        "classes": rng.integers(0, 3, 60),
        "labels": rng.integers(0, 2, (60, 4)),
        "field": x[:, :1] * 2,
    }[kind]
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    flags = f"--task {tmp_path / 'd.npz'} --align {align} --align-epochs 3 --epochs 1"
    flags += " --align-lr 1e-3 --source-size 100 --align-samples 50 --patches 64"
    flags += f" --out {tmp_path / 'run'}"
    result = orca.main(orca.parse_args(flags.split()))
    assert np.isfinite(result["test_error"])
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["distance"] < rows[0]["distance"]


TRAINED = {
    "none": {"f_t", "g", "h_t"},
    "embedder": {"g", "h_t"},
    "body": {"f_t", "h_t"},
    "both": {"h_t"},
    "layernorm-only": {"f_t", "g", "h_t"},
}


@pytest.mark.parametrize("what", list(TRAINED))
def test_O3_frozen_weights_stay_bit_for_bit(what, body, series, tmp_path):
    task = tasks.load_task(str(series), train_size=32)
    model = fresh(body)
    before = state(model)
    cfg = orca.Config(task=str(series), freeze=what, epochs=1, batch_size=16, body_lr=1e-3)
    orca.finetune(model, task, cfg, orca.Record(tmp_path))
    assert changed(model, before) == TRAINED[what]
    if what == "layernorm-only":
        moved = [n for n, w in model.g.state_dict().items() if not torch.equal(w, before["g." + n])]
        assert moved and all("LayerNorm" in name for name in moved)


def test_rate_rises_then_falls_to_0():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = plumbing.schedule_of(optimizer, orca.Config(epochs=10, warmup=0.1), epoch_steps=10)
    rates = []
    for _ in range(101):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[100] == 0.0
    assert max(rates) == 1.0 and rates[55] == pytest.approx(0.5)
    shorter = orca.Config(epochs=10, schedule_epochs=5)
    schedule = plumbing.schedule_of(optimizer, shorter, epoch_steps=10)
    assert (
        schedule.lr_lambdas[0](49) > 0 == schedule.lr_lambdas[0](50) == schedule.lr_lambdas[0](99)
    )


def test_a_batch_can_be_learnt_by_heart(body, series, tmp_path):
    task = tasks.load_task(str(series), train_size=16)
    model = fresh(body)
    cfg = orca.Config(task=str(series), epochs=60, batch_size=16, body_lr=2e-3)
    record = orca.Record(tmp_path)
    orca.finetune(model, task, cfg, record)
    assert record.rows[-1]["train_loss"] < 0.05


@pytest.fixture(scope="module")
def run(series, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "orca"
    given = {"epochs": 3, "align_epochs": 4, "align_lr": 1e-3, "body_lr": 2e-3}
    cfg = orca.Config(task=str(series), source_size=200, **given, out=str(out))
    return cfg, orca.main(cfg), out


def test_a_run_aligns_learns_and_writes_everything(run, series):
    cfg, result, out = run
    names = "config.json metrics.jsonl steps.csv curves.png model.safetensors result.json last.pt"
    assert {p.name for p in out.iterdir()} == {*names.split(), "f_t.safetensors"}
    assert json.loads((out / "result.json").read_text()) == result
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["align"] * 4 + ["finetune"] * 3
    assert rows[3]["distance"] < rows[0]["distance"]
    steps = [line.split(",") for line in (out / "steps.csv").read_text().splitlines()]
    assert steps[0] == ["step", "lr", "loss", "grad_norm"] and len(steps[1:]) % 3 == 0
    per_epoch = len(steps[1:]) // 3
    norms = [float(norm) for *_, norm in steps[-per_epoch:]]
    assert sum(norms) / per_epoch == pytest.approx(rows[-1]["grad_norm"], rel=1e-4)
    assert rows[-1]["train_loss"] < rows[4]["train_loss"]
    assert result["source"] == "words"
    saved = json.loads((out / "config.json").read_text())
    assert saved["config"]["align_epochs"] == 4 and saved["versions"]["torch"] == torch.__version__
    arrays = np.load(series)
    with torch.no_grad():
        guess = orca.load(out)(torch.from_numpy(arrays["x_test"])[:, None]).argmax(dim=1).numpy()
    assert round(float((guess != arrays["y_test"]).mean()), 6) == result["test_error"]


def test_the_best_epoch_on_validation_is_kept(run):
    cfg, result, out = run
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert result["val_error"] == round(min(row.get("val_error", 1) for row in rows), 6)


def test_the_same_seed_gives_the_same_result(run, tmp_path):
    cfg, result, out = run
    again = orca.main(orca.configure(**{**vars(cfg), "out": str(tmp_path / "again")}))
    assert {**again, "time_s": 0} == {**result, "time_s": 0}


def test_a_run_is_not_overwritten_unasked(run):
    cfg, result, out = run
    with pytest.raises(ValueError, match="is not empty; choose another --out, or give --resume"):
        orca.main(cfg)


@pytest.mark.slow
def test_bf16_runs_and_stays_close(run, tmp_path):
    """In stage 2 and the first epoch after it, the same whatever number of epochs follows."""
    cfg, result, out = run
    half = {"out": str(tmp_path / "run"), "precision": "bf16", "epochs": 1, "schedule_epochs": 3}
    assert orca.main(orca.configure(**{**vars(cfg), **half}))["precision"] == "bf16"
    rows, plain = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()[:5]]
        for place in (tmp_path / "run", out)
    )
    for name, row in [("distance", row) for row in range(4)] + [("train_loss", 4)]:
        assert rows[row][name] == pytest.approx(plain[row][name], rel=2e-2), name
    assert rows[4]["train_loss"] != plain[4]["train_loss"]


def test_a_diverging_run_stops(series, tmp_path, capsys):
    argv = f"--task {series} --align none --lr 1e30 --clip 0 --epochs 2 --out {tmp_path / 'run'}"
    assert orca.cli(argv.split()) == 3
    assert "diverged" in capsys.readouterr().err


def test_paper_settings_are_the_published_ones():
    cfg = orca.configure(task="satellite", paper=True)
    got = (cfg.data, cfg.source, cfg.epochs, cfg.batch_size, cfg.lr, cfg.weight_decay)
    assert got == ("real", "conll2003", 60, 64, 3e-5, 3e-6)
    assert cfg.body.startswith("FacebookAI/roberta-base@")  # a pinned revision
    assert (cfg.align_epochs, cfg.align_lr, cfg.align_samples, cfg.clip) == (60, 3e-4, 1280, 0.0)
    assert orca.configure(task="satellite", paper=True, epochs=7).epochs == 7
    with pytest.raises(ValueError, match="--paper has no settings for 'mine.npz'"):
        orca.configure(task="mine.npz", paper=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(series, tmp_path, precision):
    common = {"task": str(series), "epochs": 2, "align_epochs": 2, "source_size": 200}
    here = orca.main(orca.Config(**common, device="cpu", out=str(tmp_path / "cpu")))
    gpu = {**common, "device": "cuda", "precision": precision, "out": str(tmp_path / "gpu")}
    assert abs(orca.main(orca.Config(**gpu))["val_error"] - here["val_error"]) < 0.25


def test_gaussians_of_classes_with_one_sample_each_are_refused():
    """Said of them was "got x_t (0, 128), reshape it"."""
    z, y = torch.randn(12, 4), torch.arange(12) % 3
    distance = orca.distance_to("otdd-gaussian", z, y)
    with pytest.raises(ValueError, match="no class has two samples in a step; choose --align otdd"):
        distance(torch.randn(5, 4), torch.arange(5))
    one_more = distance(torch.randn(5, 4), torch.tensor([0, 0, 1, 2, 3]))  # three are left out
    assert one_more.isfinite()

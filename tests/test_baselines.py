"""tasks/baselines.py: the simple learners are right, honest, and within their time."""

import dataclasses
import time

import numpy as np
import pytest
import torch

import tasks
from tasks import baselines


def own(path, x, y, kind="", **more):
    half = len(x) // 2
    arrays = {"x_train": x[:half], "y_train": y[:half], "x_test": x[half:], "y_test": y[half:]}
    np.savez(path, **(arrays | more))
    return tasks.load_task(str(path), kind=kind)


def test_classes_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = rng.normal(size=(300, 8)) + 4 * np.eye(3, 8)[y]
    x[:, 7] *= 1e4  # which would be all that a distance of raw inputs sees
    task = own(tmp_path / "a.npz", x, y)
    found = baselines.simple_learners(task)
    assert list(found) == ["majority class", "1-NN", "logistic regression"]
    assert found["majority class"] == pytest.approx(2 / 3)
    assert found["1-NN"] < 0.05 and found["logistic regression"] < 0.03
    z = ((x - x[:150].mean(0)) / x[:150].std(0))[: 150 + 150]
    kept = task.train.indices
    near = [kept[i] for i in np.square(z[150:, None] - z[kept]).sum(-1).argmin(1)]
    assert found["1-NN"] == pytest.approx(np.mean(y[near] != y[150:]), abs=0.011)


def test_logistic_regression_is_that_of_scikit_learn_with_the_best_strength(tmp_path):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = rng.normal(size=(240, 30))
    y = (x[:, 0] + 0.8 * rng.normal(size=240) > 0).astype(int)  # two classes: one column of logits
    part = {"x_val": x[80:160], "y_val": y[80:160]}
    part |= {"x_train": x[:80], "y_train": y[:80], "x_test": x[160:], "y_test": y[160:]}
    task = own(tmp_path / "a.npz", x, y, **part)
    z = (x - x[:80].mean(0)) / x[:80].std(0)
    errors = []
    for C in baselines.CS:
        model = LogisticRegression(C=C, max_iter=1000).fit(z[:80], y[:80])
        errors.append(
            [(model.predict(z[s]) != y[s]).mean() for s in (slice(80, 160), slice(160, 240))]
        )
    best = min(errors, key=lambda pair: pair[0])[1]
    assert baselines.simple_learners(task)["logistic regression"] == pytest.approx(best, abs=0.013)


def test_quantities_labels_masks_and_fields(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12))
    y = x @ rng.normal(size=(12, 5)) + 100
    found = baselines.simple_learners(own(tmp_path / "a.npz", x, y))
    assert list(found) == ["mean of the targets", "1-NN", "ridge regression"]
    assert found["mean of the targets"] == pytest.approx(1, abs=0.05)
    assert found["ridge regression"] < 0.01 < found["1-NN"]
    found = baselines.simple_learners(own(tmp_path / "b.npz", x, (y > 100).astype(int)))
    assert list(found) == ["constant score", "1-NN", "ridge regression"]
    assert found["ridge regression"] < 0.03 < found["1-NN"] < found["constant score"]
    found = baselines.simple_learners(own(tmp_path / "c.npz", x, (x > 0).astype(int)))
    assert found["constant score"] == 0.5 and found["ridge regression"] < 0.1
    found = baselines.simple_learners(own(tmp_path / "d.npz", x, 2 * x))
    assert found["ridge regression"] < 1e-3 and found["copy of the input"] == pytest.approx(
        0.5, 0.1
    )


def test_unknown_targets_are_filled_and_lacking_classes_left_out(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 6)), np.arange(120) % 6
    task = own(tmp_path / "a.npz", x + 5 * np.eye(6)[y], y)
    rows = [i for i in range(len(task.train)) if task.train[i][1] != 2]
    task = dataclasses.replace(task, train=torch.utils.data.Subset(task.train, rows))
    found = baselines.simple_learners(task)
    assert found["logistic regression"] == pytest.approx(1 / 6, abs=0.03)
    task = own(
        tmp_path / "b.npz",
        x[:, :, None, None] + np.zeros((1, 1, 4, 4)),
        x[:, :1, None, None] + np.zeros((1, 1, 4, 4)),
    )
    sets = []
    for part in (task.train, task.val, task.test):
        a, b = zip(*part, strict=True)
        b = torch.stack(b).clone()
        b[::3, :, 0] = torch.nan
        sets.append(torch.utils.data.TensorDataset(torch.stack(a), b))
    task = dataclasses.replace(task, **dict(zip(("train", "val", "test"), sets, strict=True)))
    assert baselines.simple_learners(task)["ridge regression"] < 0.3


def test_the_strength_is_chosen_on_validation_data(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(120, 100)), rng.normal(size=100)
    task = own(tmp_path / "a.npz", x, x @ w + 20 * rng.normal(size=120))
    chosen = baselines.simple_learners(task)["ridge regression"]
    each = []
    for ridge in baselines.RIDGES:
        monkeypatch.setattr(baselines, "RIDGES", (ridge,))
        each.append(baselines.simple_learners(task)["ridge regression"])
    assert chosen in each and chosen < 0.7 * max(each)  # the weakest fits the noise


def test_time_is_kept(tmp_path):
    task = tasks.load_task("satellite", train_size=240)
    assert list(baselines.simple_learners(task, budget_s=0)) == []
    assert baselines.cheap(task) and baselines.cheap(tasks.load_task("satellite"))
    large = tasks.load_task("diffusion_reaction_1d")
    big = dataclasses.replace(large, x_shape=(57, 512, 512), y_shape=(1, 512, 512))
    assert not baselines.cheap(big) and baselines.cost(big) > 100
    start = time.process_time()
    found = baselines.simple_learners(task)
    assert time.process_time() - start < 3 * max(1, baselines.cost(task))
    assert found["logistic regression"] < found["1-NN"] < found["majority class"]

"""tasks/deepsea.py: DNA with composition and motifs, and small files in the real layout."""

import time

import numpy as np
import pytest
import torch

from tasks import deepsea, metrics

A, G, C, T = range(4)


@pytest.fixture(scope="module")
def simulated():
    """The sequences and labels of the default training set, and of a test set."""
    return deepsea.simulate(2000, [0, 0]), deepsea.simulate(1000, [0, 2])


def test_it_is_simulated_in_the_real_shape(simulated):
    (x, y), _ = simulated
    assert x.shape == (2000, 4, 1000) and y.shape == (2000, 36)
    assert x.dtype == np.float32 and y.dtype == np.float32
    assert (x.sum(axis=1) == 1).all() and set(np.unique(x)) == {0, 1} == set(np.unique(y))
    assert x.shape[1:] == deepsea.TASK["x_shape"] and y.shape[1:] == deepsea.TASK["y_shape"]
    rate = y.mean(axis=0)
    assert 0.02 < rate.min() and rate.max() < 0.4 and 0.1 < rate.mean() < 0.25


def test_it_follows_the_seed():
    a, b, c = (deepsea.simulate(50, s) for s in (3, 3, [3, 1]))
    assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))
    assert not np.array_equal(a[0], c[0]) and not np.array_equal(a[1], c[1])


def test_the_default_sizes_are_simulated_quickly():
    start = time.process_time()
    for i, n in enumerate(deepsea.TASK["sizes"].values()):
        deepsea.simulate(n, [0, i])
    assert time.process_time() - start < 30


def test_the_composition_is_that_of_a_genome(simulated):
    (x, _), _ = simulated
    gc = x[:, [G, C]].sum(axis=1).mean(axis=1)
    assert 0.38 < gc.mean() < 0.50 and 0.04 < gc.std() < 0.09
    cpg = (x[:, C, :-1] * x[:, G, 1:]).mean()
    expected = x[:, C].mean() * x[:, G].mean()
    gpc = (x[:, G, :-1] * x[:, C, 1:]).mean()
    assert cpg < 0.7 * expected and gpc > 0.85 * expected  # rare in this order only


def test_tracks_follow_composition(simulated):
    (x, y), _ = simulated
    gc = x[:, [G, C]].sum(axis=1).mean(axis=1)
    cpg = (x[:, C, :-1] * x[:, G, 1:]).mean(axis=1) - (x[:, G, :-1] * x[:, C, 1:]).mean(axis=1)
    for feature, weight in ((gc, deepsea.BY_GC), (cpg, deepsea.BY_CPG)):
        z = (feature - feature.mean()) / feature.std()
        gap = [z[y[:, k] == 1].mean() - z[y[:, k] == 0].mean() for k in range(36)]
        assert np.corrcoef(gap, weight)[0, 1] > 0.6


def best_match(x: np.ndarray, motif: int) -> np.ndarray:
    """How well the best place of each sequence, on either strand, fits a motif, (n,)."""
    weights = np.log(deepsea.WEIGHTS[motif] + 0.01)
    places = np.lib.stride_tricks.sliding_window_view(x, len(weights), axis=2)
    strands = (weights, weights[::-1, ::-1])
    return np.max([np.einsum("ncpw,wc->np", places, w).max(axis=1) for w in strands], axis=0)


def test_motifs_are_planted_where_their_tracks_are_on(simulated):
    (x, y), _ = simulated
    for motif in (0, 7):
        score = torch.from_numpy(best_match(x[:500], motif))[:, None]
        one_of_three = torch.from_numpy(y[:500, motif::12].max(axis=1, keepdims=True))
        assert metrics.auroc(score, one_of_three) < 0.35


def test_planting_writes_the_motif_or_its_reverse_complement():
    rng = np.random.default_rng(0)
    bases = np.full((300, 1000), A)
    deepsea.plant(bases, 4, np.arange(100), rng)
    assert (bases[100:] == A).all()
    planted = np.eye(4, dtype=np.float32)[bases].transpose(0, 2, 1)
    assert best_match(planted[:100], 4).min() > best_match(planted[100:], 4).max()
    flipped = planted[:, ::-1, ::-1]  # in the order A, G, C, T, base b pairs with 3 - b
    np.testing.assert_allclose(best_match(flipped, 4), best_match(planted, 4), rtol=1e-5)
    place = np.nonzero(bases[:100] != A)[1]
    assert abs(place.mean() - 500) < 30 and 120 < place.std() < 180


def ridge(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, alpha: float) -> np.ndarray:
    """Predictions of a linear model with a quadratic penalty, in its dual form."""
    mean, level = x.mean(axis=0), y.mean(axis=0)
    x, x_new = x - mean, x_new - mean
    gram = x @ x.T + alpha * np.eye(len(x), dtype=x.dtype)
    return x_new @ x.T @ np.linalg.solve(gram, y - level) + level


def test_a_linear_model_of_the_bases_beats_chance_but_not_one_of_pairs_of_bases(simulated):
    (x, y), (x_test, y_test) = simulated
    metric = lambda out: deepsea.TASK["metric"](*map(torch.from_numpy, (out, y_test)))  # noqa: E731
    assert metric(np.zeros_like(y_test)) == 0.5
    flat, flat_test = x.reshape(len(x), -1), x_test.reshape(len(x_test), -1)
    linear = metric(ridge(flat, y, flat_test, 1e4).astype(np.float32))
    pairs = [np.einsum("nat,nbt->nab", v[..., :-1], v[..., 1:]) for v in (x, x_test)]
    pairs, pairs_test = (v.reshape(len(v), -1) for v in pairs)
    better = metric(ridge(pairs, y, pairs_test, 1e2).astype(np.float32))
    assert 0.32 < linear < 0.44 and 0.15 < better < linear - 0.06


def test_the_loss_weighs_positives_four_times():
    out, y = torch.zeros(2, 36), torch.ones(2, 36)
    assert deepsea.TASK["loss"](out, y).item() == pytest.approx(4 * np.log(2))
    assert deepsea.TASK["loss"](out, 1 - y).item() == pytest.approx(np.log(2))


def real_file(dtype=np.uint8):
    """The arrays of a small file in the real layout."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 8), ("val", 3), ("test", 5)):
        arrays[f"x_{split}"] = np.eye(4, dtype=dtype)[rng.integers(0, 4, (n, 1000))]
        arrays[f"y_{split}"] = rng.integers(0, 2, (n, 36)).astype(dtype)
    return arrays


def save(tmp_path, arrays):
    (tmp_path / "deepsea").mkdir(exist_ok=True)
    np.savez(tmp_path / "deepsea" / "deepsea_filtered.npz", **arrays)


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.float32, np.int64])
def test_it_reads_the_real_layout(dtype, tmp_path):
    arrays = real_file(dtype)
    arrays["x_val"][1, 10] = 0  # N, a base that is not known
    save(tmp_path, arrays)
    for split in deepsea.TASK["splits"]:
        data = deepsea.read(tmp_path, split)
        assert len(data) == len(arrays[f"y_{split}"]) and data.x.itemsize == 1
        for i in range(len(data)):
            x, y = data[i]
            assert x.shape == (4, 1000) and x.dtype == y.dtype == torch.float32
            np.testing.assert_array_equal(x.numpy(), arrays[f"x_{split}"][i].T)
            np.testing.assert_array_equal(y.numpy(), arrays[f"y_{split}"][i])
    loader = torch.utils.data.DataLoader(deepsea.read(tmp_path, "test"), batch_size=5)
    assert next(iter(loader))[0].shape == (5, 4, 1000)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("x_train", np.zeros((8, 999, 4), np.uint8), r"shapes \(8, 999, 4\) and \(8, 36\)"),
        ("x_train", np.zeros((8, 4, 1000), np.uint8), r"shapes \(8, 4, 1000\)"),
        ("x_train", np.zeros((7, 1000, 4), np.uint8), r"\(7, 1000, 4\) and \(8, 36\)"),
        ("y_train", np.zeros((8, 919), np.uint8), r"expected x_train.*and \(8, 919\)"),
        ("y_train", np.full((8, 36), 2, np.uint8), "other values"),
        ("y_train", np.full((8, 36), -1, np.int8), "other values"),
        ("y_train", np.full((8, 36), 0.5), "other values"),
        ("x_train", np.ones((8, 1000, 4), np.uint8), "not one-hot"),
        ("x_train", np.full((8, 1000, 4), np.nan), "x_train holds 32000 of 32000 .*NaN"),
        ("x_train", np.zeros((0, 1000, 4), np.uint8), "x_train is empty"),
        ("x_train", None, "no array x_train"),
    ],
)
def test_it_refuses_other_layouts(name, array, message, tmp_path):
    arrays = {**real_file(), name: array}
    save(tmp_path, {key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=f"deepsea_filtered.npz: .*{message}"):
        deepsea.read(tmp_path, "train")


def test_a_file_that_is_missing_or_cut_short(tmp_path):
    with pytest.raises(FileNotFoundError, match="deepsea_filtered.npz.*NAS-Bench.*simulated"):
        deepsea.read(tmp_path, "test")
    save(tmp_path, real_file())
    path = tmp_path / "deepsea" / "deepsea_filtered.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="deepsea_filtered.npz: not a readable"):
        deepsea.read(tmp_path, "test")

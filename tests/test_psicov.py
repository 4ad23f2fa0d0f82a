"""tasks/psicov.py: proteins that hold together, maps that are read as they were written."""

import pickle
import time

import numpy as np
import pytest
import torch

from tasks import metrics, psicov

sliding = np.lib.stride_tricks.sliding_window_view


@pytest.fixture(scope="module")
def proteins():
    return psicov.simulate(90, 0)


@pytest.fixture(scope="module")
def folds():
    rng = np.random.default_rng(0)
    return [psicov.fold(rng, int(length)) for length in rng.integers(40, 65, 40)]


# ---- simulated ----


def test_shapes_types_and_where_the_protein_is(proteins):
    x, y = proteins
    assert x.shape == (90, *psicov.TASK["x_shape"]) and x.dtype == np.float32
    assert y.shape == (90, *psicov.TASK["y_shape"]) and y.dtype == np.float32
    assert np.isfinite(x).all() and np.abs(x).max() < 20
    known = ~np.isnan(y[:, 0])
    lengths = known[:, 0].sum(axis=1)
    assert lengths.min() >= 40 and lengths.max() <= 64 and len(set(lengths)) > 10
    inside = np.arange(64) < lengths[:, None]
    assert np.array_equal(known, inside[:, :, None] & inside[:, None])
    assert not x.transpose(0, 2, 3, 1)[~known].any()
    assert np.nanmin(y) >= 1 and np.nanmax(y) < 120
    off = ~np.eye(64, dtype=bool)  # the diagonal is made of its row's neighbours
    np.testing.assert_array_equal(y[:, 0][:, off], y[:, 0].swapaxes(1, 2)[:, off])


def test_the_seed_decides(proteins):
    (x, y), (x1, y1), (x2, _) = (psicov.simulate(4, seed) for seed in ([0, 1], [0, 1], [0, 2]))
    assert np.array_equal(x, x1) and np.array_equal(y, y1, equal_nan=True)
    assert not np.array_equal(x, x2) and not np.array_equal(x, proteins[0][:4])


def test_the_default_sizes_are_simulated_in_time():
    start = time.process_time()
    psicov.simulate(42, 3)
    assert (time.process_time() - start) * sum(psicov.TASK["sizes"].values()) / 42 < 60


def test_chains_are_connected_compact_and_of_helices_and_strands(folds):
    turns, pleats, ratios, hands = [], [], [], []
    for atoms, kinds in folds:
        bonds = np.linalg.norm(np.diff(atoms, axis=0), axis=1)
        assert abs(np.median(bonds) - 3.8) < 0.1 and bonds.min() > 2.5 and bonds.max() < 6.5
        d = np.linalg.norm(atoms[:, None] - atoms, axis=2)
        assert d[np.triu_indices(len(d), 2)].min() > 2.5
        radius = np.sqrt(((atoms - atoms.mean(axis=0)) ** 2).sum(axis=1).mean())
        ratios.append(radius / (2.2 * len(atoms) ** 0.38))  # of folded proteins: Skolnick 1997
        runs = sliding(kinds, 4)
        first = np.arange(len(runs))
        a, b, c = np.diff(sliding(atoms, 4, axis=0), axis=2).transpose(2, 0, 1)  # (runs, 3) each
        hands.extend((np.cross(a, b) * c).sum(axis=1)[(runs == psicov.HELIX).all(axis=1)])
        turns.extend(d[first, first + 3][(runs == psicov.HELIX).all(axis=1)])
        pleats.extend(d[first, first + 2][(runs == psicov.STRAND).all(axis=1)])
    assert np.mean(np.array(hands) > 0) > 0.95  # helices are right-handed
    assert 0.9 < np.mean(ratios) < 1.1 and max(ratios) < 1.4
    assert abs(np.median(turns) - 5.0) < 0.4 and abs(np.median(pleats) - 6.6) < 0.4


def test_most_proteins_have_contacts_far_apart_in_the_sequence(proteins):
    far = np.triu(np.ones((64, 64), dtype=bool), 24)
    contacts = ((proteins[1][:, 0] <= 8) & far).sum(axis=(1, 2))
    assert (contacts > 0).mean() > 0.9 and (contacts >= 5).mean() > 0.75
    assert 0.2 * 52 < contacts.mean() < 2 * 52  # of the order of one a residue


def test_features_tell_of_the_fold(folds):
    rng, right, inside, water = np.random.default_rng(1), [], [], []
    for atoms, kinds in folds:
        features, d = psicov.measure(rng, atoms, kinds)
        length, crowd = len(atoms), (d < 10).sum(axis=1)
        assert {name: np.shape(features[name]) for name in psicov.FEATURES} == {
            name: tuple(length if size == "L" else size for size in shape)
            for name, shape in psicov.FEATURES.items()
        }
        np.testing.assert_allclose(features["ss"].sum(axis=0), 1)
        np.testing.assert_allclose(features["pssm"][:, :21].sum(axis=1), 1)
        right.extend(features["ss"].argmax(axis=0) == kinds)
        inside.append(np.corrcoef(features["sa"], crowd)[0, 1])
        water.append(np.corrcoef(features["pssm"][:, :20] @ psicov.HYDROPATHY, crowd)[0, 1])
        i, j = np.triu_indices(length, 6)
        for name in ("ccmpred", "freecon"):
            np.testing.assert_allclose(features[name], features[name].T, atol=1e-9)
            touch = d[i, j] < 7
            gap = features[name][i, j][touch].mean() - features[name][i, j][~touch].mean()
            assert touch.sum() < 10 or gap > 0.05
    assert 0.75 < np.mean(right) < 0.95
    assert np.mean(inside) < -0.6 and np.mean(water) > 0.2


def test_difficulty_a_linear_model_of_the_pair_beats_the_mean_map(proteins):
    x, y = proteins
    train, test = slice(0, 60), slice(60, 90)
    clipped = np.minimum(y, 16)
    true = torch.from_numpy(y[test])
    known = ~np.isnan(y[train, 0])
    count = known.sum(axis=0)
    mean = np.where(count > 0, np.nansum(clipped[train, 0], axis=0) / np.maximum(count, 1), 16)
    trivial = np.broadcast_to(mean.astype(np.float32), y[test].shape).copy()
    of_pairs = np.pad(x[train].transpose(0, 2, 3, 1)[known], ((0, 0), (0, 1)), constant_values=1)
    gram = of_pairs.T @ of_pairs + np.eye(58)
    weights = np.linalg.solve(gram, of_pairs.T @ clipped[train, 0][known])
    linear = np.einsum("nchw,c->nhw", x[test], weights[:-1].astype(np.float32)) + weights[-1]
    error = [
        metrics.mae8(torch.as_tensor(out, dtype=torch.float32).reshape(true.shape), true)
        for out in (trivial, linear)
    ]
    assert error[1] < error[0] - 1 and error[1] > 2


def test_loss_clips_and_metric_does_not(proteins):
    y = torch.from_numpy(proteins[1][:8])
    loss, metric = psicov.TASK["loss"], psicov.TASK["metric"]
    guess = y.nan_to_num(3).clamp(max=16)
    assert loss(guess, y) == 0 and metric(guess, y) == pytest.approx(0, abs=1e-6)
    assert loss(guess + 4, y).item() == pytest.approx(1 / 16)
    assert metric(guess + 4, y) == pytest.approx(4, abs=1e-5)


# ---- features to channels, distances to maps ----


def chain(length=12, seed=0):
    """The content of a chain's two files: features and distances in half precision, as PDNET's."""
    rng = np.random.default_rng(seed)
    features = {"seq": "".join(rng.choice(list(psicov.AMINO), length))}
    for name, shape in psicov.FEATURES.items():
        shape = tuple(length if size == "L" else size for size in shape)
        features[name] = rng.normal(size=shape).astype(np.float16)
    points = rng.normal(0, 8, (length, 3))
    d = np.linalg.norm(points[:, None] - points, axis=2)
    return features, d.astype(np.float16)


def expected(features, d):
    """x and y of a chain, entry by entry."""
    length = len(d)
    x, y = np.zeros((57, length, length), np.float32), np.zeros((1, length, length), np.float32)
    for i in range(length):
        for j in range(length):
            numbers = []
            single = [[*f["ss"][:, r], *f["pssm"][r], f["sa"][r], f["entropy"][r]]
                      for f, r in ((features, j), (features, i))]  # fmt: skip
            for of_j, of_i in zip(*single, strict=True):
                numbers += [of_j, of_i]
            x[:, i, j] = numbers + [features[n][i, j] for n in ("ccmpred", "freecon", "potential")]
            around = [k for k in (i - 1, i + 1) if 0 <= k < length]
            mean = np.mean([max(float(d[i, k]), 1) for k in around])
            y[0, i, j] = mean if i == j else max(float(d[i, j]), 1)
    return x, y


def test_channels_and_distances_entry_by_entry():
    features, d = chain()
    x, y = expected(features, d)
    np.testing.assert_array_equal(psicov.channels(features), x)
    np.testing.assert_allclose(psicov.distances(d, 12), y, rtol=1e-6)
    near = np.array([[0, 0.5, 6], [0.5, 0, 4], [6, 4, 0]])
    cleaned = [[1, 1, 6], [1, 2.5, 4], [6, 4, 4]]
    assert psicov.distances(near, 3)[0].tolist() == cleaned


def test_place_fills_and_crops():
    maps = np.arange(9.0).reshape(1, 3, 3)
    assert psicov.place(maps, 4, -1)[0].tolist() == [
        [0, 1, 2, -1], [3, 4, 5, -1], [6, 7, 8, -1], [-1, -1, -1, -1]]  # fmt: skip
    assert psicov.place(maps, 2, -1, 1)[0].tolist() == [[4, 5], [7, 8]]


# ---- real files ----


def write(root, chains, folder="psicov", names=None):
    """Files as PDNET's scripts write them: pickles of dicts, object arrays of three things."""
    protein = root / "psicov" / "protein"
    for part in ("features", "distance"):
        (protein / folder / part).mkdir(parents=True, exist_ok=True)
    names = names or [f"chain{i}A" for i in range(len(chains))]
    for name, (features, d) in zip(names, chains, strict=True):
        (protein / folder / "features" / f"{name}.pkl").write_bytes(pickle.dumps(features))
        triple = np.empty(3, dtype=object)
        triple[:] = [len(d), features["seq"], d]
        np.save(protein / folder / "distance" / f"{name}-cb.npy", triple)
    (protein / f"{folder}.lst").write_text("".join(f"{name} 12\n" for name in names) + "\n")
    return protein


def test_reads_the_real_layout(tmp_path):
    chains = [chain(length, seed=length) for length in (12, 30)]
    write(tmp_path, chains)
    data = psicov.read(tmp_path, "test")
    assert len(data) == 2
    for i, (features, d) in enumerate(chains):
        x, y = data[i]
        want_x, want_y = expected(features, d)
        assert x.shape == (57, 512, 512) and y.shape == (1, 512, 512)
        assert x.dtype == y.dtype == torch.float32
        np.testing.assert_array_equal(x[:, : len(d), : len(d)].numpy(), want_x)
        np.testing.assert_allclose(y[:, : len(d), : len(d)].numpy(), want_y, rtol=1e-6)
        assert y.isnan().sum() == 512**2 - len(d) ** 2
        assert x.count_nonzero() == np.count_nonzero(want_x)


def test_the_first_hundred_chains_of_deepcov_validate(tmp_path, monkeypatch):
    monkeypatch.setattr(psicov, "SIDE_REAL", 8)
    chains = [chain(4 + i % 3, seed=i) for i in range(103)]
    protein = write(tmp_path, chains, "deepcov")
    train, val = (psicov.read(tmp_path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 100)
    assert train[0][1].isnan().sum() == 64 - len(chains[100][1]) ** 2
    np.testing.assert_array_equal(val[7][0][56, :5, :5].numpy(), chains[7][0]["potential"])
    (protein / "deepcov.lst").write_text("\n".join(f"chain{i}A" for i in range(100)))
    with pytest.raises(ValueError, match="deepcov.lst: 100 chains, expected more than 100"):
        psicov.read(tmp_path, "train")


def test_long_chains_are_cropped_at_one_place(tmp_path, monkeypatch):
    monkeypatch.setattr(psicov, "SIDE_REAL", 8)
    features, d = chain(20)
    write(tmp_path, [(features, d)] * 101, "deepcov", [f"chain{i}A" for i in range(101)])
    want_x, want_y = expected(features, d)
    train, val = (psicov.read(tmp_path, split) for split in ("train", "val"))
    np.testing.assert_array_equal(val[0][0].numpy(), want_x[:, :8, :8])
    torch.manual_seed(0)
    starts = []
    for _ in range(20):
        x, y = train[0]
        starts.append(next(s for s in range(13) if np.isclose(want_y[0, s, s + 1], y[0, 0, 1])))
        crop = slice(starts[-1], starts[-1] + 8)
        np.testing.assert_array_equal(x.numpy(), want_x[:, crop, crop])
        np.testing.assert_allclose(y.numpy(), want_y[:, crop, crop], rtol=1e-6)
    assert len(set(starts)) > 5
    torch.manual_seed(0)
    assert torch.equal(
        train[0][1][0], torch.from_numpy(want_y[0])[starts[0] :, starts[0] :][:8, :8]
    )


def changed(name, value):
    return lambda features, d: ({**features, name: value}, d)


def damaged_map(change):
    def damage(features, d):
        d = d.copy()
        return features, change(d)

    return damage


def asymmetric(d):
    d[2, 5] += 3
    return d


def unknown(d):
    d[2, 5] = d[5, 2] = np.nan
    return d


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("ss", np.zeros((12, 3))), r"pkl: 'ss' is no array \(3, 12\)"),
        (changed("pssm", np.zeros((12, 20))), r"pkl: 'pssm' is no array \(12, 22\)"),
        (changed("sa", np.full(12, np.nan)), "pkl: 'sa' is no array"),
        (changed("ccmpred", np.full((12, 12), 100.0)), "'ccmpred' .* between -100 and 100"),
        (changed("potential", None), "pkl: 'potential' is no array"),
        (changed("entropy", np.array(["a"] * 12)), "pkl: 'entropy' is no array"),
        (changed("seq", 12), "pkl: expected a pickled dict with 'seq'"),
        (damaged_map(lambda d: d[:11, :11]), r"cb.npy: .* no array \(12, 12\)"),
        (damaged_map(asymmetric), "cb.npy: .* not symmetric"),
        (damaged_map(unknown), "cb.npy: .* not symmetric, or not between 0 and 500"),
        (damaged_map(lambda d: d - 5), "cb.npy: .* not between 0 and 500"),
    ],
)
def test_damaged_chains_are_named(damage, message, tmp_path):
    write(tmp_path, [damage(*chain())])
    with pytest.raises(ValueError, match=f"chain0A.*{message}"):
        psicov.read(tmp_path, "test")[0]


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="protein.zip .*--data simulated"):
        psicov.read(tmp_path, "test")
    protein = write(tmp_path, [chain()])
    names = (protein / "psicov.lst").read_bytes()
    (protein / "psicov.lst").unlink()
    with pytest.raises(FileNotFoundError, match=r"psicov.lst; .*--data simulated"):
        psicov.read(tmp_path, "test")
    (protein / "psicov.lst").write_bytes(names)
    of_map = protein / "psicov" / "distance" / "chain0A-cb.npy"
    whole = of_map.read_bytes()
    of_map.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cb.npy: not a readable pickled array"):
        psicov.read(tmp_path, "test")[0]
    np.save(of_map, np.zeros((12, 12)))
    with pytest.raises(ValueError, match=r"cb.npy: expected \(length, the sequence"):
        psicov.read(tmp_path, "test")[0]
    triple = np.empty(3, dtype=object)
    triple[:] = [12, "A" * 12, np.zeros((12, 12))]
    np.save(of_map, triple)
    with pytest.raises(ValueError, match=r"cb.npy: expected \(length, the sequence"):
        psicov.read(tmp_path, "test")[0]
    of_map.unlink()
    with pytest.raises(FileNotFoundError, match=r"chain0A-cb.npy, .*--data simulated"):
        psicov.read(tmp_path, "test")
    (protein / "psicov.lst").write_text("\n")
    with pytest.raises(ValueError, match="psicov.lst: no chain"):
        psicov.read(tmp_path, "test")
    (protein / "psicov.lst").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="psicov.lst: not a text file"):
        psicov.read(tmp_path, "test")

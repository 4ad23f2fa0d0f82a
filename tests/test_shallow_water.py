"""tasks/shallow_water.py: the dam breaks as the equations say; the file is read as it is."""

import time

import numpy as np
import pytest
import torch

from tasks import metrics
from tasks import shallow_water as sw


def relative(p, y):
    p = np.array(np.broadcast_to(p, y.shape), np.float32)
    return metrics.relative_l2(torch.from_numpy(p), torch.from_numpy(y.astype(np.float32)))


def distances(N, centre=(0.0, 0.0)):
    """Of the centres of N x N cells from the dam's."""
    cells = sw.HALF * ((2 * np.arange(N) + 1) / N - 1)
    return np.hypot(cells[:, None] - centre[0], cells - centre[1])


# ---- the solver ----


def test_solution_converges_to_the_one_on_finer_rings():
    _, times, h = sw.history(1200, 1.6)
    late = h[np.searchsorted(times, 1.5)]
    errors = []
    for cells in (75, 150, 300):
        _, times, h = sw.history(cells, 1.6)
        coarse = np.repeat(h[np.searchsorted(times, 1.5)], 1200 // cells)
        errors.append(abs(coarse - late).mean())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders.min() > 0.8, "first order where there is a shock"


def test_error_of_the_fields_is_far_below_one_percent(monkeypatch):
    y = sw.simulate(20, 0)[1]
    coarse = sw.history(sw.CELLS // 2)
    monkeypatch.setattr(sw, "history", lambda: coarse)
    gap = relative(sw.simulate(20, 0)[1], y)
    assert gap < 3e-3, "the error of half as many rings, at least twice that of all"


def test_water_is_conserved_and_still_water_stays_still():
    r, _, h = sw.history(300, 3.0)
    water = h @ r
    np.testing.assert_allclose(water, water[0], rtol=1e-12)
    exact = (sw.REACH**2 / 2 + 1 / 2) / (r[1] - r[0])
    assert water[0] == pytest.approx(exact, rel=1e-12)
    still = np.stack([np.full(50, 1.7), np.zeros(50)])
    np.testing.assert_allclose(sw.step(still, 0.1, 0.02), still, atol=1e-14)


def test_dam_starts_to_break_like_a_straight_one():
    """Between the two waves of the straight dam, 2 deep against 1, h solves this equation."""
    low, high = 1.0, 2.0
    for _ in range(60):
        h = (low + high) / 2
        shock = (h - 1) * np.sqrt((h + 1) / (2 * h))
        low, high = (h, high) if 2 * (2**0.5 - h**0.5) > shock else (low, h)
    r, times, depths = sw.history(2400, 0.1)
    early = np.searchsorted(times, 0.06)
    assert np.interp(1.0, r, depths[early]) == pytest.approx(h, rel=0.02)
    front = r[depths[early] > (1 + h) / 2].max()
    assert front == pytest.approx(1 + 0.06 * h * 2 * (2**0.5 - h**0.5) / (h - 1), abs=0.006)


def test_any_dam_is_the_one_solution_scaled():
    R, H, cells = 0.5, 1.2, 1000
    dr = 3.0 / cells
    r, dt = (np.arange(cells) + 0.5) * dr, 1 / 1500
    q = np.stack([H * (1.0 + (r < R)), 0 * r])
    for _ in range(1500):
        q = sw.step(q, dr, dt)
    assert np.linalg.norm(sw.depth(R, H, r) - q[0]) < 3e-3 * np.linalg.norm(q[0])


def along(q, normal):
    """What flows through the faces along the last axis, for one step of dt / dx (Rusanov)."""
    q = np.concatenate([q[..., :1], q, q[..., -1:]], axis=-1)
    w = q[normal] / q[0]
    f = q * w
    f[normal] += q[0] ** 2 / 2
    speed = abs(w) + np.sqrt(q[0])
    fastest = np.maximum(speed[:, 1:], speed[:, :-1])
    flux = (f[..., 1:] + f[..., :-1]) / 2 - fastest * np.diff(q) / 2
    return -np.diff(flux)


def plain_2d(N, R):
    """h at t = 1 on N x N cells: another solver, of first order, in two dimensions."""
    steps = round(1.5 * N)  # dt / dx = 0.13
    q = np.stack([1.0 + (distances(N) <= R), np.zeros((N, N)), np.zeros((N, N))])
    for _ in range(steps):
        q = q + N / 5 / steps * (along(q, 2) + along(q.swapaxes(1, 2), 1).swapaxes(1, 2))
    return q[0]


def test_a_solver_in_two_dimensions_comes_to_the_same():
    errors = []
    for N in (32, 64, 128):
        y = sw.averaged(sw.depth(0.6, 1.0, distances(4 * N)), 4)
        errors.append(np.linalg.norm(plain_2d(N, 0.6) - y) / np.linalg.norm(y))
    assert errors[0] > 1.2 * errors[1] > 1.44 * errors[2] and errors[2] < 0.04


@pytest.mark.parametrize(("R", "front"), [(0.3, 1.51), (0.5, 1.74), (0.7, 1.96)])
def test_wave_comes_as_far_as_in_the_reference(R, front):
    r = (np.arange(2500) + 0.5) / 1000
    h = sw.depth(R, 1.0, r)
    jump = (1 + h[r > 0.8 * front].max()) / 2
    assert r[h > jump].max() == pytest.approx(front, abs=0.02)


@pytest.mark.parametrize(
    ("R", "coarse", "fine", "still"),
    [(0.3, (0.83, 1.17), (0.815, 1.192), 0.066), (0.7, (0.34, 1.27), (0.299, 1.274), 0.148)],
)
def test_depths_are_those_of_the_reference(R, coarse, fine, still):
    """The reference is a solver on 128 x 128 cells: rings as wide as these give the same."""
    _, times, h = sw.history(round(sw.REACH * R * 128 / 5), 3.5)
    h = h[np.searchsorted(times, 1 / R)]
    assert (h.min(), h.max()) == pytest.approx(coarse, abs=0.01)
    h = sw.depth(R, 1.0, (np.arange(2500) + 0.5) / 1000)
    assert (h.min(), h.max()) == pytest.approx(fine, abs=0.002)
    y = sw.averaged(sw.depth(R, 1.0, distances(512)), 4)[None, None]
    assert relative(1.0, y) == pytest.approx(still, abs=0.004)


# ---- the task ----


@pytest.mark.parametrize("published", [False, True])
def test_simulated_form_and_seeds(published):
    x, y = sw.simulate(5, [3, 0], published)
    record = {**sw.TASK, **(sw.PUBLISHED if published else {})}
    assert x.shape == (5, *record["x_shape"]) and y.shape == (5, *record["y_shape"])
    assert x.dtype == y.dtype == np.float32
    again, other = (sw.simulate(5, [3, i], published) for i in (0, 1))
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0]) and not np.array_equal(y, other[1])


def test_default_dams_vary_and_stay_off_the_walls():
    x, y = sw.simulate(150, 0)
    H = x[:, 0, 0, 0]
    assert 0.8 <= H.min() < 0.83 and 1.17 < H.max() <= 1.2
    np.testing.assert_allclose(x.max(axis=(1, 2, 3)), 2 * H, rtol=1e-6)
    for rim in (y[:, 0, 0], y[:, 0, -1], y[:, 0, :, 0], y[:, 0, :, -1]):
        np.testing.assert_allclose(rim, np.broadcast_to(H[:, None], rim.shape), rtol=1e-5)
    volume = (x - H[:, None, None, None]).sum(axis=(1, 2, 3), dtype=float) / H * (5 / 64) ** 2
    radius = np.sqrt(volume / np.pi)
    assert 0.29 < radius.min() < 0.33 and 0.67 < radius.max() < 0.71
    place = np.einsum("nij,j->n", x[:, 0] - H[:, None, None], np.arange(64) - 31.5)
    place *= (5 / 64) ** 3 / H / volume
    assert -0.41 < place.min() < -0.36 and 0.36 < place.max() < 0.41
    np.testing.assert_allclose(y.sum((1, 2, 3), float), x.sum((1, 2, 3), float), rtol=1e-3)


def test_published_dams_are_alike_but_for_the_radius():
    x, y = sw.simulate(20, 0, published=True)
    assert set(np.unique(x)) == {1, 2}
    for field in (x, y):
        for turn in (field[..., ::-1], field[..., ::-1, :], field.swapaxes(2, 3)):
            np.testing.assert_allclose(turn, field, rtol=1e-5)
    wet = np.sqrt((x == 2).sum(axis=(1, 2, 3)) * (5 / 128) ** 2 / np.pi)
    assert 0.28 < wet.min() and wet.max() < 0.72


def test_linear_model_is_between_the_mean_and_perfect():
    (x, y), (x_test, y_test) = sw.simulate(200, [0, 0]), sw.simulate(60, [0, 1])
    a, a_test = ((part - x.mean(axis=0)).reshape(len(part), -1) for part in (x, x_test))
    products = (a @ a.T).astype(float)
    ridge = 1e-3 * np.trace(products) / 200 * np.eye(200)
    weights = np.linalg.solve(products + ridge, (y - y.mean(axis=0)).reshape(200, -1))
    linear = y.mean(axis=0) + (a_test @ a.T @ weights).reshape(y_test.shape)
    mean = relative(y.mean(axis=0), y_test)
    assert 0.1 < mean < 0.18 < relative(x_test, y_test)
    assert 0.02 < relative(linear, y_test) < mean / 2


def test_default_sizes_are_simulated_in_seconds():
    sw.history()
    start = time.process_time()
    sw.simulate(60, 0)
    per_sample = (time.process_time() - start) / 60
    assert per_sample * sum(sw.TASK["sizes"].values()) < 60


# ---- the real file ----


def place(root, names, data=None, changes=None):
    """A file as the real one. All frames but the first and the last are not a number.

    data: what a group holds, if it is not a whole film; changes: {index: value}, of group "0010".
    """
    h5py = pytest.importorskip("h5py")
    path = root / "pdebench" / "2D_rdb_NA_NA.h5"
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name in names:
            group = file.create_group(name)
            group.attrs["config"] = "sim: {}"
            group["grid/t"] = np.linspace(0, 1, 101)
            group["grid/x"] = group["grid/y"] = np.linspace(-2.48, 2.48, 128)
            if data is not None:
                group["data"] = data
                continue
            shape = (101, 128, 128, 1)
            film = group.create_dataset(
                "data", shape, "f4", chunks=(1, 128, 128, 1), fillvalue=np.nan
            )
            rng = np.random.default_rng(int(name))
            film[0], film[100] = rng.uniform(0.5, 2, (2, *shape[1:]))
        for index, value in (changes or {}).items():
            file["0010/data"][index] = value
    return path


def films(names):
    """The first and the last frames that `place` writes, (groups, 2, 128, 128)."""
    return np.stack(
        [np.random.default_rng(int(i)).uniform(0.5, 2, (2, 128, 128, 1))[..., 0] for i in names]
    ).astype(np.float32)


NAMES = [f"{i:04}" for i in range(21)]


@pytest.mark.parametrize(("split", "names"), [("train", NAMES[:19]), ("test", NAMES[19:])])
def test_reads_the_real_layout(split, names, tmp_path):
    place(tmp_path, NAMES[::-1])
    x, y = sw.read(tmp_path, split, published=True)
    true = films(names)
    np.testing.assert_array_equal(x[:, 0], true[:, 0])
    np.testing.assert_array_equal(y[:, 0], true[:, 1])
    assert x.dtype == y.dtype == np.float32 and x.shape == (len(names), 1, 128, 128)
    x, y = sw.read(tmp_path, split)
    four = sum(true[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    np.testing.assert_allclose(np.stack([x[:, 0], y[:, 0]], axis=1), four, rtol=1e-6)
    assert x.dtype == y.dtype == np.float32 and x.shape == (len(names), 1, 64, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"names": NAMES[:9]}, "got 9 groups"),
        ({"names": NAMES[:11], "data": np.ones((101, 64, 64, 1), "f4")}, r"\(101, 64, 64, 1\)"),
        ({"names": NAMES[:11], "data": np.ones((100, 128, 128, 1), "f2")}, r"group 0010 has \(100"),
        ({"names": NAMES[:11], "data": np.ones((101, 128, 128, 2), "f2")}, "group 0010 has .*, 2"),
        ({"names": NAMES[:11], "changes": {(0, 3, 4): np.nan}}, "group 0010 .*not finite"),
        ({"names": NAMES[:11], "changes": {(100, 3, 4): np.inf}}, "group 0010 .*not finite"),
        ({"names": NAMES[:11], "changes": {(100, 3, 4): 0.0}}, "depths <= 0 in 'test'"),
    ],
)
def test_refuses_other_contents(content, message, tmp_path):
    place(tmp_path, **content)
    with pytest.raises(ValueError, match=f"NA.h5: expected at least 10 .*{message}") as error:
        sw.read(tmp_path, "test")
    assert "\n" not in str(error.value)


def test_refuses_missing_and_cut_files_and_groups_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="2D_rdb_NA_NA.h5.*133021.*--data simulated"):
        sw.read(tmp_path, "test")
    path = place(tmp_path, NAMES[:10])
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="NA.h5: expected at least 10") as error:
            sw.read(tmp_path, "train")
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "a") as file:
        del file["0004/data"]
    with pytest.raises(ValueError, match="NA.h5: expected at least 10"):
        sw.read(tmp_path, "train")

"""tasks/diffusion_reaction_2d.py: the equations are solved; the file is read as it is."""

import time

import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import torch

from tasks import diffusion_reaction_2d as rd
from tasks import metrics


def relative(p, y):
    p = np.array(np.broadcast_to(p, y.shape), np.float32)
    return metrics.relative_l2(torch.from_numpy(p), torch.from_numpy(y.astype(np.float32)))


def early(n, seed=0):
    """u and v at t = 0.5, (2, n, 64, 64), in float64."""
    fields = 0.5 * np.random.default_rng(seed).standard_normal((2, n, 64, 64))
    return np.stack(rd.evolve(*fields, 0.5, 32))


# ---- the solver ----


def test_a_cosine_decays_at_its_rate():
    x = 2 * (np.arange(64) + 0.5) / 64  # from the wall
    u = np.cos(3 * np.pi / 2 * x)[:, None] * np.cos(5 * np.pi / 2 * x)
    M = rd.heat(0.005, 1.5, 64)
    rate = 0.005 * (3**2 + 5**2) * np.pi**2 / 4
    np.testing.assert_allclose(M @ u @ M, u * np.exp(-1.5 * rate), atol=1e-12)
    np.testing.assert_allclose(M.sum(axis=0), 1)  # nothing is lost through the rim
    assert M.min() > -1e-12


def test_uniform_fields_follow_the_ordinary_equation():
    def slope(t, w):
        return [w[0] - w[0] ** 3 - 5e-3 - w[1], w[0] - w[1]]

    exact = scipy.integrate.solve_ivp(slope, (0, 4.5), [0.6, -0.3], rtol=1e-10, atol=1e-12)
    u, v = rd.evolve(np.full((8, 8), 0.6), np.full((8, 8), -0.3), 4.5, 48)
    np.testing.assert_allclose((u[3, 4], v[3, 4]), exact.y[:, -1], atol=2e-3)
    assert np.ptp(u) < 1e-12 and np.ptp(v) < 1e-12


def test_solver_is_second_order_in_time_and_its_error_is_far_below_one_percent():
    start = early(4)
    exact = np.stack(rd.evolve(*start, 4.5, 768))
    errors = [relative(np.stack(rd.evolve(*start, 4.5, steps)), exact) for steps in (24, 48, 96)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx([2, 2], abs=0.25) and errors[1] < 3e-3


def test_64_cells_resolve_the_default():
    start = early(3)
    waves = scipy.fft.dctn(start, axes=(2, 3), norm="ortho")
    waves = np.pad(2 * waves, ((0, 0), (0, 0), (0, 64), (0, 64)))
    fine = np.stack(rd.evolve(*scipy.fft.idctn(waves, axes=(2, 3), norm="ortho"), 4.5, 48))
    waves = scipy.fft.dctn(fine, axes=(2, 3), norm="ortho")[..., :64, :64] / 2
    same = scipy.fft.idctn(waves, axes=(2, 3), norm="ortho")
    assert relative(np.stack(rd.evolve(*start, 4.5, 48)), same) < 1e-3


def plain(u, v, t, steps):
    """Finite differences and Runge and Kutta's steps: another solver, second order in space."""

    def slope(w):
        p = np.pad(w, ((0, 0), (1, 1), (1, 1)), mode="edge")
        lap = p[:, 2:, 1:-1] + p[:, :-2, 1:-1] + p[:, 1:-1, 2:] + p[:, 1:-1, :-2] - 4 * w
        lap *= (w.shape[-1] / 2) ** 2
        return np.stack(
            [1e-3 * lap[0] + w[0] - w[0] ** 3 - 5e-3 - w[1], 5e-3 * lap[1] + w[0] - w[1]]
        )

    w, dt = np.stack([u, v]), t / steps
    for _ in range(steps):
        a = slope(w)
        b = slope(w + dt / 2 * a)
        c = slope(w + dt / 2 * b)
        w = w + dt / 6 * (a + 2 * b + 2 * c + slope(w + dt * c))
    return w


def test_finite_differences_converge_to_the_same():
    errors = []
    for N in (16, 32, 64):
        x = np.pi * (np.arange(N) + 0.5) / N
        u = 0.6 * np.cos(2 * x)[:, None] * np.cos(x) + 0.3 * np.cos(3 * x)
        v = 0.4 * np.cos(x)[:, None] * np.cos(2 * x) - 0.2
        ours = np.stack(rd.evolve(u, v, 2.0, 400))
        errors.append(np.linalg.norm(plain(u, v, 2.0, 100) - ours) / np.linalg.norm(ours))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx([2, 2], abs=0.25) and errors[-1] < 2e-3


def test_published_pattern_is_that_of_finite_differences():
    x, y = rd.simulate(1, 0, published=True)
    u, v = np.random.default_rng(0).standard_normal((1, 2, 128, 128))[0]
    np.testing.assert_array_equal(x[0, 0], u.astype(np.float32))
    assert relative(y[:, 0], plain(u, v, 5.0, 300)[1][None]) < 0.03


# ---- the task ----


@pytest.mark.parametrize("published", [False, True])
def test_simulated_form_and_seeds(published):
    x, y = rd.simulate(3, [3, 0], published)
    record = {**rd.TASK, **(rd.PUBLISHED if published else {})}
    assert x.shape == (3, *record["x_shape"]) and y.shape == (3, *record["y_shape"])
    assert y.shape[1] == record["num_classes"] and x.dtype == y.dtype == np.float32
    again, other = (rd.simulate(3, [3, i], published) for i in (0, 1))
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0]) and not np.array_equal(y, other[1])


def test_default_is_the_late_pattern_of_the_early_one():
    x, y = rd.simulate(6, 0)
    late = np.stack(rd.evolve(*x.astype(float).swapaxes(0, 1), rd.END - rd.START, 200), axis=1)
    assert relative(y, late) < 3e-3
    assert sum(t for t, _ in rd.PHASES) == rd.END and sum(t for t, _ in rd.PHASES[:2]) == rd.START


def test_levels_are_those_of_the_reference():
    _, y = rd.simulate(40, 0)
    assert np.sqrt(np.square(y).mean(axis=(0, 2, 3))) == pytest.approx([0.32, 0.175], abs=0.02)
    assert y.mean(axis=(0, 2, 3)) == pytest.approx([-0.04, -0.04], abs=0.02)
    x, y = rd.simulate(5, 0, published=True)
    assert (x.mean(), x.std()) == pytest.approx((0, 1), abs=0.01)
    assert np.sqrt(np.square(y).mean()) == pytest.approx(0.17, abs=0.015)


def test_what_published_hides_is_more_than_half():
    """The best guess of v at t = 5 from u at t = 0 is the mean over what v was: its error."""
    u, v = np.random.default_rng(0).standard_normal((2, 10, 128, 128))
    for t, steps in rd.PHASES:
        u, v = rd.evolve(np.broadcast_to(u[:1], v.shape) if t == 0.1 else u, v, t, steps)
    spread = np.sqrt(np.square(v - v.mean(axis=0)).sum() / 9 / np.square(v).mean(axis=0).sum())
    assert 0.5 < spread < 0.65


def test_linear_model_is_between_copying_and_perfect():
    (x, y), (x_test, y_test) = rd.simulate(150, [0, 0]), rd.simulate(40, [0, 1])
    a, a_test = ((part - x.mean(axis=0)).reshape(len(part), -1) for part in (x, x_test))
    products = (a @ a.T).astype(float)
    ridge = 0.1 * np.trace(products) / 150 * np.eye(150)
    weights = np.linalg.solve(products + ridge, (y - y.mean(axis=0)).reshape(150, -1))
    linear = y.mean(axis=0) + (a_test @ a.T @ weights).reshape(y_test.shape)
    assert 0.9 < relative(y.mean(axis=0), y_test) < 1.1
    assert 0.7 < relative(x_test, y_test) < 0.85
    assert 0.3 < relative(linear, y_test) < 0.9


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    rd.simulate(60, 0)
    per_sample = (time.process_time() - start) / 60
    assert per_sample * sum(rd.TASK["sizes"].values()) < 60


# ---- the real file ----

NAMES = [f"{i:04}" for i in range(11)]
USED = (0, 10, 100)  # frames


def film(name):
    """The frames that are used of a group, (3, 128, 128, 2)."""
    return np.random.default_rng(int(name)).standard_normal((3, 128, 128, 2)).astype(np.float32)


def place(root, names, data=None, changes=None):
    """A file as the real one. All frames but those that are used are not a number.

    data: what a group holds, if it is not a whole film; changes: {index: value}, of group "0010".
    """
    h5py = pytest.importorskip("h5py")
    path = root / "pdebench" / "2D_diff-react_NA_NA.h5"
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name in names:
            group = file.create_group(name)
            group.attrs["config"] = "sim: {}"
            group["grid/t"] = np.linspace(0, 5, 101)
            group["grid/x"] = group["grid/y"] = np.linspace(-0.99, 0.99, 128)
            if data is not None:
                group["data"] = data
                continue
            array = group.create_dataset(
                "data",
                (101, 128, 128, 2),
                "f4",
                chunks=(1, 128, 128, 2),
                fillvalue=np.nan,
                compression="lzf",
            )
            for i, frame in enumerate(USED):
                array[frame] = film(name)[i]
        for index, value in (changes or {}).items():
            file["0010/data"][index] = value
    return path


@pytest.mark.parametrize(("split", "names"), [("train", NAMES[:10]), ("test", NAMES[10:])])
def test_reads_the_real_layout(split, names, tmp_path):
    place(tmp_path, NAMES[::-1])
    true = np.stack([film(name) for name in names]).transpose(0, 1, 4, 2, 3)
    x, y = rd.read(tmp_path, split, published=True)
    np.testing.assert_array_equal(x, true[:, 0, :1])
    np.testing.assert_array_equal(y, true[:, 2, 1:])
    assert x.dtype == y.dtype == np.float32
    x, y = rd.read(tmp_path, split)
    four = sum(true[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    np.testing.assert_allclose(x, four[:, 1], atol=1e-6)
    np.testing.assert_allclose(y, four[:, 2], atol=1e-6)
    assert x.dtype == y.dtype == np.float32


def test_frame_0_is_read_only_where_published_and_frame_10_only_where_not(tmp_path):
    place(tmp_path, NAMES, changes={0: np.nan})
    assert np.isfinite(rd.read(tmp_path, "test")[0]).all()
    place(tmp_path, NAMES, changes={10: np.nan})
    assert np.isfinite(rd.read(tmp_path, "test", published=True)[0]).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"names": NAMES[:9]}, "got 9 groups"),
        ({"names": NAMES, "data": np.ones((101, 64, 64, 2), "f4")}, r"0010 has \(101, 64, 64, 2"),
        ({"names": NAMES, "data": np.ones((100, 128, 128, 2), "f2")}, r"0010 has \(100"),
        ({"names": NAMES, "data": np.ones((101, 128, 128, 1), "f2")}, "0010 has .*128, 1"),
        ({"names": NAMES, "changes": {(10, 3, 4, 1): np.nan}}, "group 0010 .*not finite"),
        ({"names": NAMES, "changes": {(100, 3, 4, 0): np.inf}}, "group 0010 .*not finite"),
    ],
)
def test_refuses_other_contents(content, message, tmp_path):
    place(tmp_path, **content)
    with pytest.raises(ValueError, match=f"NA.h5: expected at least 10 .*{message}") as error:
        rd.read(tmp_path, "test")
    assert "\n" not in str(error.value)


def test_refuses_missing_and_cut_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="2D_diff-react_NA_NA.h5.*133017.*--data sim"):
        rd.read(tmp_path, "test")
    path = place(tmp_path, NAMES)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="NA.h5: expected at least 10") as error:
            rd.read(tmp_path, "train")
        assert "\n" not in str(error.value)

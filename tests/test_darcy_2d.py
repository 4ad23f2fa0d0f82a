"""tasks/darcy_2d.py: the equation is solved as it says; the file is read as it is."""

import sys
import time

import numpy as np
import pytest
import scipy.linalg
import torch

from tasks import darcy, darcy_2d, metrics


def rock(seed, N=64):
    return next(darcy_2d.rocks(1, N, np.random.default_rng(seed)))


def steady(nu, f=darcy_2d.BETA, published=False):
    return darcy_2d.solve(darcy_2d.factor(nu, published), f).reshape(nu.shape)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def relative(p, y):
    p = np.array(np.broadcast_to(p, y.shape), np.float32)
    return metrics.relative_l2(torch.from_numpy(p), torch.from_numpy(y))


# ---- the solver ----


def trigonometric(N):
    """nu, f and u of a problem with a known solution, at the centres of N x N cells."""
    X, Y = np.meshgrid(*[(np.arange(N) + 0.5) / N] * 2)
    nu = 1 + np.sin(2 * np.pi * X) * Y / 2
    u = np.sin(np.pi * X) * np.sin(2 * np.pi * Y)
    flow = np.pi * np.cos(2 * np.pi * X) * Y * np.pi * np.cos(np.pi * X) * np.sin(2 * np.pi * Y)
    flow += np.sin(2 * np.pi * X) / 2 * 2 * np.pi * np.sin(np.pi * X) * np.cos(2 * np.pi * Y)
    return nu, (5 * np.pi**2 * nu * u - flow).ravel(), u  # -nu Laplace(u) - grad(nu) . grad(u)


def test_solver_is_second_order():
    errors = []
    for N in (16, 32, 64):
        nu, f, u = trigonometric(N)
        errors.append(np.abs(steady(nu, f) - u).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx([2, 2], abs=0.15) and errors[-1] < 2e-3


@pytest.mark.parametrize("seed", [1, 2])
def test_error_on_a_rock_of_square_cells_is_far_below_one_percent(seed):
    nu = rock(seed)
    fine = steady(np.kron(nu, np.ones((3, 3)))).reshape(64, 3, 64, 3)[:, 1, :, 1]
    assert distance(steady(nu), fine) < 7e-3  # and the fine one's is a ninth of that


def test_pressure_of_a_uniform_rock_is_the_series_of_poisson():
    j = np.arange(1, 200, 2)
    at = np.sin(np.pi * j * 31.5 / 64) / j
    middle = 16 / np.pi**4 * (np.outer(at, at) / (j[:, None] ** 2 + j**2)).sum()
    assert steady(np.full((64, 64), 0.1))[31, 31] == pytest.approx(middle, rel=5e-4)


def test_pressure_turns_and_scales_with_the_rock():
    nu = rock(3)
    u = steady(nu)
    for turn in (np.transpose, np.flipud, np.fliplr):
        np.testing.assert_allclose(steady(turn(nu)), turn(u), rtol=1e-9)
    np.testing.assert_allclose(steady(4 * nu, 0.2), u / 2, rtol=1e-9)
    assert u.min() > 0


def test_published_scheme_is_that_of_darcy_with_the_rim_a_cell_away():
    nu = rock(4)
    other = darcy.solve(np.pad(nu, 1, "edge"), darcy_2d.BETA * (65 / 64) ** 2)[1:-1, 1:-1]
    np.testing.assert_allclose(steady(nu, published=True), other, rtol=1e-9)


def test_decay_is_the_exponential_of_the_matrix():
    A, e = darcy_2d.factor(rock(0, 12), True), np.random.default_rng(0).uniform(1, 2, 144)
    inverse = np.stack([darcy_2d.solve(A, row) for row in np.eye(144)])
    for t in (0.5, 1.75):
        exact = scipy.linalg.expm(-t * np.linalg.inv(inverse)) @ e
        np.testing.assert_allclose(darcy_2d.decay(A, e, t), exact, rtol=0, atol=1e-5 * exact.max())


def test_decay_has_converged_in_its_small_space(monkeypatch):
    A = darcy_2d.factor(rock(0), True)
    e = darcy_2d.start(64, np.random.default_rng(1))
    short = darcy_2d.decay(A, e, 1.75)
    monkeypatch.setattr(darcy_2d, "KRYLOV", 24)
    assert distance(short, darcy_2d.decay(A, e, 1.75)) < 1e-6


def test_what_is_left_of_the_start_is_small_in_the_middle_and_large_at_times():
    rng, left = np.random.default_rng(0), []
    for nu in darcy_2d.rocks(100, 32, rng):
        A = darcy_2d.factor(nu, True)
        u = darcy_2d.solve(A, darcy_2d.BETA)
        late = darcy_2d.decay(A, darcy_2d.start(32, rng) - u, darcy_2d.TIME)
        left.append(np.linalg.norm(late) / np.linalg.norm(u))
    assert 0.003 < np.median(left) < 0.06
    assert 0.03 < np.mean(np.array(left) > 1) < 0.25


def test_start_has_a_level_and_waves():
    starts = np.stack([darcy_2d.start(32, np.random.default_rng(i)) for i in range(200)])
    assert starts.mean() == pytest.approx(5.05, abs=0.7)  # U(0.1, 10)
    waves = abs(starts - np.median(starts, axis=1, keepdims=True)).mean(axis=1)
    assert 0.001 < waves.min() and waves.max() < 0.6


# ---- the task ----


@pytest.mark.parametrize("published", [False, True])
def test_simulated_form_and_seeds(published):
    x, y = darcy_2d.simulate(3, [3, 0], published)
    record = {**darcy_2d.TASK, **(darcy_2d.PUBLISHED if published else {})}
    assert x.shape == (3, *record["x_shape"]) and y.shape == (3, *record["y_shape"])
    assert x.dtype == y.dtype == np.float32 and np.isin(x, np.float32([0.1, 1])).all()
    again, other = (darcy_2d.simulate(3, [3, i], published) for i in (0, 1))
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0]) and not np.array_equal(y, other[1])


def test_default_is_the_steady_pressure_of_its_rock():
    x, y = darcy_2d.simulate(2, 0)
    np.testing.assert_allclose(y[1, 0], steady(np.where(x[1, 0] > 0.5, 1.0, 0.1)), rtol=1e-6)
    rms = np.sqrt(np.square(darcy_2d.simulate(40, 1)[1]).mean(axis=(1, 2, 3)))
    assert 0.004 < rms.min() < rms.mean() < 0.03 and rms.max() < 0.06


def test_rocks_are_half_of_each_material():
    rocks = darcy_2d.rocks(3000, 32, np.random.default_rng(0))
    share = np.array([(nu == 1).mean() for nu in rocks])
    assert share.mean() == pytest.approx(0.49, abs=0.02)
    assert share.std() == pytest.approx(0.21, abs=0.02)


def test_linear_model_is_between_the_mean_and_perfect():
    (x, y), (x_test, y_test) = darcy_2d.simulate(150, [0, 0]), darcy_2d.simulate(60, [0, 1])
    a, a_test = ((part.reshape(len(part), -1) - 0.55) / 0.45 for part in (x, x_test))
    weights = np.linalg.solve(a @ a.T + 1e3 * np.eye(150), (y - y.mean(axis=0)).reshape(150, -1))
    ridge = y.mean(axis=0) + (a_test @ a.T @ weights).reshape(y_test.shape)
    mean = relative(y.mean(axis=0), y_test)
    assert 0.4 < mean < 0.7 and relative(x_test, y_test) > 10
    assert 0.1 < relative(ridge, y_test) < 0.6 * mean


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    darcy_2d.simulate(60, 0)
    per_sample = (time.process_time() - start) / 60
    assert per_sample * sum(darcy_2d.TASK["sizes"].values()) < 60


# ---- the real file ----


def arrays(rows, seed=0):
    """nu and tensor as in the real file, without physics; only every second cell is a number."""
    rng = np.random.default_rng(seed)
    nu, u = np.full((rows, 128, 128), np.nan, "f4"), np.full((rows, 1, 128, 128), np.nan, "f4")
    nu[:, ::2, ::2] = rng.choice([0.1, 1.0], (rows, 64, 64))
    u[..., ::2, ::2] = rng.uniform(0.001, 0.1, (rows, 1, 64, 64))
    return {"nu": nu, "tensor": u}


def place(root, content):
    h5py = pytest.importorskip("h5py")
    path = root / "pdebench" / "2D_DarcyFlow_beta0.1_Train.hdf5"
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in content.items():
            file[key] = array
        file["x-coordinate"] = file["y-coordinate"] = (np.arange(128, dtype="f4") + 0.5) / 128
        file.attrs["beta"] = 0.1
    return path


@pytest.mark.parametrize(("split", "rows"), [("test", slice(0, 2)), ("train", slice(2, 23))])
def test_reads_the_real_layout(split, rows, tmp_path, monkeypatch):
    content = arrays(23)
    place(tmp_path, content)
    monkeypatch.setattr(darcy_2d, "ROWS", 5)
    x, y = darcy_2d.read(tmp_path, split, published=True)
    np.testing.assert_array_equal(x[:, 0], content["nu"][rows, ::2, ::2])
    np.testing.assert_array_equal(y, content["tensor"][rows, :, ::2, ::2])
    assert x.dtype == y.dtype == np.float32


def test_file_is_not_the_default_problem(tmp_path):
    with pytest.raises(ValueError, match="beta0.1.*not steady yet.*--published.*--data sim"):
        darcy_2d.read(tmp_path, "train")


def changed(key, value, at=None):
    content = arrays(12)
    if at is None:
        content[key] = value
    else:
        content[key][at] = value
    return {key: array for key, array in content.items() if array is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed("tensor", None), "expected nu > 0.*tensor.*tensor"),
        (changed("nu", None), "expected nu > 0.*nu"),
        (arrays(9), r"got nu \(9, 128, 128\)"),
        (changed("tensor", np.ones((11, 1, 128, 128))), r"got nu .* tensor \(11, 1, 128, 128\)"),
        (changed("tensor", np.ones((12, 128, 128))), r"tensor \(12, 128, 128\)"),
        (changed("nu", np.ones((12, 64, 64))), r"got nu \(12, 64, 64\)"),
        (changed("nu", np.full((12, 128, 128), b"rock")), "expected nu > 0"),
        (changed("nu", np.nan, (11, 2, 2)), "not finite, or nu <= 0, in 'train'"),
        (changed("nu", 0.0, (11, 2, 2)), "not finite, or nu <= 0, in 'train'"),
        (changed("tensor", np.inf, (11, 0, 2, 2)), "not finite"),
        (changed("tensor", 0.0, 11), "0 everywhere, in 'train'"),
    ],
)
def test_refuses_other_contents(content, message, tmp_path):
    place(tmp_path, content)
    with pytest.raises(ValueError, match=f"Train.hdf5: .*{message}") as error:
        darcy_2d.read(tmp_path, "train", published=True)
    assert "\n" not in str(error.value)


def test_refuses_missing_and_cut_files_and_asks_for_h5py(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="Train.hdf5.*133218.*--data simulated"):
        darcy_2d.read(tmp_path, "test", published=True)
    path = place(tmp_path, arrays(10))
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="Train.hdf5: expected nu > 0") as error:
            darcy_2d.read(tmp_path, "train", published=True)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="Train.hdf5.*pip install h5py"):
        darcy_2d.read(tmp_path, "train", published=True)

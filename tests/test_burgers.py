"""tasks/burgers.py: the solver solves the equation; the real file is read as it is."""

import time

import numpy as np
import pytest
import torch

from tasks import burgers, metrics, sines

NAME = "1D_Burgers_Sols_Nu1.0.hdf5"
VISCOSITY = 1 / np.pi


@pytest.fixture(scope="module")
def u0():
    return sines.random_sines(200, np.random.default_rng(0))


def relative(out, y):
    out = np.broadcast_to(out, y.shape).astype(np.float32)
    return metrics.relative_l2(torch.from_numpy(out), torch.from_numpy(y))


def test_solver_finds_a_known_solution():
    x, k, m = np.arange(64) / 64, 2 * np.pi * np.array([[1], [2]]), np.array([[0.0], [0.7]])

    def exact(t):  # of phi = 1 + a cos(k x), moving with m
        a = 0.6 * np.exp(-VISCOSITY * k**2 * t)
        wave = k * (x - m * t)
        return m + 2 * VISCOSITY * a * k * np.sin(wave) / (1 + a * np.cos(wave))

    for t in (0.0, 0.01, 0.05, 0.3):
        np.testing.assert_allclose(burgers.solve(exact(0), t), exact(t), atol=1e-10)


@pytest.mark.parametrize(("viscosity", "t"), [(VISCOSITY, 0.01), (VISCOSITY / 10, 0.05)])
def test_solver_agrees_with_small_steps_of_the_equation(viscosity, t):
    x, L = np.arange(128) / 128, 128
    u = start = np.stack([0.3 + np.sin(2 * np.pi * x), np.cos(4 * np.pi * x) - 0.5])
    ik = 2j * np.pi * np.fft.rfftfreq(L, 1 / L)

    def slope(u):
        return np.fft.irfft(-ik * np.fft.rfft(u**2 / 2) + viscosity * ik**2 * np.fft.rfft(u), L)

    steps = 4000
    for _ in range(steps):  # Runge and Kutta's classical step
        k1 = slope(u)
        k2 = slope(u + t / steps / 2 * k1)
        k3 = slope(u + t / steps / 2 * k2)
        k4 = slope(u + t / steps * k3)
        u = u + t / steps / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    np.testing.assert_allclose(burgers.solve(start, t, viscosity), u, atol=1e-8)
    assert np.abs(u - start).max() > 0.1


def test_mean_is_kept_and_energy_is_lost(u0):
    start = u0(sines.centres())
    u = [start, *(burgers.solve(start, t) for t in (0.01, 0.1, 2.0))]
    for earlier, later in zip(u[:-1], u[1:], strict=True):
        np.testing.assert_allclose(later.mean(axis=1), start.mean(axis=1), atol=1e-13)
        lost = np.square(earlier).mean(axis=1) - np.square(later).mean(axis=1)
        assert (lost > -1e-14).all() and (lost > 0).mean() > 0.5  # short waves are gone early
    assert (np.square(u[1]).sum(axis=1) < np.square(start).sum(axis=1)).all()
    np.testing.assert_allclose(burgers.solve(u[1], 0.09), u[2], atol=1e-9)


def test_a_finer_grid_changes_nothing(u0):
    fine = (np.arange(8192) + 4) / 8192  # every eighth is one of the 1024 centres
    for t in (0.01, 2.0):
        y = burgers.solve(u0(fine), t)[:, ::8]
        gap = np.linalg.norm(burgers.solve(u0(sines.centres()), t) - y, axis=1)
        assert (gap / np.linalg.norm(y, axis=1)).max() < 1e-4


def test_at_the_published_time_nothing_is_left_but_the_mean():
    x, y = burgers.simulate(4000, 1, published=True)
    assert x.shape == (4000, *burgers.PUBLISHED["x_shape"])
    assert y.shape == (4000, *burgers.PUBLISHED["y_shape"])
    assert np.ptp(y[:, 0], axis=1).max() < 1e-6
    mean = np.abs(y[:, 0].mean(axis=1))
    assert (mean < 0.05).mean() == pytest.approx(0.07, abs=0.015)
    assert (mean < 0.01).mean() == pytest.approx(0.014, abs=0.006)
    flat = burgers.solve(x[:50, 0].astype(float), 2.0)
    assert np.abs(flat - flat.mean(axis=1, keepdims=True)).max() < 5e-11


def test_simulated_form_and_seeds():
    x, y = burgers.simulate(30, [3, 0])
    assert x.shape == (30, *burgers.TASK["x_shape"]) and x.dtype == y.dtype == np.float32
    assert y.shape == (30, *burgers.TASK["y_shape"]) and np.isfinite([x, y]).all()
    again, other = burgers.simulate(30, [3, 0]), burgers.simulate(30, [3, 1])
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0])
    published = burgers.simulate(30, [3, 0], published=True)
    assert np.array_equal(x, published[0][:, :, ::4]) and not np.array_equal(y, published[1])
    assert burgers.TASK["loss"] is metrics.relative_l2_loss


def test_trivial_models_fail_and_friction_alone_is_not_all():
    (x, y), (x_test, y_test) = burgers.simulate(1000, [0, 0]), burgers.simulate(200, [0, 2])
    assert relative(x_test, y_test) > 0.5
    assert relative(y.mean(axis=0), y_test) > 0.9
    assert relative(x_test.mean(axis=2, keepdims=True), y_test) > 0.4
    a, a_test = x[:, 0].astype(float), x_test[:, 0].astype(float)
    weights = np.linalg.solve(a.T @ a + np.eye(256), a.T @ y[:, 0])
    assert 0.01 < relative((a_test @ weights)[:, None], y_test) < 0.1
    decay = np.exp(-VISCOSITY * (2 * np.pi * np.arange(129)) ** 2 * 0.01)
    assert 0.01 < relative(np.fft.irfft(np.fft.rfft(x_test) * decay, 256), y_test) < 0.05


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    burgers.simulate(sum(burgers.TASK["sizes"].values()), 0)
    assert time.process_time() - start < 15


def write(root, start=0.0, frames=(0, 1, 200), value=None):
    """The real layout, random numbers on some frames; the others are not there: NaN."""
    h5py = pytest.importorskip("h5py")
    values = np.random.default_rng(0).random((20, 3, 1024), np.float32)
    values[:, 1:] /= 2  # waves wear off
    if value is not None:
        values[0, 1, 3] = value
    path = root / "pdebench" / NAME
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        tensor = file.create_dataset(
            "tensor", (20, 201, 1024), "f4", chunks=(20, 1, 1024), fillvalue=np.nan
        )
        for i, frame in enumerate(frames):
            tensor[:, frame] = values[:, i]
        file["x-coordinate"] = sines.centres(start, 1).astype(np.float32)
        file["t-coordinate"] = np.linspace(0, 2.01, 202, dtype=np.float32)
        file.attrs["Nu"] = 1.0
    return values


@pytest.mark.parametrize(("split", "rows"), [("test", slice(0, 2)), ("train", slice(2, 20))])
@pytest.mark.parametrize(("published", "frame", "stride"), [(False, 1, 4), (True, 2, 1)])
def test_reads_the_real_layout(split, rows, published, frame, stride, tmp_path):
    values = write(tmp_path)
    x, y = burgers.read(tmp_path, split, published)
    assert x.dtype == y.dtype == np.float32 and x.shape == y.shape and x.ndim == 3
    np.testing.assert_array_equal(x[:, 0], values[rows, 0, ::stride])
    np.testing.assert_array_equal(y[:, 0], values[rows, frame, ::stride])


def test_refuses_the_file_of_the_other_equation_unless_it_is_asked_for(tmp_path):
    values = write(tmp_path, start=-1.0)
    with pytest.raises(ValueError, match=f"{NAME}: x-coordinate starts at -0.999.*281365"):
        burgers.read(tmp_path, "test")
    np.testing.assert_array_equal(burgers.read(tmp_path, "test", True)[1][:, 0], values[:2, 2])


def test_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{NAME}.*281365.*--data simulated"):
        burgers.read(tmp_path, "train")
    write(tmp_path, value=np.inf)
    with pytest.raises(ValueError, match=f"{NAME}: tensor holds values that are not finite"):
        burgers.read(tmp_path, "test")
    write(tmp_path, frames=(0, 1, 199))
    with pytest.raises(ValueError, match=f"{NAME}: tensor holds values that are not finite"):
        burgers.read(tmp_path, "test", published=True)

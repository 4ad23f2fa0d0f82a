"""tasks/diffusion_reaction_1d.py: the solver is right; the real file is read as it is."""

import time

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks import diffusion_reaction_1d as task
from tasks import metrics, sines

NAME = "ReacDiff_Nu0.5_Rho1.0.hdf5"


@pytest.fixture(scope="module")
def u0():
    return sines.normalised(sines.random_sines(60, np.random.default_rng(0))(sines.centres()))


def relative(out, y):
    out = np.broadcast_to(out, y.shape).astype(np.float32)
    return metrics.relative_l2(torch.from_numpy(out), torch.from_numpy(y))


def test_uniform_fields_grow_by_the_logistic_curve():
    u = np.array([[0.0], [0.4], [0.6], [0.8], [1.0]])
    t = 0.29
    expected = u * np.exp(t) / (1 + u * (np.exp(t) - 1))
    found = task.solve(np.tile(u, 16), t)
    np.testing.assert_allclose(found, np.tile(expected, 16), atol=1e-12)
    assert found[1:4, 0] == pytest.approx([0.471, 0.667, 0.842], abs=1e-3)


def test_without_growth_waves_decay_as_heat_does():
    x = np.arange(32) / 32
    u = 0.5 + 0.3 * np.sin(2 * np.pi * x) + 0.1 * np.cos(4 * np.pi * x)
    decay = np.exp(-0.5 * (2 * np.pi) ** 2 * 0.03 * np.array([1, 4]))
    expected = 0.5 + 0.3 * decay[0] * np.sin(2 * np.pi * x) + 0.1 * decay[1] * np.cos(4 * np.pi * x)
    np.testing.assert_allclose(task.solve(u[None], 0.03, rho=0.0)[0], expected, atol=1e-12)


def test_solver_agrees_with_an_integrator_and_is_second_order():
    x, L = np.arange(32) / 32, 32
    u = 0.5 + 0.4 * np.sin(2 * np.pi * x) + 0.1 * np.cos(6 * np.pi * x)
    k = 2 * np.pi * np.fft.rfftfreq(L, 1 / L)

    def slope(t, u):
        return 0.5 * np.fft.irfft(-(k**2) * np.fft.rfft(u), L) + 10 * u * (1 - u)

    exact = solve_ivp(slope, (0, 0.04), u, "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    steps = (0.01, 0.005, 0.0025)
    errors = [np.abs(task.solve(u[None], 0.04, rho=10.0, dt=dt)[0] - exact).max() for dt in steps]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx([2, 2], abs=0.1)
    assert errors[-1] < 1e-3 < np.abs(exact - u).max()


@pytest.mark.parametrize("t", [0.03, 0.29])
def test_steps_and_grid_are_fine_enough(t, u0):
    fine = sines.random_sines(60, np.random.default_rng(0))((np.arange(4096) + 2) / 4096)
    centres = fine[:, ::4]  # the 1024 centres, scaled alike
    low, high = (f(centres, axis=1, keepdims=True) for f in (np.min, np.max))
    exact = task.solve((fine - low) / (high - low), t, dt=t / 150)[:, ::4]
    gap = np.linalg.norm(task.solve(u0, t) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert gap.mean() < 1e-4 and gap.max() < 1e-3


def test_fields_stay_within_0_and_1_and_grow(u0):
    earlier = u0
    for t in (0.03, 0.29, 1.0):
        later = task.solve(u0, t)
        assert later.min() > 0 and later.max() < 1
        assert (later.mean(axis=1) > earlier.mean(axis=1)).all()
        earlier = later
    assert task.solve(u0, 20.0, dt=0.2) == pytest.approx(1, abs=1e-6)


def test_at_the_published_time_the_field_is_flat():
    x, y = task.simulate(300, 1, published=True)
    assert x.shape == (300, *task.PUBLISHED["x_shape"])
    assert y.shape == (300, *task.PUBLISHED["y_shape"])
    flatness = (y[:, 0].std(axis=1) / y[:, 0].mean(axis=1)).mean()
    assert flatness == pytest.approx(5e-4, rel=0.2)
    m = x.mean(axis=2, keepdims=True)
    assert relative(m / (m + np.exp(-0.29) * (1 - m)), y) < 0.003


def test_simulated_form_and_seeds():
    x, y = task.simulate(30, [3, 0])
    assert x.shape == (30, *task.TASK["x_shape"]) and x.dtype == y.dtype == np.float32
    assert y.shape == (30, *task.TASK["y_shape"]) and np.isfinite([x, y]).all()
    again, other = task.simulate(30, [3, 0]), task.simulate(30, [3, 1])
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0])
    published = task.simulate(30, [3, 0], published=True)
    assert np.array_equal(x, published[0][:, :, ::4]) and not np.array_equal(y, published[1])
    assert published[0].min() == 0 and published[0].max() == 1
    assert task.TASK["loss"] is metrics.relative_l2_loss


def test_trivial_models_fail_and_a_linear_one_does_not():
    (x, y), (x_test, y_test) = task.simulate(1000, [0, 0]), task.simulate(200, [0, 2])
    assert relative(x_test, y_test) > 0.4
    assert relative(y.mean(axis=0), y_test) > 0.12
    assert relative(x_test.mean(axis=2, keepdims=True), y_test) > 0.08
    a, a_test = x[:, 0].astype(float), x_test[:, 0].astype(float)
    weights = np.linalg.solve(a.T @ a + np.eye(256), a.T @ y[:, 0])
    assert relative((a_test @ weights)[:, None], y_test) < 0.01
    decay = np.exp(-0.5 * (2 * np.pi * np.arange(129)) ** 2 * 0.03)
    only_spread = relative(np.fft.irfft(np.fft.rfft(x_test) * decay, 256), y_test)
    assert 0.01 < only_spread < 0.02  # the growth


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    task.simulate(sum(task.TASK["sizes"].values()), 0)
    assert time.process_time() - start < 15


def write(root, frames=(0, 3, 29), value=None, steps=101):
    """The real layout, random numbers on some frames; the others are not there: NaN."""
    h5py = pytest.importorskip("h5py")
    values = np.random.default_rng(0).random((20, 3, 1024), np.float32)
    if value is not None:
        values[0, 1, 3] = value
    path = root / "pdebench" / NAME
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        tensor = file.create_dataset(
            "tensor", (20, steps, 1024), "f4", chunks=(20, 1, 1024), fillvalue=np.nan
        )
        for i, frame in enumerate(frames):
            tensor[:, frame] = values[:, i]
        file["x-coordinate"] = sines.centres().astype(np.float32)
        file["t-coordinate"] = np.linspace(0, 1.01, 102, dtype=np.float32)
        file.attrs["Nu"], file.attrs["rho"] = 0.5, 1.0
    return values


@pytest.mark.parametrize(("split", "rows"), [("test", slice(0, 2)), ("train", slice(2, 20))])
@pytest.mark.parametrize(("published", "frame", "stride"), [(False, 1, 4), (True, 2, 1)])
def test_reads_the_real_layout(split, rows, published, frame, stride, tmp_path):
    values = write(tmp_path)
    x, y = task.read(tmp_path, split, published)
    assert x.dtype == y.dtype == np.float32 and x.shape == y.shape and x.ndim == 3
    np.testing.assert_array_equal(x[:, 0], values[rows, 0, ::stride])
    np.testing.assert_array_equal(y[:, 0], values[rows, frame, ::stride])


def test_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{NAME}.*133177.*--data simulated"):
        task.read(tmp_path, "train")
    write(tmp_path, value=np.nan)
    with pytest.raises(ValueError, match=f"{NAME}: tensor holds values that are not finite"):
        task.read(tmp_path, "test")
    write(tmp_path, steps=31)
    with pytest.raises(ValueError, match=rf"{NAME}: got tensor float32 of shape \(20, 31, 1024\)"):
        task.read(tmp_path, "test")

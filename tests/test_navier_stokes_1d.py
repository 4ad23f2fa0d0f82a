"""tasks/navier_stokes_1d.py: the equations are solved as it says; the file is read as it is."""

import sys
import time

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks import navier_stokes_1d as ns
from tasks import sines

FILE = "1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5"


def states(n, stride=8, seed=0, windowed=0.0):
    return ns.start(n, np.random.default_rng(seed), windowed)[:, :, ::stride]


def per_channel(p, y):
    """Mean over samples of the relative error of rho, p and v."""
    return (np.linalg.norm(p - y, axis=2) / np.linalg.norm(y, axis=2)).mean(axis=0)


def test_uneven_density_is_carried_along_where_pressure_and_velocity_are_even():
    x = sines.centres(-1, 1)[::8]
    rho = lambda x: 3 + 2 * np.sin(np.pi * x) * np.cos(3 * np.pi * x)  # noqa: E731
    before = np.stack([rho(x), np.full(128, 40.0), np.full(128, 0.7)])[None]
    after = ns.solve(before, 0.5)[0]
    np.testing.assert_allclose(after[0], rho(x - 0.35), rtol=1e-6)
    np.testing.assert_allclose(after[1:], before[0, 1:], rtol=1e-8)


@pytest.mark.parametrize("waves", [1, 2, 5])
def test_quiet_sound_is_damped_and_slowed_by_friction(waves):
    """v = e^(-a t) (cos wt - a/w sin wt) sin kx: a = nu k^2 / 2, w^2 = c^2 k^2 - a^2."""
    rho, p, quiet, t = 2.0, 30.0, 1e-6, 0.1
    k, c = np.pi * waves, (5 / 3 * p / rho) ** 0.5
    a = (4 / 3 * 0.1 + 0.1) * k**2 / 2
    w = (c**2 * k**2 - a**2) ** 0.5
    wave = np.sin(k * sines.centres(-1, 1)[::8])
    before = np.stack([np.full(128, rho), np.full(128, p), quiet * wave])[None]
    v = ns.solve(before, t)[0, 2]
    factor = np.exp(-a * t) * (np.cos(w * t) - a / w * np.sin(w * t))
    np.testing.assert_allclose(v / quiet, factor * wave, atol=1e-4)


def totals(fields):
    rho, p, v = np.moveaxis(fields, 1, 0)
    return np.stack([rho, rho * v, 1.5 * p + rho * v**2 / 2]).mean(axis=2)


def test_mass_momentum_and_energy_are_kept():
    x = states(16, stride=4)
    before, after = totals(x), totals(ns.solve(x, 0.1))
    scale = np.stack([before[0], (before[0] * before[2]) ** 0.5, before[2]])
    assert (np.abs(after - before) / scale).max() < 1e-4
    assert (np.abs(after - before) / scale).mean() < 1e-5


def conservative(fields, t):
    """The same by second-order differences of the conserved quantities, one sample."""
    L = fields.shape[1]

    def rate(t, u):
        rho, m, E = u.reshape(3, L)
        v = m / rho
        p = (E - m * v / 2) * 2 / 3
        mid = lambda f: (f + np.roll(f, -1)) / 2  # noqa: E731
        stress = mid(rho) * (4 / 3 * 0.1 + 0.1) * (np.roll(v, -1) - v) * L / 2
        flux = np.stack([mid(m), mid(m * v + p) - stress, mid((E + p) * v) - mid(v) * stress])
        return ((np.roll(flux, 1, axis=1) - flux) * L / 2).ravel()

    rho, p, v = fields
    u0 = np.stack([rho, rho * v, 1.5 * p + rho * v**2 / 2]).ravel()
    rho, m, E = solve_ivp(rate, (0, t), u0, rtol=1e-7, atol=1e-9).y[:, -1].reshape(3, L)
    return np.stack([rho, (E - m**2 / rho / 2) * 2 / 3, m / rho])


def test_agrees_with_the_conserved_form_solved_by_differences():
    errors = []
    fine = states(3, stride=2, seed=2)[2:]
    true = ns.solve(fine, 0.05)
    for stride in (4, 2):  # 128 and 256 points
        plain = conservative(fine[0, :, ::stride], 0.05)[None]
        errors.append(per_channel(plain, true[:, :, ::stride]))
    ratio = errors[0] / errors[1]
    assert (errors[1] < 0.03).all() and (3 < ratio).all() and (ratio < 5).all()


def test_mirrored_and_moving_gases_do_the_same():
    x = states(4)
    y = ns.solve(x, 0.1)
    mirror = np.array([1, 1, -1])[:, None]
    np.testing.assert_allclose(ns.solve(x[:, :, ::-1] * mirror, 0.1), y[:, :, ::-1] * mirror, 1e-6)
    wind = np.array([0, 0, 0.625])[:, None]  # times 0.1: four cells
    errors = per_channel(np.roll(ns.solve(x + wind, 0.1), -4, axis=2) - wind, y)
    assert errors.max() < 1e-3


def test_fourth_order_in_time():
    x = states(8)
    true = ns.solve(x, 0.1, courant=0.25)
    errors = [per_channel(ns.solve(x, 0.1, courant), true).max() for courant in (2.0, 1.0)]
    assert errors[0] < 1e-4 and np.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.6)


def test_default_grid_is_far_better_than_one_percent():
    fine = states(16, stride=4)
    coarse = per_channel(ns.solve(fine[:, :, ::2], 0.1), ns.solve(fine, 0.1)[:, :, ::2])
    assert coarse.max() < 3e-3


def test_what_is_too_sharp_is_refused():
    noise = np.random.default_rng(0).uniform(0, 1, (4, 3, 32))
    x = np.array([1, 10, -3])[:, None] + np.array([19, 190, 6])[:, None] * noise
    with pytest.raises(FloatingPointError, match="too sharp for 32 points; give more"):
        ns.solve(x, 0.2)


def test_published_end_is_flat_in_pressure_only():
    x, y = ns.simulate(4, 1, published=True)
    assert x.shape == y.shape == (4, *ns.PUBLISHED["x_shape"])
    spread = y.std(axis=2) / y.mean(axis=2)
    assert 0.1 < spread[:, 0].mean() < 0.4 and spread[:, 1].mean() < 0.05
    again = ns.solve(x[:, :, ::4], 1.0)
    np.testing.assert_allclose(y[:, :, ::4], again, rtol=1e-3, atol=1e-4)


def test_refine_keeps_the_points_and_the_waves():
    x = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    wave = lambda x: 2 + np.sin(3 * x) - np.cos(11 * x)  # noqa: E731
    np.testing.assert_allclose(ns.refine(wave(x), 2)[1::2], wave(x + np.pi / 64), atol=1e-12)
    np.testing.assert_allclose(ns.refine(wave(x), 4)[::4], wave(x), atol=1e-12)


def test_starts_are_as_stated():
    x = states(1500, stride=8)
    rho, p, v = np.moveaxis(x, 1, 0)
    for field, unit in ((rho, 1), (p, 10)):
        b, m = field.min(axis=1), np.ptp(field, axis=1)
        assert unit <= b.min() and field.max() <= 20 * unit and m.max() <= 10 * unit
        for part in (b, m):
            assert np.median(part) == pytest.approx(unit * 10**0.5, rel=0.1)
    assert abs(np.corrcoef(np.log(b), np.log(m))[0, 1]) < 0.1
    assert np.abs(v.mean()) < 0.1 and 1 < np.abs(v).max() < 3
    still = (states(500, windowed=0.5)[:, 2, :8] == 0).all(axis=1)  # v is 0 outside its window
    assert 0.4 < still.mean() < 0.6 and not (v[:, :8] == 0).all(axis=1).any()


def test_simulated_form_and_seeds():
    x, y = ns.simulate(40, [3, 0])
    assert x.shape == (40, *ns.TASK["x_shape"]) and y.shape == (40, *ns.TASK["y_shape"])
    assert x.dtype == y.dtype == np.float32 and y[:, :2].min() > 0
    again, other = ns.simulate(40, [3, 0]), ns.simulate(40, [3, 1])
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0]) and not np.array_equal(y, other[1])
    alone = ns.solve(states(40, seed=[3, 0])[35:36], 0.1)  # of the second chunk
    np.testing.assert_allclose(y[35:36], alone, rtol=1e-4, atol=1e-4)


def test_error_is_of_each_channel():
    y = torch.from_numpy(ns.simulate(5, 0)[1])
    loss, metric = ns.TASK["loss"], ns.TASK["metric"]
    wrong = y.clone()
    wrong[:, 2] = 0  # which would be 1 % of the norm of all three
    assert metric(wrong, y) == pytest.approx(1 / 3) and metric(y, y) == 0
    noisy = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    assert float(loss(noisy, y)) == pytest.approx(metric(noisy, y), rel=1e-5)
    assert metric(noisy, y) == pytest.approx(per_channel(noisy.numpy(), y.numpy()).mean(), 1e-5)
    with pytest.raises(FloatingPointError, match="not finite"):
        metric(y * torch.nan, y)


def test_linear_model_is_between_the_trivial_ones_and_perfect():
    (x, y), (x_test, y_test) = ns.simulate(600, [0, 0]), ns.simulate(100, [0, 1])
    mean = per_channel(np.broadcast_to(y.mean(axis=0), y_test.shape), y_test)
    copy = per_channel(x_test, y_test)
    assert 0.6 < mean.mean() < 0.85 and 0.5 < copy.mean() < 0.8 and copy.min() > 0.15
    scale = x.std(axis=(0, 2), keepdims=True)
    flat, flat_test = ((part / scale).reshape(len(part), -1) for part in (x, x_test))
    centre = flat.mean(axis=0)
    gram = (flat - centre) @ (flat - centre).T + 100 * np.eye(len(flat))
    weights = np.linalg.solve(gram, (y - y.mean(axis=0)).reshape(len(y), -1))
    out = y.mean(axis=0) + ((flat_test - centre) @ (flat - centre).T @ weights).reshape(-1, 3, 128)
    ridge = per_channel(out, y_test).mean()
    assert 0.2 < ridge < mean.mean() / 2


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    ns.simulate(64, 0)
    assert (time.process_time() - start) / 64 * sum(ns.TASK["sizes"].values()) < 30


def arrays(rows=20, frames=(0, 10, 100), seed=0):
    """The arrays of the real file, without physics; all frames but these are NaN."""
    rng = np.random.default_rng(seed)
    made = {}
    for key, low in (("density", 1), ("pressure", 10), ("Vx", -1)):
        made[key] = np.full((rows, 101, 1024), np.nan, dtype=np.float32)
        for frame in frames:
            made[key][:, frame] = rng.uniform(low, 20, (rows, 1024))
    return made


def write(root, content):
    h5py = pytest.importorskip("h5py")
    path = root / "pdebench" / FILE
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in content.items():
            file[key] = array
        file["x-coordinate"] = sines.centres(-1, 1).astype(np.float32)
        file["t-coordinate"] = np.arange(102, dtype=np.float32) / 100
        file.attrs["eta"] = file.attrs["zeta"] = 0.1
    return path


@pytest.mark.parametrize(("published", "frame", "stride"), [(False, 10, 8), (True, 100, 1)])
def test_reads_two_frames_only(published, frame, stride, tmp_path):
    made = arrays(frames=(0, frame))
    write(tmp_path, made)
    fields = np.stack([made[key] for key in ("density", "pressure", "Vx")], axis=1)[..., ::stride]
    for split, rows in (("train", slice(2, 20)), ("test", slice(2))):
        x, y = ns.read(tmp_path, split, published)
        np.testing.assert_array_equal(x, fields[rows, :, 0])
        np.testing.assert_array_equal(y, fields[rows, :, frame])
        assert x.dtype == y.dtype == np.float32


def changed(key, frame=0, **change):
    made = arrays()
    if "value" in change:
        made[key][5, frame, 16] = change["value"]
    made[key] = made[key][change.get("part", ...)].astype(change.get("dtype", np.float32))
    return made


def without(key):
    return {name: array for name, array in arrays().items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("Vx"), "no array Vx"),
        (arrays(rows=9), "9 rows are too few"),
        (changed("density", part=np.s_[:, :21]), r"density float32 of shape \(20, 21, 1024\)"),
        (changed("Vx", part=np.s_[:, :, ::4]), r"Vx float32 of shape \(20, 101, 256\)"),
        (changed("pressure", part=np.s_[:10]), "differ in their rows"),
        (changed("Vx", dtype=np.complex64), "Vx complex64"),
        (changed("density", value=np.nan), "density holds values that are not finite"),
        (changed("Vx", frame=10, value=np.inf), "Vx holds values that are not finite"),
        (changed("density", value=0.0), "density or pressure is not positive"),
        (changed("pressure", frame=10, value=-1.0), "density or pressure is not positive"),
    ],
)
def test_refuses_other_contents(content, message, tmp_path):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=f"Train.hdf5: .*{message}.*expected density") as error:
        ns.read(tmp_path, "train")
    assert "\n" not in str(error.value)


def test_refuses_missing_and_cut_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="Train.hdf5.*164668.*--data simulated"):
        ns.read(tmp_path, "test")
    path = write(tmp_path, arrays())
    whole = path.read_bytes()
    for length in (0, 60, len(whole) // 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="Train.hdf5: .*expected density"):
            ns.read(tmp_path, "test")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="Train.hdf5.*pip install h5py"):
        ns.read(tmp_path, "test")

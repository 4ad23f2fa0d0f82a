"""tasks/diffusion_sorption.py: the equation is solved as it says; the file is read as it is."""

import sys
import time

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import erfc

from tasks import diffusion_sorption as ds
from tasks import metrics


def centres(L):
    return (np.arange(L) + 0.5) / L


def relative(p, y):
    return np.linalg.norm(p - y, axis=-1) / np.linalg.norm(y, axis=-1)


def default(n, L, seed=0):
    """Initial states and soils of the default problem on L cells."""
    return [draw(centres(L), n, np.random.default_rng(seed)) for draw in (ds.plumes, ds.soils)]


def test_without_sorption_it_is_the_heat_equation_to_second_order():
    errors = []
    for L in (32, 64, 128):
        u = ds.solve(np.zeros((1, L)), 20.0, soil=0.0, steps=200)[0]
        errors.append(np.abs(u - erfc(centres(L) / 2 / (ds.D * 20) ** 0.5)).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx([2, 2], abs=0.2) and errors[-1] < 1e-3


def test_in_the_end_the_flow_is_the_same_everywhere_and_leaves_by_the_outlet():
    u, soil = default(3, 64)
    last = ds.solve(u, 1e7, soil, steps=400)
    np.testing.assert_allclose(last, np.tile(1 - centres(64) / (1 + ds.D), (3, 1)), atol=1e-6)


def test_fronts_in_an_endless_soil_depend_on_x_by_root_t_only():
    early, late = (ds.solve(np.full((2, 256), [[0.02], [0.19]]), t, steps=200) for t in (15, 60))
    halves = late.reshape(2, 128, 2).mean(axis=2)  # at twice the x of the early cells
    near = slice(0, 64)  # before the outlet is felt
    np.testing.assert_allclose(early[:, near], halves[:, near], atol=1e-3)


def test_agrees_with_an_ode_solver_on_the_equation_with_r():
    L = 64
    (u,), (soil,) = default(1, L, seed=4)

    def rate(t, u):
        outer = u[-1] / (1 + 1 / (2 * ds.D * L))  # at x = 1, where u = -D u_x
        flow = -ds.D * L * np.concatenate([[2 * (u[0] - 1)], np.diff(u), [2 * (outer - u[-1])]])
        R = 1 + soil * ds.A * ds.N_F * (np.abs(u) + 1e-6) ** (ds.N_F - 1)
        return -np.diff(flow) * L / R

    exact = solve_ivp(rate, (0, 50), u, method="BDF", rtol=1e-8, atol=1e-10).y[:, -1]
    errors = [relative(ds.solve(u[None], 50.0, soil, steps)[0], exact) for steps in (20, 40, 80)]
    assert np.log2(np.array(errors[:-1]) / errors[1:]) == pytest.approx([2, 2], abs=0.4)
    assert errors[1] < 5e-4


def test_bounds_and_samples_that_do_not_mix():
    u, soil = default(20, 128)
    y = ds.solve(u, 50.0, soil)
    assert y.min() > 0 and (y.max(axis=1) <= np.maximum(1, u.max(axis=1))).all()
    np.testing.assert_allclose(ds.solve(u[7:8], 50.0, soil[7:8])[0], y[7], atol=1e-7)


def test_reference_values_of_the_published_problem():
    levels = np.array([0.02, 0.1, 0.19])
    u = ds.solve(np.repeat(levels[:, None], 1024, axis=1), 500.0)
    assert u[:, 511:513].mean(axis=1) == pytest.approx([0.185, 0.245, 0.307], abs=2e-3)
    assert u.mean(axis=1) == pytest.approx([0.300, 0.338, 0.378], abs=2e-3)
    assert (u[:, -1] > 0).all() and (u[:, -1] < 1e-3).all()
    assert ds.content(1.0, 1.0)[1] == pytest.approx(3.16, abs=0.005)
    assert ds.content(0.1, 1.0)[1] == pytest.approx(3.88, abs=0.005)


def test_default_grid_and_steps_are_far_better_than_one_percent():
    (u, soil), (u_fine, soil_fine) = default(10, 128), default(10, 512)
    fine = ds.solve(u_fine, 50.0, soil_fine, steps=120).reshape(10, 128, 4).mean(axis=2)
    assert relative(ds.solve(u, 50.0, soil), fine).max() < 2e-3
    with pytest.raises(FloatingPointError, match="Newton's method is nan off"):
        ds.solve(np.full((1, 8), np.nan), 1.0)


@pytest.mark.parametrize(("published", "cells"), [(False, 128), (True, 1024)])
def test_simulated_form_and_seeds(published, cells):
    x, y = ds.simulate(4, [3, 0], published)
    record = ds.TASK | (ds.PUBLISHED if published else {})
    assert x.shape == (4, *record["x_shape"]) and y.shape == (4, *record["y_shape"])
    assert y.shape[2] == cells and x.dtype == y.dtype == np.float32
    again, other = ds.simulate(4, [3, 0], published), ds.simulate(4, [3, 1], published)
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0]) and not np.array_equal(y, other[1])
    assert record["loss"] is metrics.relative_l2_loss and record["metric"] is metrics.relative_l2


def test_published_problem_is_one_number_the_default_is_not():
    x, y = ds.simulate(20, 0, published=True)
    assert (x == x[:, :, :1]).all() and 0 <= x.min() and x.max() <= 0.2
    sizes = np.linalg.svd(y[:, 0], compute_uv=False)
    assert sizes[1] < 0.1 * sizes[0] and sizes[2] < 0.005 * sizes[0]
    sizes = np.linalg.svd(ds.simulate(40, 0)[1][:, 0], compute_uv=False)
    assert sizes[5] > 0.03 * sizes[0]


def test_plumes_and_soils_are_as_stated():
    u, soil = default(2000, 128)
    assert u.min() >= 0 and u.min(axis=1).max() <= 0.6 and 1 < u.max() <= 3.2
    assert np.median(soil) == pytest.approx(1, abs=0.05)
    parts = 0.6**2 / 2 * sum(1 / j for j in range(1, 5))  # of the variance of log s
    assert np.log(soil).var() == pytest.approx(parts, rel=0.1)


def test_linear_model_is_between_the_trivial_ones_and_perfect():
    (x, y), (x_test, y_test) = ds.simulate(1000, [0, 0]), ds.simulate(200, [0, 1])
    y, y_test = y[:, 0], y_test[:, 0]
    mean = relative(y.mean(axis=0), y_test).mean()
    copy = relative(x_test[:, 0], y_test).mean()
    assert 0.3 < mean < 0.5 and 0.5 < copy < 0.8
    centre = x.reshape(1000, -1).mean(axis=0)
    flat, flat_test = (part.reshape(len(part), -1) - centre for part in (x, x_test))
    map_ = np.linalg.solve(flat.T @ flat + 10 * np.eye(256), flat.T @ (y - y.mean(axis=0)))
    ridge = relative(y.mean(axis=0) + flat_test @ map_, y_test).mean()
    assert 0.04 < ridge < mean / 3


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    ds.simulate(130, 0)
    assert (time.process_time() - start) / 130 * sum(ds.TASK["sizes"].values()) < 30


def series(groups=20, seed=0):
    """Groups as in the real file, without physics; all frames but the first and last are NaN."""
    rng = np.random.default_rng(seed)
    data = np.full((groups, 101, 1024, 1), np.nan, dtype=np.float32)
    data[:, 0] = rng.uniform(0, 0.2, (groups, 1, 1))
    data[:, -1] = rng.uniform(0, 1, (groups, 1024, 1))
    return {f"{i:04d}": group for i, group in enumerate(data)}


def write(root, groups, key="data"):
    h5py = pytest.importorskip("h5py")
    path = root / "pdebench" / "1D_diff-sorp_NA_NA.h5"
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, data in groups.items():
            group = file.create_group(name)
            group.create_dataset(key, data=data, compression="lzf")
            group.create_dataset("grid/x", data=centres(1024))
            group.create_dataset("grid/t", data=np.arange(101) * 5.0)
            group.attrs["config"] = "D: 5e-4"
    return path


def test_reads_the_first_and_the_last_frame_only(tmp_path):
    groups = series()
    write(tmp_path, groups)
    all_data = np.stack(list(groups.values()))
    for split, rows in (("train", slice(18)), ("test", slice(18, 20))):
        x, y = ds.read(tmp_path, split, published=True)
        np.testing.assert_array_equal(x[:, 0], all_data[rows, 0, :, 0])
        np.testing.assert_array_equal(y[:, 0], all_data[rows, 100, :, 0])
        assert x.dtype == y.dtype == np.float32
        assert x.shape[1:] == ds.PUBLISHED["x_shape"] and y.shape[1:] == ds.PUBLISHED["y_shape"]


def changed(name="0003", frame=0, **change):
    groups = series()
    data = groups[name].astype(change.get("dtype", np.float32))
    if "value" in change:
        data[frame, 17] = change["value"]
    groups[name] = data[change.get("part", ...)]
    return groups


def alike():
    groups = series()
    for data in groups.values():
        data[0] = 0.1
    return groups


@pytest.mark.parametrize(
    ("groups", "key", "message"),
    [
        (series(9), "data", "9 groups are too few to split, give 10"),
        (series(), "u", "no data in group 0000"),
        (changed(part=np.s_[:100]), "data", r"0003/data float32 of shape \(100, 1024, 1\)"),
        (changed(part=np.s_[:, ::4]), "data", r"0003/data float32 of shape \(101, 256, 1\)"),
        (changed(part=np.s_[:, :, 0]), "data", r"0003/data float32 of shape \(101, 1024\)"),
        (changed(dtype=bool), "data", "0003/data bool"),
        (changed(value=np.nan), "data", "not finite"),
        (changed(value=np.inf, frame=-1), "data", "not finite"),
        (alike(), "data", "start alike"),
    ],
)
def test_refuses_other_contents(groups, key, message, tmp_path):
    write(tmp_path, groups, key)
    with pytest.raises(ValueError, match=f"NA_NA.h5: .*{message}.*; expected 10000") as error:
        ds.read(tmp_path, "train", published=True)
    assert "\n" not in str(error.value)


def test_refuses_missing_and_cut_files_and_the_default_problem(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="NA_NA.h5.*--data simulated"):
        ds.read(tmp_path, "test", published=True)
    path = write(tmp_path, series())
    with pytest.raises(ValueError, match="NA_NA.h5: .*not this task's plumes.*--data simulated"):
        ds.read(tmp_path, "test")
    whole = path.read_bytes()
    for length in (0, 60, len(whole) // 3, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="NA_NA.h5: .*expected") as error:
            ds.read(tmp_path, "test", published=True)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="NA_NA.h5.*pip install h5py"):
        ds.read(tmp_path, "test", published=True)


def test_loss_falls_to_zero_at_the_truth():
    y = torch.from_numpy(ds.simulate(3, 0)[1])
    assert ds.TASK["metric"](y, y) == 0 and ds.TASK["metric"](2 * y, y) == pytest.approx(1)

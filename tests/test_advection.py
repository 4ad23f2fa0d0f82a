"""tasks/advection.py: the wave moves and keeps its shape; the real file is read as it is."""

import time

import numpy as np
import pytest
import torch

from tasks import advection, metrics, sines

NAME = "1D_Advection_Sols_beta0.4.hdf5"


@pytest.fixture(scope="module")
def simulated():
    return advection.simulate(1000, [0, 0]), advection.simulate(200, [0, 2])


def relative(out, y):
    out = np.broadcast_to(out, y.shape).astype(np.float32)
    return metrics.relative_l2(torch.from_numpy(out), torch.from_numpy(y))


def test_simulated_form_and_seeds():
    x, y = advection.simulate(30, [3, 0])
    assert x.shape == (30, *advection.TASK["x_shape"]) and x.dtype == y.dtype == np.float32
    assert y.shape == (30, *advection.TASK["y_shape"]) and np.isfinite([x, y]).all()
    again, other = advection.simulate(30, [3, 0]), advection.simulate(30, [3, 1])
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0])
    published = advection.simulate(30, [3, 0], published=True)
    assert np.array_equal(x, published[0]) and np.array_equal(y, published[1])
    assert advection.TASK["loss"] is metrics.relative_l2_loss and advection.PUBLISHED == {}


def test_y_is_x_moved_by_beta_t(simulated):
    x, y = (part[:, 0].astype(float) for part in simulated[0])
    wave = np.fft.rfft(x)
    smooth = np.abs(wave[:, 10:]).max(axis=1) < 1e-4  # neither |u| nor a window: eight waves do
    assert 0.75 < smooth.mean() < 0.9
    moved = np.fft.irfft(wave * np.exp(-2j * np.pi * np.arange(129) * 0.4 * 2), 256)
    np.testing.assert_allclose(y[smooth], moved[smooth], atol=1e-5)
    np.testing.assert_allclose(y[smooth].mean(axis=1), x[smooth].mean(axis=1), atol=1e-6)
    assert np.abs(y.mean(axis=1) - x.mean(axis=1)).max() < 0.01  # kinks: no more than a cell's
    assert np.abs(np.sort(y) - np.sort(x)).mean() < 0.01  # the same values at other places


def test_trivial_models_fail_and_a_linear_one_does_not(simulated):
    (x, y), (x_test, y_test) = simulated
    assert relative(x_test, y_test) > 1
    assert relative(y.mean(axis=0), y_test) > 0.9
    assert relative(x_test.mean(axis=2, keepdims=True), y_test) == pytest.approx(0.70, abs=0.05)
    a, a_test = x[:, 0].astype(float), x_test[:, 0].astype(float)
    weights = np.linalg.solve(a.T @ a + np.eye(256), a.T @ y[:, 0])
    assert relative((a_test @ weights)[:, None], y_test) < 0.05


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    advection.simulate(sum(advection.TASK["sizes"].values()), 0)
    assert time.process_time() - start < 15


def write(root, distance=0.8, rows=20, value=None):
    """The real layout, with waves that have moved by distance; other frames are not there: NaN."""
    h5py = pytest.importorskip("h5py")
    u0 = sines.random_sines(rows, np.random.default_rng(0))
    x = sines.centres()
    before, after = u0(x), u0((x - distance) % 1)
    if value is not None:
        after[0, 3] = value
    path = root / "pdebench" / NAME
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        tensor = file.create_dataset(
            "tensor", (rows, 201, 1024), "f4", chunks=(rows, 1, 1024), fillvalue=np.nan
        )
        tensor[:, 0], tensor[:, 200] = before, after
        file["x-coordinate"] = x.astype(np.float32)
        file["t-coordinate"] = np.linspace(0, 2.01, 202, dtype=np.float32)
        file.attrs["beta"] = 0.4
    return before[:, ::4].astype(np.float32), after[:, ::4].astype(np.float32)


@pytest.mark.parametrize(("split", "rows"), [("test", slice(0, 2)), ("train", slice(2, 20))])
def test_reads_the_real_layout(split, rows, tmp_path):
    before, after = write(tmp_path)
    for published in (False, True):
        x, y = advection.read(tmp_path, split, published)
        assert x.shape[1:] == advection.TASK["x_shape"] and x.dtype == y.dtype == np.float32
        np.testing.assert_array_equal(x[:, 0], before[rows])
        np.testing.assert_array_equal(y[:, 0], after[rows])


def test_refuses_the_file_of_twice_the_speed_unless_it_is_asked_for(tmp_path):
    _, after = write(tmp_path, distance=1.6)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=f"{NAME}.*move by 1.6.*before September 2023"):
            advection.read(tmp_path, split)
    np.testing.assert_array_equal(advection.read(tmp_path, "test", True)[1][:, 0], after[:2])


def test_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{NAME}.*255674.*--data simulated"):
        advection.read(tmp_path, "train")
    write(tmp_path, value=np.nan)
    with pytest.raises(ValueError, match=f"{NAME}: tensor holds values that are not finite"):
        advection.read(tmp_path, "test")
    assert len(advection.read(tmp_path, "train")[0]) == 18  # other rows
    write(tmp_path, rows=9)
    with pytest.raises(ValueError, match=f"{NAME}: 9 rows are too few"):
        advection.read(tmp_path, "test")

"""tasks/darcy.py: the equation is solved as it says; the files are read as they are."""

import sys
import time
import types

import numpy as np
import pytest
import scipy.fft
import scipy.io
import torch

from tasks import darcy, metrics

ROWS = {1: 12, 2: 3}  # of the small files


def trigonometric(G):
    """a, f and p of a problem with a known solution, on G x G nodes."""
    X, Y = np.meshgrid(*[np.linspace(0, 1, G)] * 2)
    a = 1 + np.sin(2 * np.pi * X) * Y / 2
    p = np.sin(np.pi * X) * np.sin(2 * np.pi * Y)
    flow = np.pi * np.cos(2 * np.pi * X) * Y * np.pi * np.cos(np.pi * X) * np.sin(2 * np.pi * Y)
    flow += np.sin(2 * np.pi * X) / 2 * 2 * np.pi * np.sin(np.pi * X) * np.cos(2 * np.pi * Y)
    return a, 5 * np.pi**2 * a * p - flow, p  # -a Laplace(p) - grad(a) . grad(p)


def test_solver_is_second_order():
    errors = []
    for G in (22, 43, 85):
        a, f, p = trigonometric(G)
        errors.append(np.abs(darcy.solve(a, f) - p).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx([2, 2], abs=0.1) and errors[-1] < 5e-4


def test_solver_balances_the_flow_where_the_material_changes():
    a = np.where(darcy.random_field(1, np.random.default_rng(0))[0] >= 0, 12.0, 3.0)
    p = darcy.solve(a)
    flow_down = (a[1:] + a[:-1]) / 2 * np.diff(p, axis=0)
    flow_right = (a[:, 1:] + a[:, :-1]) / 2 * np.diff(p, axis=1)
    out = -np.diff(flow_down, axis=0)[:, 1:-1] - np.diff(flow_right, axis=1)[1:-1]
    np.testing.assert_allclose(out * 84**2, 1.0, rtol=1e-8)  # what comes in at each node, f = 1
    assert not p[[0, -1]].any() and not p[:, [0, -1]].any() and p[1:-1, 1:-1].min() > 0


def test_solver_turns_and_scales_with_the_rock():
    a = np.where(darcy.random_field(1, np.random.default_rng(1))[0] >= 0, 12.0, 3.0)
    p = darcy.solve(a)
    for turn in (np.transpose, np.flipud, np.fliplr):
        np.testing.assert_allclose(darcy.solve(turn(a)), turn(p), rtol=1e-9)
    np.testing.assert_allclose(darcy.solve(4 * a, 2.0), p / 2, rtol=1e-9)


def test_pressure_of_a_uniform_rock_is_the_series_of_poisson():
    j = np.arange(1, 200, 2)
    sines = np.sin(np.pi * j / 2) / j
    middle = 16 / np.pi**4 * (np.outer(sines, sines) / (j[:, None] ** 2 + j**2)).sum()
    assert darcy.solve(np.full((85, 85), 3.0))[42, 42] == pytest.approx(middle / 3, rel=2e-4)


def test_simulated_form_and_seeds():
    x, y = darcy.simulate(6, [3, 0])
    assert x.shape == (6, 3, 85, 85) and y.shape == (6, 1, 85, 85)
    assert x.dtype == y.dtype == np.float32 and np.isin(x[:, 0], (3, 12)).all()
    steps = np.linspace(0, 1, 85, dtype=np.float32)
    assert (x[:, 1] == steps).all() and (x[:, 2] == steps[:, None]).all()
    again, other = darcy.simulate(6, [3, 0]), darcy.simulate(6, [3, 1])
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert not np.array_equal(x, other[0]) and not np.array_equal(y, other[1])
    record = darcy.TASK
    assert record["x_shape"] == x.shape[1:] and record["y_shape"] == y.shape[1:]
    assert record["loss"] is metrics.relative_l2_loss and record["metric"] is metrics.relative_l2


def test_field_has_the_covariance_it_names():
    field = darcy.random_field(200, np.random.default_rng(0))
    k = np.arange(85)
    white = scipy.fft.dctn(field, type=1, axes=(1, 2)) * (np.pi**2 * (k[:, None] ** 2 + k**2) + 9)
    power = [(white[:, s, s] ** 2).mean() for s in (slice(1, 5), slice(5, 20), slice(20, 84))]
    assert np.array(power[:2]) / power[2] == pytest.approx([1, 1], abs=0.1)
    assert abs(white[:, 0, 0]).max() < 1e-6 * power[2] ** 0.5  # no mean
    share = (darcy.simulate(40, 0)[0][:, 0] == 12).mean(axis=(1, 2))
    assert 0.45 < share.mean() < 0.55 and 0.02 < share.std() < 0.1


def relative(p, y):
    return metrics.relative_l2(torch.from_numpy(p.astype(np.float32)), torch.from_numpy(y))


def test_linear_model_is_between_the_mean_and_perfect():
    (x, y), (x_test, y_test) = darcy.simulate(200, [0, 0]), darcy.simulate(60, [0, 1])
    a, a_test = ((part[:, 0].reshape(len(part), -1) - 7.5) / 4.5 for part in (x, x_test))
    weights = np.linalg.solve(a @ a.T + 1e4 * np.eye(200), (y - y.mean(axis=0)).reshape(200, -1))
    ridge = y.mean(axis=0) + (a_test @ a.T @ weights).reshape(y_test.shape)
    mean = relative(np.broadcast_to(y.mean(axis=0), y_test.shape), y_test)
    assert 0.2 < mean < 0.3
    assert 0.05 < relative(ridge, y_test) < mean / 2


def test_default_sizes_are_simulated_in_seconds():
    start = time.process_time()
    darcy.simulate(30, 0)
    per_sample = (time.process_time() - start) / 30
    assert per_sample * sum(darcy.TASK["sizes"].values()) < 75


def arrays(rows, seed):
    """coeff and sol as in the real files, without physics; only every fifth node is not 0 or 3."""
    rng = np.random.default_rng(seed)
    a, p = np.full((rows, 421, 421), 3.0), np.zeros((rows, 421, 421))
    a[:, ::5, ::5] = rng.choice([3.0, 12.0], (rows, 85, 85))
    p[:, ::5, ::5] = rng.uniform(0.1, 1, (rows, 85, 85))
    return {"coeff": a, "sol": p}


def place(root, number):
    path = root / "darcy" / f"piececonst_r421_N1024_smooth{number}.mat"
    path.parent.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with both files, a few rows each, and their arrays at every fifth node."""
    root = tmp_path_factory.mktemp("real")
    small = {}
    for number, rows in ROWS.items():
        content = arrays(rows, number)
        scipy.io.savemat(place(root, number), content, do_compression=True)
        small[number] = {key: array[:, ::5, ::5] for key, array in content.items()}
    return root, small


@pytest.mark.parametrize(
    ("split", "number", "rows"),
    [("train", 1, slice(11)), ("val", 1, slice(11, 12)), ("test", 2, slice(3))],
)
def test_reads_the_real_layout(real, split, number, rows):
    root, small = real
    x, y = darcy.read(root, split)
    np.testing.assert_array_equal(x[:, 0], small[number]["coeff"][rows])
    np.testing.assert_array_equal(y[:, 0], small[number]["sol"][rows].astype(np.float32))
    assert x.dtype == y.dtype == np.float32 and x.shape[1:] == (3, 85, 85) and y.ndim == 4
    np.testing.assert_array_equal(x[:, 1:], darcy.simulate(len(x), 0)[0][:, 1:])


def test_takes_the_first_rows_of_longer_files(real, monkeypatch):
    root, small = real
    monkeypatch.setattr(darcy, "TRAIN_ROWS", 10)
    monkeypatch.setattr(darcy, "TEST_ROWS", 2)
    assert [len(darcy.read(root, split)[0]) for split in ("train", "val", "test")] == [9, 1, 2]
    np.testing.assert_array_equal(darcy.read(root, "val")[0][0, 0], small[1]["coeff"][9])


def damaged(**changes):
    return {key: value for key, value in {**arrays(2, 0), **changes}.items() if value is not None}


def with_value(key, value):
    array = arrays(2, 0)[key]
    array[0, 5, 5] = value
    return {key: array}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(sol=None), "found no sol"),
        (damaged(sol=np.ones((1, 421, 421))), "2 rows of coeff and 1 of sol"),
        (damaged(coeff=np.ones((2, 85, 85))), r"got coeff float64 of \(2, 85, 85\)"),
        (damaged(coeff=np.ones((421, 421))), r"got coeff float64 of \(421, 421\)"),
        (damaged(coeff=np.ones((2, 421, 421), np.int8)), "got coeff int8"),
        (damaged(sol=np.ones((0, 421, 421))), "sol empty"),
        (damaged(**with_value("sol", np.nan)), "not finite"),
        (damaged(**with_value("coeff", np.inf)), "not finite"),
        (damaged(**with_value("coeff", 0.0)), "coeff <= 0"),
        (damaged(sol=np.zeros((2, 421, 421))), "a sol that is 0"),
    ],
)
def test_refuses_other_contents(content, message, tmp_path):
    scipy.io.savemat(place(tmp_path, 2), content)
    with pytest.raises(ValueError, match=f"smooth2.mat.*{message}") as error:
        darcy.read(tmp_path, "test")
    assert "\n" not in str(error.value)


def test_refuses_missing_short_and_cut_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="smooth1.mat.*--data simulated"):
        darcy.read(tmp_path, "val")
    path = place(tmp_path, 1)
    scipy.io.savemat(path, arrays(2, 0), do_compression=True)
    with pytest.raises(ValueError, match="smooth1.mat: 2 rows are too few.*at least 10"):
        darcy.read(tmp_path, "train")
    whole = path.read_bytes()
    for length in (0, 60, 200, len(whole) // 3, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="smooth1.mat: (not a readable|expected)"):
            darcy.read(tmp_path, "train")


def matlab73(path):
    """The header that MATLAB 7.3 writes before the HDF5 part."""
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")


def test_without_h5py_matlab73_is_refused(tmp_path, monkeypatch):
    matlab73(place(tmp_path, 2))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="smooth2.mat.*7.3.*pip install h5py.*save -v7"):
        darcy.read(tmp_path, "test")


def test_h5py_reads_matlab73_with_the_axes_reversed(real, tmp_path, monkeypatch):
    root, small = real
    matlab73(place(tmp_path, 2))
    content = {key: array.T for key, array in arrays(ROWS[2], 2).items()}  # as HDF5 stores them

    class File:
        """What darcy uses of h5py.File; `file[key][()]` is an array there too."""

        __init__ = lambda self, path, mode: None  # noqa: E731
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        __contains__ = lambda self, key: key in content  # noqa: E731
        __getitem__ = lambda self, key: content[key]  # noqa: E731

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File))
    x, y = darcy.read(tmp_path, "test")
    np.testing.assert_array_equal(x[:, 0], small[2]["coeff"])
    np.testing.assert_array_equal(y[:, 0], small[2]["sol"].astype(np.float32))
    del content["sol"]
    with pytest.raises(ValueError, match="found no sol"):
        darcy.read(tmp_path, "test")

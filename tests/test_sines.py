"""tasks/sines.py: the fields are as PDEBench draws them; files are read in slices, and checked."""

import sys

import numpy as np
import pytest

from tasks import download, sines

NAME, ROWS, STEPS = "small.hdf5", 21, 7
REMOTE = download.darus(123, 1e6, "0" * 32)


@pytest.fixture(scope="module")
def fields():
    return sines.random_sines(4000, np.random.default_rng(0))


def test_centres_are_those_of_cells():
    x = sines.centres(-1, 1)
    assert x.shape == (1024,) and x[0] == pytest.approx(-1 + 1 / 1024)
    np.testing.assert_allclose(np.diff(x), 2 / 1024)
    assert x.mean() == pytest.approx(0, abs=1e-12)


def test_statistics_of_the_published_family(fields):
    u = fields(sines.centres())
    assert u.shape == (4000, 1024) and u.dtype == np.float64
    assert u.mean(axis=1).std() == pytest.approx(0.60, abs=0.03)
    assert np.median(np.sqrt(np.square(u).mean(axis=1))) == pytest.approx(0.71, abs=0.03)
    assert 2.5 < np.abs(u).max() < 4  # four sines with amplitudes up to 1
    assert abs(u.mean()) < 0.05  # as often u as -u
    scaled = sines.normalised(u)
    assert (scaled.min(axis=1) == 0).all() and (scaled.max(axis=1) == 1).all()
    assert scaled.mean() == pytest.approx(0.5, abs=0.01)
    assert scaled.mean(axis=1).std() == pytest.approx(0.075, abs=0.01)
    outside = np.abs(u[:, [0, 1, -2, -1]]).max(axis=1) < 1e-6
    assert 0.08 < outside.mean() < 0.12  # the windowed share


@pytest.mark.parametrize(("waves", "length"), [(4, 1.0), (3, 2.0)])
def test_fields_are_a_constant_and_at_most_two_waves(waves, length):
    u0 = sines.random_sines(500, np.random.default_rng(1), waves, windowed=0, length=length)
    x = np.arange(64) * length / 64
    height = np.abs(np.fft.rfft(u0(x))) / 32
    count = (height[:, 1:] > 1e-9).sum(axis=1)
    plain = count <= 2
    assert plain.mean() == pytest.approx(0.9, abs=0.07)  # |u| has more waves, unless u > 0
    assert (count[plain] >= 1).all() and height[plain, 1 + 2 * waves :].max() < 1e-9
    assert height[plain, 2 * waves].max() > 0.1  # a number drawn twice doubles the wave's
    np.testing.assert_allclose(u0(x + length), u0(x), atol=1e-9)


def test_fields_are_functions_of_any_points(fields):
    shift = np.linspace(0, 1, 4000)[:, None]
    x = np.linspace(0, 1, 9)
    moved = fields((x + shift) % 1)
    for row in (0, 7, 3999):
        np.testing.assert_allclose(moved[row], fields((x + shift[row]) % 1)[row])
    again = sines.random_sines(4000, np.random.default_rng(0))(x)
    other = sines.random_sines(4000, np.random.default_rng(1))(x)
    assert np.array_equal(again, fields(x)) and not np.array_equal(other, again)


def test_windows_leave_what_is_within():
    def draw(windowed):
        return sines.random_sines(100, np.random.default_rng(2), 3, windowed)(sines.centres())

    always, never = draw(1.0), draw(0.0)
    np.testing.assert_allclose(always[:, 500:520], never[:, 500:520], rtol=1e-3)
    assert np.abs(always[:, :50]).max() < 1e-3 and np.abs(always[:, 975:]).max() < 1e-3
    window = np.abs(always).sum(axis=1) / np.abs(never).sum(axis=1)
    assert 0.05 < window.min() and window.max() < 0.98


def arrays(rows=ROWS, keys=("tensor",), steps=STEPS, cells=1024, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {key: rng.random((rows, steps, cells)).astype(dtype) for key in keys}


def write(root, content):
    h5py = pytest.importorskip("h5py")
    path = root / "pdebench" / NAME
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in content.items():
            file[key] = values
    return path


def read(root, split="test", frames=(0, 2), keys=("tensor",), first=None):
    return sines.read_frames(root, NAME, REMOTE, split, frames, STEPS, keys, first)


def test_reads_the_first_tenth_for_testing_and_the_rest_for_training(tmp_path):
    content = arrays(keys=("density", "Vx"))
    write(tmp_path, content)
    for split, rows in (("test", slice(0, 2)), ("train", slice(2, ROWS))):
        values = read(tmp_path, split, (0, 6), ("density", "Vx"))
        expected = np.stack([content[key][rows][:, [0, 6]] for key in ("density", "Vx")], axis=1)
        np.testing.assert_array_equal(values, expected)
        assert values.dtype == np.float32


def test_reads_only_the_frames_it_needs(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    content = arrays()
    content["tensor"][:, [1, 3, 4, 5, 6]] = np.nan  # would be refused
    write(tmp_path, content)
    sizes, original = [], h5py.Dataset.__getitem__

    def counted(self, *args):
        values = original(self, *args)
        sizes.append(np.size(values))
        return values

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    assert np.isfinite(read(tmp_path, "train")).all()
    assert sum(sizes) == 19 * 2 * 1024


def with_value(value):
    content = arrays()
    content["tensor"][1, 2, 5] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no array tensor"),
        (arrays(keys=("other",)), "no array tensor"),
        (arrays(steps=6), r"got tensor float32 of shape \(21, 6, 1024\)"),
        (arrays(cells=256), r"got tensor float32 of shape \(21, 7, 256\)"),
        (
            {"tensor": np.ones((ROWS, 1024), np.float32)},
            r"got tensor float32 of shape \(21, 1024\)",
        ),
        (arrays(dtype=np.int32), "got tensor int32"),
        (arrays(rows=9), "9 rows are too few"),
        (arrays(rows=0), "0 rows are too few"),
        (with_value(np.nan), "tensor holds values that are not finite"),
        (with_value(np.inf), "tensor holds values that are not finite"),
    ],
)
def test_refuses_other_contents(content, message, tmp_path):
    write(tmp_path, content)
    with pytest.raises(ValueError, match=f"small.hdf5: {message}.*expected tensor.*/123") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "no array x-coordinate"),
        ({"x-coordinate": np.zeros(0)}, "no array x-coordinate"),
        ({"x-coordinate": sines.centres(-1, 1)}, r"starts at -0.999, not 0.000488"),
    ],
)
def test_refuses_another_domain(extra, message, tmp_path):
    write(tmp_path, arrays() | extra)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, first=sines.centres()[0])
    write(tmp_path, arrays() | {"x-coordinate": sines.centres().astype(np.float32)})
    assert read(tmp_path, first=sines.centres()[0]).shape == (2, 1, 2, 1024)


def test_refuses_missing_cut_and_uneven_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="small.hdf5.*access/datafile/123.*--data simul"):
        read(tmp_path)
    path = write(tmp_path, arrays(keys=("a",)) | arrays(rows=30, keys=("b",)))
    with pytest.raises(ValueError, match="small.hdf5: a, b differ in their rows"):
        read(tmp_path, keys=("a", "b"))
    whole = write(tmp_path, arrays()).read_bytes()
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="small.hdf5: .*expected tensor"):
            read(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="small.hdf5: .*pip install h5py"):
        read(tmp_path)

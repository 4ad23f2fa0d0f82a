"""tasks/pdebench.py: what a task writes has the published layout, and the user's door reads it."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import orca
import tasks
from tasks import pdebench

h5py = pytest.importorskip("h5py")

ROOT = Path(__file__).resolve().parents[1]
MODULES = {name: importlib.import_module(f"tasks.{name}") for name in tasks.PDES}
SEED = 4
# samples: more than are solved at once
SIZES = dict.fromkeys(tasks.PDES, 18) | {
    "navier_stokes_1d": 12,
    "darcy_2d": 12,
    "shallow_water": 11,
    "diffusion_reaction_2d": 11,
}
GROUPS = ("diffusion_sorption", "shallow_water", "diffusion_reaction_2d")
ARRAYS = tuple(name for name in tasks.PDES if name not in GROUPS)
LARGE = ("shallow_water", "diffusion_reaction_2d")
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in tasks.PDES]
LAYOUT = {  # of the published files: arrays of a sample, coordinates, attributes
    "advection": ({"tensor": (201, 1024)}, {"x": (0, 1, 1024), "t": (0, 2.01, 202)}, {"beta": 0.4}),
    "burgers": ({"tensor": (201, 1024)}, {"x": (0, 1, 1024), "t": (0, 2.01, 202)}, {"Nu": 1.0}),
    "diffusion_reaction_1d": (
        {"tensor": (101, 1024)},
        {"x": (0, 1, 1024), "t": (0, 1.01, 102)},
        {"Nu": 0.5, "rho": 1.0},
    ),
    "diffusion_sorption": (
        {"data": (101, 1024, 1)},
        {"x": (0, 1, 1024), "t": (0, 500, 101)},
        {"config"},
    ),
    "navier_stokes_1d": (
        dict.fromkeys(["density", "pressure", "Vx"], (101, 1024)),
        {"x": (-1, 1, 1024), "t": (0, 1.01, 102)},
        {"eta": 0.1, "zeta": 0.1},
    ),
    "darcy_2d": (
        {"nu": (128, 128), "tensor": (1, 128, 128)},
        {"x": (0, 1, 128), "y": (0, 1, 128)},
        {"beta": 0.1},
    ),
    "shallow_water": (
        {"data": (101, 128, 128, 1)},
        {"x": (-2.5, 2.5, 128), "y": (-2.5, 2.5, 128), "t": (0, 1, 101)},
        {"config"},
    ),
    "diffusion_reaction_2d": (
        {"data": (101, 128, 128, 2)},
        {"x": (-1, 1, 128), "y": (-1, 1, 128), "t": (0, 5, 101)},
        {"config"},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES["navier_stokes_1d"], "CHUNK", 7)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """name -> the file that its task writes under its published name; each is written once."""
    root, done = tmp_path_factory.mktemp("solved"), {}

    def file(name):
        if name not in done:
            layout = MODULES[name].FILE
            path = root / name / "pdebench" / layout.name
            argv = ["--out", str(path), "--n", str(SIZES[name]), "--seed", str(SEED)]
            assert pdebench.cli(layout, argv) == 0
            done[name] = path
        return done[name]

    yield file
    shutil.rmtree(root)  # a quarter of a gigabyte


def load(name, root):
    return tasks.load_task(name, "real", root, published=MODULES[name].FILE.published_only)


# ---- the file ----


def edges(start, end, n):
    """The centres of n cells."""
    return start + (np.arange(n) + 0.5) * (end - start) / n


@pytest.mark.parametrize("name", EACH)
def test_layout_is_the_published_one(name, written):
    arrays, coordinates, attributes = LAYOUT[name]
    n, as_groups = SIZES[name], name in GROUPS
    key = "grid/{}" if as_groups else "{}-coordinate"
    compression = "lzf" if name in ("diffusion_sorption", "diffusion_reaction_2d") else None
    with h5py.File(written(name)) as file:
        if as_groups:
            assert list(file) == [f"{i:04}" for i in range(n)] and not file.attrs
            parts = list(file.values())
        else:
            assert set(file) == {*arrays, *map(key.format, coordinates)}
            parts = [file]
            assert file.attrs == pytest.approx(attributes)
        for part in parts:
            if as_groups:
                assert set(part) == {"data", "grid"} and set(part.attrs) == attributes
                assert len(part["grid"]) == len(coordinates) and "\n" in part.attrs["config"]
            for array, shape in arrays.items():
                assert part[array].shape == (shape if as_groups else (n, *shape))
                assert part[array].dtype == np.float32 and part[array].compression == compression
            for axis, (start, end, size) in coordinates.items():
                grid = np.linspace if axis == "t" else edges
                found = part[key.format(axis)]
                assert found.dtype == np.float32 and found.compression == compression
                np.testing.assert_allclose(found, grid(start, end, size), rtol=1e-6, atol=1e-6)
    assert not list(written(name).parent.glob("*.part"))


def solved(name):
    """What the solver gives, (n, ...) for each key, in the file's float32."""
    blocks = list(MODULES[name].frames(SIZES[name], SEED))
    assert len(blocks) > 1
    keys = LAYOUT[name][0]
    return {key: np.concatenate([block[key] for block in blocks]).astype("f4") for key in keys}


def halved(fields):
    return sum(fields[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4


def wanted(name, made, published):
    """x and y of all samples, as the docstrings of the tasks say."""
    if name == "darcy_2d":
        return made["nu"][:, None, ::2, ::2], made["tensor"][..., ::2, ::2]
    if name in LARGE:
        data = np.moveaxis(made["data"], -1, 2)  # (n, frames, channels, 128, 128)
        if name == "shallow_water":
            x, y = data[:, 0], data[:, 100]
        else:
            x, y = (data[:, 0, :1], data[:, 100, 1:]) if published else (data[:, 10], data[:, 100])
        return (x, y) if published else (halved(x), halved(y))
    if name == "diffusion_sorption":
        return made["data"][:, 0, None, :, 0], made["data"][:, 100, None, :, 0]
    frame, stride = {
        "advection": {False: (200, 4), True: (200, 4)},
        "burgers": {False: (1, 4), True: (200, 1)},
        "diffusion_reaction_1d": {False: (3, 4), True: (29, 1)},
        "navier_stokes_1d": {False: (10, 8), True: (100, 1)},
    }[name][published]
    fields = np.stack([made[key] for key in LAYOUT[name][0]], axis=1)
    return fields[:, :, 0, ::stride], fields[:, :, frame, ::stride]


def in_order(name, read):
    """x and y of both splits in the order of the file."""
    splits = ("train", "test") if name in GROUPS else ("test", "train")
    parts = [read(split) for split in splits]
    tenth = SIZES[name] // 10
    assert min(len(x) for x, _ in parts) == tenth
    return [np.concatenate(both) for both in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", EACH)
def test_read_gives_what_the_solver_gave(name, written):
    module, root, made = MODULES[name], written(name).parents[1], solved(name)
    for published in (True,) if module.FILE.published_only else (False, True):
        pair = in_order(name, lambda split: module.read(root, split, published))  # noqa: B023
        for found, expected in zip(pair, wanted(name, made, published), strict=True):
            assert found.dtype == np.float32 and found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-7)
    task = load(name, root)
    sizes = [len(part) for part in (task.train, task.val, task.test)]
    assert sum(sizes) == SIZES[name] and min(sizes) >= 1 and task.data == "real"


# problem: how far simulate(n, seed) may be off, in the norm of a channel of a sample
SAME = {
    ("advection", False): 1e-6,
    ("burgers", False): 1e-6,
    ("burgers", True): 1e-6,
    ("diffusion_reaction_1d", False): 1e-6,
    ("diffusion_reaction_1d", True): 1e-6,
    ("diffusion_sorption", True): 1e-4,
    ("navier_stokes_1d", True): 1e-3,
    ("darcy_2d", True): 1e-6,
    ("shallow_water", True): 1e-6,
    ("diffusion_reaction_2d", True): 5e-3,
}


def gaps(found, expected):
    norm = lambda u: np.sqrt(np.square(u.reshape(*u.shape[:2], -1).astype(float)).mean(2))  # noqa: E731
    return norm(found - expected) / norm(expected)


@pytest.mark.parametrize(
    ("name", "published"),
    [pytest.param(*key, marks=[pytest.mark.slow] * (key[0] in LARGE)) for key in SAME],
)
def test_the_same_seed_simulates_the_same(name, published, written):
    module, root = MODULES[name], written(name).parents[1]
    x, y = in_order(name, lambda split: module.read(root, split, published))
    x_sim, y_sim = module.simulate(SIZES[name], SEED, published)
    np.testing.assert_allclose(x, x_sim, rtol=1e-6, atol=1e-7)
    assert gaps(y, y_sim).max() < SAME[name, published]


def test_gases_without_a_window_are_those_of_the_default(written):
    module, root = MODULES["navier_stokes_1d"], written("navier_stokes_1d").parents[1]
    x, y = in_order("navier_stokes_1d", lambda split: module.read(root, split))
    x_sim, y_sim = module.simulate(SIZES["navier_stokes_1d"], SEED)
    same = np.isclose(x, x_sim, rtol=1e-5, atol=1e-5).all(axis=(1, 2))
    assert 1 <= same.sum() < len(x) / 2
    assert gaps(y, y_sim)[same].max() < 5e-3


# ---- files that are something else ----

PHYSICS = {"advection": "beta t", "burgers": "wear off", "diffusion_reaction_1d": "fills 0..1"}


def refused(name, root):
    """The one line that load_task says of a bad file: its path, what is wrong, what is expected."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(name, root)
    line, path = str(error.value), root / "pdebench" / MODULES[name].FILE.name
    assert "\n" not in line and str(path) in line and len(line) < 500, line
    return line


def place(name, root):
    path = root / "pdebench" / MODULES[name].FILE.name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("name", tasks.PDES)
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>\n" * 100, b"\x89HDF\r\n\x1a\n"])
def test_no_file_and_files_that_are_no_hdf5(name, content, tmp_path):
    line = refused(name, tmp_path)
    assert "no file" in line and "darus.uni-stuttgart.de" in line and "--data simulated" in line
    place(name, tmp_path).write_bytes(content)
    assert "expected" in refused(name, tmp_path)


@pytest.mark.parametrize("name", EACH)
def test_files_that_are_cut(name, written, tmp_path):
    size = written(name).stat().st_size
    path = Path(shutil.copy(written(name), place(name, tmp_path)))
    for length in (size - 1, size // 2, 3000):
        with path.open("r+b") as file:
            file.truncate(length)
        assert "expected" in refused(name, tmp_path)


@pytest.mark.parametrize("name", EACH)
def test_the_other_tasks_files_under_this_name(name, written, tmp_path):
    others = [other for other in tasks.PDES if other != name]
    for other in others if name in LARGE else [o for o in others if o not in LARGE]:
        place(name, tmp_path).symlink_to(written(other))
        assert "expected" in refused(name, tmp_path), other


def changed(name, old, root, array, change, attributes=None):
    """The file, with one array of all samples, or that of group "0003", changed or left out."""
    path, change = place(name, root), change or (lambda values: None)
    with h5py.File(old) as old_file, h5py.File(path, "w") as file:
        file.attrs.update(old_file.attrs if attributes is None else attributes)
        for key in old_file:
            if name in GROUPS and key != "0003":
                file[key] = h5py.ExternalLink(str(old), key)
                continue
            if key not in (array, "0003"):
                old_file.copy(key, file)
                continue
            values = change(old_file[key + ("/data" if key == "0003" else "")][:])
            file.create_group("0003") if key == "0003" else None
            if values is not None:
                file[key + ("/data" if key == "0003" else "")] = values
    return path


def with_nan(values):
    values[(slice(None), 0) if len(values) == 101 else (5, ..., 0)] = np.nan
    return values


BAD = {  # what becomes of an array
    "missing": None,
    "NaN": with_nan,
    "a smaller grid": lambda values: values[:, :, :100] if len(values) < 101 else values[:, :100],
    "text": lambda values: np.full(values.shape[:2], b"text"),
}
FRAMES = {  # (samples, frames, cells), or (frames, cells, channels) of a group
    "a frame too few": lambda values: values[:-1] if len(values) == 101 else values[:, :-1],
    "more frames": lambda values: np.concatenate([values] * 2, axis=0 if len(values) == 101 else 1),
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("case", [*BAD, *FRAMES])
def test_changed_files(name, case, written, tmp_path):
    for array in LAYOUT[name][0]:
        changed(name, written(name), tmp_path, array, (BAD | FRAMES)[case])
        line = refused(name, tmp_path)
        assert "expected" in line
        word = {"missing": array, "NaN": "finite"}.get(case, "")
        assert word in line, line
    changed(name, written(name), tmp_path, array, lambda values: values)
    assert len(load(name, tmp_path).test) == SIZES[name] // 10  # the helper breaks nothing else


@pytest.mark.parametrize("name", ARRAYS)
def test_attributes_tell_the_equation_where_there_are_any(name, written, tmp_path):
    right = LAYOUT[name][2]
    key = next(iter(right))
    for wrong in (right | {key: 2.0}, {"zeta" if key == "beta" else "beta": 0.4}, {key: "much"}):
        changed(name, written(name), tmp_path, "none", None, attributes=wrong)
        assert "expected" in refused(name, tmp_path)
    changed(name, written(name), tmp_path, "none", None, attributes={key: 2.0})
    line = refused(name, tmp_path)
    assert f"another equation, {key}=2, not {key}={right[key]:g}" in line
    for fine in ({}, {key: np.float32(right[key])}, {"author": "me", key: [right[key]]}):
        changed(name, written(name), tmp_path, "none", None, attributes=fine)
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "other"),
    [("advection", "burgers"), ("burgers", "advection"), ("diffusion_reaction_1d", None)],
)
def test_numbers_tell_the_equation_where_attributes_do_not(name, other, written, tmp_path):
    twice = lambda values: 2 * values  # noqa: E731
    path = changed(other or name, written(other or name), tmp_path, "tensor", twice, attributes={})
    if other:
        path.rename(place(name, tmp_path))
    line = refused(name, tmp_path)
    assert PHYSICS[name] in line and "expected" in line and "datafile/" in line
    changed(name, written(name), tmp_path, "none", None, attributes={})
    load(name, tmp_path)


@pytest.mark.parametrize("name", ["burgers", "darcy_2d"])
def test_from_the_command_line(name, written, tmp_path, capsys):
    flags = ["--published"] if MODULES[name].FILE.published_only else []
    argv = ["--task", name, "--data", "real", "--data-dir", str(tmp_path), *flags]
    argv += ["--out", str(tmp_path / "run")]

    def says(words):
        capsys.readouterr()
        assert orca.cli(argv) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1 and shown.out == "" and shown.err.startswith("orca.py: ")
        assert MODULES[name].FILE.name in shown.err and words in shown.err, shown.err

    says("no file")
    shutil.copy(written("diffusion_reaction_1d"), place(name, tmp_path))
    says("expected")
    changed(name, written(name), tmp_path, "tensor", with_nan)
    says("finite")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_orca_runs_on_the_file(name, written, tmp_path, capsys):
    root = written(name).parents[1]
    argv = ["--task", name, "--data", "real", "--data-dir", str(root), "--align", "none"]
    argv += ["--published"] * MODULES[name].FILE.published_only
    argv += ["--patches", "64"] * (len(MODULES[name].TASK["x_shape"]) == 3)
    assert orca.cli([*argv, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert "data=real" in capsys.readouterr().out


# ---- the command ----


def one_line(capsys):
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and shown.out == "", shown
    return shown.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--n 20", "--out"),
        ("--out FILE", "--n"),
        ("--out FILE --n 10", "--n 10 is too few to split; give 11 or more"),
        ("--out FILE --n many", "invalid int value: 'many'"),
        ("--out FILE --n 20 --seed -1", "--seed -1 is out of range"),
        ("--out FILE --n 20 --frames 3", "unrecognized arguments: --frames 3"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(argv, message, tmp_path, capsys):
    (tmp_path / "there").write_text("mine")
    argv = argv.replace("FILE", str(tmp_path / "new.h5")).replace("DIR", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        pdebench.cli(MODULES["advection"].FILE, argv.split())
    line = one_line(capsys)
    assert stop.value.code == 2 and re.search(message, line), line
    assert line.startswith("python -m tasks.advection: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_cannot_be_written_is_one_line_and_code_2(tmp_path, capsys, monkeypatch):
    layout = MODULES["advection"].FILE
    (tmp_path / "there").write_text("mine")

    def says(out, words):
        assert pdebench.cli(layout, ["--out", str(tmp_path / out), "--n", "20"]) == 2
        assert words in one_line(capsys)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["there"]

    says("", "is no file; give one such as ")
    says("there", "there exists; give another --out, or --overwrite")
    says("there/a.h5", f"there/a.h5 cannot be written: {tmp_path / 'there'}: File exists")
    monkeypatch.setattr(
        pdebench.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1)
    )
    says("a.h5", "a.h5: takes 0.0165 GB, but 1e-09 GB are free")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "h5py", None)
    says("a.h5", "pip install h5py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["darcy_2d", "diffusion_sorption"])
@pytest.mark.parametrize("kb", [1, 300])
def test_a_disk_that_is_full_is_one_line_and_code_2(name, kb, tmp_path):
    """HDF5 itself can crash of it, and not before the end."""
    resource = pytest.importorskip("resource")
    code = f"""
import resource, sys
from tasks import pdebench, {name} as task
limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, ({kb} * 1024, limit))
sys.exit(pdebench.cli(task.FILE, ["--out", sys.argv[1], "--n", "12"]))
"""
    assert resource.RLIMIT_FSIZE is not None
    argv = [sys.executable, "-c", code, str(tmp_path / "a.h5")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1 and "a.h5 cannot be written: File too large" in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_overwriting_is_asked_for_and_happens_at_the_end(tmp_path, capsys):
    layout, path = MODULES["diffusion_reaction_1d"].FILE, tmp_path / "new" / "a.hdf5"
    argv = ["--out", str(path), "--n", "11"]
    assert pdebench.cli(layout, argv) == 0
    before = path.read_bytes()
    assert re.search(r"a.hdf5: 11 samples, seed 0, 4\.6 MB, .* s\n$", capsys.readouterr().out)

    def broken(error):
        def frames(n, seed):
            yield next(layout.frames(n, seed))
            raise error

        return pdebench.File(layout.name, frames, layout.coordinates, layout.attributes)

    cases = (
        (KeyboardInterrupt(), 130, "interrupted"),
        (FloatingPointError("too sharp"), 2, "sharp"),
    )
    for error, code, word in cases:
        assert pdebench.cli(broken(error), [*argv, "--overwrite"]) == code
        assert word in one_line(capsys)
        assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    assert pdebench.cli(layout, [*argv, "--overwrite", "--seed", "1"]) == 0
    assert path.read_bytes() != before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(("n", "digits"), [(12, 4), (10000, 4), (10001, 5)])
def test_names_of_groups_are_in_the_order_of_the_samples(n, digits, tmp_path):
    rows = lambda n, seed: ({"data": np.full((4, 1), i)} for i in range(3))  # noqa: E731
    layout = pdebench.File("many.h5", rows, {}, {}, groups=True)
    pdebench.write(tmp_path / "many.h5", layout, n, 0)
    with h5py.File(tmp_path / "many.h5") as file:
        assert list(file) == [f"{i:0{digits}}" for i in range(12)]
        assert [file[name]["data"][0] for name in file] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "advection")) for n in tasks.PDES]
)
def test_help_from_the_shell(name):
    argv = [sys.executable, "-W", "error::RuntimeWarning", "-m", f"tasks.{name}", "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    layout = MODULES[name].FILE
    assert f"usage: python -m tasks.{name} " in done.stdout and layout.name in done.stdout
    assert ("--published" in done.stdout) >= layout.published_only
    assert ("DIR --published" in done.stdout) == layout.published_only

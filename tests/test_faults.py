"""Faults from outside: damaged data files, mutated pickles, bad command lines.

A valid small file in the published layout, made by the writers of the tasks' own tests, is damaged
in one way at a time. Nothing but one line that names the file may come of it.
"""

import contextlib
import gzip
import importlib
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import test_advection
import test_burgers
import test_cifar100
import test_cosmic
import test_darcy
import test_darcy_2d
import test_deepsea
import test_diffusion_reaction_1d
import test_diffusion_reaction_2d
import test_diffusion_sorption
import test_ecg
import test_fsd50k
import test_navier_stokes_1d
import test_ninapro
import test_psicov
import test_shallow_water
import test_spherical

import tasks
from tasks import psicov

ROOT = Path(__file__).resolve().parents[1]
HDF5 = (".h5", ".hdf5")
cifar100_files = test_cifar100.real  # a fixture: torchvision believes the files to be the real ones


@pytest.fixture(autouse=True)
def _no_hang():
    """A reader that hangs fails; by an exception that no reader takes for a damaged file."""
    old = signal.signal(signal.SIGALRM, lambda *args: pytest.fail("takes over a minute"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


# ---- valid files ----


def write_satellite(root):
    (root / "satellite").mkdir()
    for split in ("train", "test"):
        content = {"data": np.ones((30, 46)), "label": np.arange(30) % 24 + 1}
        np.save(root / "satellite" / f"satellite_{split}.npy", content)


def write_ninapro(root):
    for split in ("train", "val", "test"):
        test_ninapro.write(root, test_ninapro.GOOD, test_ninapro.LABELS, split)


def write_cosmic(root):
    for split in ("train", "test"):
        names = test_cosmic.write(root, split)
        np.save(root / "cosmic" / f"{split}_dirs.npy", 2 * names)  # 16, to hold some out


def write_psicov(root):
    test_psicov.write(root, [test_psicov.chain(4, i) for i in range(101)], "deepcov")
    test_psicov.write(root, [test_psicov.chain(4)])


def write_darcy(root):
    for number, rows in ((1, 10), (2, 2)):
        content = test_darcy.arrays(rows, number)
        scipy.io.savemat(test_darcy.place(root, number), content, do_compression=True)


def write_spherical(root):
    test_spherical.save(root, test_spherical.content())


# task: what writes its files, one of them, an array in that
FILES = {
    "cifar100": (None, "cifar100/cifar-100-python/train", "data"),
    "spherical": (write_spherical, "spherical/s2_cifar100.gz", "train/images"),
    "darcy": (write_darcy, "darcy/piececonst_r421_N1024_smooth1.mat", "coeff"),
    "psicov": (write_psicov, "psicov/protein/psicov/features/chain0A.pkl", "pssm"),
    "cosmic": (write_cosmic, "cosmic/npy_train/f435w/10342/3/1_0.npy", ""),
    "ninapro": (write_ninapro, "ninapro/ninapro_val.npy", ""),
    "fsd50k": (test_fsd50k.write_files, "fsd50k/dev_chunks/12_0000.wav", ""),
    "ecg": (
        lambda root: test_ecg.write(root, test_ecg.as_published(*test_ecg.records(40))),
        "ecg/challenge2017.pkl",
        "data/5",
    ),
    "satellite": (write_satellite, "satellite/satellite_test.npy", "data"),
    "deepsea": (
        lambda root: test_deepsea.save(root, test_deepsea.real_file()),
        "deepsea/deepsea_filtered.npz",
        "x_val",
    ),
    "advection": (test_advection.write, "pdebench/1D_Advection_Sols_beta0.4.hdf5", "tensor"),
    "burgers": (test_burgers.write, "pdebench/1D_Burgers_Sols_Nu1.0.hdf5", "tensor"),
    "diffusion_reaction_1d": (
        test_diffusion_reaction_1d.write,
        "pdebench/ReacDiff_Nu0.5_Rho1.0.hdf5",
        "tensor",
    ),
    "diffusion_sorption": (
        lambda root: test_diffusion_sorption.write(root, test_diffusion_sorption.series(11)),
        "pdebench/1D_diff-sorp_NA_NA.h5",
        "0003/data",
    ),
    "navier_stokes_1d": (
        lambda root: test_navier_stokes_1d.write(root, test_navier_stokes_1d.arrays(11)),
        "pdebench/1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5",
        "density",
    ),
    "darcy_2d": (
        lambda root: test_darcy_2d.place(root, test_darcy_2d.arrays(11)),
        "pdebench/2D_DarcyFlow_beta0.1_Train.hdf5",
        "nu",
    ),
    "shallow_water": (
        lambda root: test_shallow_water.place(root, test_shallow_water.NAMES[:11]),
        "pdebench/2D_rdb_NA_NA.h5",
        "0003/data",
    ),
    "diffusion_reaction_2d": (
        lambda root: test_diffusion_reaction_2d.place(root, test_diffusion_reaction_2d.NAMES),
        "pdebench/2D_diff-react_NA_NA.h5",
        "0003/data",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """task -> a directory with its files; each is written once."""
    roots = {}

    def root(name):
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name)
            FILES[name][0](roots[name])
        return roots[name]

    return root


@pytest.fixture
def valid(request, written, tmp_path, monkeypatch):
    """task -> a directory with its files, to damage."""

    def root(name):
        monkeypatch.setattr(psicov, "SIDE_REAL", 8)  # instead of 512: 60 MB a sample
        if name == "cifar100":
            data = request.getfixturevalue("cifar100_files")[0]
            visit(name, data)  # unpacks the archive
            return data
        shutil.copytree(written(name), tmp_path / "data")
        return tmp_path / "data"

    return root


def visit(name, root):
    """Load a task and look at every sample; some tasks read a sample when it is asked for."""
    module = importlib.import_module(f"tasks.{name}")
    published = name in tasks.PDES and module.FILE.published_only
    task = tasks.load_task(name, "real", root, published=published)
    for part in (task.train, task.val, task.test):
        for i in range(len(part)):
            part[i]
    return task


@pytest.mark.parametrize("name", tasks.NAMES)
def test_the_files_are_valid(name, valid):
    task = visit(name, valid(name))
    assert task.data == "real" and min(len(task.train), len(task.val), len(task.test)) > 0


# ---- damage ----


@contextlib.contextmanager
def opened(path):
    """The content of a file, whatever wrote it, as a mapping to change in place: it is written."""
    if path.suffix in HDF5:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "a") as file:
            yield file
    elif path.suffix == ".mat":
        content = {k: v for k, v in scipy.io.loadmat(path).items() if not k.startswith("__")}
        yield content
        scipy.io.savemat(path, content)
    elif path.suffix == ".npz":
        content = dict(np.load(path))
        yield content
        np.savez(path, **content)
    elif path.suffix == ".npy":
        content = np.load(path, allow_pickle=True)
        content = {"": content} if content.ndim else content[()]
        yield content
        np.save(path, content.get("", content))
    else:
        content = path.read_bytes()
        content = pickle.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
        yield content
        content = pickle.dumps(content, 4)
        path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def changed(change):
    """Damage: an array becomes what change makes of it; None: it has another name."""

    def damage(path, key):
        with opened(path) as content:
            *way, last = key.split("/")
            for part in way:
                content = content[part]
            last = int(last) if isinstance(content, np.ndarray) else last
            values = np.array(content[last])
            new = change(values[:, :2] if path.suffix == ".mat" else values) if change else values
            if isinstance(content, np.ndarray):
                content[last] = new if change else {"other": new}
                return
            del content[last]
            if new.dtype == object and path.suffix in HDF5:
                content.create_group(last)  # it knows no other object
            else:
                content[last if change else "other"] = new

    return damage


def holed(values):
    values = values.astype(np.result_type(values, np.float32))
    values[..., ::2] = np.nan
    return values


def filled(content):
    """Damage: the file has other bytes."""

    def damage(path, key):
        path.write_bytes(content(path) if callable(content) else content)

    return damage


DAMAGE = {
    "missing": lambda path, key: path.unlink(),
    "empty": filled(b""),
    "cut": filled(lambda path: path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": filled(np.random.default_rng(0).bytes(10_000)),
    "a web page": filled(b"<html>404: not found</html>\n" * 100),
    "other names": changed(None),
    "other shape": changed(lambda values: values[None]),
    "NaN": changed(holed),
    "text": changed(lambda values: np.full(values.shape, b"text")),
    "objects": changed(lambda values: values.astype(object)),
    "complex": changed(lambda values: values.astype(np.complex64)),
}


def sounds(samples, **form):
    """Damage: another sound; a wav file has numbers of one kind only."""

    def damage(path, key):
        test_fsd50k.write_wav(path, samples, **form)

    return damage


def numbers(change):
    """Damage of the numbers of FSD50K's labels."""

    def damage(path, key):
        path = path.parents[1] / "chunks" / "lbl_map.json"
        content = {key: change(value) for key, value in json.loads(path.read_text()).items()}
        path.write_text(json.dumps(content))
        return path

    return damage


SOUND = {
    "other names": numbers(lambda value: 199 - value if value else 200),
    "other shape": sounds(np.zeros(22000, "<i2")),
    "NaN": numbers(lambda value: value or float("nan")),
    "text": numbers(str),
    "objects": numbers(lambda value: [value]),
    "complex": sounds(np.zeros(44100, "<i2"), channels=2),
}


@pytest.mark.parametrize("name", tasks.NAMES)
@pytest.mark.parametrize("fault", DAMAGE)
def test_damaged_files_are_one_line_that_names_them(name, fault, valid):
    root = valid(name)
    path, key = root / FILES[name][1], FILES[name][2]
    damage = SOUND.get(fault, DAMAGE[fault]) if name == "fsd50k" else DAMAGE[fault]
    path = damage(path, key) or path
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            visit(name, root)
    line = str(error.value)
    place = path.parents[1] if name == "cifar100" else path  # the md5 is of the archive and all
    assert "\n" not in line and str(place) in line and len(line) < 600, line
    assert type(error.value) in (ValueError, FileNotFoundError) and warned == []


# ---- mutated pickles ----


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_pickles_never_crash_nor_fill_the_memory(count, tmp_path, record_property):
    """In a process of its own: a crash of the interpreter would end the tests."""
    record_property("cases", count)
    code = f"""
import resource, warnings
from pathlib import Path
from test_files import mutate
warnings.simplefilter("ignore")  # numpy's, of odd headers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mutate(Path({str(tmp_path)!r}), {count}, seed=2)  # which checks what comes of each
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]"
    done = run_python("-c", paths + code, cwd=tmp_path)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert int(done.stdout) < 2**18  # KiB


# ---- command lines ----


def run_python(*argv, cwd):
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True)


# SERIES, FILE, FOLDER: an npz file, a text file, a folder that is not empty
BAD_LINES = {  # for all scripts; what is said
    "satellite": "unrecognized arguments: satellite",
    "--task": "argument --task: expected one argument",
    "--task=": "no task ''; choose one of",
    "--task satellite.npy": "no task 'satellite.npy'",
    "--task FOLDER": "no file .*folder.npz; expected an .npz file",
    "--task FILE": "file.npz: not a readable .npz file",
    "--task SERIES --published": "series.npz' has no other published problem",
    "--task SERIES --train-size -1": "--train-size -1 is out of range",
    "--data file": "invalid choice: 'file'",
    "--data real --data-dir FILE": "satellite_train.npy",
    "--epochs 1.5": "invalid int value: '1.5'",
    "--epochs=": "invalid int value: ''",
    "--batch-size -1": "--batch-size -1 is out of range",
    "--lr inf": "--lr inf is out of range",
    "--lr 1,0": "invalid float value: '1,0'",
    "--weight-decay -0.1": "--weight-decay -0.1 is out of range",
    "--warmup nan": "--warmup nan is out of range",
    "--clip -1": "--clip -1.0 is out of range",
    "--seed 0 1": "unrecognized arguments: 1",
    "--source-size 1": "--source-size 1 is out of range; give a number of at least 2",
    "--patches -1": "--patches -1 is out of range",
    "--train_size 3": "unrecognized arguments: --train_size 3",
    "--epochs -2": "--epochs -2 is out of range; give a number of at least -1",
    "--save-every 0": "--save-every 0 is out of range; give a number of at least 1",
    "--warmup 5": "--warmup 5.0 is out of range; give a number of at least 0 and at most 1",
    "--beta2 1.5": "--beta2 1.5 is out of range",
    "--precision fp8": "invalid choice: 'fp8'",
    "--overwrite yes": "unrecognized arguments: yes",
    "--task SERIES --body FILE": "--body .*file.npz: no folder",
    "--task SERIES --body tiny_swin": "tiny_swin cannot be loaded .*series take a RoBERTa",
    "--task SERIES --device cpu:x": "--device cpu:x is not available",
    "--task SERIES --out FILE": "file.npz",
    "--task SERIES --out FILE/run": "file.npz/run",
    "--task SERIES --out FOLDER": "folder.npz .*choose another --out",
}
# the proposal has no source
BAD_SOURCE = {
    "--task SERIES --source cifar10": "'cifar10' does not suit this task, whose body takes text",
}
BAD_ORCA_LINES = BAD_SOURCE | {
    "--align otd": "invalid choice: 'otd'",
    "--align-samples -1": "--align-samples -1 is out of range",
    "--k0 3": "unrecognized arguments: --k0 3",
}
BAD_PARE_LINES = BAD_SOURCE | {
    "--align mmd": "unrecognized arguments: --align mmd",
    "--k0 -2": "--k0 -2 is out of range",
    "--task SERIES --k0 999": "k0.999 exceeds",
    "--task SERIES --k0 2 --k-end 9": "k.end.9 exceeds",
    "--gate both": "invalid choice: 'both'",
    "--mix-weight nan": "--mix-weight nan is out of range",
    "--lam 0.5": "invalid choice: '0.5'",
}
BAD_PROPOSED_LINES = {
    "--sigmas 2": "--sigmas 2: expected numbers from 0 to below 1",
    "--tau 0": "--tau 0.0 is out of range",
    "--draws 0": "--draws 0 is out of range",
    "--preserve lipschitz": "invalid choice: 'lipschitz'",
}
OWN_LINES = {"orca": BAD_ORCA_LINES, "pare": BAD_PARE_LINES, "proposed": BAD_PROPOSED_LINES}
CASES = [(s, *case) for s, own in OWN_LINES.items() for case in (BAD_LINES | own).items()]


@pytest.fixture
def argv(series, tmp_path, monkeypatch):
    """A line -> its words, run where nothing is but a file and a folder."""
    monkeypatch.chdir(tmp_path)
    Path("file.npz").write_text("hello")
    Path("folder.npz").mkdir()
    Path("folder.npz", "mine").write_text("mine")
    places = {"SERIES": series, "FILE": tmp_path / "file.npz", "FOLDER": tmp_path / "folder.npz"}

    def words(line):
        for name, place in places.items():
            line = line.replace(name, str(place))
        return line.split()

    yield words
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.npz", "folder.npz", "mine"]


@pytest.mark.parametrize(("script", "line", "says"), CASES)
def test_bad_lines_are_one_line_and_code_2_before_any_work(script, line, says, argv, capsys):
    try:
        code = importlib.import_module(script).cli(argv(line))
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and shown.err.count("\n") == 1 and shown.out == "", shown
    assert re.search(says, shown.err), shown.err


@pytest.mark.parametrize(
    ("script", "line"),
    [("orca", "--epochs 1.5"), ("pare", "--k0 -2"), ("pare", "--task FILE")],
)
def test_bad_lines_from_the_shell(script, line, argv, tmp_path):
    done = run_python(str(ROOT / f"{script}.py"), *argv(line), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"{script}.py: error: ") and "Traceback" not in done.stderr

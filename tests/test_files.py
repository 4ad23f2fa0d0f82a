"""tasks/files.py: what numpy writes is read as numpy reads it; nothing else is, nothing runs."""

import io
import os
import pickle
import pickletools
import resource
import zipfile

import numpy as np
import pytest

from tasks.files import read_npz, read_pickled

PROTOCOLS = range(6)


def save(path, content, protocol=None, header=True):
    """What numpy.save writes for an object array, under any pickle protocol; returns the path."""
    array = np.empty((), dtype=object)
    array[()] = content
    if isinstance(content, np.ndarray) and content.dtype.hasobject:
        array = content
    with path.open("wb") as file:
        if header:
            np.lib.format.write_array_header_1_0(
                file, np.lib.format.header_data_from_array_1_0(array)
            )
        pickle.dump(array if header else content, file, protocol=protocol)
    return path


def satellite_like():
    rng = np.random.default_rng(0)
    return {"data": rng.normal(size=(20, 46)), "label": rng.integers(1, 25, 20)}


def assert_same(got, want):
    """Equal in type, dtype and value, all the way down; arrays can be written to."""
    assert type(got) is type(want)
    if isinstance(want, np.ndarray):
        assert got.shape == want.shape and got.dtype == want.dtype.newbyteorder("=")
        assert got.flags.writeable
        if want.dtype.hasobject:
            for a, b in zip(got.ravel(), want.ravel(), strict=True):
                assert_same(a, b)
        else:
            np.testing.assert_array_equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    else:
        assert got == want


# ---- pickled arrays: what numpy writes ----


def test_dict_as_numpy_save_writes_it(tmp_path):
    want = satellite_like()
    np.save(tmp_path / "a.npy", want)
    assert_same(read_pickled(tmp_path / "a.npy"), want)
    assert_same(read_pickled(str(tmp_path / "a.npy")), want)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("header", [True, False])
def test_dict_under_every_protocol(tmp_path, protocol, header):
    want = satellite_like() | {"few": [1, -2.5, 3j, None, True, b"", b"\xff\0", "né"], (1, "k"): ()}
    assert_same(read_pickled(save(tmp_path / "a.npy", want, protocol, header)), want)


ARRAYS = {
    "bool": np.array([[True, False]]),
    "int8": np.arange(-3, 3, dtype=np.int8),
    "uint64": np.array([2**63], dtype=np.uint64),
    "half": np.arange(3, dtype=np.float16),
    "complex": np.array([1 + 2j]),
    "big-endian": np.arange(6, dtype=">f4").reshape(2, 3),
    "big-endian int": np.array([1, 256], dtype=">i8"),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "fortran big-endian": np.asfortranarray(np.arange(6, dtype=">i2").reshape(3, 2)),
    "strided": np.arange(20.0)[::3],
    "transposed": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    "0-d": np.array(3.5),
    "no rows": np.empty((0, 4)),
    "text": np.array(["a", "näh", ""]),
    "big-endian text": np.array(["ab", "c"], dtype=">U2"),
    "bytes": np.array([b"ab", b"c"]),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_in_a_pickle(tmp_path, name, protocol):
    want = ARRAYS[name]
    assert_same(read_pickled(save(tmp_path / "a.pkl", [want, want], protocol, False)), [want, want])


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_as_plain_npy(tmp_path, name):
    np.save(tmp_path / "a.npy", ARRAYS[name])
    assert_same(read_pickled(tmp_path / "a.npy"), ARRAYS[name])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_scalars(tmp_path, protocol):
    want = [np.float32(2.5), np.int64(-1), np.bool_(True), np.str_("ab"), np.complex64(1j)]
    assert_same(read_pickled(save(tmp_path / "a.pkl", want, protocol, False)), want)


def psicov_like():
    array = np.empty(3, dtype=object)
    array[:] = [7, "MKV", np.arange(9.0).reshape(3, 3)]
    return array


def ragged():
    array = np.empty((2, 2), dtype=object)
    array[0, 0], array[0, 1], array[1, 0], array[1, 1] = [1, [2]], "b", {"c": (3,)}, None
    return array


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("want", [psicov_like(), ragged(), np.asfortranarray(ragged())])
def test_object_arrays(tmp_path, want, protocol):
    got = read_pickled(save(tmp_path / "a.npy", want, protocol))
    assert_same(got, want)
    assert_same(got, np.load(tmp_path / "a.npy", **{"allow_pickle": True}))


def test_names_of_numpy_1(tmp_path):
    for protocol in (2, 3, 5):
        want = satellite_like()
        new = pickle.dumps(want, protocol)
        old = new.replace(b"numpy._core", b"numpy.core")
        if protocol == 5:  # there the name's length stands before it, and the frame's before all
            old = pickletools.optimize(pickle.dumps(want, 4)).replace(
                b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
            )
            old = old[:2] + old[11:]
        assert old != new
        (tmp_path / "a.pkl").write_bytes(old)
        assert_same(read_pickled(tmp_path / "a.pkl"), want)


def test_written_by_python_2(tmp_path):
    """There bytes were strings: Python 2's dumps({"x": numpy.array([1., -2.])}, 2), by hand."""
    raw = np.array([1.0, -2.0]).tobytes()
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02}U\x01xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f8K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\0tb\x89U\x10" + raw + b"tbs."
    )
    assert_same(read_pickled(tmp_path / "a.pkl"), {"x": np.array([1.0, -2.0])})


def test_shared_and_cyclic_data(tmp_path):
    array, loop = np.arange(3), []
    loop.append(loop)
    twice = [array, array, loop]
    for _ in range(60):  # 2^60 paths through 60 tuples: walked once each
        twice = (twice, twice)
    got = read_pickled(save(tmp_path / "a.pkl", twice, header=False))
    for _ in range(60):
        assert got[0] is got[1]
        got = got[0]
    assert got[0] is got[1] and got[2][0] is got[2]


# ---- pickled arrays: what must not be read ----


class Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


REFUSED = "not a readable pickled array .*; expected numbers"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, getattr, np.load, np.matrix, bytearray])
def test_functions_are_refused_by_name(tmp_path, function, header, protocol):
    path = save(tmp_path / "evil.npy", {"data": Evil(function, "0")}, protocol, header)
    name = "numpy.*load" if function is np.load else function.__name__
    with pytest.raises(ValueError, match=f"evil.npy: {REFUSED}") as caught:
        read_pickled(path)
    assert caught.match(rf"it asks for [\w.]*{name}, which is not data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_executed(tmp_path, protocol):
    marker = tmp_path / "executed"
    path = save(tmp_path / "evil.npy", Evil(os.system, f"touch {marker}"), protocol)
    with pytest.raises(ValueError, match="system, which is not data"):
        read_pickled(path)
    assert not marker.exists()
    np.load(path, **{"allow_pickle": True})  # and the file is indeed evil
    assert marker.exists()


def evil_state(state, name=("O8", False, True), dtype_state=None):
    """A pickled array whose dtype and state are given by hand."""
    build = dtype_state or (3, "|", None, None, None, -1, -1, 0)  # 0: no "list-pickled" flag
    head = b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
    parts = [pickle.dumps(part, 3)[2:-1] for part in (name, build)]
    dtype = b"cnumpy\ndtype\n" + parts[0] + b"R" + parts[1] + b"b"
    shape, fortran, content = (pickle.dumps(part, 3)[2:-1] for part in state)
    return head + b"(K\x01" + shape + dtype + fortran + content + b"tb."


def test_evil_state_is_well_made(tmp_path):
    """The hand-made pickle differs from a good one only in what the tests below put in."""
    state = (3, "<", None, None, None, -1, -1, 0)
    content = np.arange(2.0).tobytes()
    good = evil_state(((2,), False, content), ("f8", False, True), state)
    np.testing.assert_array_equal(pickle.loads(good), [0.0, 1.0])
    (tmp_path / "a.pkl").write_bytes(good)
    assert_same(read_pickled(tmp_path / "a.pkl"), np.arange(2.0))


FLOAT = {"name": ("f8", False, True), "dtype_state": (3, "<", None, None, None, -1, -1, 0)}
BAD_STATES = {
    # numpy itself would take these bytes for a pointer to a Python object, and crash
    "pointers": evil_state(((1,), False, b"A" * 8)),
    "pointers 0-d": evil_state(((), False, b"A" * 8)),
    "bytes for a list": evil_state(((8,), False, b"A" * 8)),
    "text for a list": evil_state(((8,), False, "A" * 8)),
    "short list": evil_state(((3,), False, [1, 2])),
    "long list": evil_state(((), False, [1, 2])),
    "few bytes": evil_state(((3,), False, bytes(16)), **FLOAT),
    "many bytes": evil_state(((1,), False, bytes(16)), **FLOAT),
    "shape -1": evil_state(((-1,), False, bytes(16)), **FLOAT),
    "shape -1 -2": evil_state(((-1, -2), False, bytes(16)), **FLOAT),
    "shape 0 -1": evil_state(((0, -1), False, b""), **FLOAT),
    "shape of floats": evil_state(((2.0,), False, bytes(16)), **FLOAT),
    "no shape": evil_state((2, False, bytes(16)), **FLOAT),
    "numbers as list": evil_state(((2,), False, [1.0] * 16), **FLOAT),
    "dates": evil_state(((1,), False, bytes(8)), ("M8", False, True)),
    "records": evil_state(((1,), False, bytes(8)), ("V8", False, True)),
    "two dtypes": evil_state(((1,), False, bytes(16)), ("f8,f8", False, True)),
    "dtype with shape": evil_state(((1,), False, bytes(16)), ("2f8", False, True)),
    "no such dtype": evil_state(((1,), False, bytes(3)), ("f3", False, True)),
    "zero width": evil_state(((5,), False, b""), ("S0", False, True)),
    "byte order": evil_state(
        ((2,), False, bytes(16)), ("f8", False, True), (3, "?", None, None, None, -1, -1, 0)
    ),
}


def own_element():
    array = np.empty(1, dtype=object)
    array[0] = array
    return array


BAD_PICKLES = {
    "empty": b"",
    "text": b"hello, this is not a pickle\n",
    "a class": b"\x80\x02cnumpy\ndtype\n.",
    "a dtype": pickle.dumps(np.dtype("f8")),
    "a set": pickle.dumps({1, 2}, 4),
    "an array of itself": pickle.dumps(own_element()),
    "an array as key": b"\x80\x02}" + BAD_STATES["pointers"][2:-1] + b"K\1s.",
    "no state": b"\x80\x02cnumpy._core.multiarray\n_reconstruct\n)R.",
    "attributes of a class": b"\x80\x02cbuiltins\ncomplex\nN}X\1\0\0\0aK\1s\x86b.",
    "attributes of ours": b"\x80\x02cnumpy\ndtype\nN}X\x0c\0\0\0__defaults__)s\x86b.",
    "deep": b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b".",
    "a number too long": b"I" + b"9" * 10000 + b"\n.",
    "scalar too short": pickle.dumps(np.float64(1), 2).replace(b"f8", b"f4"),
}


@pytest.mark.parametrize("name", [*BAD_STATES, *BAD_PICKLES])
def test_bad_pickles_are_refused(tmp_path, name):
    (tmp_path / "bad.pkl").write_bytes((BAD_STATES | BAD_PICKLES)[name])
    with pytest.raises(ValueError, match=f"bad.pkl: {REFUSED}") as caught:
        read_pickled(tmp_path / "bad.pkl")
    assert "\n" not in str(caught.value)


def test_huge_numbers_take_no_memory(tmp_path):
    """Python's own unpicklers would fill 64 GB for the first file and 4 GB for the second."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    assert read_pickled(tmp_path / "a.pkl") is None
    for size in (2**32 - 1, 2**40, 2**63):
        for opcode in (pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8):
            (tmp_path / "a.pkl").write_bytes(opcode + size.to_bytes(8, "little") + b"N.")
            with pytest.raises(ValueError, match=REFUSED):
                read_pickled(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + pickle.FRAME + b"\xff" * 5 + bytes(3) + b"N.")
    assert read_pickled(tmp_path / "a.pkl") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


@pytest.mark.parametrize(
    "bad",
    [
        np.array([("a", 1)], dtype=[("name", "U1"), ("n", "i4")]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.array([("é", 1)], dtype=[("é", "U1"), ("n", "i4")]),  # version 3 of the format
    ],
)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_other_dtypes_of_npy_are_refused(tmp_path, bad):
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(ValueError, match=REFUSED):
        read_pickled(tmp_path / "bad.npy")


@pytest.mark.parametrize("pickled", [True, False])
def test_truncated_files(tmp_path, pickled):
    content = satellite_like()
    np.save(tmp_path / "good.npy", content if pickled else content["data"])
    whole = (tmp_path / "good.npy").read_bytes()
    for size in [*range(0, 400, 7), len(whole) // 2, len(whole) - 1]:
        (tmp_path / "bad.npy").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=REFUSED):
            read_pickled(tmp_path / "bad.npy")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*satellite.npy; expected a .npy or .pkl"):
        read_pickled(tmp_path / "satellite.npy")


def mutate(tmp_path, count, seed):
    """Changes, adds or drops 1..8 bytes: only a value or a ValueError may come of it."""
    rng = np.random.default_rng(seed)
    content = {"data": rng.normal(size=(2, 3)), "label": np.arange(2), "s": [psicov_like(), 1.5]}
    content["more"] = rng.normal(size=100)
    goods = [
        save(tmp_path / f"{p}.npy", content, p, h).read_bytes() for p in range(6) for h in (0, 1)
    ]
    np.save(tmp_path / "plain.npy", content["data"])
    goods.append((tmp_path / "plain.npy").read_bytes())
    read, refused = 0, 0
    for _ in range(count):
        data = bytearray(goods[rng.integers(len(goods))])
        for _ in range(rng.choice([1, 1, 2, 8])):
            place, kind = int(rng.integers(len(data))), rng.integers(4)
            if kind == 0:
                del data[place]
            elif kind == 1:
                data.insert(place, int(rng.integers(256)))
            else:
                data[place] = int(rng.integers(256))
        (tmp_path / "mutant.npy").write_bytes(data)
        try:
            repr(read_pickled(tmp_path / "mutant.npy"))
            read += 1
        except ValueError as error:
            assert "\n" not in str(error) and "mutant.npy: not a readable" in str(error)
            refused += 1
    assert read > count / 20 and refused > count / 20  # else the mutations test nothing


@pytest.mark.filterwarnings("ignore")  # numpy's, of odd headers
def test_mutations(tmp_path):
    mutate(tmp_path, 300, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutations(tmp_path):
    """5000 others are in test_faults.py."""
    mutate(tmp_path, 1000, seed=1)


# ---- npz ----

NAMES = ("x_train", "y_train")


def arrays(**changes):
    return {"x_train": np.ones((4, 3)), "y_train": np.arange(4)} | changes


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz(tmp_path, write):
    want = arrays(
        x_train=np.arange(12, dtype=">f4").reshape(4, 3), y_train=np.arange(4) > 1, x_val=np.ones(2)
    )
    write(tmp_path / "a.npz", other=np.array(["ignored"]), **want)
    got = read_npz(tmp_path / "a.npz", NAMES, ("y_val", "x_val"))
    assert list(got) == ["x_train", "y_train", "x_val"]
    for name in got:
        assert_same(got[name], want[name])
    assert list(read_npz(str(tmp_path / "a.npz"), NAMES)) == list(NAMES)


RAGGED = np.array([[1, 2], [3]], dtype=object)
HOLED = np.ones((4, 3))
HOLED[1, 2], HOLED[3, 0] = np.nan, -np.inf
BAD_NPZ = {
    "missing": (
        {"x_train": np.ones(2)},
        "no array y_train; expected .*x_train, y_train, got x_tra",
    ),
    "none": ({}, "no array x_train, y_train; expected .*, got none"),
    "ragged": (
        arrays(x_train=RAGGED),
        r"x_train holds Python objects \(ragged rows\?\); save rectangular numeric arrays",
    ),
    "text": (arrays(y_train=np.array(["cat"])), "y_train has dtype <U3; expected real numbers"),
    "complex": (arrays(x_train=np.ones(2) * 1j), "x_train has dtype complex128; expected real"),
    "dates": (
        arrays(x_train=np.array(["2020-01-01"], "M8[D]")),
        r"x_train has dtype datetime64\[D\]",
    ),
    "empty": (arrays(x_train=np.ones((0, 3))), r"x_train is empty, shape \(0, 3\)"),
    "nan": (
        arrays(x_train=HOLED),
        r"x_train holds 2 of 12 values that are NaN or infinite, the first at index \(1, 2\)",
    ),
    "bad optional": (arrays(x_val=np.array([np.nan])), "x_val holds 1 of 1 values that are NaN"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_bad_arrays_in_npz(tmp_path, name):
    content, message = BAD_NPZ[name]
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(ValueError, match=f"bad.npz: {message}") as caught:
        read_npz(tmp_path / "bad.npz", NAMES, ("x_val",))
    assert "\n" not in str(caught.value)


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, **arrays())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"x_train,y_train\n1,2\n", pickle.dumps([1]), npz_bytes()[:300]]
)
def test_not_an_npz(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(
        ValueError, match="bad.npz: not a readable .npz file .*numpy.savez"
    ) as caught:
        read_npz(tmp_path / "bad.npz", NAMES)
    assert "\n" not in str(caught.value)


def test_a_single_array_is_not_an_npz(tmp_path):
    np.save(tmp_path / "bad.npy", np.ones(3))
    with pytest.raises(ValueError, match="bad.npy: a single array; expected an .npz file"):
        read_npz(tmp_path / "bad.npy", NAMES)


def test_a_zip_of_other_things(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="no array x_train, y_train; expected .*got readme.txt"):
        read_npz(tmp_path / "bad.npz", NAMES)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as file:
        file.writestr("x_train", "hello")
        file.writestr("y_train.npy", "hello")
    with pytest.raises(ValueError, match="x_train is not an array; save arrays with numpy.savez"):
        read_npz(tmp_path / "bad.npz", ("x_train",))
    with pytest.raises(ValueError, match="y_train is (damaged|not an array)"):
        read_npz(tmp_path / "bad.npz", ("y_train",))


def test_a_flipped_bit_in_an_npz(tmp_path):
    data = bytearray(npz_bytes())
    data[200] ^= 1  # among the values of x_train, which the zip has a checksum of
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(ValueError, match="bad.npz: x_train is damaged .*CRC"):
        read_npz(tmp_path / "bad.npz", NAMES)


def test_a_missing_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*my.npz; expected an .npz file with the"):
        read_npz(tmp_path / "my.npz", NAMES)

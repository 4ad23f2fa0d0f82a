"""Reading files without executing them: pickled arrays and .npz.

To unpickle is to run a program: a pickle may call any function that Python can import, and a
damaged one can crash the interpreter. Some published data sets come as pickles none the less.
`read_pickled` follows the pickle's instructions with every outside name replaced by a stand-in that
only remembers what it was given. Arrays are made afterwards, from bytes whose type and number have
been checked, and what is not plain data is refused.
"""

import io
import math
import mmap
import pickle
import re
from pathlib import Path

import numpy as np

PLAIN = "numbers, strings, lists and dicts, and arrays of them, as numpy.save or pickle write them"
KINDS = "biufcUS"  # of dtypes: bool, integers, floats, complex; text and bytes of a fixed width

# ---- 1. Pickled arrays ----


def read_pickled(path: Path) -> object:
    """The content of a .npy (pickled or not) or of a bare pickle, if it is plain data.

    Returns: what numpy and pickle would give, but a 0-d object array (numpy.save of a dict) comes
    without its wrapper, and arrays in the byte order of this machine.
    Raises: FileNotFoundError; ValueError if the file is damaged or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a .npy or .pkl file with {PLAIN}")
    try:
        # careful: mapped, so that a damaged length cannot ask for more memory than the file takes
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _read(view)
    except Exception as error:  # damaged files fail in many ways, which all mean the same
        raise ValueError(
            f"{path}: not a readable pickled array ({_one_line(error)}); expected {PLAIN}"
        ) from None


def _read(file: mmap.mmap) -> object:
    """The content of a mapped file: a .npy, or a pickle."""
    is_npy = file.read(6) == np.lib.format.MAGIC_PREFIX
    file.seek(0)
    if is_npy:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            _, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:  # raises unless it is (2, 0); 3 is for arrays with named fields, not plain data
            _, _, dtype = np.lib.format.read_array_header_2_0(file)
        if not dtype.hasobject:
            file.seek(0)
            return _native(np.lib.format.read_array(file, allow_pickle=False))
    # encoding: that of bytes written by Python 2, as text; _array turns them back
    return _plain(_Reader(file, encoding="latin1").load(), {})


class _StandIn:
    """An array or a dtype of a pickle: made with arguments, then given a state; remembers both."""

    def __init__(self, *args):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state


# careful: not pickle.Unpickler. A file of ten bytes (one huge memo index) makes that take up 64 GB;
# the same class written in Python keeps its memo in a dict. An array is one instruction for both.
class _Reader(pickle._Unpickler):
    """An unpickler to which only the names that arrays need are known, nearly all as stand-ins."""

    def find_class(self, module: str, name: str) -> object:
        # careful: methods, not functions: a pickle may set attributes of whatever it finds
        known = {
            "numpy._core.multiarray._reconstruct": self.stand_in,
            "numpy._core.multiarray.scalar": self.scalar,
            "numpy._core.numeric._frombuffer": self.frombuffer,  # arrays in protocol 5
            "numpy.ndarray": None,  # only ever an argument of _reconstruct
            "numpy.dtype": self.stand_in,
            "_codecs.encode": self.encode,  # bytes in protocols 0 to 2
            "builtins.bytes": self.no_bytes,  # likewise, b""
            "builtins.complex": complex,
        }
        full = f"{module}.{name}"
        modern = full.replace("numpy.core.", "numpy._core.").replace("__builtin__.", "builtins.")
        if modern not in known:
            raise ValueError(f"it asks for {full}, which is not data")
        return known[modern]

    def stand_in(self, *args):
        return _StandIn(*args)

    def scalar(self, dtype, raw):
        return _array(raw, dtype, (), "C")[()]

    def frombuffer(self, raw, dtype, shape, order, *axes):
        array = _StandIn()
        array.state = (1, shape, dtype, order == "F", raw, *axes)
        return array

    def encode(self, text, encoding):
        return text.encode("latin1")

    def no_bytes(self):
        return b""

    def load_bytearray8(self):  # the original first reserves as much as a damaged length asks for
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray8}


def _plain(value: object, done: dict[int, tuple[object, object]]) -> object:
    """value with arrays in the place of their stand-ins; lists and dicts are changed in place.

    done: {id: (value, result)}, so that what occurs twice is made once and cycles come to an end.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return value
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, list):
        done[id(value)] = (value, value)
        value[:] = [_plain(item, done) for item in value]
        return value
    if isinstance(value, dict):
        done[id(value)] = (value, value)
        items = [(_plain(key, done), _plain(item, done)) for key, item in value.items()]
        value.clear()
        value.update(items)
        return value
    if isinstance(value, tuple):
        result = tuple(_plain(item, done) for item in value)
    elif isinstance(value, _StandIn):
        _, shape, dtype, fortran, content, *axes = value.state
        if dtype.args[0] in ("O", "O8"):
            result = _object_array(content, shape, done)
        else:
            result = _array(content, dtype, shape, "F" if fortran else "C")
            result = result.transpose(*axes) if axes else result  # protocol 5, numpy 2.3 and later
        value.state = None  # lets go of the bytes
    else:
        raise ValueError(f"it holds a {type(value).__name__}, which is not plain data")
    done[id(value)] = (value, result)
    return result


def _object_array(items: list, shape: tuple[int, ...], done: dict) -> object:
    """An array of Python objects, from their list; never from bytes, which would become pointers.

    The list is in C order whatever the array's order was. Returns: the one object if 0-d.
    """
    if not isinstance(items, list) or len(items) != math.prod(shape):
        raise ValueError(f"an object array of shape {shape} without the list of its elements")
    array = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):
        array[i] = _plain(item, done)
    return array.reshape(shape) if shape else array[0]


def _array(raw: bytes | str, dtype: _StandIn, shape: tuple[int, ...], order: str) -> np.ndarray:
    """An array of numbers or fixed-width strings, from its bytes."""
    name, byte_order = dtype.args[0], dtype.state[1]
    if not re.fullmatch(rf"[{KINDS}][1-9]\d*", name):
        raise ValueError(f"it holds an array of dtype {name!r}, which is not plain data")
    real = np.dtype(name).newbyteorder(byte_order)
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    if len(raw) != math.prod(shape) * real.itemsize:
        raise ValueError(f"{len(raw)} bytes for an array of shape {shape} and dtype {real}")
    array = np.frombuffer(raw, real).reshape(shape, order=order)
    return _native(array).copy(order="K")  # a copy, since frombuffer's arrays cannot be written to


def _native(array: np.ndarray) -> np.ndarray:
    """array in this machine's byte order, the only one that torch takes."""
    if array.dtype.kind not in KINDS:
        raise ValueError(f"it holds an array of dtype {array.dtype}, which is not plain data")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _one_line(error: Exception) -> str:
    """The first line of an error's message, after its kind where that is not obvious."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + (str(error).strip() or "no message").splitlines()[0]


# ---- 2. Several arrays: .npz ----


def read_npz(
    path: Path,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    text: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """The named arrays of a .npz file, in that order: rectangular, numeric, finite, not empty.

    Args:
        required, optional: names; an optional array that is not there is left out of the result,
            as are arrays of other names.
        text: names of arrays that may also hold text, of a fixed width or as Python objects.
    Raises: FileNotFoundError; ValueError that says what was found and what to save instead.
    """
    path = Path(path)
    want = f"an .npz file with the arrays {', '.join(required)}"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {want} (numpy.savez writes one)")
    with path.open("rb") as file:  # not by numpy, which would not close one that is cut short
        try:
            npz = np.load(file, allow_pickle=False)
        except Exception as error:  # not numpy's, not a zip, or one cut short
            raise ValueError(
                f"{path}: not a readable .npz file ({_one_line(error)}); expected {want}; "
                "save it again with numpy.savez"
            ) from None
        if not isinstance(npz, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: a single array; expected {want}: save it with numpy.savez")
        missing = [name for name in required if name not in npz.files]
        if missing:
            raise ValueError(
                f"{path}: no array {', '.join(missing)}; expected {want}, "
                f"got {', '.join(npz.files) or 'none'}"
            )
        names = [name for name in (*required, *optional) if name in npz.files]
        return {name: _member(path, npz, name, name in text) for name in names}


def _member(path: Path, npz: np.lib.npyio.NpzFile, name: str, text: bool) -> np.ndarray:
    """One array of a .npz file, checked."""
    try:
        array = npz[name]
    except Exception as error:
        if "Object arrays" not in str(error):  # numpy's words for pickled content
            raise ValueError(
                f"{path}: {name} is damaged ({_one_line(error)}); save the file again with "
                "numpy.savez"
            ) from None
        if not text:
            raise ValueError(
                f"{path}: {name} holds Python objects (ragged rows?); "
                "save rectangular numeric arrays"
            ) from None
        array = _labels(path, npz, name)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: {name} is not an array; save arrays with numpy.savez")
    if array.dtype.kind not in ("biufU" if text else "biuf"):
        raise ValueError(
            f"{path}: {name} has dtype {array.dtype}; expected real numbers{' or text' * text}: "
            f"save integers, floats or bools{', or astype(str)' * text}"
        )
    if array.size == 0:
        raise ValueError(f"{path}: {name} is empty, shape {array.shape}; expected one row or more")
    bad = np.flatnonzero(~np.isfinite(array)) if array.dtype.kind == "f" else ()
    if len(bad):
        first = tuple(int(i) for i in np.unravel_index(bad[0], array.shape))
        raise ValueError(
            f"{path}: {name} holds {len(bad)} of {array.size} values that are NaN or infinite, the "
            f"first at index {first}; fill them in or leave their rows out"
        )
    return _native(array)


def _labels(path: Path, npz: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """An array of Python objects that are all text, or all whole numbers (pandas saves such)."""
    try:
        content = _read(io.BytesIO(npz.zip.read(f"{name}.npy")))
        values = content.ravel().tolist()
        kinds = (str, (int, np.integer))  # numpy's whole numbers are no int of Python
        if not any(all(isinstance(v, kind) for v in values) for kind in kinds):
            raise ValueError("they are not all text, or all whole numbers")
        return np.array(values).reshape(content.shape)
    except Exception as error:  # anything can be in a pickle
        raise ValueError(
            f"{path}: {name} holds Python objects ({_one_line(error)}); save text with "
            f"{name}.astype(str), numbers as numbers"
        ) from None

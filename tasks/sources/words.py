"""Words: the embedded 1D source. Windows of the English that every Python installation carries.

The text is Python's own documentation: the language reference behind `help()` (the module
`pydoc_data.topics`) and the docstrings of the standard library, read from its source files with
`ast`; nothing is imported or executed. About two million characters. A window's class says what
the text is about (CLASSES); the other docstrings serve only to pretrain bodies/tiny_roberta.

The last tenth of every class's text is held out (split="val"): the tiny body never saw it.
The text, and with it the windows, belongs to a Python version; within one, a seed fixes them.
"""

import ast
import functools
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# class: the top-level names of the standard library (packages or modules) it is made of
CLASSES = {
    "language": "",  # pydoc_data.topics: the language reference
    "internet": "email http urllib xmlrpc mailbox smtplib imaplib poplib ftplib nntplib wsgiref "
    "socketserver socket ssl ipaddress mimetypes webbrowser uuid hmac cgi",
    "concurrency": "asyncio threading multiprocessing concurrent subprocess queue sched selectors "
    "_threading_local signal contextvars",
    "numbers and dates": "_pydecimal fractions statistics random datetime _pydatetime calendar "
    "numbers _strptime colorsys zoneinfo heapq bisect",
    "files": "os shutil pathlib tempfile zipfile tarfile gzip bz2 lzma glob fnmatch filecmp "
    "fileinput _pyio posixpath ntpath genericpath shelve dbm stat netrc",
    "text and formats": "xml html re string textwrap json csv difflib configparser codecs "
    "encodings base64 locale gettext plistlib quopri stringprep",
    "code about code": "ast inspect typing importlib dis tokenize pickle pickletools enum "
    "dataclasses functools types abc collections _collections_abc contextlib weakref copy "
    "pkgutil pyclbr symtable compileall py_compile code codeop",
    "testing and logging": "unittest doctest pdb bdb trace traceback logging warnings timeit "
    "profile pstats cProfile cmd pydoc faulthandler",
}
SPLITS = {"train": (0.0, 0.9), "val": (0.9, 1.0)}  # shares of every class's text
_SKIP = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_HOLDERS = (ast.stmt, ast.excepthandler, ast.match_case)  # of statements, and so of functions


@functools.cache
def texts() -> dict[str, str]:
    """The whole text of each class, plus "other": {class: text}, in a fixed order.

    Raises: ValueError if this Python was stripped of its documentation.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    owner = {module: name for name, modules in CLASSES.items() for module in modules.split()}
    parts: dict[str, list[str]] = {name: [] for name in [*CLASSES, "other"]}
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
        parts["language"] = [topics[key] for key in sorted(topics)]
    except ImportError:
        pass  # reported below: the class stays empty
    for file in sorted(_files(stdlib)):
        name = owner.get(file.relative_to(stdlib).parts[0].removesuffix(".py"), "other")
        parts[name].extend(_docstrings(file))
    found = {name: "\n\n".join(docs) for name, docs in parts.items()}
    short = [name for name in CLASSES if len(found[name]) < 20_000]
    if short:
        raise ValueError(
            f"source 'words' needs Python's own documentation, but this Python ({stdlib}) has "
            f"next to none for {', '.join(short)}; use a full CPython, whose standard library "
            "comes as source files with docstrings, or another --source"
        )
    return found


def _files(stdlib: Path) -> Iterator[Path]:
    """The source files of the standard library, without packages that were installed beside it."""
    for folder, folders, names in os.walk(stdlib):
        folders[:] = [name for name in folders if name not in _SKIP]  # goes into these alone
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _docstrings(file: Path) -> list[str]:
    """All docstrings of a source file, in order."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a template or a test file that is not Python
        return []
    nodes, docs = [tree], []
    for node in nodes:  # level by level, as ast.walk, but past expressions, which hold none
        nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLDERS)]
        if isinstance(node, _DOCUMENTED):
            docs.append(ast.get_docstring(node))
    return [doc for doc in docs if doc]


def load(
    tokenize: Callable[[list[str]], list[list[int]]],
    n: int,
    length: int,
    seed: int = 0,
    split: str = "train",
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n windows of `length` tokens at random places, as many of each class as of any other.

    Args:
        tokenize: texts to lists of token ids; the tokenizer of the body the windows are for.
        n, length: how many windows, and tokens in each.
        seed, split: which windows ("train" or "val").
    Returns: token ids, int64 (n, length); labels, int64 (n,), 0..7; the names of the classes.
    Raises: ValueError if a class's text is shorter than one window.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    x = np.empty((n, length), dtype=np.int64)
    y = rng.permutation(np.arange(n) % len(CLASSES))
    low, high = SPLITS[split]
    whole = texts()
    for label, name in enumerate(CLASSES):
        text = whole[name]
        stream = tokenize([text[int(low * len(text)) : int(high * len(text))]])[0]
        if len(stream) <= length:
            raise ValueError(
                f"source 'words': class '{name}' has {len(stream)} tokens, "
                f"fewer than one window of {length}; ask for shorter windows"
            )
        rows = np.flatnonzero(y == label)
        starts = rng.integers(0, len(stream) - length, size=len(rows))
        x[rows] = np.asarray(stream)[starts[:, None] + np.arange(length)]
    return x, y, list(CLASSES)

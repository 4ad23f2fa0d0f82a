"""Code: an embedded 1D source. Windows of the programs that every Python installation carries.

The programs are the modules of Python's standard library, read from their source files with `ast`;
nothing is imported or executed. Docstrings and comments are left out: what is left are statements,
in one layout (`ast.unparse`), about four million characters. A window's class says what its module
is about (CLASSES). The tiny body bodies/tiny_roberta saw the docstrings of these modules (words.py)
but none of their statements.

The last tenth of every module is held out (split="val"). The code, and with it the windows, belongs
to a Python version; within one, a seed fixes them.
"""

import ast
import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

# class: the top-level names of the standard library (packages or modules) it is made of; no Python
# version has them all
CLASSES = {
    "network": "http urllib email smtplib imaplib poplib ftplib nntplib telnetlib socket "
    "socketserver ssl xmlrpc wsgiref ipaddress webbrowser cgi mailbox",
    "text and formats": "re string textwrap difflib json csv xml html _markupbase configparser "
    "plistlib gettext codecs base64 quopri pprint shlex tomllib",
    "numbers and dates": "_pydecimal fractions statistics random datetime _pydatetime calendar "
    "numbers _strptime colorsys zoneinfo heapq bisect",
    "data structures": "collections _collections_abc copy enum dataclasses functools weakref "
    "_weakrefset types abc _py_abc typing operator contextlib graphlib copyreg reprlib shelve dbm",
    "files": "os shutil pathlib tempfile zipfile tarfile gzip bz2 lzma glob fnmatch filecmp "
    "fileinput _pyio posixpath ntpath genericpath stat netrc platform mimetypes zipapp",
    "concurrency": "asyncio threading multiprocessing concurrent subprocess queue sched selectors "
    "_threading_local signal contextvars",
    "code about code": "ast tokenize dis inspect opcode symtable importlib pkgutil modulefinder "
    "runpy zipimport pickle pickletools code codeop compileall py_compile pyclbr lib2to3",
    "testing and tools": "unittest doctest pdb bdb trace traceback linecache logging timeit "
    "profile pstats cProfile cmd pydoc tracemalloc warnings venv",
}
SPLITS = {"train": (0.0, 0.9), "val": (0.9, 1.0)}  # shares of every module's tokens
_SKIP = {"test", "tests", "entities.py"}  # the last is a table


@functools.cache
def programs() -> dict[str, list[str]]:
    """The code of each class, one text a source file: {class: texts}, in a fixed order.

    Raises: ValueError if this Python comes without the sources of its library.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {}
    for name, modules in CLASSES.items():
        files = [
            file
            for module in modules.split()
            for file in [stdlib / f"{module}.py", *sorted((stdlib / module).rglob("*.py"))]
            if file.is_file() and not _SKIP.intersection(file.relative_to(stdlib).parts)
        ]
        found[name] = [text for text in map(_statements, files) if text]
    short = [name for name in CLASSES if sum(map(len, found[name])) < 20_000]
    if short:
        raise ValueError(
            f"source 'code' needs the source files of Python's own library, but this Python "
            f"({stdlib}) has next to none for {', '.join(short)}; use a full CPython, whose "
            "standard library comes as source files, or another --source"
        )
    return found


def _statements(file: Path) -> str:
    """The code of a source file without docstrings, comments and blank lines."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a template that is not Python
        return ""
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):  # of a lambda it is an expression
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    lines = ast.unparse(tree).splitlines()
    return "\n".join(line for line in lines if line.strip())


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is nothing but a string: a docstring, or a comment written as one."""
    value = getattr(node, "value", None)
    is_string = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(node, ast.Expr) and is_string


def load(
    tokenize: Callable[[list[str]], list[list[int]]],
    n: int,
    length: int,
    seed: int = 0,
    split: str = "train",
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n windows of `length` tokens at random places, as many of each class as of any other.

    A window lies in one module; modules shorter than a window have none.

    Args:
        tokenize: texts to lists of token ids; the tokenizer of the body the windows are for.
        n, length: how many windows, and tokens in each.
        seed, split: which windows ("train" or "val").
    Returns: token ids, int64 (n, length); labels, int64 (n,), 0..7; the names of the classes.
    Raises: ValueError if all modules of a class are shorter than one window, or if this Python
        comes without the sources of its library.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    x = np.empty((n, length), dtype=np.int64)
    y = rng.permutation(np.arange(n) % len(CLASSES))
    low, high = SPLITS[split]
    for label, (name, texts) in enumerate(programs().items()):
        modules = [ids[int(low * len(ids)) : int(high * len(ids))] for ids in tokenize(texts)]
        ends = np.cumsum([len(ids) for ids in modules])
        firsts = np.concatenate(  # places in the stream below where a window of one module starts
            [
                np.arange(end - len(ids), end - length + 1)
                for ids, end in zip(modules, ends, strict=True)
            ]
        )
        if len(firsts) == 0:
            raise ValueError(
                f"source 'code': the longest module of class '{name}' has "
                f"{max(map(len, modules))} tokens, fewer than one window of {length}; ask for "
                "shorter windows"
            )
        stream = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in modules])
        rows = np.flatnonzero(y == label)
        x[rows] = stream[rng.choice(firsts, size=len(rows))[:, None] + np.arange(length)]
    return x, y, list(CLASSES)

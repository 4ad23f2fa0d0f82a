"""Print the lines of the shipped code that carry an equation's label, such as (D1) of otdd.py."""

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lines(file: str, label: str, before: int = 2, after: int = 0, within: str = "") -> None:
    """Print where a comment of a file names a label, with some lines before and after.

    Args:
        file: relative to the repository's root, without .py: "otdd" or "tasks/burgers".
        label: without parentheses: "D1".
        before, after: numbers of lines to print around each, as far as their function reaches.
        within: print only what stands in this function: "otdd_naive", or "OTDD._labels".
    Raises: ValueError if no comment there names the label.
    """
    text = (ROOT / f"{file}.py").read_text(encoding="utf-8")
    code, functions = text.splitlines(), list(_functions(ast.parse(text)))
    found: dict[str, set[int]] = {}  # numbers of the lines to print, from 1
    for number, line in enumerate(code, 1):
        if re.search(rf"#.*\({label}\)", line):
            around = [f for f in functions if f[1] <= number <= f[2]]
            name, first, last = around[-1] if around else ("the file itself", 1, len(code))
            if within in ("", name):
                own = range(max(first, number - before), min(last, number + after) + 1)
                found.setdefault(name, set()).update(own)
    if not found:
        where = f"{file}.py" + (f" in {within}" if within else "")
        raise ValueError(f"got label={label!r}; expected a label that a comment of {where} names")
    for name, numbers in found.items():
        print(f"# {file}.py, {name}")
        parts: list[str] = []
        for number in sorted(numbers):
            if parts and number - 1 not in numbers:
                parts.append("    ...")
            parts.append(code[number - 1])
        print(textwrap.dedent("\n".join(parts)) + "\n")


def _functions(tree, prefix=""):
    """Name, first and last line of every function, outer ones before those inside them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if isinstance(node, ast.FunctionDef):
                yield name, node.lineno, node.end_lineno
            yield from _functions(node, f"{name}.")
        else:
            yield from _functions(node, prefix)

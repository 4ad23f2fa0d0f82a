"""What stands in two method scripts is marked, and a marked copy is still one.

The line above a repeated top-level block says "# Copied from orca.NAME" (identical, comments too)
or "# Adapted from orca.NAME: what differs". Text is compared: a syntax tree forgets comments.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [name for name in ("orca", "pare", "proposed") if (ROOT / f"{name}.py").exists()]
OWN = {"Config", "configure", "main"}  # every script has its own, and is read for it
MARK = re.compile(r"# (Copied|Adapted) from (\w+)\.(\w+)(?:: (.+))?$")


def blocks(source: str) -> dict[str, tuple[str, str]]:
    """Top-level functions and classes: {name: (the line above, the text)}."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1
            found[node.name] = (lines[first - 1] if first else "", lines[first : node.end_lineno])
    return {name: (above, "\n".join(text)) for name, (above, text) in found.items()}


def faults(scripts: dict[str, dict]) -> list[str]:
    """A sentence for every block whose marker is missing, wrong or no longer true."""
    found, seen = [], {}
    for script, code in scripts.items():
        for name, (above, text) in code.items():
            mark, place = MARK.match(above), f"{script}.{name}"
            if not mark:
                if name in seen and name not in OWN:
                    found.append(f"{place} stands in {seen[name]} too and has no marker")
                seen.setdefault(name, place)
                continue
            kind, origin, original, why = mark.groups()
            if original not in scripts.get(origin, {}) or origin == script:
                found.append(f"{place}: there is no {origin}.{original}")
                continue
            if MARK.match(scripts[origin][original][0]):
                found.append(f"{place}: {origin}.{original} is itself a copy")
            same = text == scripts[origin][original][1]
            if kind == "Copied" and not same:
                found.append(f"{place} differs from {origin}.{original}")
            if kind == "Adapted" and (same or not why):
                found.append(f"{place}: say what differs from {origin}.{original}, or copy it")
    return found


def test_copies_are_copies():
    code = {name: blocks((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in SCRIPTS}
    assert faults(code) == []


def test_the_check_sees_drift():
    original = "def f():\n    return 1  # (B, N)\n"
    cases = {
        "# Copied from orca.f\ndef f():\n    return 1  # (B, N)\n": "",
        "# Copied from orca.f\ndef f():\n    return 1  # (B, D)\n": "differs from",
        "# Copied from orca.g\ndef f():\n    return 1\n": "there is no orca.g",
        "# Adapted from orca.f\ndef f():\n    return 2\n": "say what differs",
        "# Adapted from orca.f: twice\ndef f():\n    return 2\n": "",
        "def f():\n    return 2\n": "has no marker",
    }
    for copy, fault in cases.items():
        found = faults({"orca": blocks(original), "pare": blocks(copy)})
        assert (fault in found[0]) if fault else found == [], copy

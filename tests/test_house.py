"""The house keeps its order: arrows point down, rooms stay pure, modules stay one noun."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
MODULES = sorted(
    path.relative_to(HOUSE)
    for package in ("cdefs", "rafs_v6", "fscached")
    for path in (HOUSE / package).rglob("*.py")
)

FLOORS = {
    # What knows nothing but the standard library and its own kind.
    "fscached.failure": 0,
    "fscached.malformed": 0,
    "fscached.version": 0,
    "fscached.log": 0,
    "fscached.log_writer": 1,
    "fscached.redaction": 1,
    "fscached.config_text": 1,
    "fscached.config_table": 1,
    "fscached.config_source": 2,
    "fscached.nydusd": 2,
    "fscached.config": 3,
    "fscached.manual": 4,
    "cdefs": 0,
    "rafs_v6": 1,
    "fscached.transport": 4,
    "fscached.cache": 4,
    "fscached.source": 4,
    "fscached.fill": 5,
    "fscached.store": 5,
    "fscached.handover": 5,
    "fscached.culling": 6,
    "fscached.prefetch": 6,
    "fscached.images": 6,
    "fscached.control": 7,
    "fscached.daemon": 8,
    "fscached.serving": 9,
    "fscached.standalone": 10,
    "fscached.singleton": 11,
    "fscached.cli": 12,
    "fscached.__main__": 13,
}
"""Rooms by floor. A room may import from lower floors and from itself, not from its neighbours."""

PURE = {"asyncio", "time", "socket", "selectors", "threading", "os", "uvloop", "httpx", "pycurl"}
"""What decisions must not know: loops, clocks, descriptors."""

LINES_MAX = 550


def room(module: str) -> str | None:
    """The room a dotted name lies in."""
    return max(
        (name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len, default=None
    )


def dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((HOUSE / path).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_only_point_down(path):
    """A module imports from its own room and from lower floors only."""
    here = room(dotted(path))
    if here is None:
        assert dotted(path) == "fscached"
        return
    for name in imports(path):
        there = room(name)
        if there is not None and there != here:
            assert FLOORS[there] < FLOORS[here], f"{path} imports {name}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room(dotted(path)) == "fscached.cache"], ids=str
)
def test_decisions_know_no_loop_no_clock_no_descriptor(path):
    """The rooms that decide can be tested without a kernel."""
    assert not {name.split(".")[0] for name in imports(path)} & PURE


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_say_what_they_are_and_stay_small(path):
    """Every module begins with what it is for, and is one noun long."""
    text = (HOUSE / path).read_text()
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), f"{path} has no docstring"
    assert len(text.splitlines()) <= LINES_MAX or path.name == "layout.py"


def test_the_interpreter_is_one_we_say_we_run_on():
    """pyproject says 3.11 or later."""
    assert sys.version_info >= (3, 11)

"""The C programs beside this directory, and what else a bench compiles."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from harness import command, store

HERE = Path(__file__).resolve().parent.parent
CFLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
PASSTHROUGH = Path("/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")
"""From libfuse3-dev."""


def compiled(source: Path) -> Path:
    """A C program, kept. Static: a guest needs nothing for it."""
    return _compiled(source, CFLAGS, ())


def passthrough(*, static: bool = False) -> Path:
    """libfuse's own example of a file system that hands everything to another one, kept. `static`:
    a guest needs nothing for it."""
    if not PASSTHROUGH.exists():
        raise SystemExit(f"{PASSTHROUGH} is missing: reinstall libfuse3-dev with its documentation")
    flags = ["-static"] if static else []
    ask = ["pkg-config", "--cflags", "--libs", *(f"-{flag}" for flag in flags), "fuse3"]
    return _compiled(PASSTHROUGH, ("-O2", *flags), shlex.split(command.run(ask)))


def _compiled(source: Path, flags: Sequence[str], libraries: Sequence[str]) -> Path:
    def build(directory: Path) -> None:
        command.run(["cc", *flags, "-o", directory / source.stem, source, *libraries])

    key = store.key(flags, libraries, source.read_bytes())
    return store.kept("programs", key, build, keep=8) / source.stem

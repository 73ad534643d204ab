"""The cache directory: things slow to make, kept under the hash of what they are made of."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def root() -> Path:
    """$FSCACHED_CACHE, or `fscached` below the XDG cache directory; created when missing."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(os.environ.get("FSCACHED_CACHE") or Path(home) / "fscached")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def key(*parts: object) -> str:
    """A short name for everything that went into a kept thing."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time make `name`."""
    with (root() / f".{name.replace('/', '-')}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kept(kind: str, name: str, build: Callable[[Path], None], *, keep: int = 4) -> Path:
    """The directory `kind/name` of the cache, filled by `build` when it is not there.

    `build` gets an empty temporary directory, renamed at the end: there are no half-made entries.
    Only the `keep` entries of a kind that were used last stay.
    """
    directory = root() / kind / name
    with locked(kind):
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=directory.parent))
            try:
                # 755: mkdtemp's 700 would become the mode of a root directory made from it.
                scratch.chmod(0o755)
                build(scratch)
                scratch.rename(directory)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
        os.utime(directory)
        prune(directory.parent, keep)
    return directory


def prune(directory: Path, keep: int) -> None:
    """Remove all but the `keep` entries of `directory` that were used last."""
    entries = [entry for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink()]
    entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for old in entries[keep:]:
        shutil.rmtree(old, ignore_errors=True)

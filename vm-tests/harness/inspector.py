"""Readers of noise, run in a guest: `python3 -m harness.inspector KIND ...` prints JSON.

They check every block they get and time every call. ROOT is where the image is mounted, NAME a
file's path in it.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypedDict

from harness.noise import BLOCK_BYTES, block

CALL_BLOCKS = 32
"""Blocks of one read(2): 128 KiB, as much as the kernel asks for at once."""


class Seen(TypedDict):
    """What a reader came across. `error` ended it; the slowest call may be the one that failed."""

    blocks: int
    wrong: list[str]
    error: str | None
    slowest_s: float


class Inspector:
    """One reader: its mount point and what it has seen so far."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.seen = Seen(blocks=0, wrong=[], error=None, slowest_s=0.0)

    def path(self, name: str) -> str:
        return os.path.join(self._root, name)

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        fd = os.open(self.path(name), os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def take(self, name: str, first: int, read: Callable[[], bytes]) -> bool:
        """Time one call and check the blocks it brings; False at an error."""
        began = time.monotonic()
        try:
            data = read()
        except OSError as error:
            self.seen["error"] = errno.errorcode[error.errno or 0]
            return False
        finally:
            self.seen["slowest_s"] = max(self.seen["slowest_s"], time.monotonic() - began)
        for at in range(0, len(data), BLOCK_BYTES):
            number = first + at // BLOCK_BYTES
            self.seen["blocks"] += 1
            if data[at : at + BLOCK_BYTES] != block(name, number):
                self.seen["wrong"].append(f"{name} block {number}")
        return True


def stream(root: str, *names: str) -> Seen:
    """Whole files, one after the other, by read(2); ends at the first error."""
    inspector = Inspector(root)
    for name in names:
        with inspector.opened(name) as fd:
            blocks = os.fstat(fd).st_size // BLOCK_BYTES
            for first in range(0, blocks, CALL_BLOCKS):
                if not inspector.take(
                    name, first, lambda fd=fd: os.read(fd, CALL_BLOCKS * BLOCK_BYTES)
                ):
                    return inspector.seen
    return inspector.seen


def pages(root: str, seed: str, *names: str) -> Seen:
    """Every page of files once, through mappings, in a random order. An error is a SIGBUS."""
    inspector = Inspector(root)
    mapped = {name: _map(inspector.path(name)) for name in names}
    order = [(name, at) for name in names for at in range(0, len(mapped[name]), BLOCK_BYTES)]
    random.Random(seed).shuffle(order)
    for name, at in order:
        page = slice(at, at + BLOCK_BYTES)
        inspector.take(name, at // BLOCK_BYTES, partial(mapped[name].__getitem__, page))
    return inspector.seen


def call(root: str, name: str, first: str, blocks: str) -> Seen:
    """One pread(2) of some blocks, without readahead around them."""
    inspector = Inspector(root)
    with inspector.opened(name) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        at, length = int(first) * BLOCK_BYTES, int(blocks) * BLOCK_BYTES
        inspector.take(name, int(first), lambda: os.pread(fd, length, at))
    return inspector.seen


def fault(root: str, name: str, number: str) -> Seen:
    """One page through a mapping, in a process of its own that may die of it."""
    inspector = Inspector(root)
    at = int(number) * BLOCK_BYTES

    def touch() -> bytes:
        reading, writing = os.pipe()
        if not (child := os.fork()):
            with _map(inspector.path(name)) as memory:
                os.write(writing, memory[at : at + BLOCK_BYTES])
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            data = pipe.read()
        ending = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ending:
            inspector.seen["error"] = signal.Signals(-ending).name
        return data

    inspector.take(name, int(number), touch)
    return inspector.seen


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


KINDS: dict[str, Callable[..., Seen]] = {
    kind.__name__: kind for kind in (stream, pages, call, fault)
}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](*sys.argv[2:])))

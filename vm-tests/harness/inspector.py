"""Readers of noise, run in a guest: `python3 -m harness.inspector KIND ROOT ...` prints JSON.

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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

from harness.noise import BLOCK_BYTES, block

if TYPE_CHECKING:
    from harness.guest import Guest, Process

CALL_BLOCKS = 32
"""Blocks of one read(2): 128 KiB, as much as the kernel asks for at once."""

PAUSE_S = (0.025, 0.06)
"""Between two misses, shortest and longest: prefetch goes on 20 ms after the last one."""


class Seen(TypedDict):
    """What a reader came across. `error` ended it; the slowest call may be the one that failed."""

    blocks: int
    wrong: list[str]
    error: str | None
    slowest_s: float


def start(guest: Guest, kind: str, root: str, *words: object, timeout_s: float) -> Process:
    """Have a reader begin in a guest; `seen` waits for its end."""
    command = ["/usr/bin/python3", "-m", "harness.inspector", kind, root, *map(str, words)]
    return guest.start(command, cwd="/run", timeout_s=timeout_s)


def sixteen(
    guest: Guest, root: str, names: Sequence[str], seed: int, *, timeout_s: float
) -> list[Process]:
    """Readers of four files at once: for every file two that read and two that map, one of each
    with readahead and one without."""
    return [
        start(guest, kind, root, *words, name, timeout_s=timeout_s)
        for name in names
        for kind, *words in (("stream",), ("alone",), ("pages_ahead",), ("pages", seed))
    ]


def seen(reader: Process, *, timeout_s: float) -> Seen:
    """What a reader has to say. Raises AssertionError when it died, of a SIGBUS for instance."""
    done = reader.wait(timeout_s)
    assert done.returncode == 0, f"reader: exit status {done.returncode}: {done.stderr}"
    said: Seen = json.loads(done.stdout)
    return said


def all_right(readers: Sequence[Process], blocks: int, *, timeout_s: float) -> list[Seen]:
    """What readers have to say of whom each got so many blocks, none wrong, and met no error."""
    found = [seen(reader, timeout_s=timeout_s) for reader in readers]
    for one in found:
        assert (one["error"], one["wrong"], one["blocks"]) == (None, [], blocks), one
    return found


class Inspector:
    """One reader: its mount point and what it has seen so far."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.seen = Seen(blocks=0, wrong=[], error=None, slowest_s=0.0)

    def open(self, name: str) -> int:
        return os.open(os.path.join(self._root, name), os.O_RDONLY)

    def map(self, name: str) -> mmap.mmap:
        fd = self.open(name)
        try:
            return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
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

    def read(self, name: str, fd: int, first: int, blocks: int) -> bool:
        """`take` by pread(2)."""
        length, at = blocks * BLOCK_BYTES, first * BLOCK_BYTES
        return self.take(name, first, lambda: os.pread(fd, length, at))

    def look(self, name: str, memory: mmap.mmap, number: int) -> bool:
        """`take` a page of a mapping."""
        at = number * BLOCK_BYTES
        return self.take(name, number, lambda: memory[at : at + BLOCK_BYTES])


def stream(root: str, *names: str) -> Seen:
    """Whole files, one after the other, by read(2); ends at the first error."""
    return _streamed(root, names, os.POSIX_FADV_NORMAL)


def alone(root: str, *names: str) -> Seen:
    """The same without readahead."""
    return _streamed(root, names, os.POSIX_FADV_RANDOM)


def again(root: str, over: str, *names: str) -> Seen:
    """Whole files time and again, and never from memory, until the file `over` is there; ends at
    the first error too."""
    inspector = Inspector(root)
    while not os.path.exists(over) and inspector.seen["error"] is None:
        _stream(inspector, names, os.POSIX_FADV_DONTNEED)
    return inspector.seen


def _streamed(root: str, names: Sequence[str], advice: int) -> Seen:
    inspector = Inspector(root)
    _stream(inspector, names, advice)
    return inspector.seen


def _stream(inspector: Inspector, names: Sequence[str], advice: int) -> None:
    for name in names:
        fd = inspector.open(name)
        os.posix_fadvise(fd, 0, 0, advice)
        firsts = range(0, os.fstat(fd).st_size // BLOCK_BYTES, CALL_BLOCKS)
        if not all(inspector.read(name, fd, first, CALL_BLOCKS) for first in firsts):
            break
        os.close(fd)


def pages(root: str, seed: str, *names: str) -> Seen:
    """Every page of files once, through mappings, in a random order. An error is a SIGBUS."""
    inspector = Inspector(root)
    maps = {name: inspector.map(name) for name in names}
    order = [(name, at) for name in names for at in range(len(maps[name]) // BLOCK_BYTES)]
    random.Random(seed).shuffle(order)
    for name, number in order:
        inspector.look(name, maps[name], number)
    return inspector.seen


def pages_ahead(root: str, *names: str) -> Seen:
    """Every page of files in order, through mappings, with readahead."""
    inspector = Inspector(root)
    for name in names:
        memory = inspector.map(name)
        memory.madvise(mmap.MADV_SEQUENTIAL)
        for number in range(len(memory) // BLOCK_BYTES):
            inspector.look(name, memory, number)
    return inspector.seen


def call(root: str, name: str, first: str, blocks: str) -> Seen:
    """One pread(2) of some blocks, without readahead around them."""
    inspector = Inspector(root)
    fd = inspector.open(name)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    inspector.read(name, fd, int(first), int(blocks))
    return inspector.seen


def fault(root: str, name: str, number: str) -> Seen:
    """One page through a mapping, in a process of its own that may die of it."""
    inspector = Inspector(root)
    at = int(number) * BLOCK_BYTES

    def touch() -> bytes:
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.write(writing, inspector.map(name)[at : at + BLOCK_BYTES])
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


def misses(root: str, seed: str, chunk_blocks: str, least_s: str, *names: str) -> list[float]:
    """How long reads of one random page took, in seconds: one of each chunk, in a random order,
    with a pause before each. What took less than `least_s`, a round trip, was there already and is
    not told."""
    rng = random.Random(seed)
    inspector = Inspector(root)
    fds = {name: inspector.open(name) for name in names}
    for fd in fds.values():
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    step = int(chunk_blocks)
    chunks = [
        (name, first)
        for name, fd in fds.items()
        for first in range(0, os.fstat(fd).st_size // BLOCK_BYTES, step)
    ]
    rng.shuffle(chunks)
    took = []
    for name, first in chunks:
        number = first + rng.randrange(step)
        time.sleep(rng.uniform(*PAUSE_S))
        began = time.monotonic()
        inspector.read(name, fds[name], number, 1)
        seconds = time.monotonic() - began
        took.append(seconds)
    assert not inspector.seen["wrong"] and inspector.seen["error"] is None
    return [seconds for seconds in took if seconds >= float(least_s)]


KINDS: dict[str, Callable[..., object]] = {
    kind.__name__: kind for kind in (stream, alone, again, pages, pages_ahead, call, fault, misses)
}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](*sys.argv[2:])))

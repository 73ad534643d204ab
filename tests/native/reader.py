"""A reader in a process of its own: compares an image with what it was made of, again and again,
until its standard input ends, and says on standard output what it saw.

usage: reader.py MOUNT EXPECTED SEED READ|RANDOM|MAP
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread

PAGE_BYTES = 4096


class Seen:
    """What one reader saw."""

    def __init__(self) -> None:
        self.reads = 0
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.longest_s = 0.0

    def check(self, name: str, offset: int, read: Callable[[], bytes], expected: bytes) -> None:
        """One read of these bytes."""
        began_s = time.monotonic()
        try:
            data = read()
        except OSError as error:
            self.failed.append(f"{name} at {offset}: {errno.errorcode[error.errno or 0]}")
            return
        self.longest_s = max(self.longest_s, time.monotonic() - began_s)
        self.reads += 1
        if data != expected:
            zeros = "zeros" if not any(data) else "other bytes"
            self.wrong.append(f"{name} at {offset}: {zeros}")


def run(kind: str, mount: Path, expected: Path, seed: int, over: Event, seen: Seen) -> None:
    """Read until it is over; pages are dropped, so that every pass is asked for again."""
    rng = random.Random(seed)
    names = sorted(path.name for path in expected.iterdir())
    while not over.is_set():
        name = rng.choice(names)
        right = (expected / name).read_bytes()
        fd = os.open(mount / name, os.O_RDONLY)
        try:
            if kind == "RANDOM":
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            _pass(kind, fd, name, right, rng, over, seen)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _pass(
    kind: str, fd: int, name: str, right: bytes, rng: random.Random, over: Event, seen: Seen
) -> None:
    size = len(right)
    if kind == "READ":
        length = rng.choice((PAGE_BYTES, 64 << 10, 1 << 20))
        offsets = list(range(0, size, length))
    else:
        length = PAGE_BYTES
        offsets = [rng.randrange(0, size) // PAGE_BYTES * PAGE_BYTES for _ in range(64)]
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ) if kind == "MAP" else None
    for offset in offsets:
        if over.is_set():
            break
        end = min(offset + length, size)
        if mapped is not None:
            read = partial(mapped.__getitem__, slice(offset, end))
        else:
            read = partial(os.pread, fd, end - offset, offset)
        seen.check(name, offset, read, right[offset:end])
    if mapped is not None:
        mapped.close()


def main() -> None:
    mount, expected, seed, kind = sys.argv[1:]
    seen, over = Seen(), Event()
    Thread(target=lambda: sys.stdin.read() or over.set(), daemon=True).start()
    run(kind, Path(mount), Path(expected), int(seed), over, seen)
    print(json.dumps(vars(seen)))


main()

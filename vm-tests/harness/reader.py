"""Readers for scenarios, run in a guest: `python3 -m harness.reader KIND PATH ...` prints JSON.

What a reader has read is told by its sha256, so that what comes out stays small.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

PAGE_BYTES = 4096
STEP_BYTES = 256 << 10
THREADS = 8


def crowd(path: str, readers: str, stride: str) -> list[str]:
    """`readers` at once, each reads the whole file by its own descriptor: the n-th from byte
    n * `stride` on and around. What each has read, or why it could not."""
    together = threading.Barrier(int(readers))

    def one(number: int) -> str:
        with open(path, "rb", buffering=0) as file:
            start = number * int(stride) % os.fstat(file.fileno()).st_size
            together.wait()
            return around(file.fileno(), start)

    with ThreadPoolExecutor(int(readers)) as pool:
        return list(pool.map(_or_error(one), range(int(readers))))


def around(fd: int, start: int) -> str:
    """The sha256 of a file from `start` to its end and from its beginning to `start`."""
    digest = hashlib.sha256()
    for at, end in ((start, os.fstat(fd).st_size), (0, start)):
        while at < end and (data := os.pread(fd, min(STEP_BYTES, end - at), at)):
            digest.update(data)
            at += len(data)
    return digest.hexdigest()


def scattered(path: str, seed: str) -> str:
    """Every page of a file once, by pread in a random order from several threads."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return _by_pages(os.fstat(fd).st_size, seed, lambda at: os.pread(fd, PAGE_BYTES, at), THREADS)


def mapped(path: str, seed: str) -> str:
    """Every page of a file once, through a mapping, in a random order."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        return _by_pages(len(memory), seed, lambda at: memory[at : at + PAGE_BYTES], threads=1)


def bytes_at(*pairs: str) -> list[int]:
    """For each path and offset that one byte and nothing else of the file."""
    found: list[int] = []
    for path, offset in zip(pairs[::2], pairs[1::2], strict=True):
        with open(path, "rb", buffering=0) as file:
            found += os.pread(file.fileno(), 1, int(offset))
    return found


def whole(*paths: str) -> list[str]:
    """Each file from its beginning to its end, one after the other."""

    def one(path: str) -> str:
        with open(path, "rb", buffering=0) as file:
            return around(file.fileno(), 0)

    return [_or_error(one)(path) for path in paths]


def _by_pages(size: int, seed: str, take: Callable[[int], bytes], threads: int) -> str:
    offsets = list(range(0, size, PAGE_BYTES))
    random.Random(seed).shuffle(offsets)
    content = bytearray(size)

    def copy(at: int) -> None:
        page = take(at)
        content[at : at + len(page)] = page

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, offsets))
    return hashlib.sha256(content).hexdigest()


def _or_error(read: Callable[..., str]) -> Callable[..., str]:
    def tried(argument: int | str) -> str:
        try:
            return read(argument)
        except OSError as error:
            return f"{errno.errorcode[error.errno or 0]}: {error.strerror}"

    return tried


KINDS: dict[str, Callable[..., object]] = {
    kind.__name__: kind for kind in (crowd, scattered, mapped, bytes_at, whole)
}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](*sys.argv[2:])))

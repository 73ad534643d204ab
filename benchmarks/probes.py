"""The reader's half of a bench: reads that are timed, and a start that is. Standard library only,
for guests have nothing else.

`scattered FILE STEP_BYTES COUNT SEED`: 4 KiB from each of COUNT different steps of a file, in
random order. `timed`: the same; forgets the file's pages first and prints the microseconds of every
read. `sequential FILE`: all of it; prints seconds. `start SOCKET PROGRAM ARGUMENT...`: start a
daemon, print the seconds from exec until its API answers there, and its process id.

`heads OFFSET DIRECTORY...`: 4 KiB at an offset of each file of images of `density`, by its number;
prints microseconds.

`single read|map FILE PAUSE_S OFFSET...`: 4 KiB from every offset, by pread without readahead or of
a mapping; `ranges HOST:PORT PATH PAUSE_S START-END...`: ranges of a blob as a client that does
nothing else asks for them, on one connection. After each a pause. Both print the seconds of each.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

READ_BYTES = 4096
SEQUENTIAL_BYTES = 1 << 20
OUTPUT = "/var/log/bench.out.log"
REQUEST = b"GET /api/v1/daemon HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
PAUSE_S = 0.005
PATIENCE_S = 60.0


def scattered(path: str, step_bytes: str, count: str, seed: str) -> None:
    file, offsets = _scattered(path, step_bytes, count, seed)
    for offset in offsets:
        if len(os.pread(file, READ_BYTES, offset)) != READ_BYTES:
            raise SystemExit(f"{path}: short at {offset}")


def timed(path: str, step_bytes: str, count: str, seed: str) -> None:
    """What is below the file keeps its pages."""
    file, offsets = _scattered(path, step_bytes, count, seed)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    clock, read = time.perf_counter_ns, os.pread
    stamps = [clock()]
    for offset in offsets:
        read(file, READ_BYTES, offset)
        stamps.append(clock())
    print(*((end - start) / 1000 for start, end in pairwise(stamps)))


def heads(directory: str, offset: str | int) -> Iterator[float]:
    """Raises SystemExit for wrong bytes: those of a file follow from its and its image's name."""
    start = int(offset)
    for name in sorted(os.listdir(directory), key=int):
        file = os.open(f"{directory}/{name}", os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        began = time.perf_counter_ns()
        data = os.pread(file, READ_BYTES, start)
        yield (time.perf_counter_ns() - began) / 1000
        seed = f"{os.path.basename(directory)} {name}".encode()
        if data != hashlib.shake_128(seed).digest(os.fstat(file).st_size)[start:][:READ_BYTES]:
            raise SystemExit(f"{directory}/{name}: wrong bytes at {start}")
        os.close(file)


def _scattered(path: str, step_bytes: str, count: str, seed: str) -> tuple[int, list[int]]:
    """No readahead: every read of a cold step is one READ of one page."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    step = int(step_bytes)
    steps = range(os.fstat(file).st_size // step)
    return file, [number * step for number in random.Random(seed).sample(steps, int(count))]


def sequential(path: str) -> None:
    """Into memory that is there already: only reading is timed."""
    memory = mmap.mmap(-1, SEQUENTIAL_BYTES)
    memory.write(bytes(SEQUENTIAL_BYTES))
    file = os.open(path, os.O_RDONLY)
    began = time.monotonic()
    size = 0
    while count := os.readv(file, [memory]):
        size += count
    print(time.monotonic() - began)
    if size != os.fstat(file).st_size:
        raise SystemExit(f"{path}: {size} bytes")


def single(way: str, path: str, pause_s: str, *offsets: str) -> None:
    file = os.open(path, os.O_RDONLY)
    if way == "read":
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)

        def take(offset: int) -> None:
            os.pread(file, READ_BYTES, offset)
    else:
        mapping = mmap.mmap(file, 0, prot=mmap.PROT_READ)

        def take(offset: int) -> None:
            _ = mapping[offset]

    _each(take, map(int, offsets), float(pause_s))


def ranges(address: str, path: str, pause_s: str, *wanted: str) -> None:
    memory = bytearray(2 * SEQUENTIAL_BYTES)
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port))) as connection:

        def take(span: tuple[int, int]) -> None:
            _get(connection, path, span, memory)

        _each(take, map(_span, wanted), float(pause_s))


def _span(text: str) -> tuple[int, int]:
    start, _, end = text.partition("-")
    return int(start), int(end)


def _get(connection: socket.socket, path: str, span: tuple[int, int], memory: bytearray) -> None:
    start, end = span
    text = f"GET {path} HTTP/1.1\r\nHost: d\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
    connection.sendall(text.encode())
    with memoryview(memory) as view:
        got = connection.recv_into(view)
        head = memory.index(b"\r\n\r\n", 0, got) + 4
        if not memory.startswith(b"HTTP/1.1 206"):
            raise SystemExit(f"{path}: {memory[:head].decode()}")
        while got < head + end - start:
            got += connection.recv_into(view[got:])


def _each(take: Callable[[T], None], of: Iterable[T], pause_s: float) -> None:
    clock = time.perf_counter
    for one in of:
        began = clock()
        take(one)
        print(clock() - began)
        time.sleep(pause_s)


def start(address: str, program: str, *words: str) -> None:
    """The daemon goes on when this ends."""
    log = (os.POSIX_SPAWN_OPEN, 1, OUTPUT, os.O_WRONLY | os.O_CREAT, 0o600)
    errors = (os.POSIX_SPAWN_DUP2, 1, 2)
    began = time.monotonic()
    pid = os.posix_spawnp(program, [program, *words], os.environ, file_actions=[log, errors])
    while not _answers(address):
        if time.monotonic() - began > PATIENCE_S:
            with open(OUTPUT, errors="replace") as said:
                raise SystemExit(f"{program} does not answer: {said.read()[-2000:]}")
        time.sleep(PAUSE_S)
    print(time.monotonic() - began, pid)


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
            connection.sendall(REQUEST)
            return b" 200 " in connection.recv(64)
        except OSError:
            return False


PROBES: dict[str, Callable[..., None]] = {
    "scattered": scattered,
    "sequential": sequential,
    "timed": timed,
    "single": single,
    "ranges": ranges,
    "heads": lambda offset, *all: print(*(us for each in all for us in heads(each, offset))),
    "start": start,
}

if __name__ == "__main__":
    PROBES[sys.argv[1]](*sys.argv[2:])

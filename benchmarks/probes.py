"""The reader's half of a bench: reads that are timed, and a start that is. Standard library only,
for guests have nothing else.

`scattered FILE STEP_BYTES COUNT SEED`: 4 KiB from each of COUNT different steps of a file, in
random order. `timed`: the same; forgets the file's pages first and prints the microseconds of every
read. `sequential FILE`: all of it; prints seconds. `start CONFIG`: start fscached, print
the seconds from exec until its API answers, and its process id.
"""

from __future__ import annotations

import mmap
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from itertools import pairwise

READ_BYTES = 4096
SEQUENTIAL_BYTES = 1 << 20
API_SOCKET = "/run/fscached/api.sock"
REQUEST = b"GET /api/v1/daemon HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
PAUSE_S = 0.005
PATIENCE_S = 30.0


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


def start(config: str) -> None:
    """The daemon goes on when this ends."""
    program = "/opt/fscached/bin/fscached"
    log = (os.POSIX_SPAWN_OPEN, 1, "/var/log/bench.out.log", os.O_WRONLY | os.O_CREAT, 0o600)
    errors = (os.POSIX_SPAWN_DUP2, 1, 2)
    began = time.monotonic()
    pid = os.posix_spawn(
        program,
        [program, "run", "--config", config],
        os.environ,
        file_actions=[log, errors],
    )
    while not _answers():
        if time.monotonic() - began > PATIENCE_S:
            raise SystemExit("fscached does not answer; see /var/log/bench.out.log")
        time.sleep(PAUSE_S)
    print(time.monotonic() - began, pid)


def _answers() -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(API_SOCKET)
            connection.sendall(REQUEST)
            return b" 200 " in connection.recv(64)
        except OSError:
            return False


PROBES: dict[str, Callable[..., None]] = {
    "scattered": scattered,
    "sequential": sequential,
    "timed": timed,
    "start": start,
}

if __name__ == "__main__":
    PROBES[sys.argv[1]](*sys.argv[2:])

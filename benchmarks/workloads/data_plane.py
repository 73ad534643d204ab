"""The transfer layer alone: ranges of a blob from nginx into aligned memory and onto a file.

What a remote fetch does without chunks, digests and a kernel that waits: `fscached.source.transfer`
feeds memory of the pool, workers write it. By HTTP beside the C program that does the same, to
memory (tmpfs) and to a disk (ext4); by HTTPS beside curl(1), which writes every range to a file of
its own. Ranges of 1 MiB, so many in flight.
"""

from __future__ import annotations

import asyncio
import filecmp
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import uvloop
from environments import Options, nginx
from environments.native import described
from environments.programs import HERE, compiled
from harness import command
from report import Report, Result, result

from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.source import Priority
from fscached.source.origin import Traffic, Trust
from fscached.source.request import Request
from fscached.source.transfer import Transfers

REPETITIONS = 7
FILE_BYTES = 256 << 20
RANGE_BYTES = 1 << 20
POOL_BYTES = 64 << 20
IN_FLIGHT = (1, 4, 16)
BLOCK_BYTES = 4096
BLOB = "blob"
MB, GB = 1e6, 1e9


class Moved(NamedTuple):
    """What it took to move the whole blob: seconds on the wall and of processors."""

    seconds: float
    cpu_s: float


class Case(NamedTuple):
    """How it is moved, and to where."""

    scheme: str
    medium: str
    in_flight: int

    @property
    def name(self) -> str:
        return f"{self.scheme}_{self.medium}_c{self.in_flight}"


CASES = tuple(
    Case(scheme, medium, in_flight)
    for scheme, medium in (("http", "tmpfs"), ("http", "ext4"), ("https", "tmpfs"))
    for in_flight in IN_FLIGHT
)

Figures = dict[tuple[str, str], list[Moved]]
"""By case and program, one for every repetition."""


class Bench:
    """A blob at a server, and a directory on each medium."""

    def __init__(self, scratch: Path, size_bytes: int) -> None:
        self.figures: Figures = defaultdict(list)
        self._size_bytes = size_bytes
        self._scratch = scratch
        self.blob = scratch / "tmpfs" / "files" / BLOB
        self._authority = nginx.certificates(scratch)
        for directory in (self.blob.parent, scratch / "ext4"):
            directory.mkdir(parents=True)
        self.blob.write_bytes(os.urandom(size_bytes))
        self._trust = Trust(ca_files=(str(self._authority),))

    @contextmanager
    def served(self) -> Iterator[None]:
        """As long as nginx runs."""
        with nginx.on_host(self._scratch, nginx.files(self.blob.parent)) as self._ports:
            yield

    def take(self, case: Case, *, reverse: bool) -> None:
        """Both programs in turn."""
        other = self._fetch if case.scheme == "http" else self._curl
        programs: list[tuple[str, Callable[[Case], Moved]]] = [
            ("ours", self._ours),
            ("other", other),
        ]
        for name, move in reversed(programs) if reverse else programs:
            # What was written before is not to be written back during this.
            os.sync()
            self.figures[case.name, name].append(move(case))

    def _ours(self, case: Case) -> Moved:
        target = self._target(case)
        whole = Request(self._url(case), (), 0, self._size_bytes, Priority.DEMAND, self._trust)
        moved = uvloop.run(_moved(whole, case.in_flight, target))
        if not filecmp.cmp(self.blob, target, shallow=False):
            raise SystemExit(f"{case.name}: not the blob's bytes")
        target.unlink()
        return moved

    def _fetch(self, case: Case) -> Moved:
        target = self._target(case)
        moved = self.fetch(case, target)
        target.unlink()
        return moved

    def fetch(self, case: Case, target: Path) -> Moved:
        """Have the C program move the blob to `target`; its last block is filled up."""
        words = [self._ports.http, f"/{BLOB}", self._size_bytes, RANGE_BYTES, case.in_flight]
        fetch = compiled(HERE / "fetch.c")
        seconds, cpu_s = command.run([fetch, *map(str, words), target]).split()
        return Moved(float(seconds), float(cpu_s))

    def _curl(self, case: Case) -> Moved:
        """One process for all ranges; its start is counted, some hundredths of a second."""
        directory = self._target(case).parent / "parts"
        directory.mkdir()
        script = self._scratch / "curl.conf"
        script.write_text(
            curl_script(self._url(case), self._authority, directory, self._size_bytes)
        )
        argv = ["curl", "--silent", "--parallel", "--parallel-max", str(case.in_flight)]
        began = time.monotonic()
        process = subprocess.Popen([*argv, "--config", script], stderr=subprocess.PIPE, text=True)
        assert process.stderr
        said = process.stderr.read()  # its meter too, which nothing keeps it from showing
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"curl: exit status {process.returncode}: {said[-2000:]}")
        if sum(part.stat().st_size for part in directory.iterdir()) != self._size_bytes:
            raise SystemExit("curl: not all bytes")
        shutil.rmtree(directory)
        return Moved(seconds, used.ru_utime + used.ru_stime)

    def _url(self, case: Case) -> str:
        port = self._ports.http if case.scheme == "http" else self._ports.https
        return f"{case.scheme}://127.0.0.1:{port}/{BLOB}"

    def _target(self, case: Case) -> Path:
        return self._scratch / case.medium / "target"


def run_native(options: Options) -> Report:
    """Cases in turn; in every other repetition the other program begins."""
    tmpfs = options.scratch / "tmpfs"
    tmpfs.mkdir()
    command.run(["mount", "-t", "tmpfs", "-o", f"size={3 * FILE_BYTES}", "none", tmpfs])
    bench = Bench(options.scratch, FILE_BYTES)
    with bench.served():
        for repetition in range(options.repetitions):
            for case in CASES:
                bench.take(case, reverse=bool(repetition % 2))
    command.run(["umount", tmpfs])
    environment = {**described(options), "file_mib": FILE_BYTES >> 20}
    return Report(options.bench, environment, list(_results(bench.figures)))


def curl_script(url: str, authority: Path, directory: Path, size_bytes: int) -> str:
    """What curl(1) reads to fetch every range into a file of its own."""
    return "next\n".join(
        f"silent\nshow-error\nfail\ncacert = {authority}\nurl = {url}\n"
        f"range = {start}-{end - 1}\noutput = {directory}/{start}\n"
        for start, end in _ranges(size_bytes)
    )


def _ranges(size_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size_bytes, RANGE_BYTES):
        yield start, min(start + RANGE_BYTES, size_bytes)


async def _moved(whole: Request, in_flight: int, target: Path) -> Moved:
    """As a flight does it (`fscached.fill.flight`)."""
    transfers = Transfers(demand_connections=in_flight)
    crew = Crew(len(os.sched_getaffinity(0)), Pool(POOL_BYTES))
    file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    ranges = _ranges(whole.end)
    began, before = time.monotonic(), time.process_time()

    async def move() -> None:
        for start, end in ranges:
            await _move(whole._replace(start=start, end=end), transfers, crew, file)

    await asyncio.gather(*(move() for _ in range(in_flight)))
    moved = Moved(time.monotonic() - began, time.process_time() - before)
    os.truncate(file, whole.end)
    os.close(file)
    crew.close()
    await transfers.close()
    return moved


async def _move(request: Request, transfers: Transfers, crew: Crew, file: int) -> None:
    memory = await crew.pool.take(RANGE_BYTES, True)
    filled = 0

    def feed(piece: memoryview) -> None:
        nonlocal filled
        memory[filled : filled + len(piece)] = piece
        filled += len(piece)

    reply = await transfers.get(request, feed, Traffic())
    if reply.fault is not None or reply.status != 206 or filled != request.end - request.start:
        raise SystemExit(f"{request.url}: {reply.status} {reply.reason}")
    padded = -(-filled // BLOCK_BYTES) * BLOCK_BYTES
    await crew.run(partial(os.pwrite, file, memoryview(memory)[:padded], request.start))
    crew.pool.give(memory)


def _results(figures: Figures) -> Iterator[Result]:
    """How fast, then what it costs."""
    for case in CASES:
        ours, other = figures[case.name, "ours"], figures[case.name, "other"]
        speeds = ([FILE_BYTES / MB / one.seconds for one in moved] for moved in (ours, other))
        yield result(f"{case.name}_speed", "MB/s", "higher", *speeds)
    for case in CASES:
        ours, other = figures[case.name, "ours"], figures[case.name, "other"]
        costs = ([one.cpu_s / (FILE_BYTES / GB) for one in moved] for moved in (ours, other))
        yield result(f"{case.name}_cpu", "s/GB", "lower", *costs)

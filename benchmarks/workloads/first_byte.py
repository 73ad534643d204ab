"""The first byte of a random cold read over a link: 50 ms away, 10 MB/s.

What cannot be less is the round trip and the transfer of the chunk that holds the byte: that is the
baseline of every figure. A client that does nothing else, which asks for exactly those bytes on a
connection it has, shows what of the rest is TCP's and the server's.

`alone`: nothing is on the link when the read begins. `mapped`: a page fault, with the readahead of
the kernel. `row`: one read after the other, so that what the last window brings behind its first
chunk is still on the link; the same with windows as long as a chunk.
"""

from __future__ import annotations

import bisect
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from environments import Options, nginx
from environments.archive import FILE, images
from environments.guest import booted, described, fresh_cache, probe
from environments.nginx import Ports
from harness import link
from harness.guest import Guest
from harness.image import Origin
from harness.registry import Registry
from report import Report, Result, result
from runners import MOUNT
from runners.fscached import STATE, Fscached

REPETITIONS = 3
READS = 24
FILE_BYTES = 128 << 20
ROUND_TRIP_MS = 50.0
BYTES_PER_S = 10_000_000
PAUSE_S = 0.3
"""Longer than a window of 1 MiB is on the link."""

PORTS = Ports(5080, 5443)
STEP_BYTES = 1 << 20
KIB = 1 << 10

CHUNKS = """
import json, sys
from rafs_v6.bootstrap import Bootstrap
[path] = sys.argv[1:]
bootstrap = Bootstrap(open(path, "rb").read())
[entry] = bootstrap.blobs
rows = bootstrap.chunk_table(entry.blob_index)
print(json.dumps([[r.uncompressed_offset, r.compressed_offset, r.compressed_size] for r in rows]))
"""
"""Where the chunks of an image of one file are: in the file, in the blob, and how long there."""


class Target(NamedTuple):
    """A byte to read, and the bytes of the blob that its chunk is: [start, end)."""

    offset: int
    start: int
    end: int

    @property
    def ideal_s(self) -> float:
        """A round trip and the transfer."""
        return ROUND_TRIP_MS / 1000 + (self.end - self.start) / BYTES_PER_S


class Case(NamedTuple):
    """A way of reading an image, with windows of `window_bytes` at first."""

    name: str
    image: str
    way: str
    pause_s: float
    window_bytes: int


LARGE, SMALL = "1m:latest", "64k:latest"
IMAGES: dict[str, Sequence[str]] = {LARGE: ["--chunk-size", "1M"], SMALL: ["--chunk-size", "64K"]}
WINDOW_BYTES = 1 << 20

TURNS = (
    (
        Case("alone_1m", LARGE, "read", PAUSE_S, WINDOW_BYTES),
        Case("row_1m", LARGE, "read", 0, WINDOW_BYTES),
        Case("mapped_1m", LARGE, "map", PAUSE_S, WINDOW_BYTES),
    ),
    (
        Case("alone_64k", SMALL, "read", PAUSE_S, WINDOW_BYTES),
        Case("row_64k", SMALL, "read", 0, WINDOW_BYTES),
    ),
    (Case("row_64k_window_64k", SMALL, "read", 0, 64 * KIB),),
)
"""Of every turn the cases share a mount, and read different chunks."""

Figures = dict[str, list[float]]
"""Mean seconds by name, one for every repetition; the ideal's too."""


class Bench:
    """A guest with its registry behind nginx, which sends the blobs' files itself."""

    def __init__(self, guest: Guest, origin: Origin) -> None:
        self.figures: Figures = defaultdict(list)
        self._fscached = Fscached(guest)
        self._guest = guest
        self._origin = origin
        self._registry = Registry(guest)
        self._registry.start()
        locations = nginx.registry(self._registry.address, self._registry.storage)
        nginx.in_guest(guest, PORTS, locations)

    def turn(self, cases: Sequence[Case], seed: int) -> None:
        """Mount an image, and read it as each of the cases has it."""
        first = cases[0]
        self._guest.run(f"find {self._registry.storage} -type f -exec cat {{}} + > /dev/null")
        self._fscached.start(fresh_cache(self._guest), first.window_bytes)
        self._fscached.pull(f"127.0.0.1:{PORTS.http}/{first.image}")
        opening, *found = self._targets(seed)
        with link.shaped(self._guest, bytes_per_s=BYTES_PER_S, round_trip_ms=ROUND_TRIP_MS):
            if first is TURNS[0][0]:
                self._note("opening", [opening], self._read(first, [opening]))
            else:
                self._read(first, [opening])
            for case in cases:
                read, found = found[:READS], found[READS:]
                self._note(case.name, read, self._read(case, read))
                if case is first:
                    self._note(f"{case.name}_client", read, self._ask(case, read))
        self._fscached.stop()

    def _targets(self, seed: int) -> list[Target]:
        """Of all steps of the file, in random order."""
        path = self._guest.run(f"echo {STATE}/images/*/image.boot").stdout.strip()
        chunks = json.loads(self._guest.python(CHUNKS, path).stdout)
        found = targets(chunks, FILE_BYTES)
        random.Random(seed).shuffle(found)
        return found

    def _read(self, case: Case, read: Sequence[Target]) -> list[float]:
        words = [case.way, f"{MOUNT}/{FILE}", case.pause_s, *(target.offset for target in read)]
        return _seconds(probe(self._guest, "single", *words))

    def _ask(self, case: Case, read: Sequence[Target]) -> list[float]:
        """The first of the answers opens the connection, and its time does not count."""
        [blob_id] = self._origin.blob_ids(case.image)
        path = f"/v2/{case.image.partition(':')[0]}/blobs/sha256:{blob_id}"
        spans = [f"{target.start}-{target.end}" for target in (read[-1], *read)]
        return _seconds(probe(self._guest, "ranges", PORTS.http, path, case.pause_s, *spans))[1:]

    def _note(self, name: str, read: Sequence[Target], seconds: Sequence[float]) -> None:
        self.figures[name].append(statistics.mean(seconds))
        self.figures[f"{name}_ideal"].append(statistics.mean(target.ideal_s for target in read))


def run(options: Options) -> Report:
    """Every turn with a cache and a daemon of its own."""
    origin = images(FILE_BYTES, IMAGES)
    with booted(options, [origin.disk]) as guest:
        if not link.can_delay(guest):
            raise SystemExit("first-byte: this guest's kernel has no netem")
        environment = {
            **described(guest, options),
            "round_trip_ms": ROUND_TRIP_MS,
            "bytes_per_s": BYTES_PER_S,
        }
        bench = Bench(guest, origin)
        for repetition in range(options.repetitions):
            for cases in TURNS:
                bench.turn(cases, repetition)
    return Report(options.bench, environment, list(_results(bench.figures)))


def run_native(options: Options) -> Report:
    """Not where a link cannot be made longer."""
    print("first-byte: this kernel has no netem: run it in a guest", file=sys.stderr)
    raise SystemExit(3)


def targets(chunks: Sequence[tuple[int, int, int]], size_bytes: int) -> list[Target]:
    """The middle of every step of the file. A window from one to the next ends before the next,
    and readahead around it stays in its chunk where that is as long as the step."""
    starts = [offset for offset, _, _ in chunks]
    found = []
    for offset in range(STEP_BYTES // 2, size_bytes, STEP_BYTES):
        _, start, length = chunks[bisect.bisect_right(starts, offset) - 1]
        found.append(Target(offset, start, start + length))
    return found


def _seconds(said: str) -> list[float]:
    return [float(line) for line in said.split()]


def _results(figures: Figures) -> Iterator[Result]:
    """In milliseconds, beside the ideal."""
    for name, seconds in figures.items():
        if not name.endswith("_ideal"):
            ours, ideal = ([one * 1000 for one in of] for of in (seconds, figures[f"{name}_ideal"]))
            yield result(name, "ms", "lower", ours, ideal)

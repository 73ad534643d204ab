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
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

from environments import ROOT, Options, guest, native, nginx
from environments import link as native_link
from environments.archive import FILE, images
from environments.nginx import Ports
from environments.programs import HERE
from harness import command, link, registry
from harness.daemon import Settings
from harness.guest import Guest
from harness.image import Origin
from harness.registry import Registry
from report import Report, Result, result
from runners import MOUNT
from runners.fscached import STATE, Fscached
from runners.supervised import Supervised

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


Row = tuple[int, int, int]


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
        Case("1m_alone", LARGE, "read", PAUSE_S, WINDOW_BYTES),
        Case("1m_row", LARGE, "read", 0, WINDOW_BYTES),
        Case("1m_mapped", LARGE, "map", PAUSE_S, WINDOW_BYTES),
    ),
    (
        Case("64k_alone", SMALL, "read", PAUSE_S, WINDOW_BYTES),
        Case("64k_row", SMALL, "read", 0, WINDOW_BYTES),
    ),
    (Case("64k_row-small-windows", SMALL, "read", 0, 64 * KIB),),
)
"""Of every turn the cases share a mount, and read different chunks."""

Figures = dict[str, list[float]]
"""Mean seconds by name, one for every repetition; the ideal's too."""


class Machine(Protocol):
    """A daemon on one end of the link, and a registry on the other."""

    address: str

    def mount(self, image: str, window_bytes: int) -> Sequence[Row]:
        """Start a daemon on an empty cache and mount an image; its chunks."""
        ...

    def shaped(self) -> AbstractContextManager[None]:
        """With the link as long as it is to be."""
        ...

    def read(self, way: str, *words: object) -> str:
        """What a probe says of the mounted file."""
        ...

    def ask(self, *words: object) -> str:
        """What a probe says that asks the registry itself."""
        ...

    def stop(self) -> None:
        """Unmount and end the daemon."""
        ...


class Virtual:
    """A guest, whose loopback is made longer."""

    address = f"{PORTS.address}:{PORTS.http}"

    def __init__(self, inside: Guest) -> None:
        self._fscached = Fscached(inside)
        self._guest = inside
        self._registry = Registry(inside)
        self._registry.start()
        locations = nginx.registry(self._registry.address, self._registry.storage)
        nginx.in_guest(inside, PORTS, locations)

    def mount(self, image: str, window_bytes: int) -> Sequence[Row]:
        """See Machine."""
        self._guest.run(f"find {self._registry.storage} -type f -exec cat {{}} + > /dev/null")
        self._fscached.start(guest.fresh_cache(self._guest), window_bytes)
        self._fscached.pull(f"{self.address}/{image}")
        path = self._guest.run(f"echo {STATE}/images/*/image.boot").stdout.strip()
        rows: Sequence[Row] = json.loads(self._guest.python(CHUNKS, path).stdout)
        return rows

    def shaped(self) -> AbstractContextManager[None]:
        """See Machine."""
        return link.far(self._guest, bytes_per_s=BYTES_PER_S, round_trip_ms=ROUND_TRIP_MS)

    def read(self, way: str, *words: object) -> str:
        """See Machine."""
        return guest.probe(self._guest, "single", way, f"{MOUNT}/{FILE}", *words)

    def ask(self, *words: object) -> str:
        """See Machine."""
        return guest.probe(self._guest, "ranges", self.address, *words)

    def stop(self) -> None:
        """See Machine."""
        self._fscached.stop()


class Own:
    """This machine, on the near end of a link that always is as long."""

    def __init__(self, scratch: Path, storage: Path, ports: Ports) -> None:
        self.address = f"{ports.address}:{ports.http}"
        self._scratch = scratch
        self._storage = storage
        self._daemon: Supervised | None = None

    def mount(self, image: str, window_bytes: int) -> Sequence[Row]:
        """See Machine."""
        place = self._scratch / "turn"
        shutil.rmtree(place, ignore_errors=True)
        for file in self._storage.rglob("data"):
            file.read_bytes()
        tables: Settings = {
            "fetch": {"window_bytes": window_bytes, "window_limit_bytes": window_bytes},
            "prefetch": {"enabled": False},
            "source": {"insecure_registries": [self.address]},
        }
        self._daemon = Supervised("fscached", place, tables)
        self._daemon.start()
        self._daemon.pull(f"{self.address}/{image}")
        bootstrap, _ = self._daemon.files()
        rows: Sequence[Row] = json.loads(
            command.run([sys.executable, "-c", CHUNKS, bootstrap], cwd=ROOT)
        )
        return rows

    def shaped(self) -> AbstractContextManager[None]:
        """See Machine."""
        return nullcontext()

    def read(self, way: str, *words: object) -> str:
        """See Machine."""
        assert self._daemon
        return self._probe("single", way, self._daemon.directory / FILE, *words)

    def ask(self, *words: object) -> str:
        """See Machine."""
        return self._probe("ranges", self.address, *words)

    def stop(self) -> None:
        """See Machine."""
        assert self._daemon
        self._daemon.stop()

    def _probe(self, *words: object) -> str:
        return command.run([sys.executable, HERE / "probes.py", *map(str, words)])


class Bench:
    """Figures of one machine."""

    def __init__(self, machine: Machine, origin: Origin) -> None:
        self.figures: Figures = defaultdict(list)
        self._machine = machine
        self._origin = origin

    def turn(self, cases: Sequence[Case], seed: int) -> None:
        """Mount an image, and read it as each of the cases has it."""
        first = cases[0]
        found = targets(self._machine.mount(first.image, first.window_bytes), FILE_BYTES)
        random.Random(seed).shuffle(found)
        with self._machine.shaped():
            opening = found.pop()
            seconds = self._read(first, [opening])
            if first is TURNS[0][0]:
                self._note("1m_opening", [opening], seconds)
            for case in cases:
                read, found = found[:READS], found[READS:]
                self._note(case.name, read, self._read(case, read))
                if case is first:
                    self._note(f"{case.name}-client", read, self._ask(case, read))
        self._machine.stop()

    def _read(self, case: Case, read: Sequence[Target]) -> list[float]:
        offsets = [target.offset for target in read]
        return _seconds(self._machine.read(case.way, case.pause_s, *offsets))

    def _ask(self, case: Case, read: Sequence[Target]) -> list[float]:
        """The first of the answers opens the connection, and its time does not count."""
        [blob_id] = self._origin.blob_ids(case.image)
        path = f"/v2/{case.image.partition(':')[0]}/blobs/sha256:{blob_id}"
        spans = [f"{target.start}-{target.end}" for target in (read[-1], *read)]
        return _seconds(self._machine.ask(path, case.pause_s, *spans))[1:]

    def _note(self, name: str, read: Sequence[Target], seconds: Sequence[float]) -> None:
        self.figures[name].append(statistics.mean(seconds))
        self.figures[f"{name}_ideal"].append(statistics.mean(target.ideal_s for target in read))


def run(options: Options) -> Report:
    """In a guest, whose kernel has netem."""
    origin = images(FILE_BYTES, IMAGES)
    with guest.booted(options, [origin.disk]) as inside:
        if not link.can_delay(inside):
            print("first-byte: this guest's kernel has no netem", file=sys.stderr)
            raise SystemExit(3)
        environment = guest.described(inside, options)
        bench = _measured(Virtual(inside), origin, options)
    return _report(bench, environment, options)


def run_native(options: Options) -> Report:
    """On this machine's kernel, over a link of our own making."""
    origin = images(FILE_BYTES, IMAGES)
    nginx.certificates(options.scratch)
    with (
        native.mounted(origin.disk.image, options.scratch / "origin") as storage,
        native_link.between(ROUND_TRIP_MS, BYTES_PER_S),
        ExitStack() as far,
    ):
        with native_link.entered(native_link.FAR):
            address = far.enter_context(registry.on_host(storage))
            locations = nginx.registry(address, str(storage))
            server = nginx.on_host(options.scratch, locations, native_link.FAR_ADDRESS)
            ports = far.enter_context(server)
        bench = _measured(Own(options.scratch, storage, ports), origin, options)
    return _report(bench, native.described(options), options)


def _measured(machine: Machine, origin: Origin, options: Options) -> Bench:
    """Every turn with a cache and a daemon of its own."""
    bench = Bench(machine, origin)
    for repetition in range(options.repetitions):
        for cases in TURNS:
            bench.turn(cases, repetition)
    return bench


def _report(bench: Bench, environment: dict[str, object], options: Options) -> Report:
    linked = {"round_trip_ms": ROUND_TRIP_MS, "bytes_per_s": BYTES_PER_S}
    return Report(options.bench, environment | linked, list(_results(bench.figures)))


def targets(chunks: Sequence[Row], size_bytes: int) -> list[Target]:
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

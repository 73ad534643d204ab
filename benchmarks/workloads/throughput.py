"""Cold sequential throughput from a registry on the loopback, beside programs that only move bytes.

One large file is read through the mount, from an uncompressed and from a zstd image, by HTTP beside
the C program, by HTTPS (nginx before the registry) beside curl(1) with one request for the whole
blob. Both others move the uncompressed image. The C program asks for ranges as long as our longest;
`-1m` is the same beside ranges of 1 MiB, each of which costs docker-registry a read of 4 MiB.

On this machine's own kernel also by HTTPS from a zstd image on one processor and on two: servers,
daemon and reader all have the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, Protocol

from environments import Options, guest, native, nginx
from environments.archive import FILE, images
from environments.nginx import Ports
from environments.programs import HERE, compiled
from harness import command, registry
from harness.daemon import Settings
from harness.guest import Guest
from harness.image import Origin
from harness.registry import Registry
from report import Report, Result, result
from runners import MOUNT
from runners.fscached import Fscached
from runners.peer import Peer
from runners.supervised import Supervised
from runners.usage import Usage

REPETITIONS = 3
TAKES_PEER = True
OPTIONS = {"plain": ["--compressor", "none"], "zstd": ["--compressor", "zstd"]}
SCHEMES = ("http", "https")
GUEST_FILE_BYTES = 64 << 20
NATIVE_FILE_BYTES = 512 << 20
RANGES = {"http": 8 << 20, "1m": 1 << 20}
"""Of the C program."""
PROCESSORS = (1, 2)
PORTS = Ports(5080, 5443)
MB, GB = 1e6, 1e9

CURL = ("curl", "-sSf", "-w", "%{time_total}", "-o")


class Reading(NamedTuple):
    """A file that was read through a mount: how long it took, what the daemon used."""

    seconds: float
    usage: Usage


class Machine(Protocol):
    """Where daemon, registry and reader are."""

    file_bytes: int
    peer: Peer | None

    def fetch(self, path: str, size_bytes: int, range_bytes: int) -> tuple[float, float]:
        """The C program's seconds on the wall and of processors for a blob of the registry."""
        ...

    def curl(self, path: str) -> float:
        """curl's seconds for it by HTTPS."""
        ...

    def read(self, image: str, scheme: str) -> Reading:
        """Mount an image on an empty cache, and read its file."""
        ...

    def read_peer(self, image: str) -> float:
        """The seconds the peer takes for that, by HTTP."""
        ...


class Bench:
    """Figures by name, one value for every repetition."""

    def __init__(self, machine: Machine, origin: Origin) -> None:
        self.figures: dict[str, list[float]] = defaultdict(list)
        self._machine = machine
        self._origin = origin
        if origin.blob_bytes("plain:latest") < machine.file_bytes:
            raise SystemExit("throughput: some chunks are there twice, and would be fetched once")

    def turns(self) -> list[Callable[[], None]]:
        """Everything that is measured, each with a cache of its own."""
        reads = [partial(self._read, image, scheme) for image, scheme in product(OPTIONS, SCHEMES)]
        fetches = [partial(self._fetch, name) for name in RANGES]
        peers = [partial(self._peer, image) for image in OPTIONS] if self._machine.peer else []
        return [*fetches, self._curl, *reads, *peers]

    def _fetch(self, name: str) -> None:
        size_bytes = self._origin.blob_bytes("plain:latest")
        seconds, cpu_s = self._machine.fetch(self._path(), size_bytes, RANGES[name])
        self.figures[name].append(size_bytes / MB / seconds)
        self.figures[f"{name} cpu"].append(cpu_s / (size_bytes / GB))

    def _curl(self) -> None:
        size_bytes = self._origin.blob_bytes("plain:latest")
        self.figures["https"].append(size_bytes / MB / self._machine.curl(self._path()))

    def _read(self, image: str, scheme: str) -> None:
        reading = self._machine.read(f"{image}:latest", scheme)
        self.note(f"{image}_{scheme}", reading)

    def _peer(self, image: str) -> None:
        seconds = self._machine.read_peer(f"{image}:latest")
        self.figures[f"{image}_peer"].append(self._machine.file_bytes / MB / seconds)

    def note(self, name: str, reading: Reading) -> None:
        """Keep what was measured."""
        seconds, used = reading
        self.figures[name].append(self._machine.file_bytes / MB / seconds)
        self.figures[f"{name} cpu"].append(used.cpu_s / (self._machine.file_bytes / GB))
        self.figures[f"{name} request"].append(used.received_bytes / used.requests / 1024)

    def _path(self) -> str:
        [blob_id] = self._origin.blob_ids("plain:latest")
        return f"/v2/plain/blobs/sha256:{blob_id}"


class Virtual:
    """A guest."""

    file_bytes = GUEST_FILE_BYTES

    def __init__(self, inside: Guest, peer: str) -> None:
        self.fscached = Fscached(inside)
        self.peer = Peer(inside, peer) if peer else None
        self._guest = inside
        self._registry = Registry(inside)
        self._registry.start()
        nginx.in_guest(inside, PORTS, nginx.registry(self._registry.address))
        inside.run(f"echo 127.0.0.1 {nginx.NAME} >> /etc/hosts")

    def fetch(self, path: str, size_bytes: int, range_bytes: int) -> tuple[float, float]:
        """See Machine."""
        target = f"{self._begin()}/blob"
        port = self._registry.address.rpartition(":")[2]
        words = [f"{guest.PROGRAMS}/fetch", port, path, str(size_bytes), str(range_bytes), "1"]
        seconds, cpu_s = self._guest.run([*words, target], timeout_s=300).stdout.split()
        return float(seconds), float(cpu_s)

    def curl(self, path: str) -> float:
        """See Machine."""
        target, authority = f"{self._begin()}/blob", f"{nginx.FILES}/authority.pem"
        url = f"https://{nginx.NAME}:{PORTS.https}{path}"
        argv = [*CURL, target, "--cacert", authority, url]
        return float(self._guest.run(argv, timeout_s=300).stdout)

    def read(self, image: str, scheme: str) -> Reading:
        """See Machine."""
        trust = {"source": {"ca_files": [f"{nginx.FILES}/authority.pem"]}}
        host = self._registry.address if scheme == "http" else f"{nginx.NAME}:{PORTS.https}"
        self.fscached.run(self._begin(), trust)
        self.fscached.pull(f"{host}/{image}")
        before = self.fscached.usage()
        seconds = float(guest.probe(self._guest, "sequential", f"{MOUNT}/{FILE}"))
        used = self.fscached.usage().since(before)
        self.fscached.stop()
        return Reading(seconds, used)

    def read_peer(self, image: str) -> float:
        """See Machine."""
        assert self.peer is not None
        self.peer.start(self._begin())
        self._guest.run(self.peer.offered(self._registry.address, image, prefetch=False))
        seconds = float(guest.probe(self._guest, "sequential", f"{MOUNT}/{FILE}"))
        self.peer.stop()
        return seconds

    def _begin(self) -> str:
        """An empty cache, and everything the registry serves in the guest's memory."""
        self._guest.run(f"find {self._registry.storage} -type f -exec cat {{}} + > /dev/null")
        return guest.fresh_cache(self._guest)


class Own:
    """This machine, while `served`."""

    file_bytes = NATIVE_FILE_BYTES
    peer: Peer | None = None

    def __init__(self, scratch: Path, storage: Path) -> None:
        self._scratch = scratch
        self._storage = storage
        self._authority = nginx.certificates(scratch)
        self._registry = ""
        self._ports = PORTS

    @contextmanager
    def served(self, *, blobs: bool = False) -> Iterator[None]:
        """With a registry, and nginx before it. `blobs`: nginx sends the blobs' files itself."""
        storage = str(self._storage) if blobs else ""
        with registry.on_host(self._storage) as self._registry:
            locations = nginx.registry(self._registry, storage)
            with nginx.on_host(self._scratch, locations) as self._ports:
                yield

    def fetch(self, path: str, size_bytes: int, range_bytes: int) -> tuple[float, float]:
        """See Machine."""
        target = self._begin() / "blob"
        port = self._registry.rpartition(":")[2]
        words = [port, path, str(size_bytes), str(range_bytes), "1"]
        said = command.run([compiled(HERE / "fetch.c"), *words, target])
        seconds, cpu_s = said.split()
        return float(seconds), float(cpu_s)

    def curl(self, path: str) -> float:
        """See Machine."""
        target = self._begin() / "blob"
        url = f"https://{nginx.NAME}:{self._ports.https}{path}"
        return float(command.run([*CURL, target, "--cacert", self._authority, url]))

    def read(self, image: str, scheme: str) -> Reading:
        """See Machine."""
        host = self._registry if scheme == "http" else f"{nginx.NAME}:{self._ports.https}"
        tables: Settings = {
            "prefetch": {"enabled": False},
            "source": {"ca_files": [str(self._authority)]},
        }
        daemon = Supervised("fscached", self._begin(), tables)
        daemon.start()
        try:
            daemon.pull(f"{host}/{image}")
            before = daemon.usage()
            probe: list[str | Path] = [sys.executable, HERE / "probes.py", "sequential"]
            seconds = float(command.run([*probe, daemon.directory / FILE]))
            return Reading(seconds, daemon.usage().since(before))
        finally:
            daemon.stop()

    def read_peer(self, image: str) -> float:
        """There is none here."""
        raise NotImplementedError

    def _begin(self) -> Path:
        """An empty directory, and everything the registry serves in memory."""
        place = self._scratch / "turn"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        everything: list[str | Path] = [
            "find",
            self._storage,
            "-type",
            "f",
            "-exec",
            "cat",
            "{}",
            "+",
        ]
        subprocess.run(everything, stdout=subprocess.DEVNULL, check=True)
        os.sync()
        return place


def run(options: Options) -> Report:
    """Each in its turn, in a guest."""
    origin = images(GUEST_FILE_BYTES, _named(OPTIONS))
    with guest.booted(options, [origin.disk]) as inside:
        environment = guest.described(inside, options)
        machine = Virtual(inside, options.peer)
        bench = Bench(machine, origin)
        turns = bench.turns()
        for _ in range(options.repetitions):
            for turn in turns:
                turn()
            turns.reverse()
    ours = machine.fscached
    results = [
        *_results(bench.figures),
        result("daemon_start_s", "s", "lower", ours.start_s),
        result("resident_mib", "MiB", "lower", ours.resident_idle_mib),
        result("resident_image_mib", "MiB", "lower", ours.resident_image_mib),
    ]
    return Report(options.bench, environment, results)


def run_native(options: Options) -> Report:
    """Each in its turn, on this machine's kernel."""
    origin = images(NATIVE_FILE_BYTES, _named(OPTIONS))
    with (
        native.mounted(origin.disk.image, options.scratch / "origin") as storage,
        native.known_as(nginx.NAME, options.scratch),
    ):
        machine = Own(options.scratch, storage)
        bench = Bench(machine, origin)
        turns = bench.turns()
        for _ in range(options.repetitions):
            with machine.served():
                for turn in turns:
                    turn()
            for count in PROCESSORS:
                with native.processors(count), machine.served(blobs=True):
                    bench.note(f"processors {count}", machine.read("zstd:latest", "https"))
            turns.reverse()
    results = [*_results(bench.figures), *_processors(bench.figures)]
    return Report(options.bench, native.described(options), results)


def _named(options: dict[str, list[str]]) -> dict[str, Sequence[str]]:
    return {f"{name}:latest": words for name, words in options.items()}


def _results(figures: dict[str, list[float]]) -> Iterator[Result]:
    """`request` is the mean length of an answer; the C program's are all as long as can be."""
    names = [f"{image}_{scheme}" for image, scheme in product(OPTIONS, SCHEMES)]
    for name in names:
        other = figures[name.rpartition("_")[2]]
        yield result(f"cold_{name}", "MB/s", "higher", figures[name], other)
    yield result("cold_plain_http-1m", "MB/s", "higher", figures["plain_http"], figures["1m"])
    for image in OPTIONS:
        if peer := figures.get(f"{image}_peer"):
            yield result(f"cold_{image}_peer", "MB/s", "higher", figures[f"{image}_http"], peer)
    for name in names:
        other = figures.get(f"{name.rpartition('_')[2]} cpu", [])
        yield result(f"cpu_{name}", "s/GB", "lower", figures[f"{name} cpu"], other)
    for name in names:
        yield result(f"request_{name}", "KiB", "higher", figures[f"{name} request"])


def _processors(figures: dict[str, list[float]]) -> Iterator[Result]:
    one, two = (figures[f"processors {count}"] for count in PROCESSORS)
    yield result("cold_zstd_two-processors", "MB/s", "higher", two, one)
    one, two = (figures[f"processors {count} cpu"] for count in PROCESSORS)
    yield result("cpu_zstd_two-processors", "s/GB", "lower", two, one)

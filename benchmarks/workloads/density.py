"""Hundreds of images of 20 blobs each, every one of their thousands of cache files read cold, in
one daemon; beside one with a single image. With `--long` 1,000 images that have 5,000 cache files.

No two images share a tree, so every blob is a cache file of its own. An image is offered and
mounted (`start`), then the first 4 KiB of a file of each blob are read (`read`): a miss whose bytes
are local. Memory is the daemon's own. `restart` is from SIGKILL until the supervisor's next daemon
answers, with all images; then every blob is read once more (`again`), another chunk of it.

In a guest, where that is slow: tens of images unless `--long`, no restart, and beside a peer if one
is given.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import shake_128
from pathlib import Path
from typing import NamedTuple, Protocol

import probes
from environments import Options, guest, local, native
from harness import disk, store
from harness.daemon import Settings
from harness.disk import Disk
from harness.guest import Guest
from report import Report, Result, percentile, result
from runners import LocalImage
from runners.fscached import Fscached
from runners.peer import Peer
from runners.supervised import Supervised

from fscached.transport import mount
from rafs_v6.layout import Compressor
from rafs_v6.pack import Format
from rafs_v6.tree import Node

REPETITIONS = 1
"""Every figure is one of hundreds."""
TAKES_PEER = True
SINGLES = 3
"""Daemons with one image: few misses would say little."""
CHUNK_BYTES = 4096
FILE_BYTES = 4 * CHUNK_BYTES
SETTINGS: Settings = {
    "prefetch": {"enabled": False},
    "fetch": {"window_bytes": CHUNK_BYTES, "window_limit_bytes": CHUNK_BYTES},
}
SOURCES = "/srv/density"
READ_TIMEOUT_S = 1200.0

Figures = dict[str, list[float]]


class Size(NamedTuple):
    """How many images there are, and how many blobs each has."""

    images: int
    blobs: int

    @property
    def cache_files(self) -> int:
        """Those of all blobs, and of each image's bootstrap."""
        return self.images * (self.blobs + 1)


NATIVE, GUEST = Size(200, 20), Size(30, 20)
"""Blobs as many as a Node.js image has, by the EROFS-over-fscache article."""
LONG = Size(1000, 4)
"""The most objects and cache files that the daemon has budgets for."""


class Crowd(Protocol):
    """A daemon that has many images."""

    def start(self) -> None: ...

    def mount(self, image: LocalImage) -> float:
        """Milliseconds until it can be read."""
        ...

    def read(self, images: Sequence[LocalImage], offset: int) -> list[float]:
        """Microseconds of one read from each blob of each."""
        ...

    def drop_caches(self) -> None: ...

    def resident_mib(self) -> float: ...

    def restart(self) -> float | None:
        """Seconds until another daemon is in its place, or that there is none."""
        ...

    def stop(self) -> None: ...


class Here:
    """On this machine."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._daemon = Supervised("fscached", scratch, SETTINGS)
        self._mounted: list[Path] = []

    def start(self) -> None:
        """See Crowd."""
        self._daemon.start()

    def mount(self, image: LocalImage) -> float:
        """See Crowd."""
        at = self._scratch / image.fsid
        at.mkdir()
        self._mounted.append(at)
        began = time.perf_counter()
        self._daemon.offer(image)
        offered = time.perf_counter()
        # Not timed: it lists all of them.
        [known] = [known for known in self._daemon.images() if known.fsid == image.fsid]
        listed = time.perf_counter()
        mount.mount_files(str(at), known.bootstrap, known.devices or [])
        return (offered - began + time.perf_counter() - listed) * 1e3

    def read(self, images: Sequence[LocalImage], offset: int) -> list[float]:
        """See Crowd."""
        directories = (str(self._scratch / image.fsid) for image in images)
        return [us for directory in directories for us in probes.heads(directory, offset)]

    def drop_caches(self) -> None:
        """See Crowd."""
        native.drop_caches()

    def resident_mib(self) -> float:
        """See Crowd."""
        return self._daemon.resident_mib()

    def restart(self) -> float | None:
        """See Crowd."""
        began = time.monotonic()
        self._daemon.restart()
        return time.monotonic() - began

    def stop(self) -> None:
        """See Crowd."""
        for at in self._mounted:
            if at.is_mount():
                mount.unmount(str(at))
        self._daemon.stop()


class Inside:
    """In a guest."""

    def __init__(self, inside: Guest, daemon: Fscached | Peer) -> None:
        self._guest = inside
        self._daemon = daemon

    def start(self) -> None:
        """See Crowd."""
        self._daemon.start(guest.fresh_cache(self._guest), CHUNK_BYTES)

    def mount(self, image: LocalImage) -> float:
        """See Crowd."""
        at = f"/mnt/{image.fsid}"
        options = f"fsid={image.fsid},domain_id={image.domain_id}"
        script = f"mkdir -p {at}; mount -t erofs -o {options} none {at}"
        began = time.perf_counter()
        self._guest.run(f"{self._daemon.offering(image)}; {script}")
        return (time.perf_counter() - began) * 1e3

    def read(self, images: Sequence[LocalImage], offset: int) -> list[float]:
        """See Crowd."""
        directories = (f"/mnt/{image.fsid}" for image in images)
        said = guest.probe(self._guest, "heads", offset, *directories, timeout_s=READ_TIMEOUT_S)
        return [float(word) for word in said.split()]

    def drop_caches(self) -> None:
        """See Crowd."""
        self._guest.run("sync; echo 3 > /proc/sys/vm/drop_caches")

    def resident_mib(self) -> float:
        """See Crowd."""
        return self._daemon.resident_mib()

    def restart(self) -> float | None:
        """There is no supervisor."""
        return None

    def stop(self) -> None:
        """See Crowd."""
        self._guest.run("umount -t erofs -a")
        self._daemon.end()


def run(options: Options) -> Report:
    """In a guest: the crowd of each daemon, then one image in each."""
    size = LONG if options.long else GUEST
    found: dict[str, Figures] = defaultdict(dict)
    with guest.booted(options, [_disk(size)]) as inside:
        images = [_named(f"{SOURCES}/{n}", n) for n in range(size.images)]
        daemons: list[Fscached | Peer] = [Fscached(inside)]
        if options.peer:
            daemons.append(Peer(inside, options.peer))
        for daemon in daemons:
            for _ in range(options.repetitions):
                _measure(Inside(inside, daemon), images, found[daemon.name])
                _measure(Inside(inside, daemon), images[:1], found[f"{daemon.name} single"])
        environment = guest.described(inside, options) | _described(size)
    ours = found[Fscached.name]
    results = list(_results(ours, found[f"{Fscached.name} single"], size.images))
    if options.peer:
        results += _beside_peer(ours, found[Peer.name])
    return Report(options.bench, environment, results)


def run_native(options: Options) -> Report:
    """The crowd, then daemons with one image."""
    size = LONG if options.long else NATIVE
    sources = options.scratch / "sources"
    images = [_image(sources, number, size.blobs) for number in range(size.images)]
    crowd: Figures = {}
    single: Figures = {}
    for turn in range(options.repetitions):
        _measure(Here(options.scratch / f"crowd-{turn}"), images, crowd)
        for number in range(SINGLES):
            place = Here(options.scratch / f"single-{turn}-{number}")
            _measure(place, images[number : number + 1], single)
    environment = native.described(options) | _described(size)
    return Report(options.bench, environment, list(_results(crowd, single, size.images)))


def _described(size: Size) -> dict[str, int]:
    return {"images": size.images, "cache_files": size.cache_files}


def _disk(size: Size) -> Disk:
    """The images on a disk, kept."""

    def build(directory: Path) -> None:
        for number in range(size.images):
            _image(directory / "tree", number, size.blobs)
        disk.from_tree(directory / "images.ext4", directory / "tree")

    key = store.key(*size, CHUNK_BYTES, FILE_BYTES)
    kept = store.kept("bench-density", key, build, keep=2)
    return Disk(kept / "images.ext4", "images", SOURCES, options="ro")


def _image(sources: Path, number: int, blobs: int) -> LocalImage:
    """One in a directory of its own, layers of one file each."""
    directory = sources / str(number)
    image = _named(str(directory), number)
    layers = (_layer(f"{image.fsid} {layer}", layer) for layer in range(blobs))
    local.write(directory, image.fsid, layers, Format(Compressor.NONE, chunk_bytes=CHUNK_BYTES))
    return image


def _named(directory: str, number: int) -> LocalImage:
    """In one domain: each has 257 directories of the kernel's, and an ext4 of 2 GiB has inodes for
    fewer than 500."""
    return LocalImage(directory, f"density-{number}", shared_domain="density")


def _layer(seed: str, number: int) -> Node:
    """`probes.heads` knows what is in it."""
    data = shake_128(seed.encode()).digest(FILE_BYTES)
    return local.folder({b"%d" % number: local.small_file(data)})


def _measure(crowd: Crowd, images: list[LocalImage], into: Figures) -> None:
    figures: Figures = defaultdict(list)
    crowd.start()
    try:
        figures["idle"].append(crowd.resident_mib())
        for image in images:
            figures["start"].append(crowd.mount(image))
        figures["mounted"].append(crowd.resident_mib())
        crowd.drop_caches()
        figures["read"] += crowd.read(images, 0)
        figures["resident"].append(crowd.resident_mib())
        if (seconds := crowd.restart()) is not None:
            figures["restart"].append(seconds)
            figures["again"] += crowd.read(images, 2 * CHUNK_BYTES)
            figures["restarted"].append(crowd.resident_mib())
    finally:
        crowd.stop()
    for name, values in figures.items():
        into.setdefault(name, []).extend(values)


def _results(crowd: Figures, single: Figures, count: int) -> Iterator[Result]:
    for name, unit in (("start", "ms"), ("read", "us"), ("again", "us")):
        for percent in (50, 99) if name in crowd else ():
            ours, other = ([percentile(of[name], percent)] for of in (crowd, single))
            yield result(f"{name}_p{percent}", unit, "lower", ours, other)
    if "restart" in crowd:
        yield result("restart", "s", "lower", crowd["restart"], single["restart"])
    for name in ("idle", "mounted", "resident", "restarted"):
        if name in crowd:
            yield result(f"memory_{name}", "MiB", "lower", crowd[name], single[name])
    pairs = zip(crowd["resident"], crowd["idle"], strict=True)
    per_image = [(full - idle) / count for full, idle in pairs]
    yield result("memory_per_image", "MiB", "lower", per_image)


def _beside_peer(ours: Figures, peer: Figures) -> Iterator[Result]:
    for name, unit in (("start", "ms"), ("read", "us")):
        for percent in (50, 99):
            values = ([percentile(of[name], percent)] for of in (ours, peer))
            yield result(f"{name}_p{percent}_peer", unit, "lower", *values)
    for name in ("idle", "mounted", "resident"):
        yield result(f"memory_{name}_peer", "MiB", "lower", ours[name], peer[name])

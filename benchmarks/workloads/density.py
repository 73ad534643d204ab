"""Hundreds of images of 20 blobs each, every one of their thousands of cache files read cold, in
one daemon; beside one with a single image.

No two images share a tree, so every blob is a cache file of its own. An image is offered and
mounted (`start`), then the first 4 KiB of a file of each blob are read (`read`): a miss whose bytes
are local. Memory is the daemon's own. `restart` is from SIGKILL until the supervisor's next daemon
answers, with all images; then every blob is read once more (`again`), another chunk of it.
"""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from hashlib import shake_128
from pathlib import Path

from environments import Options, local
from environments.native import described, drop_caches
from report import Report, Result, percentile, result
from runners import LocalImage
from runners.supervised import Supervised

from fscached.transport import mount
from rafs_v6.layout import Compressor
from rafs_v6.pack import Format
from rafs_v6.tree import Node

REPETITIONS = 1
"""Every figure is one of hundreds."""
IMAGES = 200
LONG_IMAGES = 500
BLOBS = 20
"""Of a Node.js image, by the EROFS-over-fscache article."""
SINGLES = 3
"""Daemons with one image: few misses would say little."""
CHUNK_BYTES = 4096
FILE_BYTES = 4 * CHUNK_BYTES
SETTINGS = {
    "prefetch": {"enabled": False},
    "fetch": {"window_bytes": CHUNK_BYTES, "window_limit_bytes": CHUNK_BYTES},
}

Figures = dict[str, list[float]]


def run_native(options: Options) -> Report:
    """The crowd, then daemons with one image."""
    count = LONG_IMAGES if options.long else IMAGES
    sources = options.scratch / "sources"
    images = [_image(sources, number) for number in range(count)]
    crowd: Figures = defaultdict(list)
    single: Figures = defaultdict(list)
    for turn in range(options.repetitions):
        _measure(options.scratch / f"crowd-{turn}", images, crowd)
        for number in range(SINGLES):
            _measure(
                options.scratch / f"single-{turn}-{number}", images[number : number + 1], single
            )
    environment = {**described(options), "images": count, "cache_files": count * (BLOBS + 1)}
    return Report(options.bench, environment, list(_results(crowd, single, count)))


def _image(sources: Path, number: int) -> LocalImage:
    """One in a directory of its own, layers of one file each."""
    directory, fsid = sources / str(number), f"density-{number}"
    layers = (_layer(f"{number} {layer}", layer) for layer in range(BLOBS))
    local.write(directory, fsid, layers, Format(Compressor.NONE, chunk_bytes=CHUNK_BYTES))
    return LocalImage(str(directory), fsid)


def _layer(seed: str, number: int) -> Node:
    data = shake_128(seed.encode()).digest(FILE_BYTES)
    return local.folder({b"%d" % number: local.small_file(data)})


def _measure(scratch: Path, images: list[LocalImage], figures: Figures) -> None:
    daemon = Supervised("fscached", scratch, SETTINGS)
    daemon.start()
    mounted: list[Path] = []
    try:
        figures["idle"].append(daemon.resident_mib())
        for image in images:
            mounted.append(scratch / image.fsid)
            figures["start"].append(_mount(daemon, image, mounted[-1]))
        figures["mounted"].append(daemon.resident_mib())
        drop_caches()
        figures["read"] += [us for at in mounted for us in _read(at, 0)]
        figures["resident"].append(daemon.resident_mib())
        began = time.monotonic()
        daemon.restart()
        figures["restart"].append(time.monotonic() - began)
        figures["again"] += [us for at in mounted for us in _read(at, 2 * CHUNK_BYTES)]
        figures["restarted"].append(daemon.resident_mib())
    finally:
        for at in mounted:
            if at.is_mount():
                mount.unmount(str(at))
        daemon.stop()


def _mount(daemon: Supervised, image: LocalImage, at: Path) -> float:
    """Milliseconds until it can be read."""
    at.mkdir()
    began = time.perf_counter()
    daemon.offer(image)
    [known] = [known for known in daemon.images() if known["fsid"] == image.fsid]
    mount.mount_files(str(at), known["bootstrap"], known["devices"])
    return (time.perf_counter() - began) * 1e3


def _read(at: Path, offset: int) -> Iterator[float]:
    """Microseconds of one read from each blob. Raises SystemExit for wrong bytes."""
    number = at.name.rpartition("-")[2]
    gc.disable()
    for layer in range(BLOBS):
        file = os.open(at / str(layer), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        began = time.perf_counter()
        data = os.pread(file, CHUNK_BYTES, offset)
        yield (time.perf_counter() - began) * 1e6
        os.close(file)
        if (
            data
            != shake_128(f"{number} {layer}".encode()).digest(FILE_BYTES)[offset:][:CHUNK_BYTES]
        ):
            raise SystemExit(f"{at}/{layer}: wrong bytes at {offset}")
    gc.enable()


def _results(crowd: Figures, single: Figures, count: int) -> Iterator[Result]:
    for name, unit in (("start", "ms"), ("read", "us"), ("again", "us")):
        for percent in (50, 99):
            ours, other = ([percentile(of[name], percent)] for of in (crowd, single))
            yield result(f"{name}_p{percent}", unit, "lower", ours, other)
    yield result("restart", "s", "lower", crowd["restart"], single["restart"])
    for name in ("idle", "mounted", "resident", "restarted"):
        yield result(f"memory_{name}", "MiB", "lower", crowd[name], single[name])
    pairs = zip(crowd["resident"], crowd["idle"], strict=True)
    per_image = [(full - idle) / count for full, idle in pairs]
    yield result("memory_per_image", "MiB", "lower", per_image)

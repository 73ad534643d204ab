"""An image of 20 GB with one file of 8 GB, beside one of a sixteenth of that: what size costs.

Content is made while it is converted and compresses well, so that the image takes less than a
gigabyte here. Opening is from the request until the image is mounted; throughput is that of 512 MiB
read from the file's beginning; `readers` are 64 at once, each with 4 MiB of its own somewhere in
the file. Bytes are at a directory: no network takes part, and decoding is easier than of real
content.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from environments import Options, local
from environments.native import described, drop_caches
from harness import store
from report import Report, Result, result
from runners import LocalImage
from runners.supervised import Supervised

from rafs_v6.pack import Format
from rafs_v6.tree import Node

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

REPETITIONS = 3
GIB, MIB = 1 << 30, 1 << 20
CHUNK_BYTES = MIB
NOISE_BYTES = 32 << 10
"""Of each chunk; the rest is one byte repeated."""
READ_BYTES = 512 * MIB
READERS = 64
READER_BYTES = 4 * MIB
STEP_BYTES = MIB
MB = 1e6


class Size(NamedTuple):
    """An image: one file, and others of 256 MiB beside it."""

    name: str
    file_bytes: int
    others: int


LARGE, SMALL = Size("large", 8 * GIB, 48), Size("small", GIB // 2, 3)
OTHER_BYTES = GIB // 4
FILE = "file"

Figures = dict[tuple[str, str], list[float]]
"""By image and figure."""


class Made(io.RawIOBase):
    """Content by its name and size, in whole chunks."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self._name = name
        self._size = size_bytes
        self._at = 0

    def readable(self) -> bool:
        """It is only that."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """At most the rest of a chunk."""
        if self._at >= self._size:
            return 0
        inside = self._at % CHUNK_BYTES
        with memoryview(buffer) as view:
            data = chunk(self._name, self._at - inside)[inside : inside + len(view)]
            view[: len(data)] = data
        self._at += len(data)
        return len(data)


def chunk(name: str, offset: int) -> bytes:
    """The chunk of a file at a multiple of its size."""
    noise = hashlib.shake_128(f"{name} {offset}".encode()).digest(NOISE_BYTES)
    return noise.ljust(CHUNK_BYTES, noise[:1])


def run_native(options: Options) -> Report:
    """Both in turns, each time on an empty cache."""
    figures: Figures = defaultdict(list)
    images = [(size, LocalImage(str(_kept(size)), size.name)) for size in (SMALL, LARGE)]
    for turn in range(options.repetitions):
        for size, image in images:
            _measure(options.scratch / f"{size.name}-{turn}", size, image, figures)
        images.reverse()
    logical = LARGE.file_bytes + LARGE.others * OTHER_BYTES
    environment = {**described(options), "image_mib": logical // MIB, "readers": READERS}
    return Report(options.bench, environment, list(_results(figures)))


def _measure(scratch: Path, size: Size, image: LocalImage, figures: Figures) -> None:
    def note(name: str, value: float) -> None:
        figures[size.name, name].append(value)

    daemon = Supervised("fscached", scratch, {"prefetch": {"enabled": False}})
    daemon.start()
    try:
        note("idle", daemon.resident_mib())
        drop_caches()
        began = time.monotonic()
        daemon.mount(image)
        note("open", time.monotonic() - began)
        note("opened", daemon.resident_mib())
        file = daemon.directory / FILE
        began = time.monotonic()
        _read(file, 0, READ_BYTES)
        note("sequential", READ_BYTES / MB / (time.monotonic() - began))
        note("resident", daemon.resident_mib())
    finally:
        daemon.stop()
    _crowd(scratch.with_name(f"{scratch.name}-crowd"), size, image, figures)


def _crowd(scratch: Path, size: Size, image: LocalImage, figures: Figures) -> None:
    daemon = Supervised("fscached", scratch, {"prefetch": {"enabled": False}})
    daemon.start()
    try:
        daemon.mount(image)
        places = range(0, size.file_bytes, READER_BYTES)
        starts = random.Random(1).sample(places, READERS)
        began = time.monotonic()
        with ThreadPoolExecutor(READERS) as pool:
            read = partial(_read, daemon.directory / FILE, size_bytes=READER_BYTES)
            list(pool.map(read, starts))
        seconds = time.monotonic() - began
        figures[size.name, "readers"].append(READERS * READER_BYTES / MB / seconds)
        figures[size.name, "crowded"].append(daemon.resident_mib())
    finally:
        daemon.stop()


def _read(path: Path, start: int, size_bytes: int) -> None:
    """Raises SystemExit when the last chunk is not what it should be."""
    file = os.open(path, os.O_RDONLY)
    try:
        for at in range(start, start + size_bytes, STEP_BYTES):
            data = os.pread(file, STEP_BYTES, at)
    finally:
        os.close(file)
    if data != chunk(FILE, start + size_bytes - STEP_BYTES):
        raise SystemExit(f"{path}: wrong bytes before {start + size_bytes}")


def _kept(size: Size) -> Path:
    """The image's directory, kept."""

    def made(name: str, size_bytes: int) -> Node:
        return local.large_file(size_bytes, lambda: io.BufferedReader(Made(name, size_bytes)))

    def build(directory: Path) -> None:
        others = {
            f"other-{number}".encode(): made(f"other-{number}", OTHER_BYTES)
            for number in range(size.others)
        }
        tree = local.folder({FILE.encode(): made(FILE, size.file_bytes), **others})
        local.write(directory, size.name, [tree], Format(chunk_bytes=CHUNK_BYTES))

    key = store.key(size, NOISE_BYTES, OTHER_BYTES, CHUNK_BYTES)
    return store.kept("bench-large", key, build, keep=2)


def _results(figures: Figures) -> Iterator[Result]:
    for name, figure in (("open", "open"), ("memory_idle", "idle"), ("memory_opened", "opened")):
        unit = "s" if name == "open" else "MiB"
        yield _beside(name, unit, figures, figure)
    for figure in ("resident", "crowded"):
        yield _beside(f"memory_{figure}", "MiB", figures, figure)
    for figure in ("sequential", "readers"):
        ours, other = figures[LARGE.name, figure], figures[SMALL.name, figure]
        yield result(f"read_{figure}", "MB/s", "higher", ours, other)


def _beside(name: str, unit: str, figures: Figures, figure: str) -> Result:
    return result(name, unit, "lower", figures[LARGE.name, figure], figures[SMALL.name, figure])

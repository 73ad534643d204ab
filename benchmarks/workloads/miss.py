"""READ to completion with the bytes already local, beside a minimal C daemon in the same guest.

Windows of exactly 4 KiB, of 1 MiB in chunks of 64 KiB (a reader is woken by its own, the C daemon
wakes it after the window), and of 1 MiB in a single chunk, all of which has to be verified before
anybody is woken. The kernel's tracepoints are the clock.

On this machine's own kernel: through fanotify, in windows of 4 KiB, and the reader has the clock.
Beside holes that are filled, reads of what is there while the file is still marked, so that the
kernel asks in vain, and the same reads of a file that never was. All of it once with processors
that idle between reads, and once with some that do not: a virtual one is slow to wake.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from hashlib import shake_128
from pathlib import Path
from typing import NamedTuple

from environments import Options
from environments.guest import booted, described, fresh_cache, probe
from environments.native import awake, drop_caches
from environments.native import described as described_native
from environments.programs import HERE
from environments.trace import recorded
from harness import command, disk, store
from harness.daemon import Settings
from harness.disk import Disk
from harness.guest import Guest
from report import Report, Result, percentile, result
from runners import MOUNT, LocalImage, Runner
from runners.files import Asking, Unasked
from runners.fscached import Fscached
from runners.minimal import Minimal
from runners.peer import Peer
from runners.supervised import Supervised
from runners.trees import Tree

from rafs_v6.build import ImageBuilder
from rafs_v6.layout import Compressor
from rafs_v6.pack import Format
from rafs_v6.tree import read_directory

REPETITIONS = 5
TAKES_PEER = True
IMAGES = "/srv/images"
FILE = "data"
STEP_BYTES = 32 << 10
PROBES = str(HERE / "probes.py")


class Window(NamedTuple):
    """An image of one file, how it is chunked and fetched, and how many windows are read."""

    name: str
    chunk_bytes: int
    window_bytes: int
    file_bytes: int
    reads: int


WINDOWS = (
    Window("4k", 4 << 10, 4 << 10, 32 << 20, 1000),
    Window("1m", 64 << 10, 1 << 20, 256 << 20, 200),
    Window("1m_chunk", 1 << 20, 1 << 20, 256 << 20, 200),
)

SMALLEST = WINDOWS[0]
SETTINGS: Settings = {
    "fetch": {
        "window_bytes": SMALLEST.window_bytes,
        "window_limit_bytes": SMALLEST.window_bytes,
    },
    "prefetch": {"enabled": False},
}

STATES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "idle": nullcontext,
    "awake": awake,
}
"""What the processors do between reads."""

Times = dict[tuple[str, str], list[float]]
"""Microseconds by runner and figure, one for every repetition."""


def run(options: Options) -> Report:
    """Runners take turns; every turn has a cache of its own."""
    times: Times = defaultdict(list)
    with booted(options, [_images()]) as guest:
        environment = described(guest, options)
        ours = Fscached(guest)
        runners: list[Runner] = [ours, Minimal(guest)]
        if options.peer:
            runners.append(Peer(guest, options.peer))
        for repetition in range(options.repetitions):
            for window in WINDOWS:
                for runner in runners:
                    _measure(guest, runner, window, repetition, times)
            runners.reverse()
    return Report(options.bench, environment, _results(times, ours))


def _measure(guest: Guest, runner: Runner, window: Window, seed: int, times: Times) -> None:
    directory = f"{IMAGES}/{window.name}"
    # Local means in memory: it is not the disk below the source that is measured.
    guest.run(f"cat {directory}/* > /dev/null")
    runner.start(fresh_cache(guest), window.window_bytes)
    with recorded(guest) as trace:
        runner.mount(LocalImage(directory, window.name))
        probe(guest, "scattered", f"{MOUNT}/{FILE}", window.window_bytes, window.reads, seed)
    runner.stop()
    read_us = trace.read_times_us()
    # A peer's windows are its own: one may bring what the next read wants.
    if len(read_us) != window.reads and not (runner.name == Peer.name and read_us):
        raise SystemExit(f"{runner.name}: {len(read_us)} READs for {window.reads} cold reads")
    for percent in (50, 99):
        name = f"read_p{percent}_{window.name}"
        times[runner.name, name].append(percentile(read_us, percent))


def _results(times: Times, ours: Fscached) -> list[Result]:
    names = [f"read_p{percent}_{window.name}" for window in WINDOWS for percent in (50, 99)]
    return [
        *(
            result(name, "us", "lower", times[ours.name, name], times[Minimal.name, name])
            for name in names
        ),
        *(
            result(f"{name}_peer", "us", "lower", times[ours.name, name], times[Peer.name, name])
            for name in names
            if (Peer.name, name) in times
        ),
        result("daemon_start_s", "s", "lower", ours.start_s),
        result("resident_mib", "MiB", "lower", ours.resident_idle_mib),
        result("resident_image_mib", "MiB", "lower", ours.resident_image_mib),
    ]


def run_native(options: Options) -> Report:
    """Everybody in turn, each on a file of its own."""
    times: Times = defaultdict(list)
    directory = options.scratch / SMALLEST.name
    _build(directory, SMALLEST)
    image = LocalImage(str(directory), SMALLEST.name)
    for repetition in range(options.repetitions):
        for state, meanwhile in STATES.items():
            place = options.scratch / f"{repetition}-{state}"
            with meanwhile():
                _round(place, image, repetition, state, times)
    return Report(options.bench, described_native(options), list(_native_results(times)))


def _round(place: Path, image: LocalImage, seed: int, state: str, times: Times) -> None:
    ours = Supervised("fscached", place / "fscached", SETTINGS)
    trees: list[Tree] = [ours, Asking(place / "c", image), Unasked(place / "plain", image)]
    for tree in trees:
        tree.start()
        if tree is ours:
            ours.mount(image)
        drop_caches()
        _warm(Path(image.directory))
        for name in ("miss", "there"):
            for percent, us in _timed(tree.directory / FILE, seed):
                times[tree.name, f"{state}_{name}_p{percent}"].append(us)
        tree.stop()


def _warm(directory: Path) -> None:
    """Local means in memory."""
    for file in directory.iterdir():
        file.read_bytes()


def _timed(file: Path, seed: int) -> Iterator[tuple[int, float]]:
    """Percents, and microseconds from a read's start to its end."""
    argv = map(str, ["timed", file, STEP_BYTES, SMALLEST.reads, seed])
    said = command.run([sys.executable, PROBES, *argv])
    for percent in (50, 99):
        yield percent, percentile(map(float, said.split()), percent)


def _native_results(times: Times) -> Iterator[Result]:
    """At first the bytes of a file that never was marked are on the disk, then in memory."""
    for state in STATES:
        for percent in (50, 99):
            for name, figure in (("plain_disk", "miss"), ("plain", "there")):
                us = times[Unasked.name, f"{state}_{figure}_p{percent}"]
                yield result(f"{state}_{name}_p{percent}", "us", "lower", us)
            for figure in (f"{state}_miss_p{percent}", f"{state}_there_p{percent}"):
                ours, other = times["fscached", figure], times[Asking.name, figure]
                yield result(figure, "us", "lower", ours, other)
        plain = times[Unasked.name, f"{state}_there_p50"]
        for figure in (f"{state}_miss_p50", f"{state}_there_p50"):
            ours, other = (
                [asked - unasked for asked, unasked in zip(times[name, figure], plain, strict=True)]
                for name in ("fscached", Asking.name)
            )
            yield result(f"{figure}_over_plain", "us", "lower", ours, other)


def _images() -> Disk:
    """A disk with one image per window, kept."""

    def build(directory: Path) -> None:
        for window in WINDOWS:
            _build(directory / "tree" / window.name, window)
        disk.from_tree(directory / "images.ext4", directory / "tree")

    kept = store.kept("bench-images", store.key(WINDOWS, Path(__file__).read_bytes()), build)
    return Disk(kept / "images.ext4", "images", IMAGES, options="ro")


def _build(directory: Path, window: Window) -> None:
    """An uncompressed image, no chunk of it twice: its blob file begins with its cache file."""
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as tree:
        Path(tree, FILE).write_bytes(shake_128(b"fscached").digest(window.file_bytes))
        form = Format(compressor=Compressor.NONE, chunk_bytes=window.chunk_bytes)
        builder, output = ImageBuilder(form), io.BytesIO()
        builder.add(read_directory(tree), output)
        image = builder.finish()
    (directory / image.blobs[0].blob_id).write_bytes(output.getbuffer())
    (directory / window.name).write_bytes(image.bootstrap)

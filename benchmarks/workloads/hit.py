"""Reads of what is cached: fio, tar, a build and a walk, as ratios to ext4.

The same tree on ext4, through loop devices, in an image that is complete, in one that lacks a chunk
nobody reads, so that the kernel asks before every read that misses the page cache, and through
FUSE. For fio memory is limited to half of the file; `cold` is after all caches were dropped, `warm`
the same once more.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from environments import Options
from environments.linux import DATA_BYTES, NAME, Linux, linux
from environments.native import MemoryGroup, described, drop_caches, memory_group
from harness import command, registry
from report import Report, Result, result
from runners.supervised import Supervised
from runners.trees import Fuse, Loop, Native, Tree

REPETITIONS = 3
LIMIT_BYTES = DATA_BYTES // 2
RANDOM_READ_S = 5
BUILT = ("kernel/", "mm/")
"""Of a tinyconfig: a third of it, so that a run stays below half an hour on two processors."""

GB = 1e9
BASELINE = Native.name
AGAINST_FUSE = ("read_cold", "stat_cold")


class Taken(NamedTuple):
    """A figure, and how many bytes were read for it where that is known."""

    value: float
    read_bytes: int = 0


class Measurement(NamedTuple):
    """`take` is called with a tree's directory."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    take: Callable[[Path], Taken]
    cold: bool


Figures = dict[tuple[str, str], list[float]]
"""By measurement and tree, one for every repetition."""


def run_native(options: Options) -> Report:
    """Trees take turns; in every other repetition the last is the first."""
    kept = linux()
    environment = {
        **described(options),
        "memory_limit_mib": LIMIT_BYTES >> 20,
        "file_mib": DATA_BYTES >> 20,
    }
    figures: Figures = defaultdict(list)
    with memory_group() as group, _trees(kept, options.scratch, group) as trees:
        measurements = list(_measurements(kept, group, options.scratch / "build"))
        for _ in range(options.repetitions):
            for tree in trees:
                for measurement in measurements:
                    _measure(measurement, tree, figures)
            trees.reverse()
    return Report(options.bench, environment, list(_results(measurements, figures)))


@contextmanager
def _trees(kept: Linux, scratch: Path, group: MemoryGroup) -> Iterator[list[Tree]]:
    """All of them, mounted, and what is to be in a cache is there."""
    complete = Supervised("complete", scratch / "complete", {})
    marks = Supervised("marks", scratch / "marks", {"prefetch": {"enabled": False}})
    with ExitStack() as stack:

        def started(tree: Tree) -> Tree:
            tree.start()
            stack.callback(tree.stop)
            return tree

        with registry.on_host(kept.storage) as address:
            # `marks` ends last: at its end it unmounts whatever has a blob of this name.
            for daemon in (marks, complete):
                started(daemon)
                daemon.pull(f"{address}/{NAME}")
            complete.await_complete()
            for name in (kept.data, kept.source):
                _pipe(marks.directory / name)
        bootstrap, blobs = complete.files()
        yield [
            Native(kept.tree),
            started(Loop(scratch / "loop", bootstrap, blobs)),
            complete,
            marks,
            started(Fuse(scratch / "fuse", kept.tree, group)),
        ]


def _measure(measurement: Measurement, tree: Tree, figures: Figures) -> None:
    if measurement.cold:
        drop_caches()
    before = tree.events() if isinstance(tree, Supervised) else 0
    taken = measurement.take(tree.directory)
    figures[measurement.name, tree.name].append(taken.value)
    if isinstance(tree, Supervised) and taken.read_bytes:
        events = (tree.events() - before) / (taken.read_bytes / GB)
        if tree.name == "complete" and events:
            raise SystemExit("the kernel asks for a complete image: see its log")
        figures[f"events_{measurement.name}", tree.name].append(events)


def _measurements(kept: Linux, group: MemoryGroup, build: Path) -> Iterator[Measurement]:
    """In this order: what is warm builds on what was read before it."""

    def fio(mode: str, seed: int) -> Callable[[Path], Taken]:
        return lambda tree: _fio(tree / kept.data, mode, seed, group)

    def of_source(take: Callable[[Path], Taken]) -> Callable[[Path], Taken]:
        return lambda tree: take(tree / kept.source)

    yield Measurement("read_cold", "MB/s", "higher", fio("read", 1), True)
    yield Measurement("read_warm", "MB/s", "higher", fio("read", 1), False)
    yield Measurement("randread_warm", "1/s", "higher", fio("randread", 1), False)
    yield Measurement("randread_cold", "1/s", "higher", fio("randread", 2), True)
    source_bytes = int(command.run(["du", "-sb", kept.tree / kept.source]).split()[0])
    pipe = partial(_pipe, read_bytes=source_bytes)
    for name, take in (("tar_null", _tar), ("tar_pipe", pipe), ("stat", _walk)):
        yield Measurement(f"{name}_cold", "s", "lower", of_source(take), True)
        yield Measurement(f"{name}_warm", "s", "lower", of_source(take), False)
    yield Measurement("make", "s", "lower", of_source(lambda tree: _make(tree, build)), True)


def _fio(file: Path, mode: str, seed: int, group: MemoryGroup) -> Taken:
    limit = ["--runtime", str(RANDOM_READ_S)] if mode == "randread" else []
    argv: list[str | Path] = [
        *("fio", "--name=hit", f"--filename={file}", f"--rw={mode}", f"--size={DATA_BYTES}"),
        *("--ioengine=psync", "--bs=4k", "--direct=0", "--numjobs=1", "--readonly"),
        *("--invalidate=0", f"--randseed={seed}", "--output-format=json", *limit),
    ]
    with group.limited(LIMIT_BYTES):
        said = json.loads(command.run(group.within(argv)))
    read = said["jobs"][0]["read"]
    value = read["iops"] if mode == "randread" else read["bw_bytes"] / 1e6
    return Taken(value, read["io_bytes"])


def _tar(tree: Path) -> Taken:
    """GNU tar reads no file data for /dev/null."""
    return _timed(["tar", "-cf", "/dev/null", tree])


def _pipe(tree: Path, read_bytes: int = 0) -> Taken:
    everything = 'tar -cf - "$0" | cat > /dev/null'
    seconds, _ = _timed(["bash", "-o", "pipefail", "-c", everything, tree])
    return Taken(seconds, read_bytes)


def _walk(tree: Path) -> Taken:
    return _timed(["find", tree, "-printf", "%s\\n"])


def _make(tree: Path, build: Path) -> Taken:
    """Out of tree: an image cannot be written to."""
    command.run(["rm", "-rf", build])
    build.mkdir()
    make = ["make", "-s", "-C", str(tree), f"O={build}"]
    command.run([*make, "tinyconfig"])
    drop_caches()
    return _timed([*make, f"-j{os.cpu_count()}", *BUILT])


def _timed(argv: Sequence[str | Path]) -> Taken:
    began = time.monotonic()
    command.run(argv)
    return Taken(time.monotonic() - began)


def _results(measurements: Sequence[Measurement], figures: Figures) -> Iterator[Result]:
    names = dict.fromkeys(tree for _, tree in figures)
    for name, unit, better, *_ in measurements:
        baseline = figures[name, BASELINE]
        yield result(f"{name}_{BASELINE}", unit, better, baseline)
        for tree in names:
            if tree != BASELINE:
                yield result(f"{name}_{tree}", unit, better, figures[name, tree], baseline)
    for name, unit, better, *_ in measurements:
        if name in AGAINST_FUSE:
            ours, fuse = figures[name, "complete"], figures[name, "fuse"]
            yield result(f"{name}_over_fuse_complete", unit, better, ours, fuse)
    for (name, tree), events in figures.items():
        if name.startswith("events_"):
            yield result(f"{name}_{tree}", "1/GB", "lower", events)

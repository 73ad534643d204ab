"""How long the first window of a reader should be, and whether it should shrink.

Starts of real programs, recorded on this machine's kernel from an image that is all there, are
replayed over links that are only reckoned (`replay`): with windows as they are (1 MiB, growing
while access is sequential) beside ones that shrink when what they bring is not read, and others.
`waited_*` is how long the program waits for bytes, `fetched_*` what comes over the link.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from environments import Options
from environments.native import described, drop_caches
from environments.runtimes import published
from harness import command, registry
from replay import WINDOW_BYTES, WINDOW_LIMIT_BYTES, Cost, Link, Read, Replay, Shrinking
from report import Report, Result, result
from runners.supervised import Supervised

from fscached.cache.planner import Planner
from fscached.prefetch.trace import decode
from rafs_v6.blob import ChunkMap
from rafs_v6.bootstrap import Bootstrap

REPETITIONS = 1
PROGRAMS = {
    "python": ("python3", "-c", "import json, sqlite3, urllib.request"),
    "node": ("node", "-e", "require('https')"),
    "science": ("python3", "-c", "import numpy, pandas, scipy.optimize, scipy.stats"),
}
LINKS = {
    "20ms_300mbit": Link(0.020, 300e6 / 8),
    "50ms_80mbit": Link(0.050, 80e6 / 8),
    "1ms_2gbit": Link(0.001, 2e9 / 8),
}
OURS = "1m"
PLANNERS: Mapping[str, Callable[[], Planner]] = {
    OURS: partial(Planner, WINDOW_BYTES, WINDOW_LIMIT_BYTES),
    "shrinking": Shrinking,
    "256k": partial(Planner, WINDOW_BYTES // 4, WINDOW_LIMIT_BYTES),
    "2m": partial(Planner, WINDOW_BYTES * 2, WINDOW_LIMIT_BYTES),
}
MB = 1e6
FIGURES: Mapping[str, tuple[str, Callable[[Cost], float]]] = {
    "waited": ("s", lambda cost: cost.waited_s),
    "fetched": ("MB", lambda cost: cost.fetched_bytes / MB),
}

Recorded = tuple[dict[str, ChunkMap], list[Read]]


def run_native(options: Options) -> Report:
    """Record each program once; what is replayed needs no repetition."""
    results: list[Result] = []
    for name in PROGRAMS:
        scratch = options.scratch / name
        scratch.mkdir()
        chunks, reads = _recorded(name, scratch)
        results += _results(name, chunks, reads)
    return Report(options.bench, described(options), results)


def _results(name: str, chunks: dict[str, ChunkMap], reads: list[Read]) -> Iterator[Result]:
    """Ours beside each other way, which is the baseline."""
    for link, planner in itertools.product(LINKS, PLANNERS):
        if planner != OURS:
            replays = (Replay(chunks, LINKS[link], PLANNERS[it]) for it in (OURS, planner))
            ours, other = (replay.run(reads) for replay in replays)
            for what, (unit, value) in FIGURES.items():
                figure = f"{what}_{name}_{link}_{planner}"
                yield result(figure, unit, "lower", [value(ours)], [value(other)])


def _recorded(name: str, scratch: Path) -> Recorded:
    """The chunks of a runtime's image, and what its program reads of them."""
    origin, storage = published(name), scratch / "storage"
    storage.mkdir()
    command.run(["mount", "-o", "ro,loop,noload", origin.disk.image, storage])
    daemon = Supervised(name, scratch / "daemon", {"prefetch": {"enabled": False}})
    daemon.start()
    try:
        with registry.on_host(storage) as address:
            daemon.pull(f"{address}/{origin.rafs_tag}")
            # Nothing is fetched in the second run: what passes between reads is the program's time.
            _run(daemon.directory, PROGRAMS[name])
            drop_caches()
            daemon.record()
            _run(daemon.directory, PROGRAMS[name])
            bootstrap = Bootstrap(daemon.files()[0].read_bytes())
            reads = list(_reads(daemon.trace()))
    finally:
        daemon.stop()
        command.run(["umount", storage])
    maps = (
        ChunkMap.from_chunk_table(entry, bootstrap.chunk_table(entry.blob_index))
        for entry in bootstrap.blobs
    )
    return {chunks.blob_id: chunks for chunks in maps}, reads


def _run(tree: Path, program: tuple[str, ...]) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([program[0], *program[1:]], check=True, env=environment, preexec_fn=_in(tree))


def _in(tree: Path) -> Callable[[], None]:
    def enter() -> None:
        os.chroot(tree)
        os.chdir("/")

    return enter


def _reads(trace: bytes) -> Iterator[Read]:
    before_s = 0.0
    for access in decode(trace).accesses:
        yield Read(access.after_s - before_s, access.blob_id, access.start, access.end)
        before_s = access.after_s

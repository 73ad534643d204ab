"""Reads of a large file that is cached, by fio as in the EROFS-over-fscache article, as ratios to
ext4.

The same tree on ext4, through loop devices, in an image that is complete, in one that lacks a chunk
nobody reads, so that fanotify asks before every read that misses the page cache, and through FUSE.
Memory is limited to half of the file; `cold` is after all caches were dropped, `warm` the same once
more. In a guest, through cachefiles, nobody is asked for what is there: `complete` is all there is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from contest import Measurement, Place, Taken, held
from environments import Options
from report import Report
from runners.here import here
from runners.inside import DATA_BYTES, inside

REPETITIONS = 3
GUEST_REPETITIONS = 1
RUNTIME_S = {"read": 60, "randread": 5}


def run(options: Options) -> Report:
    """In a guest whose memory is half of the file."""
    return held(options, partial(inside, data_bytes=DATA_BYTES), _measurements, ["read_cold"])


def run_native(options: Options) -> Report:
    """On this machine's own kernel."""
    return held(options, here, _measurements, over_fuse=["read_cold"])


def _measurements(place: Place) -> Iterator[Measurement]:
    """In this order: what is warm builds on what was read before it."""
    for name, mode, seed, cold in (
        ("read_cold", "read", 1, True),
        ("read_warm", "read", 1, False),
        ("randread_warm", "randread", 1, False),
        ("randread_cold", "randread", 2, True),
    ):
        unit = "MB/s" if mode == "read" else "1/s"

        def take(tree: str, mode: str = mode, seed: int = seed) -> Taken:
            return _fio(place, f"{tree}/{place.data}", mode, seed)

        yield Measurement(name, unit, "higher", take, cold)


def _fio(place: Place, file: str, mode: str, seed: int) -> Taken:
    argv = [
        *("fio", "--name=hit", f"--filename={file}", f"--rw={mode}", f"--size={place.data_bytes}"),
        *("--ioengine=psync", "--bs=4k", "--direct=0", "--numjobs=1", "--readonly"),
        *("--invalidate=0", f"--randseed={seed}", "--output-format=json"),
        f"--runtime={RUNTIME_S[mode]}",
    ]
    read = json.loads(place.run(argv, limited=True))["jobs"][0]["read"]
    value = read["iops"] if mode == "randread" else read["bw_bytes"] / 1e6
    return Taken(value, read["io_bytes"])

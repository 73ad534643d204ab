"""A build of sources that are cached, as ratios to ext4: a job for every processor.

An image cannot be written to: on this machine's own kernel a part of a Linux tinyconfig is built
out of tree; in a guest, where a processor is emulated, 300 units of Debian's libtomcrypt without
optimisation, over overlayfs as in a container. The same forms of a tree as in `hit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from contest import Measurement, Place, Taken, held
from environments import Options
from report import Report
from runners.here import here
from runners.inside import inside

REPETITIONS = 3
GUEST_REPETITIONS = 1


def run(options: Options) -> Report:
    """In a guest."""
    return held(options, partial(inside, data_bytes=0), _measurements)


def run_native(options: Options) -> Report:
    """On this machine's own kernel."""
    return held(options, here, _measurements)


def _measurements(place: Place) -> Iterator[Measurement]:
    target = f"{place.scratch}/build"

    def take(tree: str) -> Taken:
        place.run(["sh", "-c", 'rm -rf "$0" && mkdir "$0"', target])
        prepare, build = place.build
        sources = f"{tree}/{place.sources}"
        place.run(["sh", "-c", prepare, sources, target])
        place.drop_caches()
        return Taken(place.seconds(["sh", "-c", build, sources, target]))

    yield Measurement("make", "s", "lower", take, False)

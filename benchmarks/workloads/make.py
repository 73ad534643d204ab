"""A build of sources that are cached, as ratios to ext4: a job for every processor.

An image cannot be written to: on this machine's own kernel a part of a Linux tinyconfig is built
out of tree; in a guest, where a processor is emulated, 300 units of Debian's libtomcrypt without
optimisation, over overlayfs as in a container. The same forms of a tree as in `hit`.

A build that is short says more of what stands around it: one on ext4 of less than LEAST_S is
reported as such.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from contest import BASELINE, Measurement, Place, Taken, held
from environments import Options
from report import Report
from runners.here import here
from runners.inside import inside

REPETITIONS = 3
GUEST_REPETITIONS = 1
LEAST_S = 60.0


def run(options: Options) -> Report:
    """In a guest."""
    return noted(held(options, partial(inside, data_bytes=0), _measurements))


def run_native(options: Options) -> Report:
    """On this machine's own kernel."""
    return noted(held(options, here, _measurements))


def noted(report: Report) -> Report:
    """How long a build takes on ext4, beside what is measured, and whether that is long enough."""
    [build_s] = [one.median for one in report.results if one.name == f"make_{BASELINE}"]
    if build_s < LEAST_S:
        print(f"make: {build_s:.0f} s on {BASELINE}, less than {LEAST_S:.0f} s", file=sys.stderr)
    said: dict[str, object] = {"build_s": build_s, "long_enough": build_s >= LEAST_S}
    return replace(report, environment=report.environment | said)


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

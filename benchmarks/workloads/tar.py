"""A tree of sources that is cached, read by tar and listed, as ratios to ext4.

`tar_null` is the article's `tar -cf /dev/null DIR`, for which GNU tar reads no file; `tar_pipe` has
it read them all; `stat` lists every file with its size. The same forms of a tree as in `hit`; in
a guest the sources are Debian's libtomcrypt.
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
COMMANDS = {
    "tar_null": ["tar", "-cf", "/dev/null"],
    "tar_pipe": ["bash", "-o", "pipefail", "-c", 'tar -cf - "$0" | cat > /dev/null'],
    "stat": ["bash", "-c", 'find "$0" -printf "%s\\n" > /dev/null'],
}


def run(options: Options) -> Report:
    """In a guest."""
    return held(options, partial(inside, data_bytes=0), _measurements, ["stat_cold"])


def run_native(options: Options) -> Report:
    """On this machine's own kernel."""
    return held(options, here, _measurements, over_fuse=["stat_cold"])


def _measurements(place: Place) -> Iterator[Measurement]:
    """In this order: what is warm builds on what was read before it."""
    for name, argv in COMMANDS.items():
        read_bytes = place.sources_bytes if name == "tar_pipe" else 0

        def take(tree: str, argv: list[str] = argv, read_bytes: int = read_bytes) -> Taken:
            return Taken(place.seconds([*argv, f"{tree}/{place.sources}"]), read_bytes)

        yield Measurement(f"{name}_cold", "s", "lower", take, True)
        yield Measurement(f"{name}_warm", "s", "lower", take, False)

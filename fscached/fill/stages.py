"""Where the time of a READ went: it waits for its turn, the source, a worker, the disk."""

from __future__ import annotations

import logging
from typing import NamedTuple

from fscached.transport import Wanted

log = logging.getLogger(__name__)


class Stamps(NamedTuple):
    """Of the chunks that a READ waited for last, in seconds on the monotonic clock, which is the
    event loop's as well: when the source was asked, when all of it was here, when a worker took
    it, and when it was in the file. `write_s` is how long of that the writing took."""

    asked_s: float
    arrived_s: float
    began_s: float
    ended_s: float
    write_s: float


Pending = tuple[Wanted, float]
"""A READ without an answer, and when it came. A plain tuple: one is made for every READ."""


def tell(
    pending: Pending, now_s: float, blob_id: str, source: str, stamps: Stamps | None, failed: bool
) -> None:
    """The one line of a slow READ."""
    want, came_s = pending
    what = {
        "blob": blob_id,
        "offset": want.start,
        "bytes": want.end - want.start,
        "seconds": f"{now_s - came_s:.3f}",
        "source": source,
    }
    if stamps is not None:
        stages = spent(came_s, now_s, stamps)
        what |= {f"{stage}_s": f"{seconds:.3f}" for stage, seconds in stages.items()}
    log.warning("a slow read failed" if failed else "a slow read", extra=what)


def spent(came_s: float, now_s: float, stamps: Stamps) -> dict[str, float]:
    """Seconds by what the READ waited for; together they are all of it.

    `queue`: until the source was asked (the blob's chunk map, memory, a connection's turn is the
    source's); `source`: until the bytes were here; `worker`: until one took them; `decode`:
    decompressed and verified; `write`: to the disk; `answer`: until the kernel was told. What was
    over when the READ came has cost it nothing.
    """
    marks = [stamps.asked_s, stamps.arrived_s, stamps.began_s, stamps.ended_s - stamps.write_s]
    marks += [stamps.ended_s, now_s]
    names = ("queue", "source", "worker", "decode", "write", "answer")
    found, at_s = {}, came_s
    for name, mark_s in zip(names, marks, strict=True):
        mark_s = max(at_s, mark_s)
        found[name], at_s = mark_s - at_s, mark_s
    return found

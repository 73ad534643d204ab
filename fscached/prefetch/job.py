"""The prefetch of one image: what is left of it, what holds it up, how fast it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from mmap import PROT_READ, mmap
from typing import NamedTuple

from fscached.cache.blob import Fetch
from fscached.config import Prefetch
from fscached.fill.blob import OpenBlob, Stage
from fscached.prefetch import listing, policy
from fscached.prefetch.budget import Budget, Speed
from fscached.prefetch.phase import Phase
from fscached.prefetch.policy import Agenda, Look, Range, Streams
from fscached.prefetch.recording import Recording
from fscached.prefetch.trace import Trace
from fscached.source import Priority
from fscached.store import Image
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 1.0
RETRY_PAUSE_LIMIT_S = 60.0


class Report(NamedTuple):
    """`why` says more about a phase; `left_bytes` of cache files are still to come, which takes
    `eta_s` at the present speed, None when nobody can say."""

    phase: Phase
    why: str
    requests: int
    brought_bytes: int
    left_bytes: int
    bytes_per_s: float
    eta_s: float | None


class Taken(NamedTuple):
    """A fetch that is to be flown now, and what it will be in the cache file."""

    opened: OpenBlob
    fetch: Fetch
    range: Range


@dataclass(slots=True)
class Pause:
    """Why nothing is asked for, and until when."""

    why: str
    until_s: float


def listed(image: Image, settings: Prefetch, trace: Trace | None) -> list[Range]:
    """What an image's policies name, in order. For a thread: it reads the bootstrap. A listing that
    cannot be followed is said and left out."""
    known = frozenset(entry.blob_id for entry in image.blobs)
    sources: list[Iterator[Range]] = []
    if trace is not None and "trace" in settings.policies:
        sources.append(policy.expected(trace, known))
    wanted = {"table", "patterns"} & set(settings.policies)
    with suppress(FileNotFoundError), image.path.open("rb") as file:
        bootstrap = Bootstrap(mmap(file.fileno(), 0, prot=PROT_READ)) if wanted else None
        if bootstrap is not None and "table" in wanted:
            sources.append(_followed(image, listing.table(bootstrap)))
        if bootstrap is not None and "patterns" in wanted:
            sources.append(_followed(image, listing.patterns(bootstrap, settings.patterns)))
    ranges = islice(chain.from_iterable(sources), policy.RANGE_LIMIT)
    return list(policy.joined(ranges, settings.range_bytes, policy.GAP_BYTES))


def _followed(image: Image, ranges: Iterator[Range]) -> Iterator[Range]:
    try:
        yield from ranges
    except ImageError as error:
        log.warning("prefetch of %s leaves a list out: %s", image.reference or image.fsid, error)


class Job:
    """One image. Decides what comes next; `fscached.prefetch.service` brings it."""

    def __init__(self, image: Image, settings: Prefetch) -> None:
        self.image = image
        self.settings = settings
        self.budget = Budget(settings.image_bandwidth_bytes_per_s)
        self.blobs: dict[str, OpenBlob] = {}
        self.recording: Recording | None = None
        self.pause: Pause | None = None
        self.planned = False
        self.workers = 0
        self.speed = Speed()
        self.requests = 0
        self.brought_bytes = 0
        self._pause_s = RETRY_PAUSE_S
        self.wanted = settings.enabled
        self.agenda = Agenda((), None, ())

    @property
    def name(self) -> str:
        """What a person calls the image."""
        return self.image.reference or self.image.fsid

    def plan(self, ranges: list[Range]) -> None:
        """What the policies name is known now."""
        insisted, policies = self.agenda.whole, self.settings.policies
        streams = Streams(self.settings.ahead_bytes) if "sequential" in policies else None
        whole = insisted or "whole" in policies
        self.agenda = Agenda(ranges, streams, self._all() if whole else ())
        self.planned = True

    def insist(self) -> None:
        """Bring all of it, whatever the policies say."""
        self.wanted = True
        self.agenda.insist(self._all())

    def next(self, limit_bytes: int) -> Taken | Look:
        """What to bring now; see Agenda."""
        return self.agenda.next(partial(self._take, limit_bytes))

    def failed(self, why: str, now_s: float) -> None:
        """Something did not come; wait, the longer the more often."""
        if self.pause is not None:
            return
        log.warning("prefetch of %s pauses for %g s: %s", self.name, self._pause_s, why)
        self.pause = Pause(why, now_s + self._pause_s)
        self._pause_s = min(self._pause_s * 2, RETRY_PAUSE_LIMIT_S)

    def brought(self, size_bytes: int, began_s: float, now_s: float) -> None:
        """A fetch has brought so many bytes of a cache file."""
        self._pause_s = RETRY_PAUSE_S
        self.brought_bytes += size_bytes
        self.speed.brought(size_bytes, began_s, now_s)

    @property
    def in_flight(self) -> bool:
        """Whether anybody is bringing any of it, or waits for it."""
        return any(
            opened.waiting or (opened.blob and opened.blob.in_flight_bytes)
            for opened in self.blobs.values()
        )

    def report(self, now_s: float, held: bool, full: str) -> Report:
        """How it goes on. `held`: readers are served first just now; `full`: of what there is too
        little."""
        phase, why = self._phase(held, full)
        left = self._left_bytes() if self.wanted else 0
        speed = self.speed.bytes_per_s(now_s)
        eta_s = 0.0 if phase is Phase.DONE else None
        if left and speed and phase in (Phase.RUNNING, Phase.PAUSED):
            eta_s = left / speed
        return Report(phase, why, self.requests, self.brought_bytes, left, speed, eta_s)

    def _phase(self, held: bool, full: str) -> tuple[Phase, str]:
        if not self.wanted:
            return Phase.OFF, ""
        if not self.blobs:
            return Phase.UNMOUNTED, ""
        if self.workers:
            return self._running(held, full)
        if not self.planned:
            return Phase.WAITING, "what comes first is looked up"
        if any(opened.stage is Stage.NEW for opened in self.blobs.values()):
            return Phase.WAITING, "its chunks, or what of them is here, is not known yet"
        return Phase.DONE, ""

    def _running(self, held: bool, full: str) -> tuple[Phase, str]:
        if full:
            return Phase.STOPPED, full
        if self.pause is not None:
            return Phase.PAUSED, self.pause.why
        gives_way = held and self.agenda.priority is Priority.PREFETCH
        return (Phase.PAUSED, "readers come first") if gives_way else (Phase.RUNNING, "")

    def _left_bytes(self) -> int:
        """An upper bound where only some of the image is wanted."""
        if not self.agenda.whole:
            return self.agenda.listed_bytes
        return sum(self._absent(*sizes) for sizes in self._sizes())

    def _absent(self, blob_id: str, size_bytes: int) -> int:
        opened = self.blobs.get(blob_id)
        if opened is None or opened.blob is None:
            return size_bytes
        return 0 if opened.blob.complete else max(0, size_bytes - opened.blob.resident_bytes)

    def _sizes(self) -> list[tuple[str, int]]:
        return [(entry.blob_id, entry.uncompressed_size) for entry in self.image.blobs]

    def _all(self) -> list[Range]:
        return [Range(blob_id, 0, size_bytes) for blob_id, size_bytes in self._sizes()]

    def _take(self, limit_bytes: int, range: Range) -> Taken | Look:
        opened = self.blobs.get(range.blob_id)
        if opened is None or opened.stage is not Stage.READY:
            return Look.LATER
        fetch = opened.take(range.start, range.end, limit_bytes)
        if fetch is None or opened.blob is None:
            return Look.NOTHING
        chunks = opened.blob.chunks
        start, end = chunks.offset(fetch.first), chunks.padded_end(fetch.end - 1)
        return Taken(opened, fetch, range._replace(start=start, end=end))

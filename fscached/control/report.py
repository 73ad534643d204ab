"""What is told of the daemon and its images: looked up when somebody asks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator

from fscached import __version__, version
from fscached.control.messages import (
    CacheStatus,
    DemandStatus,
    ImageInfo,
    ImageStatus,
    LatencyCounts,
    ObjectStatus,
    PrefetchStatus,
    SourceStatus,
    Status,
    Totals,
)
from fscached.control.metrics import resident_memory_bytes
from fscached.control.state import State
from fscached.fill.blob import OpenBlob
from fscached.fill.objects import Objects
from fscached.fill.tally import Latencies, SourceTally, Tally, total
from fscached.images import Registration
from fscached.prefetch.service import Service as Prefetcher
from fscached.source import Giver
from fscached.source.registries import Registries
from fscached.transport import ObjectKey, Transport


class Report:
    """`staying` are the images to tell of; `bound_s` says since when each is bound, on the event
    loop's clock."""

    def __init__(
        self,
        cache_directory: str,
        objects: Objects,
        prefetch: Prefetcher,
        transport: Transport,
        registries: Registries,
        staying: Callable[[], Iterable[Registration]],
        cache: Callable[[], CacheStatus],
    ) -> None:
        self.bound_s: dict[ObjectKey, float] = {}
        self._cache_directory = cache_directory
        self._objects = objects
        self._prefetch = prefetch
        self._transport = transport
        self._registries = registries
        self._staying = staying
        self._cache = cache
        self._began = asyncio.get_running_loop().time()

    def whole(self, state: State) -> Status:
        """Everything that is counted."""
        registries = self._registries.traffic
        tallies = self._objects.tallies
        return Status(
            version=__version__,
            git_commit=version.COMMIT,
            pid=os.getpid(),
            state=state,
            transport=self._transport.name,
            cache_directory=self._cache_directory,
            uptime_s=asyncio.get_running_loop().time() - self._began,
            rss_bytes=resident_memory_bytes(),
            totals=Totals(
                opens=self._objects.tally.opens,
                closes=self._objects.tally.closes,
                open_objects=len(self._objects),
                reads=self._objects.tally.reads,
                reads_waiting=self._objects.waiting,
                reads_failed=_sum(tallies.values(), "reads_failed"),
                reads_slow=_sum(tallies.values(), "slow_reads"),
                requests=registries.requests,
                received_bytes=registries.received_bytes,
                written_bytes=_sum(tallies.values(), "landed_bytes"),
                bad_chunks=_sum(tallies.values(), "bad_chunks"),
                prefetches_stopped=_sum(tallies.values(), "prefetches_stopped"),
                source_errors=_sum(tallies.values(), "source_errors"),
            ),
            given={giver.value: registries.given[giver] for giver in Giver},
            images=[self._image(registration) for registration in self._staying()],
            cache=self._cache(),
            demand=_demand(tallies.values()),
        )

    def info(self, registration: Registration) -> ImageInfo:
        """What a client is told of an image it may mount."""
        image = registration.image
        shared = registration.volume != image.fsid
        device = self._transport.device
        by_name = device(registration.key) is None
        devices = [device(key) or "" for key, _ in registration.blobs()]
        return ImageInfo(
            reference=image.reference,
            fsid=image.fsid,
            domain_id=registration.volume if shared else "",
            manifest_digest=image.manifest_digest,
            blobs=[entry.blob_id for entry in image.blobs],
            settled=not by_name or self._settled(registration),
            bootstrap=str(image.path),
            devices=None if by_name else devices,
        )

    def _settled(self, registration: Registration) -> bool:
        """Whether all of an image's cache files are linked. cachefiles keeps a new object in an
        unlinked O_TMPFILE until its first CLOSE (tried on 6.1 and 6.12)."""
        keys = [registration.key, *(key for key, _ in registration.blobs())]
        return all(os.path.lexists(self._transport.files.path(key)) for key in keys)

    def _image(self, registration: Registration) -> ImageStatus:
        image = registration.image
        opened = self._objects.blobs(registration.volume)
        info = self.info(registration)
        return ImageStatus(
            reference=info.reference,
            fsid=info.fsid,
            domain_id=info.domain_id,
            manifest_digest=info.manifest_digest,
            settled=info.settled,
            bootstrap=self._bootstrap_status(registration, info),
            blobs=[
                self._object_status(
                    ObjectKey(registration.volume, entry.blob_id),
                    entry.uncompressed_size,
                    opened.get(entry.blob_id),
                )
                for entry in image.blobs
            ],
            prefetch=self.prefetch(registration),
            last_demand_s=self._last_demand_s(registration),
            demand=_demand(self._tallies(registration)),
        )

    def _tallies(self, registration: Registration) -> Iterator[Tally]:
        keys = (registration.key, *(key for key, _ in registration.blobs()))
        return (tally for key in keys if (tally := self._objects.tallies.get(key)) is not None)

    def _last_demand_s(self, registration: Registration) -> float:
        bound_s = self.bound_s.get(registration.key, 0.0)
        fetched = [it.fetched_s for it in self._tallies(registration) if it.fetched_s is not None]
        return max(0.0, max(fetched, default=bound_s) - bound_s)

    def prefetch(self, registration: Registration) -> PrefetchStatus:
        report = self._prefetch.report(registration.key, registration.prefetch)
        return PrefetchStatus(**report._asdict())

    def resident_bytes(self, registration: Registration) -> int:
        opened = self._objects.blobs(registration.volume)
        blobs = [
            opened[entry.blob_id].blob
            for entry in registration.image.blobs
            if entry.blob_id in opened
        ]
        return sum(blob.resident_bytes for blob in blobs if blob is not None)

    def _bootstrap_status(self, registration: Registration, info: ImageInfo) -> ObjectStatus:
        """One that is mounted as a file is all there."""
        size_bytes = registration.image.size_bytes
        if info.devices is not None:
            return ObjectStatus(registration.image.fsid, size_bytes, size_bytes)
        return self._object_status(registration.key, size_bytes, None)

    def _object_status(
        self, key: ObjectKey, size_bytes: int, opened: OpenBlob | None
    ) -> ObjectStatus:
        tally = self._objects.tallies.get(key, Tally())
        blob = opened.blob if opened is not None else None
        return ObjectStatus(
            id=key.cookie,
            size_bytes=size_bytes,
            resident_bytes=blob.resident_bytes if blob is not None else None,
            in_flight_bytes=blob.in_flight_bytes if blob is not None else 0,
            reads=tally.reads,
            reads_failed=tally.reads_failed,
            requests=tally.requests,
            received_bytes=tally.received_bytes,
            bad_chunks=tally.bad_chunks,
            given={giver.value: count for giver, count in tally.given.items()},
        )


def _sum(tallies: Iterable[Tally], name: str) -> int:
    return sum(getattr(tally, name) for tally in tallies)


def _demand(tallies: Iterable[Tally]) -> DemandStatus:
    whole = total(tallies)
    return DemandStatus(
        hits=whole.hits,
        joined=whole.joined,
        misses=whole.misses,
        failed=whole.reads_failed,
        latencies=_latencies(whole.latencies),
        sources={name: _source(spent) for name, spent in whole.sources.items()},
    )


def _source(spent: SourceTally) -> SourceStatus:
    by_size = tuple(_latencies(row) for row in spent.by_size)
    return SourceStatus(spent.requests, spent.received_bytes, spent.failures, by_size)


def _latencies(counted: Latencies) -> LatencyCounts:
    return LatencyCounts(tuple(counted.counts), counted.seconds)

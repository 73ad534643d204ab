"""The images bound on this node: what a key of the kernel stands for, and where its bytes are.

A registration names a bootstrap by volume and fsid and brings a source for its data blobs. Images
of one volume (a shared domain) share their blobs: a blob is served from the registration that came
last, whose credentials are the freshest; where those are refused, from the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from fscached.config import Prefetch
from fscached.fill.blob import Origin
from fscached.fill.objects import LocalBootstrap
from fscached.source import Answer, Fault, LocalSource, Priority, Refusal, Source, SourceError
from fscached.store import Image
from fscached.transport import ObjectKey
from rafs_v6 import ImageError
from rafs_v6.blob import ChunkMap
from rafs_v6.layout import BlobEntry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registration:
    """One image, bound. `prefetch`: how its blobs are brought before anybody asks."""

    image: Image
    volume: str
    source: Source
    prefetch: Prefetch

    @property
    def key(self) -> ObjectKey:
        """The bootstrap's key."""
        return ObjectKey(self.volume, self.image.fsid)

    def blobs(self) -> Iterator[tuple[ObjectKey, BlobEntry]]:
        """The keys of its blobs, and what its bootstrap says of them."""
        return ((ObjectKey(self.volume, entry.blob_id), entry) for entry in self.image.blobs)


class Images:
    """All registrations. `chunks` loads the verified chunk map of one blob of one image."""

    def __init__(self, chunks: Callable[[Registration, BlobEntry], Awaitable[ChunkMap]]) -> None:
        self._load = chunks
        self._by_key: dict[ObjectKey, Registration] = {}
        self._by_blob: dict[ObjectKey, dict[str, tuple[Registration, BlobEntry]]] = {}
        """Who has a blob, by fsid; the last of them serves it."""
        self._maps: dict[ObjectKey, asyncio.Future[ChunkMap]] = {}

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def bind(self, registration: Registration) -> None:
        """Register an image; the same one again replaces its source, so credentials renew.

        Raises ImageError for a blob that another image of the volume describes differently: one
        of them lies, and its cache file would be the other's.
        """
        for key, entry in registration.blobs():
            owner = self.owner(key)
            if owner is not None and _identity(owner[1]) != _identity(entry):
                raise ImageError(
                    f"blob {entry.blob_id[:12]} is another one in {owner[0].image.reference} of "
                    f"the same domain: mount one of the images in a domain of its own"
                )
        before = self._by_key.get(registration.key)
        if before is not None:
            self._withdraw(before)
        self._by_key[registration.key] = registration
        for key, entry in registration.blobs():
            self._by_blob.setdefault(key, {})[registration.image.fsid] = (registration, entry)

    def unbind(self, volume: str, fsid: str) -> Registration | None:
        """Forget an image. What the kernel has open keeps working."""
        gone = self._by_key.pop(ObjectKey(volume, fsid), None)
        if gone is not None:
            self._withdraw(gone)
            for key, _ in gone.blobs():
                if self.owner(key) is None:
                    self._maps.pop(key, None)
        return gone

    def get(self, volume: str, fsid: str) -> Registration | None:
        """The registration of a bootstrap."""
        return self._by_key.get(ObjectKey(volume, fsid))

    def lookup(self, key: ObjectKey) -> Origin | LocalBootstrap | None:
        """What a key of the kernel stands for, or None."""
        registration = self._by_key.get(key)
        if registration is not None:
            return LocalBootstrap(registration.image.path, registration.image.size_bytes)
        owner = self.owner(key)
        if owner is None:
            return None
        registration, entry = owner
        source = registration.source
        return Origin(
            entry.blob_id,
            entry.uncompressed_size,
            source if isinstance(source, LocalSource) else _Serving(self, key, source),
            lambda: self._chunks(key, owner),
        )

    def having(self, key: ObjectKey) -> list[Registration]:
        """The registrations that have a blob."""
        return [registration for registration, _ in self._by_blob.get(key, {}).values()]

    def sources(self, key: ObjectKey) -> list[Source]:
        """Where a blob may be read, the one to ask first first."""
        return [registration.source for registration in reversed(self.having(key))]

    def keys(self) -> frozenset[ObjectKey]:
        """Of all bootstraps and blobs."""
        return frozenset((*self._by_key, *self._by_blob))

    def owner(self, key: ObjectKey) -> tuple[Registration, BlobEntry] | None:
        """The registration that serves a blob now, and what it says of it."""
        return next(reversed(self._by_blob.get(key, {}).values()), None)

    def _withdraw(self, registration: Registration) -> None:
        for key, _ in registration.blobs():
            if owners := self._by_blob.get(key):
                owners.pop(registration.image.fsid, None)
                if not owners:
                    del self._by_blob[key]

    async def _chunks(self, key: ObjectKey, opened: tuple[Registration, BlobEntry]) -> ChunkMap:
        """One load per blob however many ask; one that failed is forgotten."""
        future = self._maps.get(key)
        if future is None:
            registration, entry = self.owner(key) or opened
            source = registration.source
            if not isinstance(source, LocalSource):
                registration = replace(registration, source=_Serving(self, key, source))
            future = asyncio.ensure_future(self._load(registration, entry))
            self._maps[key] = future
            future.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(future)

    def _loaded(self, key: ObjectKey, future: asyncio.Future[ChunkMap]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._maps.pop(key, None)


class _Serving:
    """The sources of an open blob: those of the registrations that have it now. Their credentials
    may be renewed, and of two images that share it one may go, while the kernel has it open."""

    def __init__(self, images: Images, key: ObjectKey, source: Source) -> None:
        self.name = source.name
        self._images = images
        self._key = key
        self._source = source
        self._refused: list[Source] = []
        """Asked last from now on: each refused this blob."""

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        """See Source."""
        sources = self._images.sources(self._key) or [self._source]
        self._refused = [source for source in self._refused if source in sources]
        sources.sort(key=self._refused.__contains__)
        brought = _Count(feed) if len(sources) > 1 else None
        for source in sources:
            self._source, self.name = source, source.name
            at = start + (brought.bytes if brought is not None else 0)
            try:
                return await source.read(blob_id, at, end, priority, brought or feed, deadline_s)
            except SourceError as error:
                if source is sources[-1] or not (
                    isinstance(error, Refusal) or error.fault is Fault.AUTH
                ):
                    raise
                log.warning(
                    "%s: another image that has the blob is asked for: %s", self.name, error
                )
                self._refused.append(source)
        raise AssertionError("there is a last one")

    def distrust(self, blob_id: str, start: int, end: int) -> bool:
        """See Source."""
        return self._source.distrust(blob_id, start, end)

    async def close(self) -> None:
        """Nothing is this blob's alone."""


class _Count:
    """Counts what goes through."""

    def __init__(self, feed: Callable[[memoryview], None]) -> None:
        self.bytes = 0
        self._feed = feed

    def __call__(self, memory: memoryview) -> None:
        self.bytes += len(memory)
        self._feed(memory)


def _identity(entry: BlobEntry) -> tuple[object, ...]:
    """What decides a cache file's bytes."""
    return (
        entry.uncompressed_size,
        entry.compressed_size,
        entry.compressor,
        entry.digester,
        entry.ci_offset,
        entry.ci_compressed_size,
        entry.toc_digest,
    )

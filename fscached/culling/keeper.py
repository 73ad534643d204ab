"""The half of housekeeping that blocks: looks at the disk, deletes files, notes their last use.

What is known elsewhere is handed in as it was a moment ago. That is enough: a file that is bound
meanwhile is not in the way of its deletion, since the next reader has it made anew, and one that is
open the kernel, or the lease on it, defends.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Set
from typing import NamedTuple

from fscached.config import Cache
from fscached.culling.budget import Excess, excess, oldest_first
from fscached.store import Known, Store
from fscached.transport import CacheFile, NotReady, ObjectId, ObjectKey, Transport

log = logging.getLogger(__name__)

TOUCH_AGE_S = 3600.0
"""By how much the last use of a file may be wrong after a crash of the host."""


class OpenObject(NamedTuple):
    """An object that the kernel has open here."""

    object: ObjectId
    key: ObjectKey
    size_bytes: int


class Look(NamedTuple):
    """What the event loop knows: keys of all bound images, bootstraps and blobs; what is open."""

    bound: frozenset[ObjectKey]
    opened: list[OpenObject]


class Census(NamedTuple):
    """All cache files. `nameless` ones have an empty path: unlinked, and seen by no directory
    listing, they are counted by what the kernel says they hold. One that nobody has read since a
    predecessor ended is not among them: the kernel opens it anew with the next READ."""

    files: list[CacheFile]
    nameless: list[CacheFile]

    @property
    def used_bytes(self) -> int:
        """What all of them take of the disk."""
        return sum(file.allocated_bytes for file in (*self.files, *self.nameless))


class Culled(NamedTuple):
    """A file that is gone, or would be, and why: `asked for`, `orphan`, `budget`."""

    file: CacheFile
    why: str


class Swept(NamedTuple):
    """What a sweep did. `busy` files would have gone, but somebody has them open; `excess` is what
    is still too much."""

    culled: list[Culled]
    busy: list[CacheFile]
    census: Census
    excess: Excess

    @property
    def used_bytes(self) -> int:
        """What is taken of the disk now."""
        gone_bytes = sum(gone.file.allocated_bytes for gone in self.culled)
        return self.census.used_bytes - gone_bytes


class Keeper:
    """Deletes cache files, and what the state directory keeps for images that are gone."""

    def __init__(
        self,
        limits: Cache,
        transport: Transport,
        store: Store,
        clock: Callable[[], float],
        statvfs: Callable[[str], os.statvfs_result],
    ) -> None:
        """`clock`: seconds since 1970, as a file's last use is kept."""
        self._limits = limits
        self._transport = transport
        self._files = transport.files
        self._store = store
        self._clock = clock
        self._statvfs = statvfs
        self._began_s = clock()

    def short_of_space(self) -> bool:
        """Whether the file system has too little left. Raises OSError."""
        return bool(excess(0, self._statvfs(self._limits.directory), self._limits))

    def census(self, look: Look) -> Census:
        """Look at the disk. Raises OSError."""
        files = list(self._files.listed())
        named = {file.key for file in files}
        return Census(files, [self._nameless(it) for it in look.opened if it.key not in named])

    def touch(self, closed: Mapping[ObjectKey, float]) -> None:
        """Note when objects were used last. Raises OSError."""
        for key, used_s in closed.items():
            self._files.touch(key, used_s)

    def cull(self, cookie: str, look: Look) -> tuple[list[Culled], bool]:
        """Delete the files of a cookie in all volumes in which no image is bound that needs them;
        what went, and whether that is all there was. Raises OSError."""
        found = self._files.found(cookie)
        gone = [
            Culled(file, "asked for")
            for file in found
            if file.key not in look.bound and self._cull(file, "asked for")
        ]
        self._tidy({it.file.key.volume for it in gone}, look)
        return gone, len(gone) == len(found)

    def remove(self, key: ObjectKey) -> bool:
        """Delete one file; False: it is in use. Raises OSError."""
        return self._files.cull(key)

    def sweep(self, look: Look, all_idle: bool, dry_run: bool) -> Swept:
        """Delete orphans, and as much as is over the budget; or everything that no bound image
        needs. Raises OSError."""
        census = self.census(look)
        over = excess(census.used_bytes, self._statvfs(self._limits.directory), self._limits)
        culled: list[Culled] = []
        busy: list[CacheFile] = []
        for file, why in self._candidates(census, look, all_idle):
            if why == "budget" and not over:
                break
            if dry_run or self._cull(file, why):
                culled.append(Culled(file, why))
                over = over.without(file)
            else:
                busy.append(file)
        if not dry_run:
            left = {file.key for file in census.files} - {it.file.key for it in culled}
            self._touch_bound(census, look)
            self._forget(left, look)
            self._tidy({it.file.key.volume for it in culled}, look)
        return Swept(culled, busy, census, over)

    def _candidates(
        self, census: Census, look: Look, all_idle: bool
    ) -> Iterator[tuple[CacheFile, str]]:
        """What may go, in this order, and why."""
        idle = oldest_first(census.files, look.bound)
        if all_idle:
            yield from ((file, "asked for") for file in idle)
            return
        known = {key for image in self._store.known() for key in self._keys(image)}
        orphans = {file.key for file in idle if file.key not in known and self._is_old(file.used_s)}
        yield from ((file, "orphan") for file in idle if file.key in orphans)
        yield from ((file, "budget") for file in idle if file.key not in orphans)

    def _keys(self, known: Known) -> list[ObjectKey]:
        """The files of an image that was pulled here and may be mounted again."""
        volume = self._limits.domain_id or known.fsid
        return [ObjectKey(volume, name) for name in (known.fsid, *known.blob_ids)]

    def _is_old(self, used_s: float) -> bool:
        """Not before those who bind images have had time to do so again after a boot."""
        return max(used_s, self._began_s) + self._limits.orphan_age_s <= self._clock()

    def _cull(self, file: CacheFile, why: str) -> bool:
        if not self._files.cull(file.key):
            return False
        volume, cookie = file.key
        what = {"volume": volume, "cookie": cookie, "bytes": file.allocated_bytes, "why": why}
        log.info("a cache file is deleted", extra=what)
        return True

    def _touch_bound(self, census: Census, look: Look) -> None:
        now_s = self._clock()
        for file in census.files:
            if file.key in look.bound and file.used_s + TOUCH_AGE_S < now_s:
                self._files.touch(file.key, now_s)

    def _forget(self, left: Set[ObjectKey], look: Look) -> None:
        """Images of which nothing is in the cache any more, and chunk maps of no image."""
        bound = {key.cookie for key in look.bound}
        blob_ids = set(bound)
        for image in self._store.known():
            idle = image.fsid not in bound and left.isdisjoint(self._keys(image))
            if idle and self._is_old(image.adopted_s):
                log.info(
                    "an image is forgotten: nothing of it is in the cache",
                    extra={"fsid": image.fsid},
                )
                self._store.forget(image.fsid)
            else:
                blob_ids |= image.blob_ids
        for blob_id, kept_s in self._store.metas():
            if blob_id not in blob_ids and self._is_old(kept_s):
                self._store.forget_meta(blob_id)

    def _tidy(self, volumes: Set[str], look: Look) -> None:
        for volume in volumes - {key.volume for key in look.bound}:
            self._files.tidy(volume)

    def _nameless(self, it: OpenObject) -> CacheFile:
        """fstat tells nothing of an object's descriptor: it is the anonymous inode's."""
        held_bytes = 0
        with contextlib.suppress(NotReady, OSError):
            extents = self._transport.resident(it.object, it.size_bytes)
            held_bytes = sum(end - start for start, end in extents)
        return CacheFile(it.key, "", it.size_bytes, held_bytes, self._clock())

"""What people and tools ask of the cache files: which there are, whose they are, that some go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Literal, NamedTuple

from fscached.config import Cache
from fscached.control.http import ApiError
from fscached.control.messages import (
    CacheFileInfo,
    CacheListing,
    CacheStatus,
    Collected,
    CollectGarbage,
    CulledFile,
    Repaired,
    RepairFile,
)
from fscached.culling.keeper import Culled, Look, OpenObject
from fscached.culling.service import Culling
from fscached.fill.objects import Objects
from fscached.images import Images
from fscached.store import Store
from fscached.transport import CacheFile, NotReady, ObjectKey
from fscached.transport.cache_file import forget_pages
from fscached.transport.mount import name_fault

log = logging.getLogger(__name__)


class _Owner(NamedTuple):
    """An image that a file belongs to."""

    name: str
    fsid: str
    bootstrap: str
    is_bound: bool


class CacheService:
    """Implements `control.api.Cache`."""

    def __init__(
        self, limits: Cache, store: Store, images: Images, objects: Objects, culling: Culling
    ) -> None:
        self._limits = limits
        self._objects = objects
        self._store = store
        self._images = images
        self._culling = culling

    def cull(self, blob_id: str) -> None:
        if fault := name_fault(blob_id):
            raise ApiError(HTTPStatus.BAD_REQUEST, f"QueryString: blob_id {fault}")
        self._culling.cull(blob_id)

    async def listing(self) -> CacheListing:
        look = self._culling.look()
        with _refused():
            census = await self._culling.census()
        owners = self._owners()
        opened = {it.key for it in look.opened}
        files = [
            _described(file, owners.get(file.key, []), file.key in opened)
            for file in sorted((*census.files, *census.nameless), key=lambda file: -file.used_s)
        ]
        limits = self._limits
        return CacheListing(limits.directory, census.used_bytes, limits.budget_bytes, files)

    async def collect(self, wanted: CollectGarbage) -> Collected:
        with _refused():
            swept = await self._culling.sweep(wanted.all_idle, wanted.dry_run)
        return Collected(
            culled=_culled(swept.culled),
            busy=_culled(Culled(file, "") for file in swept.busy),
            used_bytes=swept.used_bytes,
            excess_bytes=max(0, swept.excess.allocated_bytes),
        )

    async def repair(self, spoiled: RepairFile) -> Repaired:
        key = ObjectKey(spoiled.volume, spoiled.cookie)
        with _refused():
            try:
                chunks = await self._objects.renew(key, spoiled.offsets)
            except NotReady as error:
                raise ApiError(HTTPStatus.CONFLICT, f"{error}: read something of it") from None
            if chunks is None:
                return Repaired(0, await self._cull(key))
            await asyncio.to_thread(forget_pages)
        log.warning("chunks were fetched again", extra={"blob": key.cookie, "chunks": chunks})
        return Repaired(chunks, False)

    async def _cull(self, key: ObjectKey) -> bool:
        """The whole file: the next reader has it made anew."""
        if not await self._culling.remove(key):
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"{key.cookie} is in use and cannot be replaced: unmount its images first",
            )
        log.warning("a file was spoiled and is deleted", extra={"cookie": key.cookie})
        return True

    def status(self) -> CacheStatus:
        """As of the last look, which status and metrics do not wait for."""
        counts = self._culling.counts
        return CacheStatus(
            used_bytes=counts.used_bytes,
            budget_bytes=self._limits.budget_bytes,
            excess_bytes=counts.excess_bytes,
            files=counts.files,
            culled_files=counts.culled_files,
            culled_bytes=counts.culled_bytes,
            culls_waiting=self._culling.waiting,
        )

    def _owners(self) -> dict[ObjectKey, list[_Owner]]:
        """Bound images first."""
        owners: dict[ObjectKey, list[_Owner]] = {}
        for known in self._images:
            image = known.image
            owner = _Owner(image.reference or image.fsid, image.fsid, str(image.path), True)
            for key in (known.key, *(key for key, _ in known.blobs())):
                owners.setdefault(key, []).append(owner)
        for pulled in self._store.known():
            volume = self._limits.domain_id or pulled.fsid
            bootstrap = str(self._store.bootstrap(pulled.fsid))
            owner = _Owner(pulled.reference, pulled.fsid, bootstrap, False)
            for name in (pulled.fsid, *pulled.blob_ids):
                others = owners.setdefault(ObjectKey(volume, name), [])
                if all(owner.fsid != other.fsid for other in others):
                    others.append(owner)
        return owners


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, f"the cache: {error}") from error


def looker(images: Images, objects: Objects) -> Callable[[], Look]:
    """What housekeeping has to know of a moment."""

    def look() -> Look:
        return Look(images.keys(), [OpenObject(*opened) for opened in objects.opened()])

    return look


def _described(file: CacheFile, owners: list[_Owner], is_open: bool) -> CacheFileInfo:
    kind: Literal["bootstrap", "blob", ""] = ""
    state: Literal["bound", "idle", "orphan"] = "orphan"
    if owners:
        is_bootstrap = any(owner.fsid == file.key.cookie for owner in owners)
        kind = "bootstrap" if is_bootstrap else "blob"
        state = "bound" if owners[0].is_bound else "idle"
    return CacheFileInfo(
        volume=file.key.volume,
        cookie=file.key.cookie,
        kind=kind,
        state=state,
        open=is_open,
        size_bytes=file.size_bytes,
        allocated_bytes=file.allocated_bytes,
        used_s=file.used_s,
        path=file.path,
        images=[owner.name for owner in owners],
        bootstrap=owners[0].bootstrap if owners else "",
    )


def _culled(gone: Iterable[Culled]) -> list[CulledFile]:
    return [CulledFile(*file.key, file.allocated_bytes, why) for file, why in gone]

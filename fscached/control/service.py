"""What the daemon does for people and tools: bind images, forget them, say how things are."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Set
from http import HTTPStatus
from pathlib import Path

import msgspec

from fscached import __version__, version
from fscached.config import Config
from fscached.control import entry as wire
from fscached.control.binding import OFFLINE, Binding, credential, parsed, source_of
from fscached.control.cache import CacheService
from fscached.control.completeness import missing
from fscached.control.http import ApiError
from fscached.control.messages import (
    Credentials,
    ImageInfo,
    ImageStatus,
    ObjectStatus,
    PrefetchStatus,
    Status,
    Totals,
)
from fscached.control.metrics import resident_memory_bytes
from fscached.control.state import State
from fscached.control.tracing import Tracing
from fscached.culling.service import Culling
from fscached.fill.blob import OpenBlob
from fscached.fill.objects import Objects
from fscached.fill.tally import Tally
from fscached.handover import Handover
from fscached.images import Images, Registration
from fscached.prefetch.service import Service as Prefetcher
from fscached.source import Fault, Giver, SourceError
from fscached.source.registries import Registries
from fscached.store import Image, Store, bootstrap_layer, unpack_bootstrap
from fscached.transport import ObjectKey, Transport
from rafs_v6 import ImageError

log = logging.getLogger(__name__)

RELEASE_PAUSE_S = 1.0
"""How often an image that is to be forgotten is looked at: nobody says when its mount ends."""


class ControlService:
    """Implements `control.api.Service`."""

    def __init__(
        self,
        config: Config,
        store: Store,
        images: Images,
        objects: Objects,
        prefetch: Prefetcher,
        transport: Transport,
        registries: Registries,
        handover: Handover,
        culling: Culling,
        state: Callable[[], State],
    ) -> None:
        self._state = state
        self._config = config
        self._store = store
        self._images = images
        self._objects = objects
        self._prefetch = prefetch
        self.traces = Tracing(store, prefetch, self._staying, self._resident_bytes)
        self._transport = transport
        self._registries = registries
        self._handover = handover
        self._culling = culling
        self.cache = CacheService(config.cache, store, images, objects, culling)
        self._bindings: dict[ObjectKey, Binding] = {}
        self._bound_s: dict[ObjectKey, float] = {}
        self._leaving: set[ObjectKey] = set()
        self._keeping = asyncio.Lock()
        """Between keeping a bootstrap and binding it nothing is let go of."""
        self._letting_go: set[asyncio.Task[None]] = set()
        self._releasing: asyncio.Handle | None = None
        objects.on_closed = self._closed
        self._began = asyncio.get_running_loop().time()

    def restore(self) -> None:
        """Bind what the predecessor has bound, and forget what it has forgotten since this was
        called last. What cannot be bound is logged and left out."""
        left = [msgspec.convert(raw, Binding) for raw in self._handover.load() or []]
        bindings = {binding.key: binding for binding in left}
        for key in self._bindings.keys() - bindings.keys():
            del self._bindings[key], self._bound_s[key]
            self._images.unbind(*key)
        for key, binding in bindings.items():
            if self._bindings.get(key) == binding:
                continue
            try:
                registration = self._bind(binding, self._image(binding))
                for blob, size_bytes in _sizes(registration):
                    self._objects.heed(self._transport.offer(blob, size_bytes))
            except (OSError, ImageError, SourceError) as error:
                log.error("image %s of the predecessor is lost: %s", binding.fsid[:12], error)

    def begin(self) -> None:
        """No predecessor changes anything any more."""
        self.restore()
        self._store.keep_only(self._digests())

    async def bind_blob_entry(self, entry: wire.BlobEntry) -> None:
        try:
            async with self._keeping:
                path = Path(entry.metadata_path)
                image = await asyncio.to_thread(self._store.keep, path, entry.id)
                binding = Binding(entry.domain_id, entry.id, entry=entry, digest=image.digest)
                try:
                    self._require_same(binding)
                    await self._admit(binding, image)
                except BaseException:
                    self._let_go_of({image.digest})
                    raise
        except (OSError, ImageError) as error:
            raise _refused("CreateBlobObject", str(error)) from None

    async def update_auth(self, name: str, auth: str) -> bool:
        found = [binding for binding in self._bindings.values() if binding.is_known_as(name)]
        try:
            renewed = [binding.with_auth(auth) for binding in found]
        except (ValueError, TypeError) as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"BadRequest: {error}") from None
        for binding in renewed:
            known = self._images.get(*binding.key)
            assert known is not None
            self._bind(binding, known.image)
        if renewed:
            self._save()
        return bool(renewed)

    async def unbind(self, domain_id: str, blob_id: str) -> bool:
        keys = [key for key in self._bindings if key.volume == domain_id]
        if blob_id:
            keys = [key for key in keys if key.cookie == blob_id]
        return self._forget(keys)

    async def add_image(self, reference: str, credentials: Credentials | None) -> ImageInfo:
        try:
            image = await self._pull(reference, credentials)
            volume = self._config.cache.domain_id or image.fsid
            binding = Binding(volume, image.fsid, reference, credentials)
            await self._admit(binding, image)
        except ImageError as error:
            raise _refused("CreateBlobObject", f"{reference}: {error}") from None
        except OSError as error:
            raise _refused("CreateBlobObject", f"{reference}: cannot be kept: {error}") from error
        return await asyncio.to_thread(self._info, self._images.get(volume, image.fsid))

    def images(self) -> list[ImageInfo]:
        return [self._info(registration) for registration in self._staying()]

    async def remove_image(self, fsid: str) -> bool:
        return self._forget([key for key in self._bindings if key.cookie == fsid])

    def prefetch(self, fsid: str) -> PrefetchStatus:
        known = self._known(fsid)
        if not self._prefetch.insist(known.key):
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"{known.image.reference or fsid}: nobody has it mounted: mount it first",
            )
        return self._prefetch_status(known)

    def prefetch_status(self, fsid: str) -> PrefetchStatus:
        return self._prefetch_status(self._known(fsid))

    def status(self) -> Status:
        registries = self._registries.traffic
        tallies = self._objects.tallies
        return Status(
            version=__version__,
            git_commit=version.COMMIT,
            pid=os.getpid(),
            state=self._state(),
            transport=self._transport.name,
            cache_directory=self._config.cache.directory,
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
                source_errors=_sum(tallies.values(), "source_errors"),
            ),
            given={giver.value: registries.given[giver] for giver in Giver},
            images=[self._image_status(registration) for registration in self._staying()],
            cache=self.cache.status(),
        )

    async def _pull(self, reference: str, credentials: Credentials | None) -> Image:
        """The image as its registry has it; as it was known before when that cannot be reached, or
        is not to be asked."""
        if self._config.source.offline:
            known = await asyncio.to_thread(self._store.find, reference)
            if known is None:
                raise SourceError(f"{reference}: {OFFLINE}", Fault.LOCAL)
            return known
        limit_s = self._config.source.mount_deadline_s
        try:
            async with asyncio.timeout(limit_s) as deadline:
                return await self._fetch(reference, credentials)
        except TimeoutError:
            if not deadline.expired():
                raise
            failure = SourceError(
                f"{reference}: manifest and bootstrap did not come within {limit_s:g} s: check the "
                "way from this node to the registry, or raise [source] mount_deadline_s",
                Fault.DEADLINE,
            )
        except SourceError as error:
            failure = error
        known = await asyncio.to_thread(self._store.find, reference)
        if known is None or failure.fault not in (Fault.NETWORK, Fault.DEADLINE):
            raise failure
        log.warning("%s: taken as it was known: %s", reference, failure)
        return known

    async def _fetch(self, reference: str, credentials: Credentials | None) -> Image:
        """Manifest and bootstrap, each link verified."""
        name = parsed(reference)
        distribution = self._registries.distribution(name.registry, credential(credentials))
        manifest = await distribution.pull_manifest(name)
        digest, size, blob_ids = bootstrap_layer(msgspec.json.decode(manifest.body))
        known = await asyncio.to_thread(self._store.find, reference)
        if known is not None and known.manifest_digest == manifest.digest:
            return known
        limit = min(size, self._config.source.bootstrap_limit_bytes)
        layer = await distribution.pull_blob(name, digest, limit)
        bootstrap = await asyncio.to_thread(unpack_bootstrap, layer)
        volume = self._config.cache.domain_id or hashlib.sha256(bootstrap).hexdigest()
        for blob_id in sorted(blob_ids):
            if self._is_here(ObjectKey(volume, blob_id)):
                # It would be served without the registry's being asked for it.
                await distribution.require_blob(name, f"sha256:{blob_id}")
        return await asyncio.to_thread(
            self._store.adopt, reference, manifest.digest, bootstrap, blob_ids
        )

    def _is_here(self, key: ObjectKey) -> bool:
        """Whether another image has brought a blob where this one would find it."""
        path = self._transport.files.path(key)
        return bool(self._images.having(key)) or os.path.lexists(path)

    def _image(self, binding: Binding) -> Image:
        """The image of a binding, from the local disk. Raises OSError, ImageError."""
        if binding.entry is None:
            return self._store.load(binding.fsid)
        return self._store.kept(binding.digest, binding.fsid)

    def _require_same(self, binding: Binding) -> None:
        """A bootstrap cannot become another one while the kernel has it open."""
        before = self._bindings.get(binding.key)
        changed = before is not None and before.digest != binding.digest
        if changed and binding.key in self._objects.keys:
            raise ImageError(f"another bootstrap is mounted as {binding.fsid}: unmount it first")

    async def _admit(self, binding: Binding, image: Image) -> None:
        """Bind an image and make its blobs ready to be mounted. Raises as `_bind` does, ApiError
        when there is no room, OSError."""
        self._require_room(binding)
        if self._config.source.offline:
            await self._require_all(binding, image)
        registration = self._bind(binding, image)
        try:
            for key, size_bytes in _sizes(registration):
                offer = self._transport.offer
                self._objects.heed(await asyncio.to_thread(offer, key, size_bytes))
        except OSError:
            self._forget([registration.key])
            raise
        self._save()

    def _bind(self, binding: Binding, image: Image) -> Registration:
        """Raises SourceError for a source that cannot be, ImageError for a blob that is another
        one in an image of the same volume."""
        key = binding.key
        source = source_of(binding, image, self._registries, self._config.source.offline)
        prefetch = self._config.prefetch
        if binding.entry is not None:
            prefetch = wire.prefetch(binding.entry.prefetch, prefetch)
        registration = Registration(image, binding.volume, source, prefetch)
        self._images.bind(registration)
        self._bindings[key] = binding
        self._bound_s.setdefault(key, asyncio.get_running_loop().time())
        self._leaving.discard(key)
        return registration

    def _require_room(self, binding: Binding) -> None:
        limit = self._config.cache.images
        if len(self._images) >= limit and self._images.get(binding.volume, binding.fsid) is None:
            raise ApiError(
                HTTPStatus.INSUFFICIENT_STORAGE,
                f"{limit} images are registered, the limit: unmount some, or raise [cache] images",
            )

    async def _require_all(self, binding: Binding, image: Image) -> None:
        """An image that nobody is asked for has to be here."""
        files = self._transport.files
        lack = await missing(binding.volume, image, self._objects, files, self._store)
        if lack and binding.needs_network:
            raise SourceError(
                f"{image.reference or image.fsid[:12]}: {lack}: {OFFLINE}", Fault.LOCAL
            )

    def _known(self, fsid: str) -> Registration:
        for known in self._staying():
            if known.image.fsid == fsid:
                return known
        raise ApiError(HTTPStatus.NOT_FOUND, f"NotFound: no image with fsid {fsid}")

    def _staying(self) -> list[Registration]:
        return [known for known in self._images if known.key not in self._leaving]

    def _forget(self, keys: Iterable[ObjectKey]) -> bool:
        """Forget images, those still in use when the kernel lets go of them: a successor has to
        know them, and the umount that comes before this sends its CLOSEs later."""
        gone = [key for key in keys if key not in self._leaving]
        self._leaving.update(gone)
        self._release()
        return bool(gone)

    def _release(self) -> None:
        """Forget the leaving images of which the kernel holds nothing that is only theirs."""
        staying = {key for known in self._staying() for key, _ in known.blobs()}
        gone = []
        for key in self._leaving:
            known = self._images.get(*key)
            own = {blob for blob, _ in known.blobs()} - staying if known is not None else set()
            for blob in own:
                self._objects.withdraw(blob)
            if self._objects.keys.isdisjoint({key, *own}):
                gone.append(key)
        digests = {self._bindings[key].digest for key in gone}
        for key in gone:
            self._leaving.remove(key)
            del self._bindings[key], self._bound_s[key]
            self._images.unbind(*key)
        if gone:
            self._save()
            self._letting_go.add(task := asyncio.ensure_future(self._let_go(digests)))
            task.add_done_callback(self._letting_go.discard)
        if self._leaving and self._releasing is None:
            loop = asyncio.get_running_loop()
            self._releasing = loop.call_later(RELEASE_PAUSE_S, self._release_again)

    async def _let_go(self, digests: Set[str]) -> None:
        """Of kept bootstraps, unless they are somebody else's too."""
        async with self._keeping:
            self._let_go_of(digests)

    def _let_go_of(self, digests: Set[str]) -> None:
        self._store.let_go(digests - self._digests() - {""})

    def _digests(self) -> set[str]:
        return {binding.digest for binding in self._bindings.values()}

    def _release_again(self) -> None:
        self._releasing = None
        self._release()

    def _closed(self, key: ObjectKey) -> None:
        """The kernel has closed something: soon, since a release may be what closes it."""
        self._culling.closed(key)
        if self._leaving:
            if self._releasing is not None:
                self._releasing.cancel()
            self._releasing = asyncio.get_running_loop().call_soon(self._release_again)

    def _save(self) -> None:
        self._handover.save([msgspec.to_builtins(binding) for binding in self._bindings.values()])

    def _info(self, registration: Registration | None) -> ImageInfo:
        assert registration is not None
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

    def _image_status(self, registration: Registration) -> ImageStatus:
        image = registration.image
        opened = self._objects.blobs(registration.volume)
        info = self._info(registration)
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
            prefetch=self._prefetch_status(registration),
            last_demand_s=self._last_demand_s(registration),
        )

    def _last_demand_s(self, registration: Registration) -> float:
        bound_s = self._bound_s.get(registration.key, 0.0)
        tallies = (self._objects.tallies.get(key) for key, _ in registration.blobs())
        fetched = [it.fetched_s for it in tallies if it is not None and it.fetched_s is not None]
        return max(0.0, max(fetched, default=bound_s) - bound_s)

    def _prefetch_status(self, registration: Registration) -> PrefetchStatus:
        report = self._prefetch.report(registration.key, registration.prefetch)
        return PrefetchStatus(**report._asdict())

    def _resident_bytes(self, registration: Registration) -> int:
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


def _sizes(registration: Registration) -> list[tuple[ObjectKey, int]]:
    return [(key, entry.uncompressed_size) for key, entry in registration.blobs()]


def _refused(what: str, why: str) -> ApiError:
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, f"{what}(DaemonAbnormal(Other({why!r})))")


def _sum(tallies: Iterable[Tally], name: str) -> int:
    return sum(getattr(tally, name) for tally in tallies)

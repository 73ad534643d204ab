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

from fscached.config import Config
from fscached.control import entry as wire
from fscached.control.binding import OFFLINE, Binding, credential, parsed, source_of
from fscached.control.cache import CacheService
from fscached.control.completeness import missing
from fscached.control.http import ApiError
from fscached.control.messages import (
    Credentials,
    ImageInfo,
    PrefetchStatus,
    Status,
)
from fscached.control.report import Report
from fscached.control.state import State
from fscached.control.tracing import Tracing
from fscached.culling.service import Culling
from fscached.fill.objects import Objects
from fscached.handover import Handover
from fscached.images import Images, Registration
from fscached.prefetch.service import Service as Prefetcher
from fscached.source import Fault, SourceError
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
        self._transport = transport
        self._registries = registries
        self._handover = handover
        self._culling = culling
        self.cache = CacheService(config.cache, store, images, objects, culling)
        self._report = Report(
            config.cache.directory,
            objects,
            prefetch,
            transport,
            registries,
            self._staying,
            self.cache.status,
        )
        self.traces = Tracing(store, prefetch, self._staying, self._report.resident_bytes)
        self._bindings: dict[ObjectKey, Binding] = {}
        self._leaving: set[ObjectKey] = set()
        self._keeping = asyncio.Lock()
        """Between keeping a bootstrap and binding it nothing is let go of."""
        self._letting_go: set[asyncio.Task[None]] = set()
        self._releasing: asyncio.Handle | None = None
        objects.on_closed = self._closed

    def restore(self) -> None:
        """Bind what the predecessor has bound, and forget what it has forgotten since this was
        called last. What cannot be bound is logged and left out. Raises ValueError."""
        try:
            left = msgspec.convert(self._handover.load() or [], list[Binding])
        except msgspec.ValidationError as error:
            raise ValueError(f"what the predecessor has bound cannot be read: {error}") from None
        bindings = {binding.key: binding for binding in left}
        for key in self._bindings.keys() - bindings.keys():
            del self._bindings[key], self._report.bound_s[key]
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
            if not keys and self._images.having(ObjectKey(domain_id, blob_id)):
                return True  # a data blob goes with the last image that has it
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
        known = self._images.get(volume, image.fsid)
        assert known is not None
        return await asyncio.to_thread(self._report.info, known)

    def images(self) -> list[ImageInfo]:
        return [self._report.info(registration) for registration in self._staying()]

    async def remove_image(self, fsid: str) -> bool:
        return self._forget([key for key in self._bindings if key.cookie == fsid])

    def prefetch(self, fsid: str) -> PrefetchStatus:
        known = self._known(fsid)
        if not self._prefetch.insist(known.key):
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"{known.image.reference or fsid}: nobody has it mounted: mount it first",
            )
        return self._report.prefetch(known)

    def prefetch_status(self, fsid: str) -> PrefetchStatus:
        return self._report.prefetch(self._known(fsid))

    def status(self) -> Status:
        return self._report.whole(self._state())

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
        self._report.bound_s.setdefault(key, asyncio.get_running_loop().time())
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
            del self._bindings[key], self._report.bound_s[key]
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
        self._handover.save(list(self._bindings.values()))


def _sizes(registration: Registration) -> list[tuple[ObjectKey, int]]:
    return [(key, entry.uncompressed_size) for key, entry in registration.blobs()]


def _refused(what: str, why: str) -> ApiError:
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, f"{what}(DaemonAbnormal(Other({why!r})))")

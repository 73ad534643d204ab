"""How an image came to be bound, and where that says its blobs are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from fscached.control import entry as wire
from fscached.control.http import ApiError
from fscached.control.messages import Credentials
from fscached.source import Source
from fscached.source.auth import Credential, Kind, Secret
from fscached.source.directory import Directory
from fscached.source.nobody import Nobody
from fscached.source.objectstore import ObjectStore
from fscached.source.origin import Trust
from fscached.source.reference import Reference, ReferenceError
from fscached.source.registries import Registries
from fscached.source.signature import Key
from fscached.store import Image
from fscached.transport import ObjectKey

_SNAPSHOT: Final = re.compile(r"/snapshots/([0-9]+)/fs/?\Z")


class Binding(msgspec.Struct, frozen=True):
    """How one image came to be bound: enough to bind it again after a crash. `digest` is the
    bootstrap's that a snapshotter brought, hex digits of its sha256."""

    volume: str
    fsid: str
    reference: str = ""
    credentials: Credentials | None = None
    entry: wire.BlobEntry | None = None
    digest: str = ""

    @property
    def key(self) -> ObjectKey:
        """The bootstrap's key."""
        return ObjectKey(self.volume, self.fsid)

    @property
    def needs_network(self) -> bool:
        """Whether its blobs are elsewhere."""
        return self.entry is None or not isinstance(self.entry.backend, wire.Localfs)

    def is_known_as(self, name: str) -> bool:
        """By its fsid, or by the snapshotter's number of its snapshot, which newer ones take for
        the fsid: that is hashed from it, or the directory's name."""
        if name == self.fsid or hashlib.sha256(f"nydus-snapshot-{name}".encode()).hexdigest() == (
            self.fsid
        ):
            return True
        found = _SNAPSHOT.search(self.entry.work_dir) if self.entry is not None else None
        return found is not None and found[1] == name

    def with_auth(self, auth: str) -> Binding:
        """The same with other credentials, base64 of user:password. Raises ValueError, whose text
        does not repeat them, and TypeError for an image whose source has none."""
        given = Credential.from_basic(auth)
        if self.entry is None:
            credentials = Credentials(given.username, given.secret.reveal())
            return msgspec.structs.replace(self, credentials=credentials)
        if not isinstance(self.entry.backend, wire.Registry):
            raise TypeError(f"the blobs of {self.fsid[:12]} are not in a registry")
        backend = msgspec.structs.replace(self.entry.backend, auth=auth, registry_token="")
        entry = msgspec.structs.replace(self.entry, backend=backend)
        return msgspec.structs.replace(self, entry=entry)


OFFLINE: Final = "not in the cache, and nobody is asked: offline is set in [source]"


def source_of(binding: Binding, image: Image, registries: Registries, offline: bool) -> Source:
    """Where an image's blobs are read. Raises SourceError for a source that cannot be."""
    if offline and binding.needs_network:
        return Nobody(OFFLINE)
    sizes = {entry.blob_id: entry.compressed_size for entry in image.blobs}
    if binding.entry is None:
        reference = parsed(binding.reference)
        given = credential(binding.credentials)
        return registries.source(reference.registry, reference.repository, given, sizes=sizes)
    match binding.entry.backend:
        case wire.Localfs() as local:
            others = [Path(path).absolute() for path in local.alt_dirs]
            return Directory(Path(local.dir or local.blob_file).absolute(), others)
        case wire.Registry() as registry:
            return _repository(registry, sizes, registries)
        case store:
            host, make = _store(store)
            verify, ca_files = not store.skip_verify, store.ca_cert_files
            return registries.store(host, make, verify=verify, ca_files=ca_files)


def parsed(reference: str) -> Reference:
    """Raises ApiError for a name that is none."""
    try:
        return Reference.parse(reference)
    except ReferenceError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, str(error)) from None


def credential(given: Credentials | None) -> Credential | None:
    """As sources take it."""
    return Credential(given.username, Secret(given.password)) if given is not None else None


def _repository(backend: wire.Registry, sizes: Mapping[str, int], registries: Registries) -> Source:
    given = Credential.from_basic(backend.auth) if backend.auth else None
    if backend.registry_token:
        given = Credential("", Secret(backend.registry_token), Kind.BEARER)
    return registries.source(
        backend.host,
        backend.repo,
        given,
        backend.scheme,
        wire.mirrors(backend),
        wire.proxy(backend),
        sizes=sizes,
        verify=not backend.skip_verify,
        ca_files=backend.ca_cert_files,
    )


def _store(
    backend: wire.S3 | wire.Oss | wire.HttpServer,
) -> tuple[str, Callable[[Trust], ObjectStore]]:
    """The `host[:port]` of an object store, and how to make it."""
    if isinstance(backend, wire.HttpServer):
        make = partial(ObjectStore.files, backend.addr, backend.path)
        return urlsplit(backend.addr).netloc, make
    host, bucket, prefix = backend.endpoint, backend.bucket_name, backend.object_prefix
    key = Key(backend.access_key_id, Secret(backend.access_key_secret))
    if isinstance(backend, wire.Oss):
        return host, partial(ObjectStore.oss, backend.scheme, host, bucket, prefix, key)
    region = backend.region
    return host, partial(ObjectStore.s3, backend.scheme, host, region, bucket, prefix, key)

"""OCI images: reading and writing image layout directories, and how a RAFS image looks in one.

Facts: OCI image specification 1.1 (image-layout.md, manifest.md, config.md) for the directory;
nydus's converter for media types, annotations and the bootstrap's layer. Nothing a layout holds
is believed before its sha256 and size were compared with its descriptor.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, TypeVar

import msgspec

from rafs_v6 import ImageError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
TAR_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
RAFS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
RAFS_IMAGE = "application/vnd.nydus.image.manifest.v1+json"
RAFS_OS_FEATURE = "nydus.remoteimage.v1"
BLOB_ANNOTATION = "containerd.io/snapshot/nydus-blob"
BOOTSTRAP_ANNOTATION = "containerd.io/snapshot/nydus-bootstrap"
VERSION_ANNOTATION = "containerd.io/snapshot/nydus-fs-version"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"
BOOTSTRAP_NAME = "image/image.boot"
BOOTSTRAP_NAMES = frozenset({BOOTSTRAP_NAME, "image.boot"})
"""Where builders have put it."""

MAX_DOCUMENT_BYTES = 4 << 20
"""Largest index, manifest or configuration, as most registries have it."""

_MANIFESTS = frozenset({MANIFEST, "application/vnd.docker.distribution.manifest.v2+json"})
_INDEXES = frozenset({INDEX, "application/vnd.docker.distribution.manifest.list.v2+json"})
_MAX_INDEX_DEPTH = 3
_COPY_BYTES = 1 << 20

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0)]


class Platform(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"os_features": "os.features"}
):
    """What an image runs on."""

    architecture: str
    os: str
    variant: str = ""
    os_features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


def platform_of(config: dict[str, Any]) -> Platform:
    """The platform a configuration names. Raises ImageError when it names none."""
    try:
        return msgspec.convert(config, Platform)
    except msgspec.ValidationError as error:
        raise ImageError(f"the image's configuration: {error}") from error


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """What to expect of a blob: every reference in an image is one of these. `size` in bytes."""

    media_type: str
    digest: Sha256
    size: Size
    annotations: dict[str, str] = {}
    platform: Platform | None = None
    artifact_type: str = ""


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """Configuration and layers of one image, lowest layer first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    schema_version: int = 0
    media_type: str = ""
    annotations: dict[str, str] = {}


class Index(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """Manifests of several images, or of one image for several platforms."""

    manifests: tuple[Descriptor, ...]
    schema_version: int = 0
    media_type: str = ""


class StoredImage(NamedTuple):
    """An image of a layout: its manifest and its configuration as it stands there."""

    manifest: Manifest
    config: dict[str, Any]


_Document = TypeVar("_Document")


class Layout:
    """An image layout directory; made if `create`. Raises ImageError when it is none."""

    def __init__(self, directory: Path, *, create: bool = False) -> None:
        self._directory = directory
        self._blobs = directory / "blobs" / "sha256"
        marker = directory / "oci-layout"
        if create:
            self._blobs.mkdir(parents=True, exist_ok=True)
            marker.write_bytes(b'{"imageLayoutVersion":"1.0.0"}')
        elif not marker.is_file():
            raise ImageError(
                f"{directory} is no OCI image layout: it has no file oci-layout (make one with "
                "`skopeo copy docker://IMAGE oci:DIRECTORY`)"
            )

    def path(self, descriptor: Descriptor) -> Path:
        """Where a blob lies."""
        return self._blobs / descriptor.digest.removeprefix("sha256:")

    @contextmanager
    def open(self, descriptor: Descriptor) -> Iterator[BinaryIO]:
        """A blob, read once and found to be what its descriptor says.

        Raises ImageError when it is missing or another one.
        """
        path = self.path(descriptor)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise ImageError(f"{path} is missing: copy the image again") from None
        with file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if f"sha256:{sha256}" != descriptor.digest or file.tell() != descriptor.size:
                raise ImageError(
                    f"{path} is damaged: sha256 {sha256} of {file.tell()} bytes, {descriptor.size} "
                    "bytes expected: copy the image again"
                )
            file.seek(0)
            yield file

    def tags(self) -> list[str]:
        """Names of the images in here."""
        return [name for each in self._index() if (name := each.annotations.get(TAG_ANNOTATION))]

    def image(self, tag: str | None, platform: Platform) -> StoredImage:
        """The image with that tag, or the only one; for that platform if there are several.

        Raises ImageError.
        """
        tops = [top for top in self._index() if tag in (None, top.annotations.get(TAG_ANNOTATION))]
        if len(tops) != 1:
            known = ", ".join(sorted(self.tags())) or "none"
            wanted = f"tag {tag!r}" if tag else "a tag to choose one"
            raise ImageError(
                f"{self._directory}: {wanted} needed, {len(tops)} images fit (tags: {known})"
            )
        descriptor = _for_platform(list(self._manifests(tops[0])), platform)
        manifest = self._document(descriptor, Manifest)
        return StoredImage(manifest, self._document(manifest.config, dict[str, Any]))

    @contextmanager
    def stage(self) -> Iterator[BinaryIO]:
        """A new file to write a blob to and `keep`; what was not kept vanishes at the end."""
        handle, name = tempfile.mkstemp(dir=self._blobs, prefix=".new-")
        os.close(handle)
        try:
            with open(name, "w+b") as file:
                yield file
        finally:
            Path(name).unlink(missing_ok=True)

    def keep(self, staged: BinaryIO, descriptor: Descriptor) -> None:
        """Make a staged file the blob its descriptor says it is."""
        _place(staged, self.path(descriptor))

    def add(
        self, data: bytes, media_type: str, annotations: dict[str, str] | None = None
    ) -> Descriptor:
        """Store a small blob."""
        descriptor = Descriptor(
            media_type, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data), annotations or {}
        )
        with self.stage() as file:
            file.write(data)
            self.keep(file, descriptor)
        return descriptor

    def name(self, manifest: Descriptor, tag: str | None) -> None:
        """List a manifest in the index, under a tag or none, instead of the one so named."""
        named = Descriptor(
            manifest.media_type,
            manifest.digest,
            manifest.size,
            {TAG_ANNOTATION: tag} if tag else {},
            manifest.platform,
            manifest.artifact_type,
        )
        exists = (self._directory / "index.json").exists()
        others = [
            each
            for each in (self._index() if exists else ())
            if each.annotations.get(TAG_ANNOTATION) != tag
        ]
        index = Index((*others, named), schema_version=2, media_type=INDEX)
        with self.stage() as file:
            file.write(msgspec.json.encode(index))
            _place(file, self._directory / "index.json")

    def _index(self) -> tuple[Descriptor, ...]:
        path = self._directory / "index.json"
        try:
            with path.open("rb") as file:
                return _decoded(file.read(MAX_DOCUMENT_BYTES + 1), Index, str(path)).manifests
        except FileNotFoundError:
            raise ImageError(f"{path} is missing: there is no image in the layout") from None

    def _manifests(self, top: Descriptor, depth: int = 0) -> Iterator[Descriptor]:
        if top.media_type in _MANIFESTS:
            yield top
        elif top.media_type in _INDEXES and depth < _MAX_INDEX_DEPTH:
            for each in self._document(top, Index).manifests:
                yield from self._manifests(each, depth + 1)

    def _document(self, descriptor: Descriptor, kind: type[_Document]) -> _Document:
        with self.open(descriptor) as file:
            return _decoded(file.read(MAX_DOCUMENT_BYTES + 1), kind, descriptor.digest)


def _place(staged: BinaryIO, path: Path) -> None:
    staged.flush()
    os.fchmod(staged.fileno(), 0o644)
    os.replace(staged.name, path)


def _decoded(data: bytes, kind: type[_Document], where: str) -> _Document:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ImageError(f"{where}: larger than {MAX_DOCUMENT_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ImageError(f"{where}: {error}") from error


def _for_platform(manifests: list[Descriptor], platform: Platform) -> Descriptor:
    # Attestations that buildkit puts beside images are for platform unknown/unknown.
    images = [each for each in manifests if each.platform is None or each.platform.os != "unknown"]
    if len(images) == 1:
        return images[0]
    for image in images:
        if image.platform and str(image.platform).startswith(str(platform)):
            return image
    known = ", ".join(str(each.platform) for each in images if each.platform) or "none"
    raise ImageError(f"the image is not for {platform} (for: {known})")


def bootstrap_layer(bootstrap: bytes) -> tuple[bytes, str]:
    """The layer a bootstrap travels in, a tar compressed with gzip, and its diff id."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        directory = tarfile.TarInfo(os.path.dirname(BOOTSTRAP_NAME))
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(directory)
        file = tarfile.TarInfo(BOOTSTRAP_NAME)
        file.size, file.mode = len(bootstrap), 0o444
        tar.addfile(file, io.BytesIO(bootstrap))
    plain = content.getvalue()
    return gzip.compress(plain, mtime=0), f"sha256:{hashlib.sha256(plain).hexdigest()}"

"""Images this node knows: verified bootstraps and blob metas, kept on the local disk.

Trust starts at the manifest's digest: manifest → bootstrap layer → bootstrap, whose sha256 is the
fsid → blob table → ToC → blob meta → chunk. What lies on the disk is verified again when it is
read; nothing secret is among it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from fscached.source import Priority, Source
from rafs_v6 import ImageError
from rafs_v6.blob import BlobMeta, ChunkMap, has_trusted_toc
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.layout import BlobEntry
from rafs_v6.oci import BLOB_ANNOTATION, BOOTSTRAP_ANNOTATION, BOOTSTRAP_NAMES

log = logging.getLogger(__name__)

BOOTSTRAP_LIMIT_BYTES = 1024 * 1024 * 1024

_PIECE = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class Image:
    """An image whose bootstrap lies on the local disk, verified."""

    reference: str
    manifest_digest: str
    fsid: str
    path: Path
    size_bytes: int
    blobs: tuple[BlobEntry, ...]
    digest: str = ""
    """The bootstrap's sha256, where the fsid is another name."""

    @property
    def identity(self) -> str:
        """What tells it from all other images, on any node: its bootstrap's sha256."""
        return self.digest or self.fsid


class Known(NamedTuple):
    """An image that was adopted here, without a look at its bootstrap. `adopted_s`: when, in
    seconds since 1970."""

    fsid: str
    reference: str
    blob_ids: frozenset[str]
    adopted_s: float


def bootstrap_layer(manifest: Mapping[str, Any]) -> tuple[str, int, frozenset[str]]:
    """Digest and size of a manifest's bootstrap layer, and the blob ids of its data layers.

    Raises ImageError for a manifest that is not of a RAFS image (`rafs-v6` packing: annotations).
    """
    layers = manifest.get("layers")
    if not isinstance(layers, list):
        raise ImageError("the manifest has no layers: not an image; convert one and push it")
    found: tuple[str, int] | None = None
    blobs = set()
    for layer in layers:
        digest, size, annotations = _descriptor(layer)
        if BOOTSTRAP_ANNOTATION in annotations:
            found = (digest, size)
        elif BLOB_ANNOTATION in annotations:
            blobs.add(digest.removeprefix("sha256:"))
    if found is None:
        raise ImageError(
            f"no layer of the manifest is annotated {BOOTSTRAP_ANNOTATION}: not a RAFS image; "
            "convert it with `fscached image convert`"
        )
    return *found, frozenset(blobs)


def _descriptor(layer: Any) -> tuple[str, int, Mapping[str, str]]:
    if not isinstance(layer, dict):
        raise ImageError("a layer of the manifest is not an object")
    digest, size = layer.get("digest"), layer.get("size")
    annotations = layer.get("annotations") or {}
    if (
        not isinstance(digest, str)
        or not isinstance(size, int)
        or not isinstance(annotations, dict)
    ):
        raise ImageError("a layer of the manifest has no proper digest, size or annotations")
    return digest, size, annotations


def unpack_bootstrap(layer: bytes) -> bytes:
    """The bootstrap inside its layer, a tar that may be compressed.

    Raises ImageError.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(layer), mode="r:*") as archive:
            for member in archive:
                if member.name.removeprefix("./") in BOOTSTRAP_NAMES and member.isreg():
                    return _member(archive, member)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ImageError(f"the bootstrap layer is not a tar archive: {error}") from error
    raise ImageError(f"the bootstrap layer holds none of {', '.join(sorted(BOOTSTRAP_NAMES))}")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > BOOTSTRAP_LIMIT_BYTES:
        raise ImageError(
            f"the bootstrap claims {member.size} bytes; the limit is {BOOTSTRAP_LIMIT_BYTES}"
        )
    file: IO[bytes] | None = archive.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise ImageError(f"the bootstrap ends after {len(data)} of {member.size} bytes")
    return data


class _Reader(Protocol):
    """Ranges of a blob file."""

    async def read(self, start: int, end: int) -> bytes: ...


class _SourceReader:
    """Ranges from a source, kept to be packed."""

    def __init__(self, blob_id: str, source: Source, deadline_s: float) -> None:
        self._blob_id = blob_id
        self._source = source
        self._deadline_s = deadline_s
        self._pieces: list[tuple[int, bytes]] = []

    async def read(self, start: int, end: int) -> bytes:
        piece = bytearray()
        await self._source.read(
            self._blob_id, start, end, Priority.DEMAND, piece.extend, self._deadline_s
        )
        self._pieces.append((start, bytes(piece)))
        return self._pieces[-1][1]

    def packed(self) -> bytes:
        """The pieces in one file: start, length, bytes, and again."""
        return b"".join(_PIECE.pack(start, len(data)) + data for start, data in self._pieces)


class _FileReader:
    """The same ranges from such a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed: bytes | None = None

    async def read(self, start: int, end: int) -> bytes:
        if self._packed is None:
            self._packed = await asyncio.to_thread(self._path.read_bytes)
        at = 0
        while at + _PIECE.size <= len(self._packed):
            first, length = _PIECE.unpack_from(self._packed, at)
            at += _PIECE.size
            if (first, first + length) == (start, end):
                return self._packed[at : at + length]
            at += length
        raise ImageError(f"bytes {start} to {end} are not in it")


class Store:
    """The state directory: `images/FSID/{image.boot,image.json}`, `blobs/ID.meta`, and
    `bound/DIGEST`: bootstraps that a snapshotter brought and may remove while they are mounted."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError when the directory cannot be made."""
        self._images = directory / "images"
        self._blobs = directory / "blobs"
        self._bound = directory / "bound"
        for path in (directory, self._images, self._blobs, self._bound):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def adopt(
        self,
        reference: str,
        manifest_digest: str,
        bootstrap: bytes,
        blob_ids: frozenset[str] | None,
    ) -> Image:
        """Keep a bootstrap that came with a verified manifest. `blob_ids`: the data layers that
        the manifest names; a bootstrap may use no other.

        Raises ImageError, OSError.
        """
        blobs = Bootstrap(bootstrap).blobs
        strangers = {entry.blob_id for entry in blobs} - (blob_ids or set())
        if blob_ids is not None and strangers:
            raise ImageError(
                f"the bootstrap uses blob {min(strangers)[:12]}, which is no layer of the manifest"
            )
        fsid = hashlib.sha256(bootstrap).hexdigest()
        directory = self._images / fsid
        directory.mkdir(mode=0o700, exist_ok=True)
        replace(directory / "image.boot", bootstrap)
        record = {
            "reference": reference,
            "manifest_digest": manifest_digest,
            "blobs": [entry.blob_id for entry in blobs],
        }
        replace(directory / "image.json", json.dumps(record).encode())
        return Image(
            reference, manifest_digest, fsid, directory / "image.boot", len(bootstrap), blobs
        )

    def load(self, fsid: str) -> Image:
        """An image adopted before, verified anew.

        Raises ImageError when it is not what it was, FileNotFoundError when it never was.
        """
        directory = self._images / fsid
        bootstrap = (directory / "image.boot").read_bytes()
        if hashlib.sha256(bootstrap).hexdigest() != fsid:
            raise ImageError(f"{directory / 'image.boot'} is damaged; mount the image again")
        record = json.loads((directory / "image.json").read_bytes())
        return Image(
            record["reference"],
            record["manifest_digest"],
            fsid,
            directory / "image.boot",
            len(bootstrap),
            Bootstrap(bootstrap).blobs,
        )

    def keep(self, path: Path, fsid: str) -> Image:
        """An image whose bootstrap lies elsewhere, and here from now on: the same file where the
        file system allows it. Raises ImageError, OSError."""
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > BOOTSTRAP_LIMIT_BYTES:
            raise ImageError(
                f"{path}: {found.st_size} bytes; a bootstrap has at most {BOOTSTRAP_LIMIT_BYTES}"
            )
        scratch = self._bound / f".{fsid}-{threading.get_ident()}"
        try:
            scratch.unlink(missing_ok=True)
            try:
                os.link(path, scratch)
            except OSError:
                shutil.copyfile(path, scratch)
            bootstrap = scratch.read_bytes()
            digest = hashlib.sha256(bootstrap).hexdigest()
            blobs = Bootstrap(bootstrap).blobs
            os.replace(scratch, self._bound / digest)
        finally:
            scratch.unlink(missing_ok=True)
        return Image("", "", fsid, self._bound / digest, len(bootstrap), blobs, digest)

    def kept(self, digest: str, fsid: str) -> Image:
        """The same, verified anew. Raises ImageError, FileNotFoundError."""
        path = self._bound / digest
        bootstrap = path.read_bytes()
        if hashlib.sha256(bootstrap).hexdigest() != digest:
            raise ImageError(f"{path} is damaged; mount the image again")
        return Image("", "", fsid, path, len(bootstrap), Bootstrap(bootstrap).blobs, digest)

    def let_go(self, digests: Set[str]) -> None:
        """Of what was kept."""
        for digest in digests:
            (self._bound / digest).unlink(missing_ok=True)

    def keep_only(self, digests: Set[str]) -> None:
        """Let go of all that was kept but these."""
        for path in self._bound.iterdir():
            if path.name not in digests:
                path.unlink(missing_ok=True)

    def find(self, reference: str) -> Image | None:
        """The image adopted last for a reference."""
        found = [image for image in self.known() if image.reference == reference]
        newest = max(found, key=lambda image: (image.adopted_s, image.fsid), default=None)
        return self.load(newest.fsid) if newest else None

    def bootstrap(self, fsid: str) -> Path:
        """Where the bootstrap of an image lies."""
        return self._images / fsid / "image.boot"

    def known(self) -> Iterator[Known]:
        """All images adopted here. What cannot be read is none."""
        for path in self._images.glob("*/image.json"):
            with suppress(OSError, ValueError, KeyError):
                record = json.loads(path.read_bytes())
                blob_ids, adopted_s = frozenset(record["blobs"]), path.stat().st_mtime
                yield Known(path.parent.name, record["reference"], blob_ids, adopted_s)

    def forget(self, fsid: str) -> None:
        """Delete an image. One that is mounted from its bootstrap's file must stay."""
        # The record first: without it there is no image.
        (self._images / fsid / "image.json").unlink(missing_ok=True)
        shutil.rmtree(self._images / fsid, ignore_errors=True)

    def metas(self) -> Iterator[tuple[str, float]]:
        """Ids of the blobs whose chunk map is kept, and since when, in seconds since 1970."""
        for path in self._blobs.glob("[!.]*.meta"):
            with suppress(FileNotFoundError):
                yield path.stem, path.stat().st_mtime

    def forget_meta(self, blob_id: str) -> None:
        """Delete a blob's chunk map: it is fetched again when it is wanted."""
        (self._blobs / f"{blob_id}.meta").unlink(missing_ok=True)

    async def chunks(
        self, image: Image, entry: BlobEntry, source: Source, verify: bool, deadline_s: float
    ) -> ChunkMap:
        """The chunks of one of an image's blobs: from the blob's own tail where the bootstrap
        vouches for it, else from the bootstrap's chunk table.

        Raises ImageError when a link of the chain is broken, or when nobody vouches for the
        chunks and `verify` is on; SourceError when the tail cannot be fetched.
        """
        if not has_trusted_toc(entry):
            chunks = await asyncio.to_thread(_from_chunk_table, image, entry)
            if chunks.count:
                return chunks
            if verify:
                raise ImageError(
                    f"blob {entry.blob_id[:12]} of {image.reference}: nothing in the image vouches "
                    "for its chunks; convert it again with digests, or set verify = false"
                )
        kept = self._blobs / f"{entry.blob_id}.meta"
        try:
            return await self._tail(entry, _FileReader(kept))
        except (OSError, ImageError) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("%s is of no use and is fetched again: %s", kept, error)
        reader = _SourceReader(entry.blob_id, source, deadline_s)
        chunks = await self._tail(entry, reader)
        await asyncio.to_thread(replace, kept, reader.packed())
        return chunks

    async def _tail(self, entry: BlobEntry, reader: _Reader) -> ChunkMap:
        """Fetch, or read again, what the chunk map is made of; verified either way."""
        meta = BlobMeta(entry)
        while meta.wanted:
            for start, end in meta.wanted:
                meta.feed(start, await reader.read(start, end))
        return await asyncio.to_thread(meta.chunks)


def _from_chunk_table(image: Image, entry: BlobEntry) -> ChunkMap:
    with image.path.open("rb") as file:
        bootstrap = Bootstrap(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    return ChunkMap.from_chunk_table(entry, bootstrap.chunk_table(entry.blob_index))


def replace(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is the old one or the new one, never a part."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise

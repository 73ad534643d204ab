"""The data of a layer becomes a blob: every chunk once, and behind the chunks what finds them.

A blob is what nydus-image writes with `--features blob-toc` and no inlined bootstrap, except for
its id: here it is the sha256 of the whole file, so that a registry, the blob table and the cookie
in the kernel all have one name for it. nydusd takes an id for a name and does not recompute it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from os import fsdecode, sched_getaffinity
from typing import BinaryIO, NamedTuple

from rafs_v6 import ImageError, codec
from rafs_v6.layout import (
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    META_HEADER_BYTES,
    MIN_CHUNK_BYTES,
    TOC_FLAGS,
    BlobEntry,
    BlobFeatures,
    ChunkInfo,
    ChunkInfoFlags,
    Compressor,
    Digest,
    Memory,
    MetaHeader,
    TailHeader,
    TocEntry,
    TocFlags,
    align_up,
)
from rafs_v6.tree import Node, groups

MAX_REMOTE_BYTES = 1 << 40
MAX_CACHE_BYTES = 1 << 44
CHUNKS_AHEAD = 4
"""Chunks in memory per processor: enough that a slow one does not let the others wait."""

Progress = Callable[[int], None]
"""Told how many bytes of file data were packed since it was last told."""


@dataclass(frozen=True, slots=True)
class Format:
    """How to write an image. Chunks are a power of two of bytes, 4 KiB to 16 MiB.

    `prefetch` names files and directories whose data comes first in each blob, and which the
    bootstrap recommends to fetch before anybody asks. `hints` are names of files that come behind
    those, as far as they are there: what was read of an image that this one may be a newer one of.
    """

    compressor: Compressor = Compressor.ZSTD
    digester: Digest = Digest.BLAKE3
    chunk_bytes: int = 1 << 20
    chunk_info_v2: bool = False
    prefetch: Sequence[bytes] = ()
    hints: Sequence[bytes] = ()

    def __post_init__(self) -> None:
        if self.chunk_bytes.bit_count() != 1 or not (
            MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES
        ):
            raise ImageError(
                f"chunk size {self.chunk_bytes}: a power of two from {MIN_CHUNK_BYTES} to "
                f"{MAX_CHUNK_BYTES} bytes needed"
            )
        if self.compressor not in TOC_FLAGS:
            raise ImageError(f"compressor {self.compressor.name.lower()} is only for reading")

    @property
    def features(self) -> BlobFeatures:
        """Features of every blob of this format."""
        features = (
            BlobFeatures.ALIGNED
            | BlobFeatures.INLINED_CHUNK_DIGEST
            | BlobFeatures.HAS_TAR_HEADER
            | BlobFeatures.HAS_TOC
            | BlobFeatures.CAP_TAR_TOC
        )
        return features | BlobFeatures.CHUNK_INFO_V2 if self.chunk_info_v2 else features


class Ranking:
    """The order of prefetch names: what a path is worth. Takes a path's depth, however many names
    there are: a trace names thousands."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.last = len(names)
        self._ranks: dict[bytes, int] = {}
        for rank, name in enumerate(names):
            self._ranks.setdefault(name.strip(b"/"), rank)

    def rank(self, path: bytes) -> int:
        """Position of the first name that is the path or has it in it; `last` for all others.
        `path` has no leading slash."""
        best, end = self._ranks.get(b"", self.last), len(path)
        while end > 0:
            best = min(best, self._ranks.get(path[:end], self.last))
            end = path.rfind(b"/", 0, end)
        return best


class Chunk(NamedTuple):
    """A stored chunk: the `number`-th of the blob of the `layer`-th layer."""

    digest: bytes
    layer: int
    number: int
    info: ChunkInfo


@dataclass(slots=True)
class Chunks:
    """All chunks of an image so far: `known` by digest and size, and those `of` each file."""

    known: dict[tuple[bytes, int], Chunk] = field(default_factory=dict)
    of: dict[Node, list[Chunk]] = field(default_factory=dict)


class _Encoded(NamedTuple):
    node: Node
    digest: bytes
    size: int
    stored: bytes


def pack(
    tree: Node,
    layer: int,
    chunks: Chunks,
    form: Format,
    output: BinaryIO,
    progress: Progress = lambda _: None,
) -> BlobEntry | None:
    """Write the file data of a layer that `chunks` does not have yet, and enter it there.

    The blob index in the entry returned is 0, to be replaced. None, with nothing written, when
    there is no new data. Files are read in the order of names; every processor compresses, with
    `CHUNKS_AHEAD` chunks each in memory. Raises ImageError, and OSError from files and `output`.
    """
    blob = BlobWriter(layer, form, output)
    with ThreadPoolExecutor(len(sched_getaffinity(0)), "pack") as workers:
        for encoded in _encoded(_files(tree, chunks, form), chunks, form, workers):
            key = encoded.digest, encoded.size
            if key not in chunks.known:
                chunks.known[key] = blob.add(encoded.digest, encoded.size, encoded.stored)
            chunks.of[encoded.node].append(chunks.known[key])
            progress(encoded.size)
    return blob.finish() if blob.infos else None


def _files(tree: Node, chunks: Chunks, form: Format) -> list[tuple[bytes, Node]]:
    """Files whose chunks are not known yet, each under its first name, in the order of the best
    rank that one of its names has."""
    ranking = Ranking((*form.prefetch, *form.hints))
    files: dict[Node, tuple[int, bytes]] = {}
    for group in groups(tree):
        for name, node in group.entries:
            if node.is_regular and node not in chunks.of:
                path = group.path_of(name)
                rank, first = files.get(node, (ranking.last, path))
                files[node] = min(rank, ranking.rank(path)), first
    chunks.of.update((node, []) for node in files)
    ordered = sorted(files.items(), key=lambda file: file[1][0])
    return [(path, node) for node, (_, path) in ordered]


def _encoded(
    files: list[tuple[bytes, Node]], chunks: Chunks, form: Format, workers: ThreadPoolExecutor
) -> Iterator[_Encoded]:
    def encode(node: Node, data: bytes) -> _Encoded:
        digest = codec.digest(form.digester, data)
        if (digest, len(data)) in chunks.known:
            return _Encoded(node, digest, len(data), b"")
        return _Encoded(node, digest, len(data), codec.compress(form.compressor, data) or data)

    under_way: deque[Future[_Encoded]] = deque()
    for path, node in files:
        try:
            for data in node.chunks(form.chunk_bytes):
                under_way.append(workers.submit(encode, node, data))
                if len(under_way) > CHUNKS_AHEAD * len(sched_getaffinity(0)):
                    yield under_way.popleft().result()
        except ImageError as error:
            raise ImageError(f"{fsdecode(path)}: {error}") from error
    while under_way:
        yield under_way.popleft().result()


class BlobWriter:
    """The blob file of a layer while it is being written."""

    def __init__(self, layer: int, form: Format, output: BinaryIO) -> None:
        self._layer = layer
        self._form = form
        self._output = output
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._cache_size = 0
        self.infos: list[ChunkInfo] = []
        self._digests: list[bytes] = []
        self._contents: list[TocEntry] = []

    def add(self, digest: bytes, size: int, stored: Memory) -> Chunk:
        """Write a chunk of `size` bytes, compressed if `stored` is shorter. Raises ImageError when
        a blob has no room for it, OSError."""
        compressed = len(stored) < size
        info = ChunkInfo(
            offset=self._cache_size,
            size=size,
            remote_offset=self._size,
            remote_size=len(stored),
            flags=ChunkInfoFlags.COMPRESSED.value if compressed else 0,
        )
        self._write(stored)
        self._cache_size += align_up(size)
        if (
            len(self.infos) == MAX_CHUNKS
            or self._size > MAX_REMOTE_BYTES
            or self._cache_size > MAX_CACHE_BYTES
        ):
            raise ImageError("more data than one blob can have: larger chunks, or more layers")
        self.infos.append(info)
        self._digests.append(digest)
        return Chunk(digest, self._layer, len(self.infos) - 1, info)

    def finish(self) -> BlobEntry:
        """Write everything behind the chunks."""
        data_size = self._size
        self._write(TailHeader("image.blob", data_size).pack())
        # The only digest of the table of contents that covers its tail-tar header.
        data = TocEntry(
            TocFlags.UNCOMPRESSED,
            "image.blob",
            self._sha256.digest(),
            0,
            data_size,
            self._cache_size,
        )
        meta = self._write_meta()
        digests = self._stored("blob.digest", b"".join(self._digests))
        self._write(TailHeader("blob.digest", digests.compressed_size).pack())
        self._contents = [data, *self._contents, digests]
        toc = b"".join(entry.pack() for entry in self._contents)
        toc += TailHeader("rafs.blob.toc", len(toc)).pack()
        self._write(toc)
        return BlobEntry(
            blob_id=self._sha256.hexdigest(),
            blob_index=0,
            chunk_size=self._form.chunk_bytes,
            chunk_count=len(self.infos),
            compressor=self._form.compressor,
            digester=self._form.digester,
            features=self._form.features,
            compressed_size=self._size,
            uncompressed_size=self._cache_size,
            toc_size=len(toc),
            ci_compressor=meta.ci_compressor,
            ci_offset=meta.ci_offset,
            ci_compressed_size=meta.ci_compressed_size,
            ci_uncompressed_size=meta.ci_uncompressed_size,
            toc_digest=hashlib.sha256(toc).digest(),
        )

    def _write_meta(self) -> MetaHeader:
        pack_info = ChunkInfo.pack_v2 if self._form.chunk_info_v2 else ChunkInfo.pack_v1
        infos = b"".join(map(pack_info, self.infos))
        packed = codec.compress(self._form.compressor, infos)
        compressor = self._form.compressor if packed else Compressor.NONE
        stored = self._stored("blob.meta", infos, compressor, packed)
        header = MetaHeader(
            features=self._form.features,
            ci_compressor=compressor,
            ci_entries=len(self.infos),
            ci_offset=stored.compressed_offset,
            ci_compressed_size=stored.compressed_size,
            ci_uncompressed_size=stored.uncompressed_size,
        )
        self._contents = [stored, self._stored("blob.meta.header", header.pack())]
        self._write(TailHeader("blob.meta", stored.compressed_size + META_HEADER_BYTES).pack())
        return header

    def _stored(
        self,
        name: str,
        content: bytes,
        compressor: Compressor = Compressor.NONE,
        packed: bytes | None = None,
    ) -> TocEntry:
        entry = TocEntry(
            TOC_FLAGS[compressor],
            name,
            hashlib.sha256(content).digest(),
            self._size,
            len(packed or content),
            len(content),
        )
        self._write(packed or content)
        return entry

    def _write(self, data: Memory) -> None:
        self._output.write(data)
        self._sha256.update(data)
        self._size += len(data)

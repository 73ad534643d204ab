"""Data blobs: where each chunk is in the remote file and in the cache file, and what it must be.

A blob file is chunk data, then the chunk infos with their header (`blob.meta`), the digests of
all chunks (`blob.digest`), perhaps a bootstrap (`image.boot`) and a table of contents
(`rafs.blob.toc`), each followed by a tail-tar header. What may be believed of it hangs on the
bootstrap, which is authentic before anything is mounted:

* the bootstrap's chunk table has placement and digest of every chunk *its own* image reads. It
  needs no request: `ChunkMap.from_chunk_table`.
* the bootstrap's blob table may have the digest of the blob's table of contents, which has those
  of the chunk infos and of the chunks' digests: `BlobMeta`, one request, knows every chunk.
  The field's merge leaves it out unless told the layers' ToC digests.
* a bootstrap with neither gives placement nobody vouches for and no digests: `BlobMeta` too.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

from rafs_v6 import ImageError, codec
from rafs_v6.layout import (
    BLOCK_BITS,
    BLOCK_BYTES,
    DIGEST_BYTES,
    INFO_V1_BYTES,
    INFO_V2_BYTES,
    META_HEADER_BYTES,
    TAIL_HEADER_BYTES,
    TOC_ENTRY_BYTES,
    BlobEntry,
    BlobFeatures,
    ChunkEntry,
    ChunkFlags,
    ChunkInfo,
    ChunkInfoFlags,
    Compressor,
    Memory,
    MetaHeader,
    TailHeader,
    TocEntry,
    align_up,
)

DATA_NAME = "image.blob"
META_NAME = "blob.meta"
META_HEADER_NAME = "blob.meta.header"
DIGESTS_NAME = "blob.digest"
BOOTSTRAP_NAME = "image.boot"
TOC_NAME = "rafs.blob.toc"

MAX_TOC_BYTES = 65536
MAX_META_BYTES = 64 << 20
"""Most memory for the chunk infos and digests of one blob: a million chunks need 56 MB."""
SPARE_BYTES = 256 << 10
"""How many bytes nobody asked for are fetched rather than sending a second request."""

_REFUSED: Mapping[BlobFeatures, str] = {
    BlobFeatures.ZRAN: "it refers into a .tar.gz layer (zran)",
    BlobFeatures.SEPARATE: "it refers into a tar layer, its chunk infos being another blob",
    BlobFeatures.BATCH: "its small chunks are compressed in batches",
    BlobFeatures.ENCRYPTED: "it is encrypted",
    BlobFeatures.EXTERNAL: "its data is kept by an external backend",
    BlobFeatures.TARFS: "it is a tarfs",
}
_PARSED_FEATURES = (
    BlobFeatures.ALIGNED
    | BlobFeatures.CHUNK_INFO_V2
    | BlobFeatures.ZRAN
    | BlobFeatures.SEPARATE
    | BlobFeatures.BATCH
    | BlobFeatures.ENCRYPTED
)
_REFUSED_INFO_FLAGS = (ChunkInfoFlags.ZRAN | ChunkInfoFlags.BATCH | ChunkInfoFlags.ENCRYPTED).value
_REFUSED_FLAGS = (ChunkFlags.HOLE | ChunkFlags.BATCH | ChunkFlags.ENCRYPTED).value
_COMPRESSED = ChunkFlags.COMPRESSED.value


def require_native(entry: BlobEntry) -> None:
    """Raise ImageError for a blob of a kind that cannot be loaded on demand (yet)."""
    for feature, why in _REFUSED.items():
        if feature in entry.features:
            raise ImageError(
                f"blob {entry.blob_id}: {why}: not supported, convert the image without that"
            )
    if entry.compressor is Compressor.GZIP and BlobFeatures.CHUNK_INFO_V2 not in entry.features:
        raise ImageError(
            f"blob {entry.blob_id}: an eStargz layer, whose sizes are guesses: not supported, "
            "convert the image to zstd"
        )


def data_end(entry: BlobEntry) -> int:
    """Where the chunk data of the remote file ends (as nydusd sees it)."""
    if BlobFeatures.CAP_TAR_TOC not in entry.features:
        return entry.compressed_size
    tar = TAIL_HEADER_BYTES if BlobFeatures.HAS_TAR_HEADER in entry.features else 0
    return entry.ci_offset - tar


class Chunk(NamedTuple):
    """Where one chunk is, in the remote file and in the cache file; see ChunkMap."""

    offset: int
    size: int
    padded_end: int
    remote_offset: int
    remote_size: int
    compressed: bool

    @property
    def remote_end(self) -> int:
        return self.remote_offset + self.remote_size


class ChunkMap:
    """The chunks of one blob, in the order of the cache file. All offsets and sizes in bytes.

    A chunk is `remote_size` bytes at `remote_offset` of the remote file and, uncompressed, `size`
    bytes at `offset` of the cache file, where it takes whole pages: up to `padded_end`, the rest
    zeros. Chunks never overlap, neither here nor there; neighbours in the cache file are
    neighbours in the remote file too, so that a run of them is one range. There may be holes
    (`from_chunk_table`); an index here is a position in this map.

    About 21 bytes per chunk, 53 with digests. Raises ImageError for chunks that cannot be so.
    """

    def __init__(
        self, entry: BlobEntry, infos: Iterable[ChunkInfo], digests: bytes | None = None
    ) -> None:
        require_native(entry)
        self.blob_id = entry.blob_id
        self.size_bytes = entry.uncompressed_size
        self.compressor = entry.compressor
        self.digester = entry.digester
        self._blocks = array("I")
        self._sizes = array("I")
        self._remote_offsets = array("Q")
        self._remote_sizes = array("I")
        self._compressed = bytearray()
        self._digests = digests
        self._load(infos, entry.chunk_size, data_end(entry))
        if digests is not None and len(digests) != self.count * DIGEST_BYTES:
            raise ImageError(
                f"blob {self.blob_id}: {len(digests)} bytes of digests for {self.count} chunks"
            )

    @classmethod
    def from_chunk_table(cls, entry: BlobEntry, rows: Iterable[ChunkEntry]) -> Self:
        """Chunks of the blob that a bootstrap knows: all its image can ask for.

        `rows`: those of the blob, as `Bootstrap.chunk_table(entry.blob_index)` has them. The rows
        of several images of one blob may be chained; they must not contradict each other.
        """
        chunks: dict[int, ChunkEntry] = {}
        for row in rows:
            known = chunks.setdefault(row.chunk_index, row)
            if row.flags & _REFUSED_FLAGS or (known is not row and _stored(known) != _stored(row)):
                raise ImageError(
                    f"blob {entry.blob_id}: chunk {row.chunk_index} with flags {row.flags:#x}: of "
                    "a kind that is not supported, or there twice and differs"
                )
        ordered = [chunks[index] for index in sorted(chunks)]
        digests = b"".join([row.digest for row in ordered])
        return cls(entry, map(chunk_info, ordered), digests)

    def _load(self, infos: Iterable[ChunkInfo], chunk_bytes: int, remote_limit: int) -> None:
        end = remote_end = 0
        for index, (offset, size, remote_offset, remote_size, flags, _) in enumerate(infos):
            compressed = flags & _COMPRESSED
            joined = offset == end and index
            behind = remote_offset == remote_end if joined else remote_offset >= remote_end
            if (
                offset & (BLOCK_BYTES - 1)
                or offset < end
                or not 0 < size <= chunk_bytes
                or offset + size > self.size_bytes
                or not behind
                or not 0 < remote_size <= size
                or remote_offset + remote_size > remote_limit
                or not (compressed or remote_size == size)
                or flags & _REFUSED_INFO_FLAGS
            ):
                raise ImageError(
                    f"blob {self.blob_id}: chunk {index}: {size} bytes at {offset} of "
                    f"{self.size_bytes}, from {remote_size} at {remote_offset} of {remote_limit} "
                    f"with flags {flags:#x}, behind chunks that end at {end} and {remote_end}: "
                    "impossible, or no native blob"
                )
            end = offset + size + BLOCK_BYTES - 1 & -BLOCK_BYTES
            remote_end = remote_offset + remote_size
            self._blocks.append(offset >> BLOCK_BITS)
            self._sizes.append(size)
            self._remote_offsets.append(remote_offset)
            self._remote_sizes.append(remote_size)
            self._compressed.append(compressed)

    @property
    def count(self) -> int:
        return len(self._sizes)

    @property
    def verifiable(self) -> bool:
        """Whether it is known what the chunks must be."""
        return self._digests is not None

    def __getitem__(self, index: int) -> Chunk:
        """All that is asked of a chunk on its way into the cache file, in one call."""
        offset, size = self._blocks[index] << BLOCK_BITS, self._sizes[index]
        return Chunk(
            offset,
            size,
            offset + size + BLOCK_BYTES - 1 & -BLOCK_BYTES,
            self._remote_offsets[index],
            self._remote_sizes[index],
            bool(self._compressed[index]),
        )

    def offset(self, index: int) -> int:
        return self._blocks[index] << BLOCK_BITS

    def size(self, index: int) -> int:
        return self._sizes[index]

    def padded_end(self, index: int) -> int:
        """Where the chunk's last page of the cache file ends."""
        return align_up((self._blocks[index] << BLOCK_BITS) + self._sizes[index])

    def remote_offset(self, index: int) -> int:
        return self._remote_offsets[index]

    def remote_size(self, index: int) -> int:
        return self._remote_sizes[index]

    def compressed(self, index: int) -> bool:
        """Whether the remote bytes are compressed, with `compressor`."""
        return bool(self._compressed[index])

    def digest(self, index: int) -> bytes | None:
        """32 bytes, by `digester`, of the uncompressed chunk; None where nobody vouches for it."""
        if self._digests is None:
            return None
        start = index * DIGEST_BYTES
        return self._digests[start : start + DIGEST_BYTES]

    def find(self, offset: int) -> int:
        """Index of the chunk whose pages hold that byte of the cache file, else IndexError."""
        index = bisect_right(self._blocks, offset >> BLOCK_BITS) - 1
        if index < 0 or offset >= self.padded_end(index):
            raise IndexError(f"blob {self.blob_id}: no chunk at {offset} of {self.size_bytes}")
        return index

    def overlapping(self, start: int, end: int) -> range:
        """Indexes of the chunks with pages in [start, end) of the cache file."""
        if start >= end:
            return range(0)
        first = max(bisect_right(self._blocks, start >> BLOCK_BITS) - 1, 0)
        if first < self.count and self.padded_end(first) <= start:
            first += 1
        stop = bisect_left(self._blocks, align_up(end) >> BLOCK_BITS)
        return range(first, max(first, stop))


def _stored(row: ChunkEntry) -> tuple[object, ...]:
    return (row.digest, row.flags, *row[3:7])


def chunk_info(row: ChunkEntry) -> ChunkInfo:
    """Where a chunk of the chunk table is."""
    return ChunkInfo(
        row.uncompressed_offset,
        row.uncompressed_size,
        row.compressed_offset,
        row.compressed_size,
        row.flags & _COMPRESSED,
    )


class BlobMeta:
    """What a blob file says about its chunks: which bytes of it to fetch, and what they must be.

    Fetch the ranges `wanted`, `feed` them, until none is; then ask for `chunks`. One range if the
    parts lie near each other, else the table of contents and then what it points to.

    Raises ImageError, as `feed` and `chunks` do, naming the first thing that is not as the
    bootstrap promised.
    """

    def __init__(self, entry: BlobEntry) -> None:
        require_native(entry)
        self.entry = entry
        self.wanted: tuple[tuple[int, int], ...]
        self._where = f"blob {entry.blob_id}"
        self._toc: Mapping[str, TocEntry] | None = None
        self._pieces: list[tuple[int, bytes]] = []
        self._meta = (
            entry.ci_offset,
            entry.ci_offset + entry.ci_compressed_size + META_HEADER_BYTES,
        )
        needed = (
            entry.ci_uncompressed_size
            + entry.chunk_count * DIGEST_BYTES
            + META_HEADER_BYTES
            + 3 * TAIL_HEADER_BYTES
            + entry.toc_size
        )
        if needed > MAX_META_BYTES:
            raise ImageError(
                f"{self._where}: {needed} bytes of chunk infos and digests: over the limit of "
                f"{MAX_META_BYTES}"
            )
        if not has_trusted_toc(entry):
            self.wanted = (self._meta,)
        elif entry.compressed_size - entry.ci_offset <= needed + SPARE_BYTES:
            self.wanted = ((entry.ci_offset, entry.compressed_size),)
        else:
            self.wanted = ((entry.compressed_size - entry.toc_size, entry.compressed_size),)

    def feed(self, start: int, memory: Memory) -> None:
        """Bytes of the blob file from `start` on: one of the ranges wanted, whole."""
        got = (start, start + len(memory))
        if got not in self.wanted:
            raise ImageError(f"{self._where}: got bytes {got} instead of {self.wanted}: cut off?")
        self._pieces.append((start, bytes(memory)))
        self.wanted = tuple(part for part in self.wanted if part != got)
        if self._toc is None and has_trusted_toc(self.entry):
            self._toc = self._trusted_toc()
            self.wanted = tuple(part for part in self._parts(self._toc) if not self._has(part))

    def chunks(self) -> ChunkMap:
        """All chunks of the blob, with their digests if the table of contents is trusted."""
        entry, digests = self.entry, None
        raw = self._part(self._meta)
        packed, header = raw[:-META_HEADER_BYTES], raw[-META_HEADER_BYTES:]
        if self._toc is not None:
            self._require_digest(header, self._toc, META_HEADER_NAME)
            digests = bytes(self._part(self._digests_range(self._toc)))
            self._require_digest(digests, self._toc, DIGESTS_NAME)
        count = self._require_header(MetaHeader.unpack(header))
        infos = bytearray(entry.ci_uncompressed_size)
        codec.decompress_into(entry.ci_compressor, packed, memoryview(infos))
        if self._toc is not None:
            self._require_digest(infos, self._toc, META_NAME)
        return ChunkMap(entry, _infos(entry, infos, count), digests)

    def _require_header(self, header: MetaHeader) -> int:
        entry = self.entry
        # A merge clears INLINED_FS_META in the bootstrap; only what changes the meaning counts.
        promised = (
            entry.features & _PARSED_FEATURES,
            entry.ci_compressor,
            entry.ci_offset,
            entry.ci_compressed_size,
            entry.ci_uncompressed_size,
        )
        found = (
            header.features & _PARSED_FEATURES,
            header.ci_compressor,
            header.ci_offset,
            header.ci_compressed_size,
            header.ci_uncompressed_size,
        )
        size = header.ci_entries * _info_bytes(entry)
        if found != promised or size > entry.ci_uncompressed_size:
            raise ImageError(f"{self._where}: header {header} where the bootstrap says {promised}")
        generated = BlobFeatures.CHUNKDICT_GENERATED in entry.features
        if header.ci_entries != entry.chunk_count and not generated:
            raise ImageError(
                f"{self._where}: {header.ci_entries} chunks, {entry.chunk_count} in the bootstrap"
            )
        return header.ci_entries

    def _trusted_toc(self) -> Mapping[str, TocEntry]:
        entry = self.entry
        raw = self._part((entry.compressed_size - entry.toc_size, entry.compressed_size))
        if hashlib.sha256(raw).digest() != entry.toc_digest:
            raise ImageError(
                f"{self._where}: its table of contents is not the one the bootstrap was built for "
                "(sha256 differs)"
            )
        return unpack_toc(raw, self._where)

    def _digests_range(self, toc: Mapping[str, TocEntry]) -> tuple[int, int]:
        found = toc.get(DIGESTS_NAME)
        if found is None:
            raise ImageError(f"{self._where}: its table of contents has no {DIGESTS_NAME}")
        start, size = found.compressed_offset, found.compressed_size
        # The only hostile size here: all others are the bootstrap's own.
        if size > MAX_META_BYTES or start + size > self.entry.compressed_size:
            raise ImageError(f"{self._where}: {DIGESTS_NAME} of {size} bytes at {start}")
        return start, start + size

    def _require_digest(self, content: Memory, toc: Mapping[str, TocEntry], name: str) -> None:
        found = toc.get(name)
        if found is None or hashlib.sha256(content).digest() != found.digest:
            raise ImageError(
                f"{self._where}: its {name} is not what its table of contents promises (sha256)"
            )

    def _parts(self, toc: Mapping[str, TocEntry]) -> tuple[tuple[int, int], ...]:
        digests = self._digests_range(toc)
        if 0 <= digests[0] - self._meta[1] <= SPARE_BYTES:
            return ((self._meta[0], digests[1]),)
        return self._meta, digests

    def _has(self, part: tuple[int, int]) -> bool:
        return any(
            start <= part[0] and part[1] <= start + len(piece) for start, piece in self._pieces
        )

    def _part(self, part: tuple[int, int]) -> memoryview:
        for start, piece in self._pieces:
            if start <= part[0] and part[1] <= start + len(piece):
                return memoryview(piece)[part[0] - start : part[1] - start]
        raise ImageError(f"{self._where}: bytes {part} were not fetched")


def has_trusted_toc(entry: BlobEntry) -> bool:
    """Whether the bootstrap vouches for the blob's table of contents and that for its digests."""
    features = BlobFeatures.CAP_TAR_TOC | BlobFeatures.HAS_TOC | BlobFeatures.INLINED_CHUNK_DIGEST
    return (
        features in entry.features
        and any(entry.toc_digest)
        and TAIL_HEADER_BYTES < entry.toc_size <= min(MAX_TOC_BYTES, entry.compressed_size)
    )


def unpack_toc(memory: Memory, where: str = "table of contents") -> dict[str, TocEntry]:
    """Entries of a table of contents by name; `memory` is it and its tail-tar header.

    Raises ImageError.
    """
    size = len(memory) - TAIL_HEADER_BYTES
    header = TailHeader.unpack(memory, max(size, 0))
    if header != (TOC_NAME, size) or size % TOC_ENTRY_BYTES:
        raise ImageError(f"{where}: {header} behind a table of contents of {size} bytes")
    entries = [TocEntry.unpack(memory, at) for at in range(0, size, TOC_ENTRY_BYTES)]
    toc = {entry.name: entry for entry in entries}
    if len(toc) != len(entries):
        raise ImageError(f"{where}: a name is in its table of contents twice")
    return toc


class TailEntry(NamedTuple):
    """A part of a blob file with a tail-tar header: bytes [start, start + size)."""

    name: str
    start: int
    size: int


def tail_entries(blob: Memory) -> list[TailEntry]:
    """The parts of a whole blob file, last first, as their tail-tar headers say.

    Raises ImageError where a header is none, or its data would begin before the file.
    """
    entries, end = [], len(blob)
    while end:
        name, size = TailHeader.unpack(blob, max(end - TAIL_HEADER_BYTES, 0))
        start = end - TAIL_HEADER_BYTES - size
        if start < 0:
            raise ImageError(f"blob file: {name} of {size} bytes ends at {end}: cut off?")
        entries.append(TailEntry(name, start, size))
        end = start
    return entries


def _info_bytes(entry: BlobEntry) -> int:
    return INFO_V2_BYTES if BlobFeatures.CHUNK_INFO_V2 in entry.features else INFO_V1_BYTES


def _infos(entry: BlobEntry, memory: Memory, count: int) -> Iterable[ChunkInfo]:
    unit = _info_bytes(entry)
    unpack = ChunkInfo.unpack_v2 if unit == INFO_V2_BYTES else ChunkInfo.unpack_v1
    return (unpack(memory, index * unit) for index in range(count))

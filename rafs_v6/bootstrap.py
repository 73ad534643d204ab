"""Read a bootstrap: the metadata of an image, itself a valid EROFS image.

Opening looks at superblocks, devices and blobs only; inodes, directories, chunk indexes and the
chunk table are looked at when asked for. Whatever is returned has been checked: offsets lie in the
bootstrap, chunks in their blob, names can be names. A bootstrap that says something impossible
raises ImageError, then or when it is opened; reading one takes bounded time and memory whatever
it says.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from rafs_v6 import ImageError
from rafs_v6.layout import (
    BLOB_ENTRY_BYTES,
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_ENTRY_BYTES,
    CHUNK_FORMAT_BITS,
    CHUNK_FORMAT_INDEXES,
    CHUNK_INDEX_BYTES,
    COMPACT_INODE_BYTES,
    COMPAT_RAFS_V6,
    COMPRESSOR_FLAGS,
    DEVICE_BYTES,
    DEVICES_OFFSET,
    DIGEST_FLAGS,
    DIRENT_BYTES,
    FILE_TYPES,
    INFO_V1_BYTES,
    INFO_V2_BYTES,
    INODE_BYTES,
    MAX_BLOBS,
    MAX_CACHE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_REMOTE_BYTES,
    META_HEADER_BYTES,
    MIN_CHUNK_BYTES,
    NID_BYTES,
    UNKNOWN_BLOB_ID,
    BlobEntry,
    BlobFeatures,
    ChunkEntry,
    ChunkIndex,
    CompactInode,
    DataLayout,
    DeviceSlot,
    Dirent,
    ExtendedInode,
    ExtendedSuperblock,
    FileType,
    Incompat,
    Memory,
    RafsFlags,
    Superblock,
    align_up,
    unpack_dirents,
    unpack_rdev,
    unpack_xattrs,
    xattr_area_bytes,
)

MAX_TARGET_BYTES = 4095
"""Longest symbolic link."""
MAX_DEPTH = 2048
"""Deepest directory walked: no path below it fits PATH_MAX."""

_FLAT = frozenset({DataLayout.FLAT_PLAIN, DataLayout.FLAT_INLINE})
_CHUNKED = frozenset({DataLayout.CHUNK_BASED})
_ENTRY_BLOB = struct.Struct("<32xI44x")
_PREFETCH_NID = struct.Struct("<I")


class Inode(NamedTuple):
    """One inode, compact or extended. `size` in bytes; `u` depends on the type of file.

    `offset` is where it is in the bootstrap, `head_bytes` what it takes there before its xattrs.
    A compact inode has the time of its superblock.
    """

    nid: int
    offset: int
    head_bytes: int
    xattr_bytes: int
    type: FileType
    layout: DataLayout
    mode: int
    nlink: int
    size: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int
    ino: int
    u: int

    @property
    def tail_offset(self) -> int:
        """What follows inode and xattrs: inline data, or (aligned to 8) chunk indexes."""
        return self.offset + self.head_bytes + self.xattr_bytes

    @property
    def rdev(self) -> tuple[int, int]:
        """Major and minor number of a device node."""
        return unpack_rdev(self.u)


class Bootstrap:
    """The metadata of one image, read from a buffer that stays as it is (bytes, or a mapping).

    `own_blob_id` is for a layer's bootstrap that lies inside its own blob and so cannot know the
    blob's id (it has 64 × "x" instead): the name of the blob. Without it such a bootstrap is
    refused, for it cannot be mounted.

    Raises ImageError, as all methods do.
    """

    superblock: Superblock
    extended: ExtendedSuperblock
    devices: tuple[DeviceSlot, ...]
    blobs: tuple[BlobEntry, ...]

    def __init__(self, memory: Memory | mmap.mmap, own_blob_id: str | None = None) -> None:
        self._memory = memoryview(memory).cast("B").toreadonly()
        size = len(self._memory)
        if size < BLOCK_BYTES or size % BLOCK_BYTES:
            raise ImageError(
                f"bootstrap of {size} bytes: not a multiple of {BLOCK_BYTES}: truncated, fetch it "
                "again"
            )
        self.superblock = _superblock(self._memory)
        self.extended = _extended_superblock(self._memory, self.superblock.extra_devices)
        self.devices, self.blobs = _blobs(
            self._memory, self.extended, self.superblock.extra_devices, own_blob_id
        )
        self._require_blocks()

    def _require_blocks(self) -> None:
        claimed, there = self.superblock.blocks, sum(slot.blocks for slot in self.devices)
        # An old builder counted its own first block when there was no blob (section 2).
        if claimed != there and (self.devices or claimed != BLOCK_BYTES):
            raise ImageError(
                f"superblock: {claimed} blocks, but the device slots have {there} together"
            )

    @property
    def size_bytes(self) -> int:
        return len(self._memory)

    @property
    def chunk_bytes(self) -> int:
        """How much of a file one chunk holds; its last may hold less."""
        return self.extended.chunk_size

    @property
    def root(self) -> Inode:
        root = self.inode(self.superblock.root_nid)
        if root.type is not FileType.DIRECTORY:
            raise ImageError(f"root inode {root.nid}: not a directory")
        return root

    def inode(self, nid: int) -> Inode:
        """The inode of that number."""
        offset = self.superblock.meta_blkaddr * BLOCK_BYTES + nid * NID_BYTES
        what = f"inode {nid}"
        self._slice(offset, COMPACT_INODE_BYTES, what)
        compact = CompactInode.unpack(self._memory, offset)
        head: CompactInode | ExtendedInode = compact
        head_bytes, mtime = COMPACT_INODE_BYTES, self.superblock.build_time
        mtime_nsec = self.superblock.build_time_nsec
        if compact.format & 1:
            self._slice(offset, INODE_BYTES, what)
            head = extended = ExtendedInode.unpack(self._memory, offset)
            head_bytes, mtime, mtime_nsec = INODE_BYTES, extended.mtime, extended.mtime_nsec
        layout, kind = head.format >> 1, FILE_TYPES.get(stat.S_IFMT(head.mode))
        if kind is None or layout not in (_CHUNKED if kind is FileType.REGULAR else _FLAT):
            raise ImageError(
                f"{what} at offset {offset}: mode {head.mode:#o} with format {head.format:#x}: "
                "RAFS v6 has no such file"
            )
        xattr_bytes = xattr_area_bytes(head.xattr_icount)
        self._slice(offset + head_bytes, xattr_bytes, f"{what}: xattrs")
        return Inode(
            nid=nid,
            offset=offset,
            head_bytes=head_bytes,
            xattr_bytes=xattr_bytes,
            type=kind,
            layout=DataLayout(layout),
            mode=head.mode,
            nlink=head.nlink,
            size=head.size,
            uid=head.uid,
            gid=head.gid,
            mtime=mtime,
            mtime_nsec=mtime_nsec,
            ino=head.ino,
            u=head.u,
        )

    def dirents(self, inode: Inode) -> Iterator[Dirent]:
        """Entries of a directory as they stand there, "." and ".." among them."""
        what = f"directory {inode.nid}"
        if inode.type is not FileType.DIRECTORY:
            raise ImageError(f"inode {inode.nid}: not a directory")
        before = b""
        for index, block in enumerate(self._flat_data(inode, what)):
            for entry in unpack_dirents(block, f"{what}: block {index}"):
                if b"/" in entry.name or not before < entry.name:
                    raise ImageError(
                        f"{what}: name {entry.name!r} after {before!r}: not a name, or not in order"
                    )
                before = entry.name
                yield entry

    def children(self, inode: Inode) -> Iterator[tuple[bytes, Inode]]:
        """Names and inodes in a directory, by name, without "." and ".."."""
        for entry in self.dirents(inode):
            if entry.name in (b".", b".."):
                continue
            child = self.inode(entry.nid)
            if entry.type not in (child.type, FileType.UNKNOWN):
                raise ImageError(
                    f"directory {inode.nid}: {entry.name!r} is a {entry.type.name.lower()} here "
                    f"and a {child.type.name.lower()} in inode {child.nid}"
                )
            yield entry.name, child

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """All paths and inodes, the root (path "/") first, a directory before what is in it.

        Ends in ImageError where a directory is met twice, lies too deep, or where entries share
        their bytes so that there are more of them than the bootstrap has room for.
        """
        room = len(self._memory) // DIRENT_BYTES
        root = self.root
        seen = {root.nid}
        yield b"/", root
        unfinished = [(b"/", self.children(root))]
        while unfinished:
            base, children = unfinished[-1]
            for name, inode in children:
                path = base + name
                room -= 1
                if room < 0:
                    raise ImageError(f"{path!r}: more entries than the bootstrap has room for")
                yield path, inode
                if inode.type is FileType.DIRECTORY:
                    if inode.nid in seen or len(unfinished) >= MAX_DEPTH:
                        raise ImageError(
                            f"{path!r}: directory {inode.nid} is met twice or lies deeper than "
                            f"{MAX_DEPTH}"
                        )
                    seen.add(inode.nid)
                    unfinished.append((path + b"/", self.children(inode)))
                    break
            else:
                unfinished.pop()

    def read_link(self, inode: Inode) -> bytes:
        """Where a symbolic link points to."""
        what = f"symbolic link {inode.nid}"
        if inode.type is not FileType.SYMLINK or not 0 < inode.size <= MAX_TARGET_BYTES:
            raise ImageError(f"{what}: not one, or of {inode.size} bytes")
        target = b"".join(self._flat_data(inode, what))
        if b"\0" in target:
            raise ImageError(f"{what}: target {target!r} holds a NUL")
        return target

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Extended attributes: full names and values."""
        what = f"inode {inode.nid}: xattrs"
        area = self._slice(inode.offset + inode.head_bytes, inode.xattr_bytes, what)
        return unpack_xattrs(area, what)

    def chunks(self, inode: Inode) -> Iterator[ChunkIndex]:
        """Chunks of a regular file in order, `chunk_bytes` of it each (the last one the rest).

        Their number follows from the superblock's chunk size: the inode's may be larger, for the
        kernel's sake (one extent for a file that is contiguous in its blob).
        """
        what = f"file {inode.nid}"
        if inode.type is not FileType.REGULAR:
            raise ImageError(f"{what}: not a regular file")
        extent_bits = (inode.u & CHUNK_FORMAT_BITS) + BLOCK_BITS
        if inode.u & ~CHUNK_FORMAT_BITS != CHUNK_FORMAT_INDEXES:
            raise ImageError(f"{what}: chunk format {inode.u:#x} is none RAFS v6 has")
        count = -(-inode.size // self.chunk_bytes)
        if count and 1 << extent_bits < self.chunk_bytes:
            raise ImageError(f"{what}: chunks of 2^{extent_bits} bytes, less than the image's")
        indexes = self._slice(align_up(inode.tail_offset, 8), count * CHUNK_INDEX_BYTES, what)
        for position in range(count):
            index = ChunkIndex.unpack(indexes, position * CHUNK_INDEX_BYTES)
            size = min(self.chunk_bytes, inode.size - position * self.chunk_bytes)
            if not self._inside_blob(index, size):
                why = "lies beyond its blob" if index.blob_index < len(self.blobs) else "of no blob"
                raise ImageError(f"{what}: chunk {position}: {index} {why}")
            yield index

    def chunk_table(self, blob_index: int | None = None) -> Iterator[ChunkEntry]:
        """Entries of the chunk table, of one blob or of all, in the table's order."""
        start = self.extended.chunk_table_offset
        table = self._memory[start : start + self.extended.chunk_table_size]
        for position, (owner,) in enumerate(_ENTRY_BLOB.iter_unpack(table)):
            if owner >= len(self.blobs):
                raise ImageError(f"chunk table: entry {position}: there is no blob {owner}")
            if blob_index is None or owner == blob_index:
                yield ChunkEntry.unpack(table, position * CHUNK_ENTRY_BYTES)

    def prefetch_nids(self) -> tuple[int, ...]:
        """Inodes whose data should come first, in order; the root's number means everything."""
        start, size = self.extended.prefetch_table_offset, self.extended.prefetch_table_size
        if not start:
            return ()
        nids = [nid for (nid,) in _PREFETCH_NID.iter_unpack(self._memory[start : start + size])]
        return tuple(nids[: nids.index(0)] if 0 in nids else nids)

    def _slice(self, offset: int, length: int, what: str) -> memoryview:
        if offset + length > len(self._memory):
            raise ImageError(
                f"{what}: [{offset}, {offset + length}) lies beyond the end of a bootstrap of "
                f"{len(self._memory)} bytes"
            )
        return self._memory[offset : offset + length]

    def _flat_data(self, inode: Inode, what: str) -> Iterator[memoryview]:
        whole, tail = inode.size, 0
        if inode.layout is DataLayout.FLAT_INLINE:
            tail = inode.size % BLOCK_BYTES
            whole -= tail
        data = self._slice(inode.u * BLOCK_BYTES, whole, what) if whole else memoryview(b"")
        for at in range(0, whole, BLOCK_BYTES):
            yield data[at : at + BLOCK_BYTES]
        if tail:
            if inode.tail_offset % BLOCK_BYTES + tail > BLOCK_BYTES:
                raise ImageError(f"{what}: inline data crosses a block: the kernel refuses it")
            yield self._slice(inode.tail_offset, tail, what)

    def _inside_blob(self, index: ChunkIndex, size: int) -> bool:
        if index.blob_index >= len(self.blobs):
            return False
        blob = self.blobs[index.blob_index]
        end = index.start_block * BLOCK_BYTES + size
        return end <= blob.uncompressed_size and index.chunk_index < blob.chunk_count


def _superblock(memory: memoryview) -> Superblock:
    superblock = Superblock.unpack(memory)
    if superblock.blkszbits != BLOCK_BITS:
        raise ImageError(
            f"superblock: blocks of 2^{superblock.blkszbits} bytes: an image of another page size "
            f"(or tarfs); only {BLOCK_BYTES} bytes can be mounted on demand"
        )
    if not superblock.feature_compat & COMPAT_RAFS_V6:
        raise ImageError("superblock: an EROFS image, but not RAFS v6 (its marker is missing)")
    if superblock.feature_incompat != Incompat.RAFS_V6:
        raise ImageError(
            f"superblock: incompatible features {superblock.feature_incompat:#x} instead of "
            f"{Incompat.RAFS_V6:#x}: not RAFS v6, or a newer one"
        )
    fixed = {
        "checksum": 0,
        "sb_extslots": 0,
        "xattr_blkaddr": 0,
        "compression_algorithms": 0,
        "devt_slotoff": DEVICES_OFFSET // DEVICE_BYTES,
        "dirblkbits": 0,
    }
    for field, value in fixed.items():
        if getattr(superblock, field) != value:
            raise ImageError(
                f"superblock: {field} is {getattr(superblock, field)} instead of {value}"
            )
    if not superblock.inos or b"\0" not in superblock.volume_name:
        raise ImageError("superblock: no inodes, or a volume name without an end")
    if superblock.extra_devices > MAX_BLOBS:
        raise ImageError(f"superblock: {superblock.extra_devices} blobs, more than {MAX_BLOBS}")
    if superblock.meta_blkaddr * BLOCK_BYTES >= len(memory):
        raise ImageError(f"superblock: metadata at block {superblock.meta_blkaddr}, beyond the end")
    return superblock


def _extended_superblock(memory: memoryview, device_count: int) -> ExtendedSuperblock:
    extended = ExtendedSuperblock.unpack(memory)
    _require_flags(extended.flags)
    chunk_size = extended.chunk_size
    if chunk_size & chunk_size - 1 or not MIN_CHUNK_BYTES <= chunk_size <= MAX_CHUNK_BYTES:
        raise ImageError(
            f"extended superblock: chunk size {chunk_size} is not a power of two from "
            f"{MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}"
        )
    tables = [
        ("blob table", extended.blob_table_offset, extended.blob_table_size, BLOB_ENTRY_BYTES),
        ("chunk table", extended.chunk_table_offset, extended.chunk_table_size, CHUNK_ENTRY_BYTES),
    ]
    if extended.prefetch_table_offset:
        start, size = extended.prefetch_table_offset, extended.prefetch_table_size
        tables.append(("prefetch table", start, size, _PREFETCH_NID.size))
    end = DEVICES_OFFSET + device_count * DEVICE_BYTES
    if end > len(memory):
        raise ImageError(f"superblock: {device_count} device slots do not fit the bootstrap")
    for name, start, size, unit in sorted(tables, key=lambda table: table[1]):
        if not size:
            continue
        if size % unit or start < end or start + size > len(memory):
            raise ImageError(
                f"{name} at [{start}, {start + size}): overlaps what is before it, is cut off, "
                f"or is not of whole entries of {unit} bytes"
            )
        end = start + size
    if extended.blob_table_size != device_count * BLOB_ENTRY_BYTES:
        raise ImageError(
            f"blob table of {extended.blob_table_size} bytes for {device_count} device slots: "
            f"each needs {BLOB_ENTRY_BYTES}"
        )
    return extended


def _require_flags(flags: RafsFlags) -> None:
    # Iterating flags leaves out those of several bits.
    unknown = flags.value & ~sum(flag.value for flag in [*RafsFlags, RafsFlags.RESERVED_COMPATIBLE])
    if unknown:
        raise ImageError(f"extended superblock: unknown flags {unknown:#x}: a newer RAFS?")
    if flags & RafsFlags.TARFS:
        raise ImageError("extended superblock: a tarfs image cannot be loaded on demand")
    if flags & RafsFlags.ENCRYPTION_AES128_XTS:
        raise ImageError("extended superblock: the image is encrypted, which is not supported")
    for what, known in (("compressor", COMPRESSOR_FLAGS), ("digest", DIGEST_FLAGS)):
        if sum(flag in flags for flag in known.values()) != 1:
            raise ImageError(f"extended superblock: flags {flags!r} name not one {what}")


def _blobs(
    memory: memoryview, extended: ExtendedSuperblock, count: int, own_blob_id: str | None
) -> tuple[tuple[DeviceSlot, ...], tuple[BlobEntry, ...]]:
    devices, blobs = [], []
    seen: set[str] = set()
    for index in range(count):
        slot = DeviceSlot.unpack(memory, DEVICES_OFFSET + index * DEVICE_BYTES)
        entry = BlobEntry.unpack(memory, extended.blob_table_offset + index * BLOB_ENTRY_BYTES)
        _require_entry(entry, slot, index, extended.chunk_size)
        if entry.blob_id == UNKNOWN_BLOB_ID and own_blob_id is not None:
            slot, entry = slot._replace(tag=own_blob_id), entry._replace(blob_id=own_blob_id)
        _require_id(entry.blob_id, seen)
        seen.add(entry.blob_id)
        devices.append(slot)
        blobs.append(entry)
    return tuple(devices), tuple(blobs)


def _require_id(blob_id: str, seen: set[str]) -> None:
    if blob_id == UNKNOWN_BLOB_ID:
        raise ImageError(
            "blob table: a layer's bootstrap that does not know its own blob's id: merge it, or "
            "say the id"
        )
    if not blob_id or "/" in blob_id or not blob_id.isprintable() or blob_id in (".", ".."):
        raise ImageError(f"blob table: {blob_id!r} cannot be a blob's id")
    if blob_id in seen:
        raise ImageError(f"blob table: blob {blob_id} is there twice")


def _require_entry(entry: BlobEntry, slot: DeviceSlot, index: int, chunk_size: int) -> None:
    where = f"blob {index} ({entry.blob_id})"
    if (slot.tag, slot.blocks * BLOCK_BYTES) != (entry.blob_id, entry.uncompressed_size):
        raise ImageError(
            f"{where}: device slot ({slot.tag}, {slot.blocks} blocks) and blob table "
            f"({entry.uncompressed_size} bytes) differ"
        )
    if not 0 < entry.uncompressed_size <= MAX_CACHE_BYTES:
        raise ImageError(f"{where}: a cache file of {entry.uncompressed_size} bytes")
    if entry.compressed_size > MAX_REMOTE_BYTES:
        raise ImageError(f"{where}: a blob file of {entry.compressed_size} bytes is over 1 TiB")
    if entry.blob_index != index or entry.chunk_size != chunk_size:
        raise ImageError(
            f"{where}: says it is blob {entry.blob_index} with chunks of {entry.chunk_size} bytes"
        )
    _require_features(entry, where)
    _require_chunk_info(entry, where)


def _require_features(entry: BlobEntry, where: str) -> None:
    refused = BlobFeatures.UNKNOWN_INCOMPATIBLE | BlobFeatures.TARFS | BlobFeatures.V5_WITHOUT_TABLE
    if entry.features & refused or not entry.features & BlobFeatures.ALIGNED:
        raise ImageError(
            f"{where}: features {entry.features.value:#x}: tarfs, chunks that are not aligned, or "
            "something newer: cannot be loaded on demand"
        )


def _require_chunk_info(entry: BlobEntry, where: str) -> None:
    features, size = entry.features, entry.ci_uncompressed_size
    has_table = features & (BlobFeatures.BATCH | BlobFeatures.ZRAN | BlobFeatures.ENCRYPTED)
    version_2 = bool(features & BlobFeatures.CHUNK_INFO_V2)
    array = entry.chunk_count * (INFO_V2_BYTES if version_2 else INFO_V1_BYTES)
    counted = (
        size >= array if has_table or features & BlobFeatures.CHUNKDICT_GENERATED else size == array
    )
    if not counted or entry.chunk_count > MAX_CHUNKS or (has_table and not version_2):
        raise ImageError(
            f"{where}: {size} bytes of chunk infos for {entry.chunk_count} chunks with features "
            f"{features.value:#x}"
        )
    end = entry.ci_offset + entry.ci_compressed_size + META_HEADER_BYTES
    # Builders before 2.2 counted chunk data only, and of ref images the meta is another blob.
    whole_file = BlobFeatures.CAP_TAR_TOC in features and BlobFeatures.SEPARATE not in features
    if entry.ci_compressed_size > size or (whole_file and end > entry.compressed_size):
        raise ImageError(
            f"{where}: chunk infos at [{entry.ci_offset}, {end}) of {entry.compressed_size} bytes"
        )

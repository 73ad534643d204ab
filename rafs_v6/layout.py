"""On-disk structures of RAFS v6: one tuple per structure, packed exactly as the field writes them.

A RAFS v6 bootstrap is an EROFS image of metadata, so the names of its fields are those of the
kernel's `fs/erofs/erofs_fs.h`; the rest (extended superblock, blob and chunk tables, blob meta,
table of contents) are RAFS's own. Everything is little-endian. Reserved bytes are written as
zeros and ignored when read: old builders left garbage in some of them.

`unpack` takes any buffer and an offset in bytes and raises ImageError when the structure does not
fit or says something no such structure can say; whether it makes sense *in its image* is for
`rafs_v6.bootstrap` and `rafs_v6.blob`.
"""

from __future__ import annotations

import enum
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeAlias, TypeVar

from rafs_v6 import ImageError

Memory: TypeAlias = bytes | bytearray | memoryview

BLOCK_BITS = 12
BLOCK_BYTES = 1 << BLOCK_BITS
NID_BYTES = 32
"""Inodes live at multiples of this from the metadata's start; their nid is the multiple."""
SUPERBLOCK_OFFSET = 1024
EXTENDED_OFFSET = 1152
DEVICES_OFFSET = 1408
META_HEADER_BYTES = 4096
TAIL_HEADER_BYTES = 512
DIGEST_BYTES = 32
BLOB_ID_BYTES = 64
MAX_BLOBS = 254
MAX_CHUNKS = (1 << 24) - 1
MAX_REMOTE_BYTES = 1 << 40
MAX_CACHE_BYTES = 1 << 44
MIN_CHUNK_BYTES = BLOCK_BYTES
MAX_CHUNK_BYTES = 1 << 24
MAX_PREFETCH_NIDS = 1 << 20
"""Most entries of a prefetch table: what names more files recommends nothing."""
UNKNOWN_BLOB_ID = "x" * BLOB_ID_BYTES
"""What a builder writes for a blob that will hold the very bootstrap that names it."""

SUPERBLOCK_MAGIC = 0xE0F5E1E2
META_MAGIC = 0xB10BB10B
COMPAT_RAFS_V6 = 0x40000000


class Incompat(enum.IntFlag):
    """EROFS features without which a kernel must refuse the image: RAFS v6 has exactly these."""

    CHUNKED_FILE = 0x4
    DEVICE_TABLE = 0x8
    RAFS_V6 = CHUNKED_FILE | DEVICE_TABLE


class Compressor(enum.IntEnum):
    NONE = 0
    LZ4_BLOCK = 1
    GZIP = 2
    ZSTD = 3


class Digest(enum.IntEnum):
    BLAKE3 = 0
    SHA256 = 1


class RafsFlags(enum.IntFlag):
    """Flags of the extended superblock."""

    COMPRESSOR_NONE = 0x1
    COMPRESSOR_LZ4_BLOCK = 0x2
    DIGEST_BLAKE3 = 0x4
    DIGEST_SHA256 = 0x8
    EXPLICIT_UIDGID = 0x10
    HAS_XATTR = 0x20
    COMPRESSOR_GZIP = 0x40
    COMPRESSOR_ZSTD = 0x80
    INLINED_CHUNK_DIGEST = 0x100
    TARFS = 0x200
    ENCRYPTION_NONE = 0x01000000
    ENCRYPTION_AES128_XTS = 0x02000000
    RESERVED_COMPATIBLE = 0xFC000000


COMPRESSOR_FLAGS: Mapping[Compressor, RafsFlags] = {
    Compressor.NONE: RafsFlags.COMPRESSOR_NONE,
    Compressor.LZ4_BLOCK: RafsFlags.COMPRESSOR_LZ4_BLOCK,
    Compressor.GZIP: RafsFlags.COMPRESSOR_GZIP,
    Compressor.ZSTD: RafsFlags.COMPRESSOR_ZSTD,
}
DIGEST_FLAGS: Mapping[Digest, RafsFlags] = {
    Digest.BLAKE3: RafsFlags.DIGEST_BLAKE3,
    Digest.SHA256: RafsFlags.DIGEST_SHA256,
}


class BlobFeatures(enum.IntFlag):
    """Features of a blob: in the bootstrap's blob table and, again, in the blob's own header."""

    ALIGNED = 0x1
    INLINED_FS_META = 0x2
    CHUNK_INFO_V2 = 0x4
    ZRAN = 0x8
    SEPARATE = 0x10
    INLINED_CHUNK_DIGEST = 0x20
    TARFS = 0x40
    BATCH = 0x80
    ENCRYPTED = 0x100
    CHUNKDICT_GENERATED = 0x200
    SEPARATED_WITH_PREFETCH_FILES = 0x400
    EXTERNAL = 0x800
    UNKNOWN_INCOMPATIBLE = 0xF000
    HAS_TAR_HEADER = 0x10000000
    HAS_TOC = 0x20000000
    CAP_TAR_TOC = 0x40000000
    V5_WITHOUT_TABLE = 0x80000000


class ChunkFlags(enum.IntFlag):
    """Flags of a chunk table entry (`ChunkEntry`)."""

    COMPRESSED = 0x1
    HOLE = 0x2
    ENCRYPTED = 0x4
    BATCH = 0x8
    HAS_CRC32 = 0x10


class ChunkInfoFlags(enum.IntFlag):
    """Flags of a chunk info, version 2 (`ChunkInfo`)."""

    COMPRESSED = 0x1
    ZRAN = 0x2
    BATCH = 0x4
    ENCRYPTED = 0x8
    HAS_CRC32 = 0x10


class TocFlags(enum.IntFlag):
    """How the data of a table-of-contents entry is stored: exactly one."""

    UNCOMPRESSED = 0x1
    ZSTD = 0x2
    LZ4_BLOCK = 0x4


TOC_FLAGS: Mapping[Compressor, TocFlags] = {
    Compressor.NONE: TocFlags.UNCOMPRESSED,
    Compressor.ZSTD: TocFlags.ZSTD,
    Compressor.LZ4_BLOCK: TocFlags.LZ4_BLOCK,
}


class DataLayout(enum.IntEnum):
    """Where the data of an inode is; 1 and 3 are EROFS's own compression, never used by RAFS."""

    FLAT_PLAIN = 0
    FLAT_INLINE = 2
    CHUNK_BASED = 4


class FileType(enum.IntEnum):
    """File type of a directory entry."""

    UNKNOWN = 0
    REGULAR = 1
    DIRECTORY = 2
    CHARACTER = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7


FILE_TYPES: Mapping[int, FileType] = {
    stat.S_IFREG: FileType.REGULAR,
    stat.S_IFDIR: FileType.DIRECTORY,
    stat.S_IFCHR: FileType.CHARACTER,
    stat.S_IFBLK: FileType.BLOCK,
    stat.S_IFIFO: FileType.FIFO,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFLNK: FileType.SYMLINK,
}
"""File types by the type bits of a mode."""

CHUNK_FORMAT_INDEXES = 0x20
"""Bit of a regular file's `i_u`: the chunks are described by 8-byte indexes."""
CHUNK_FORMAT_BITS = 0x1F

XATTR_PREFIXES: Mapping[int, bytes] = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_ACL_INDEXES = frozenset({2, 3})

_SUPERBLOCK = struct.Struct("<4xIIBBHQQIIII16s16sIHHHB37x")
_EXTENDED = struct.Struct("<QQIIQQQI204x")
_DEVICE = struct.Struct("<64sII56x")
_BLOB = struct.Struct("<64sIIIIIIQQIIQQQ32s32sQQI36x")
_COMPACT = struct.Struct("<HHHHI4xIIHH4x")
_INODE = struct.Struct("<HHH2xQIIIIqII16x")
_DIRENT = struct.Struct("<QHBx")
_CHUNK_INDEX = struct.Struct("<HHI")
_CHUNK_ENTRY = struct.Struct("<32sIIIIQQQII")
_XATTR_HEADER = struct.Struct("<IB7x")
_XATTR_ENTRY = struct.Struct("<BBH")
_TOC_ENTRY = struct.Struct("<I4x16s32sQQQ48x")
_META_HEADER = struct.Struct("<4xIIIQQQQQI4032x4x")
_INFO_V1 = struct.Struct("<QQ")
_INFO_V2 = struct.Struct("<QQQ")
_U32 = struct.Struct("<I")

SUPERBLOCK_BYTES = _SUPERBLOCK.size
EXTENDED_BYTES = _EXTENDED.size
DEVICE_BYTES = _DEVICE.size
BLOB_ENTRY_BYTES = _BLOB.size
COMPACT_INODE_BYTES = _COMPACT.size
INODE_BYTES = _INODE.size
DIRENT_BYTES = _DIRENT.size
CHUNK_INDEX_BYTES = _CHUNK_INDEX.size
CHUNK_ENTRY_BYTES = _CHUNK_ENTRY.size
XATTR_HEADER_BYTES = _XATTR_HEADER.size
TOC_ENTRY_BYTES = _TOC_ENTRY.size
INFO_V1_BYTES = _INFO_V1.size
INFO_V2_BYTES = _INFO_V2.size


def align_up(value: int, unit: int = BLOCK_BYTES) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def align_down(value: int, unit: int = BLOCK_BYTES) -> int:
    """The greatest multiple of `unit` that is not above `value`."""
    return value // unit * unit


def _fields(codec: struct.Struct, memory: Memory, offset: int, what: str) -> tuple[Any, ...]:
    try:
        return codec.unpack_from(memory, offset)
    except struct.error:
        raise ImageError(
            f"{what} at offset {offset}: {codec.size} bytes needed, "
            f"{max(len(memory) - offset, 0)} there: truncated or damaged, fetch it again"
        ) from None


_Code = TypeVar("_Code", bound=enum.IntEnum)


def _code(codes: type[_Code], value: int, what: str) -> _Code:
    try:
        return codes(value)
    except ValueError:
        known = ", ".join(f"{code.value} {code.name.lower()}" for code in codes)
        raise ImageError(f"{what}: unknown value {value} (known: {known})") from None


def _unpack_id(raw: bytes, what: str) -> str:
    name = raw.rstrip(b"\0")
    if b"\0" in name or not name.isascii():
        raise ImageError(f"{what}: blob id {raw!r} is not ASCII padded with NUL")
    return name.decode("ascii")


def _pack_id(blob_id: str) -> bytes:
    if not blob_id.isascii() or not 0 < len(blob_id) <= BLOB_ID_BYTES:
        raise ImageError(f"blob id {blob_id!r}: 1 to {BLOB_ID_BYTES} ASCII characters needed")
    return blob_id.encode("ascii")


class Superblock(NamedTuple):
    """EROFS superblock, 128 bytes at offset 1024; defaults are what RAFS always writes."""

    root_nid: int
    inos: int
    blocks: int
    meta_blkaddr: int
    extra_devices: int
    checksum: int = 0
    feature_compat: int = COMPAT_RAFS_V6
    blkszbits: int = BLOCK_BITS
    sb_extslots: int = 0
    build_time: int = 0
    build_time_nsec: int = 0
    xattr_blkaddr: int = 0
    uuid: bytes = bytes(16)
    volume_name: bytes = bytes(16)
    feature_incompat: int = Incompat.RAFS_V6.value
    compression_algorithms: int = 0
    devt_slotoff: int = DEVICES_OFFSET // _DEVICE.size
    dirblkbits: int = 0

    @classmethod
    def unpack(cls, memory: Memory, offset: int = SUPERBLOCK_OFFSET) -> Self:
        f = _fields(_SUPERBLOCK, memory, offset, "superblock")
        (magic,) = _U32.unpack_from(memory, offset)
        if magic != SUPERBLOCK_MAGIC:
            raise ImageError(
                f"superblock at offset {offset}: magic {magic:#010x} instead of "
                f"{SUPERBLOCK_MAGIC:#010x}: not an EROFS image (RAFS v5, or not a bootstrap?)"
            )
        return cls(
            checksum=f[0],
            feature_compat=f[1],
            blkszbits=f[2],
            sb_extslots=f[3],
            root_nid=f[4],
            inos=f[5],
            build_time=f[6],
            build_time_nsec=f[7],
            blocks=f[8],
            meta_blkaddr=f[9],
            xattr_blkaddr=f[10],
            uuid=f[11],
            volume_name=f[12],
            feature_incompat=f[13],
            compression_algorithms=f[14],
            extra_devices=f[15],
            devt_slotoff=f[16],
            dirblkbits=f[17],
        )

    def pack(self) -> bytes:
        packed = _SUPERBLOCK.pack(
            self.checksum,
            self.feature_compat,
            self.blkszbits,
            self.sb_extslots,
            self.root_nid,
            self.inos,
            self.build_time,
            self.build_time_nsec,
            self.blocks,
            self.meta_blkaddr,
            self.xattr_blkaddr,
            self.uuid,
            self.volume_name,
            self.feature_incompat,
            self.compression_algorithms,
            self.extra_devices,
            self.devt_slotoff,
            self.dirblkbits,
        )
        return _U32.pack(SUPERBLOCK_MAGIC) + packed[4:]


class ExtendedSuperblock(NamedTuple):
    """RAFS's own superblock, 256 bytes at offset 1152. Offsets and sizes are in bytes."""

    flags: RafsFlags
    blob_table_offset: int
    blob_table_size: int
    chunk_size: int
    chunk_table_offset: int
    chunk_table_size: int
    prefetch_table_offset: int = 0
    prefetch_table_size: int = 0

    @classmethod
    def unpack(cls, memory: Memory, offset: int = EXTENDED_OFFSET) -> Self:
        flags, *rest = _fields(_EXTENDED, memory, offset, "extended superblock")
        return cls(RafsFlags(flags), *rest)

    def pack(self) -> bytes:
        return _EXTENDED.pack(*self)


class DeviceSlot(NamedTuple):
    """EROFS device slot, 128 bytes: `blocks` of 4 KiB that the kernel finds under `tag`."""

    tag: str
    blocks: int
    mapped_blkaddr: int

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        tag, blocks, mapped = _fields(_DEVICE, memory, offset, "device slot")
        return cls(_unpack_id(tag, f"device slot at offset {offset}"), blocks, mapped)

    def pack(self) -> bytes:
        return _DEVICE.pack(_pack_id(self.tag), self.blocks, self.mapped_blkaddr)


class BlobEntry(NamedTuple):
    """Blob table entry, 256 bytes. Sizes and offsets in bytes.

    `compressed_size` is the whole blob file, meta and table of contents included;
    `uncompressed_size` is the cache file. `ci` is the chunk info array in the blob file.
    """

    blob_id: str
    blob_index: int
    chunk_size: int
    chunk_count: int
    compressor: Compressor
    digester: Digest
    features: BlobFeatures
    compressed_size: int
    uncompressed_size: int
    toc_size: int
    ci_compressor: Compressor
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    toc_digest: bytes = bytes(DIGEST_BYTES)
    meta_digest: bytes = bytes(DIGEST_BYTES)
    meta_size: int = 0
    cipher_iv: int = 0
    cipher: int = 0

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        f = _fields(_BLOB, memory, offset, "blob table entry")
        where = f"blob table entry at offset {offset}"
        return cls(
            _unpack_id(f[0], where),
            f[1],
            f[2],
            f[3],
            _code(Compressor, f[4], f"{where}: compressor"),
            _code(Digest, f[5], f"{where}: digest"),
            BlobFeatures(f[6]),
            f[7],
            f[8],
            f[9],
            _code(Compressor, f[10], f"{where}: chunk info compressor"),
            *f[11:],
        )

    def pack(self) -> bytes:
        return _BLOB.pack(_pack_id(self.blob_id), *self[1:])


class CompactInode(NamedTuple):
    """EROFS compact inode, 32 bytes: no time, 16-bit owner, 32-bit size."""

    format: int
    xattr_icount: int
    mode: int
    nlink: int
    size: int
    u: int
    ino: int
    uid: int
    gid: int

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        return cls(*_fields(_COMPACT, memory, offset, "compact inode"))

    def pack(self) -> bytes:
        return _COMPACT.pack(*self)


class ExtendedInode(NamedTuple):
    """EROFS extended inode, 64 bytes. `mtime` in seconds, may be before 1970."""

    format: int
    xattr_icount: int
    mode: int
    size: int
    u: int
    ino: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int
    nlink: int

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        return cls(*_fields(_INODE, memory, offset, "extended inode"))

    def pack(self) -> bytes:
        return _INODE.pack(*self)


def pack_nids(nids: Sequence[int]) -> bytes:
    """A prefetch table. Raises ImageError for what none can say."""
    if len(nids) > MAX_PREFETCH_NIDS:
        raise ImageError(
            f"{len(nids)} files to prefetch, {MAX_PREFETCH_NIDS} can be: name directories instead"
        )
    if not all(0 < nid <= 0xFFFFFFFF for nid in nids):
        raise ImageError("a prefetch table has inodes from 1 to 2^32 - 1 only")
    return struct.pack(f"<{len(nids)}I", *nids)


def inode_format(layout: DataLayout, *, extended: bool) -> int:
    """`i_format`: bit 0 the inode's form, bits 1–3 its data layout."""
    return layout << 1 | extended


def chunk_format(extent_bytes: int) -> int:
    """`i_u` of a regular file whose chunks the kernel may take for `extent_bytes` each."""
    return CHUNK_FORMAT_INDEXES | (extent_bytes.bit_length() - 1 - BLOCK_BITS)


def pack_rdev(major: int, minor: int) -> int:
    """`i_u` of a device node, as the kernel's `new_encode_dev`."""
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def unpack_rdev(rdev: int) -> tuple[int, int]:
    """Major and minor number, as the kernel's `new_decode_dev`."""
    return (rdev & 0xFFF00) >> 8, (rdev & 0xFF) | (rdev >> 12 & 0xFFF00)


class ChunkIndex(NamedTuple):
    """One chunk of a regular file, 8 bytes: which blob, which of its chunks, which block of the
    cache file it starts at."""

    blob_index: int
    chunk_index: int
    start_block: int

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        low, high, start_block = _fields(_CHUNK_INDEX, memory, offset, "chunk index")
        device = high & 0xFF
        if not device:
            raise ImageError(f"chunk index at offset {offset}: device 0 is the bootstrap itself")
        return cls(device - 1, low | high >> 8 << 16, start_block)

    def pack(self) -> bytes:
        high = self.blob_index + 1 | self.chunk_index >> 16 << 8
        return _CHUNK_INDEX.pack(self.chunk_index & 0xFFFF, high, self.start_block)


class ChunkEntry(NamedTuple):
    """Chunk table entry, 80 bytes; the table is sorted by digest, then blob index. `flags` are
    `ChunkFlags`, as a plain number: there are hundreds of thousands.

    `compressed_offset` is in the blob file, `uncompressed_offset` in the cache file,
    `file_offset` in the last file that has the chunk; all in bytes.
    """

    digest: bytes
    blob_index: int
    flags: int
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int
    file_offset: int
    chunk_index: int
    crc32: int = 0

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        return cls(*_fields(_CHUNK_ENTRY, memory, offset, "chunk table entry"))

    def pack(self) -> bytes:
        return _CHUNK_ENTRY.pack(*self)


class TocEntry(NamedTuple):
    """Entry of a blob's table of contents, 128 bytes.

    `digest` is sha256 of the uncompressed content; for `image.blob` it is that of the chunk data
    followed by its tail-tar header, and `uncompressed_size` is the cache file's.
    """

    flags: TocFlags
    name: str
    digest: bytes
    compressed_offset: int
    compressed_size: int
    uncompressed_size: int

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        flags, raw, digest, *sizes = _fields(_TOC_ENTRY, memory, offset, "ToC entry")
        stored, name = TocFlags(flags & 0xF), raw.rstrip(b"\0")
        if stored not in TOC_FLAGS.values() or b"\0" in name or not name.isascii():
            raise ImageError(
                f"ToC entry at offset {offset}: unusable flags {flags:#x} or name {raw!r}"
            )
        return cls(stored, name.decode("ascii"), digest, *sizes)

    def pack(self) -> bytes:
        return _TOC_ENTRY.pack(self.flags, self.name.encode("ascii"), *self[2:])


_GNU_MAGIC = b"ustar  \0"
_REGULAR = b"0"


class TailHeader(NamedTuple):
    """512-byte header of a "tail tar", where each header *follows* its data and nothing is padded.

    Looks like GNU tar with mode, owner and group all NUL. Its bytes matter: they are hashed.
    """

    name: str
    size: int

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        raw = bytes(memory[offset : offset + TAIL_HEADER_BYTES])
        name, size = raw[:100].rstrip(b"\0"), raw[124:135]
        blank = raw[:148] + b" " * 8 + raw[156:]
        if (
            len(raw) != TAIL_HEADER_BYTES
            or raw[257:265] != _GNU_MAGIC
            or raw[156:157] != _REGULAR
            or raw[148:155] != b"%07o" % sum(blank)
            or size.strip(b"01234567")
            or b"\0" in name
            or not name.isascii()
        ):
            raise ImageError(
                f"tail-tar header at offset {offset}: not a GNU tar header of a regular file"
            )
        return cls(name.decode("ascii"), int(size, 8))

    def pack(self) -> bytes:
        raw = bytearray(TAIL_HEADER_BYTES)
        name = self.name.encode("ascii")
        if len(name) > 100 or not 0 <= self.size < 8**11:
            raise ImageError(f"tail-tar header {self.name!r}: size {self.size} or name too long")
        raw[: len(name)] = name
        raw[124:135] = b"%011o" % self.size
        raw[136:147] = b"0" * 11
        raw[148:156] = b" " * 8
        raw[156:157] = _REGULAR
        raw[257:265] = _GNU_MAGIC
        raw[148:156] = b"%07o\0" % sum(raw)
        return bytes(raw)


class MetaHeader(NamedTuple):
    """Header of a blob's chunk info array, 4096 bytes right behind it (both as stored).

    `table` is the zran or batch context table inside the uncompressed array.
    """

    features: BlobFeatures
    ci_compressor: Compressor
    ci_entries: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    table_offset: int = 0
    table_size: int = 0
    table_entries: int = 0

    @classmethod
    def unpack(cls, memory: Memory, offset: int = 0) -> Self:
        features, compressor, *rest = _fields(_META_HEADER, memory, offset, "blob meta header")
        magics = [
            _U32.unpack_from(memory, offset + at)[0] for at in (0, META_HEADER_BYTES - _U32.size)
        ]
        if magics != [META_MAGIC, META_MAGIC]:
            raise ImageError(
                f"blob meta header at offset {offset}: magics {magics[0]:#010x} and "
                f"{magics[1]:#010x} instead of {META_MAGIC:#010x}"
            )
        compressor = _code(Compressor, compressor, "blob meta header: chunk info compressor")
        return cls(BlobFeatures(features), compressor, *rest)

    def pack(self) -> bytes:
        magic = _U32.pack(META_MAGIC)
        return magic + _META_HEADER.pack(*self)[4:-4] + magic


class ChunkInfo(NamedTuple):
    """Where one chunk is: `size` bytes at `offset` of the cache file, `remote_size` bytes at
    `remote_offset` of the blob file.

    Version 1 (16 bytes) knows nothing else: a chunk is compressed if its sizes differ. Version 2
    (24 bytes) has flags (`ChunkInfoFlags`) and `data`, whose low half may be a crc32c.
    """

    offset: int
    size: int
    remote_offset: int
    remote_size: int
    flags: int = 0
    data: int = 0

    @property
    def compressed(self) -> bool:
        return bool(self.flags & ChunkInfoFlags.COMPRESSED.value)

    @classmethod
    def unpack_v1(cls, memory: Memory, offset: int = 0) -> Self:
        near, far = _fields(_INFO_V1, memory, offset, "chunk info")
        size = (near >> 44 | (near >> 8 & 0xF) << 20) + 1
        remote_size = (far >> 44 | (far >> 40 & 0xF) << 20) + 1
        flags = ChunkInfoFlags.COMPRESSED.value if size != remote_size else 0
        return cls(near & 0xFFFFFFFF000, size, far & 0xFFFFFFFFFF, remote_size, flags)

    def pack_v1(self) -> bytes:
        size, remote_size = self.size - 1, self.remote_size - 1
        return _INFO_V1.pack(
            self.offset | (size & 0xFFFFF) << 44 | size >> 20 << 8,
            self.remote_offset | (remote_size & 0xFFFFF) << 44 | remote_size >> 20 << 40,
        )

    @classmethod
    def unpack_v2(cls, memory: Memory, offset: int = 0) -> Self:
        near, far, data = _fields(_INFO_V2, memory, offset, "chunk info")
        return cls(
            (near & 0xFFFFFFFF) << BLOCK_BITS,
            (near >> 32 & 0xFFFFFF) + 1,
            far & 0xFFFFFFFFFF,
            far >> 40,
            near >> 56,
            data,
        )

    def pack_v2(self) -> bytes:
        return _INFO_V2.pack(
            self.offset >> BLOCK_BITS | self.size - 1 << 32 | self.flags << 56,
            self.remote_offset | self.remote_size << 40,
            self.data,
        )


class Dirent(NamedTuple):
    """Directory entry: 12 bytes at a block's start, its name later in the same block."""

    name: bytes
    nid: int
    type: FileType


def dirent_bytes(name: bytes) -> int:
    """What an entry takes of its directory block."""
    return DIRENT_BYTES + len(name)


def pack_dirents(entries: Iterable[Dirent]) -> bytes:
    """One directory block of entries already in order, at most 4096 bytes, not padded."""
    block = list(entries)
    at, heads = len(block) * DIRENT_BYTES, bytearray()
    for name, nid, kind in block:
        heads += _DIRENT.pack(nid, at, kind)
        at += len(name)
    return bytes(heads) + b"".join(entry.name for entry in block)


def unpack_dirents(block: Memory, where: str = "directory block") -> Iterator[Dirent]:
    """Entries of one directory block, as they stand there. Raises ImageError naming `where`."""
    heads = [_fields(_DIRENT, block, 0, where)]
    first, end = heads[0][1], len(block)
    if not DIRENT_BYTES <= first <= end or first % DIRENT_BYTES:
        raise ImageError(f"{where}: names start at {first}, not behind whole entries")
    heads += [_DIRENT.unpack_from(block, at) for at in range(DIRENT_BYTES, first, DIRENT_BYTES)]
    ends = [head[1] for head in heads[1:]] + [end]
    for (nid, start, kind), stop in zip(heads, ends, strict=True):
        if not start < stop <= end:
            raise ImageError(f"{where}: name at [{start}, {stop}) of a block of {end} bytes")
        name = bytes(block[start:stop])
        if stop == end:
            name = name.split(b"\0", 1)[0]
        yield Dirent(name, nid, _code(FileType, kind, f"{where}: entry {name!r}: file type"))


def pack_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    """The xattr area behind an inode, sorted by full name; empty when there are none.

    Raises ImageError for a name EROFS has no prefix for, or a name or value that is too long.
    """
    if not xattrs:
        return b""
    return _XATTR_HEADER.pack(0, 0) + b"".join(
        _pack_xattr(name, value) for name, value in sorted(xattrs.items())
    )


def _pack_xattr(name: bytes, value: bytes) -> bytes:
    if len(name) > 255 or len(value) > 0xFFFF:
        raise ImageError(f"xattr {name!r}: name over 255 or value over 65535 bytes")
    for index, prefix in XATTR_PREFIXES.items():
        if name == prefix if index in _ACL_INDEXES else name.startswith(prefix):
            suffix = name[len(prefix) :]
            entry = _XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
            return entry.ljust(align_up(len(entry), 4), b"\0")
    raise ImageError(f"xattr {name!r}: no such prefix in EROFS (user, trusted, security, ACLs)")


def xattr_icount(area_bytes: int) -> int:
    """`i_xattr_icount` of an inode with that many bytes of xattrs, as `pack_xattrs` returns."""
    if not area_bytes:
        return 0
    return (area_bytes - XATTR_HEADER_BYTES) // 4 + 1


def xattr_area_bytes(icount: int) -> int:
    """Bytes of xattrs behind an inode whose `i_xattr_icount` is given."""
    return XATTR_HEADER_BYTES + 4 * (icount - 1) if icount else 0


def unpack_xattrs(area: Memory, where: str = "xattrs") -> dict[bytes, bytes]:
    """Full names and values of an inode's xattr area. Raises ImageError naming `where`."""
    xattrs: dict[bytes, bytes] = {}
    if not area:
        return xattrs
    _, shared = _fields(_XATTR_HEADER, area, 0, where)
    if shared:
        raise ImageError(f"{where}: {shared} shared xattrs: RAFS has none")
    at = XATTR_HEADER_BYTES
    while at < len(area):
        name_len, index, value_len = _fields(_XATTR_ENTRY, area, at, where)
        start = at + _XATTR_ENTRY.size
        middle, end = start + name_len, start + name_len + value_len
        if index not in XATTR_PREFIXES or end > len(area):
            raise ImageError(f"{where}: entry at {at}: unknown prefix {index} or beyond the area")
        name = XATTR_PREFIXES[index] + bytes(area[start:middle])
        if name in xattrs:
            raise ImageError(f"{where}: {name!r} is there twice")
        xattrs[name] = bytes(area[middle:end])
        at = align_up(end, 4)
    return xattrs

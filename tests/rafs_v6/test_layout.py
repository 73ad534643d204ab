from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafs_v6 import ImageError
from rafs_v6.layout import (
    TOC_FLAGS,
    BlobEntry,
    BlobFeatures,
    ChunkEntry,
    ChunkIndex,
    ChunkInfo,
    ChunkInfoFlags,
    CompactInode,
    Compressor,
    DataLayout,
    DeviceSlot,
    Digest,
    Dirent,
    ExtendedInode,
    ExtendedSuperblock,
    FileType,
    MetaHeader,
    RafsFlags,
    Superblock,
    TailHeader,
    TocEntry,
    align_down,
    align_up,
    chunk_format,
    dirent_bytes,
    inode_format,
    pack_dirents,
    pack_rdev,
    pack_xattrs,
    unpack_dirents,
    unpack_rdev,
    unpack_xattrs,
    xattr_area_bytes,
    xattr_icount,
)


def uint(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, (1 << bits) - 1)


U8, U16, U32, U64 = uint(8), uint(16), uint(32), uint(64)
BYTES_16 = st.binary(min_size=16, max_size=16)
BYTES_32 = st.binary(min_size=32, max_size=32)
BLOB_IDS = st.text("0123456789abcdef", min_size=1, max_size=64)
BLOCKS = st.integers(0, (1 << 32) - 1).map(lambda block: block << 12)
SIZES = st.integers(1, 1 << 24)

STRUCTURES: dict[type[Any], st.SearchStrategy[Any]] = {
    Superblock: st.builds(
        Superblock,
        U16,
        U64,
        U32,
        U32,
        U16,
        U32,
        U32,
        U8,
        U8,
        U64,
        U32,
        U32,
        BYTES_16,
        BYTES_16,
        U32,
        U16,
        U16,
        U8,
    ),
    ExtendedSuperblock: st.builds(
        ExtendedSuperblock, U64.map(RafsFlags), U64, U32, U32, U64, U64, U64, U32
    ),
    DeviceSlot: st.builds(DeviceSlot, BLOB_IDS, U32, U32),
    BlobEntry: st.builds(
        BlobEntry,
        BLOB_IDS,
        U32,
        U32,
        U32,
        st.sampled_from(Compressor),
        st.sampled_from(Digest),
        U32.map(BlobFeatures),
        U64,
        U64,
        U32,
        st.sampled_from(Compressor),
        U64,
        U64,
        U64,
        BYTES_32,
        BYTES_32,
        U64,
        U64,
        U32,
    ),
    CompactInode: st.builds(CompactInode, U16, U16, U16, U16, U32, U32, U32, U16, U16),
    ExtendedInode: st.builds(
        ExtendedInode,
        U16,
        U16,
        U16,
        U64,
        U32,
        U32,
        U32,
        U32,
        st.integers(-(1 << 63), (1 << 63) - 1),
        U32,
        U32,
    ),
    ChunkIndex: st.builds(ChunkIndex, st.integers(0, 253), uint(24), U32),
    ChunkEntry: st.builds(ChunkEntry, BYTES_32, U32, U32, U32, U32, U64, U64, U64, U32, U32),
    TocEntry: st.builds(
        TocEntry,
        st.sampled_from(list(TOC_FLAGS.values())),
        st.text("abc.", min_size=1, max_size=16),
        BYTES_32,
        U64,
        U64,
        U64,
    ),
    TailHeader: st.builds(
        TailHeader, st.text("abc.", min_size=1, max_size=100), st.integers(0, 8**11 - 1)
    ),
    MetaHeader: st.builds(
        MetaHeader,
        U32.map(BlobFeatures),
        st.sampled_from(Compressor),
        U32,
        U64,
        U64,
        U64,
        U64,
        U64,
        U32,
    ),
}
SIZES_ON_DISK = {
    Superblock: 128,
    ExtendedSuperblock: 256,
    DeviceSlot: 128,
    BlobEntry: 256,
    CompactInode: 32,
    ExtendedInode: 64,
    ChunkIndex: 8,
    ChunkEntry: 80,
    TocEntry: 128,
    TailHeader: 512,
    MetaHeader: 4096,
}


@pytest.mark.parametrize("structure", STRUCTURES)
@given(data=st.data())
def test_structures_come_back_as_they_were_packed(structure: Any, data: st.DataObject) -> None:
    """Unpacking what was packed, wherever it stands, gives the same fields."""
    value = data.draw(STRUCTURES[structure])
    packed = value.pack()
    assert len(packed) == SIZES_ON_DISK[structure]
    assert structure.unpack(b"\xff" * 8 + packed, 8) == value


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_truncated_structure_is_an_image_error(structure: Any) -> None:
    """One byte too few is an ImageError, never a struct.error."""
    with pytest.raises(ImageError):
        structure.unpack(bytes(SIZES_ON_DISK[structure] - 1), 0)


@pytest.mark.parametrize(
    ("structure", "offset"),
    [
        (Superblock, 1024),
        (ExtendedSuperblock, 1152),
        (DeviceSlot, 1408),
        (BlobEntry, 4096),
        (ExtendedInode, 12288),
        (ExtendedInode, 12448),
        (ChunkIndex, 12512),
        (ChunkEntry, 16384),
        (ChunkEntry, 16464),
    ],
)
def test_packing_gives_the_bytes_of_nydus_image(
    structure: Any, offset: int, nydus_bootstrap: bytes
) -> None:
    """What we pack from the fields of a foreign bootstrap are its very bytes."""
    size = SIZES_ON_DISK[structure]
    packed = structure.unpack(nydus_bootstrap, offset).pack()
    assert packed == nydus_bootstrap[offset : offset + size]


@pytest.mark.parametrize(
    ("name", "end"),
    [("rafs.blob.toc", 14554), ("blob.digest", 13530), ("blob.meta", 12954), ("image.blob", 8314)],
)
def test_tail_headers_have_the_bytes_of_nydus_image(name: str, end: int, nydus_blob: bytes) -> None:
    """Tail-tar headers are hashed, so every byte of ours must be that of the field's builder."""
    raw = nydus_blob[end - 512 : end]
    header = TailHeader.unpack(raw)
    assert header.name == name
    assert header.pack() == raw


def test_the_blob_meta_header_and_chunk_infos_have_the_bytes_of_nydus_image(
    nydus_blob: bytes,
) -> None:
    """So do the header of the chunk infos and the chunk infos themselves."""
    assert MetaHeader.unpack(nydus_blob, 8346).pack() == nydus_blob[8346:12442]
    infos = [ChunkInfo.unpack_v1(nydus_blob, at) for at in (8314, 8330)]
    assert infos == [
        ChunkInfo(0, 16931, 0, 4828, ChunkInfoFlags.COMPRESSED),
        ChunkInfo(20480, 13400, 4828, 2974, ChunkInfoFlags.COMPRESSED),
    ]
    assert b"".join(info.pack_v1() for info in infos) == nydus_blob[8314:8346]


def test_a_chunk_info_of_version_2_has_its_fields_where_the_field_has_them() -> None:
    """The first chunk of nydus's zran fixture: 1404 bytes at 0, from 649 at 184, at 1024 in it."""
    words = (1403 << 32 | 0x3 << 56, 184 | 649 << 40, 1024)
    raw = b"".join(word.to_bytes(8, "little") for word in words)
    flags = ChunkInfoFlags.COMPRESSED | ChunkInfoFlags.ZRAN
    assert ChunkInfo.unpack_v2(raw) == ChunkInfo(0, 1404, 184, 649, flags, 1024)
    assert ChunkInfo(0, 1404, 184, 649, flags, 1024).pack_v2() == raw


@given(BLOCKS, SIZES, uint(40), SIZES)
def test_chunk_infos_of_version_1_come_back(
    offset: int, size: int, remote_offset: int, remote_size: int
) -> None:
    """Both sizes up to 16 MiB, whose highest bits lie apart; compressed is what sizes say."""
    info = ChunkInfo.unpack_v1(ChunkInfo(offset, size, remote_offset, remote_size).pack_v1())
    assert info[:4] == (offset, size, remote_offset, remote_size)
    assert info.compressed == (size != remote_size)


@given(st.builds(ChunkInfo, BLOCKS, SIZES, uint(40), uint(24), U8, U64))
def test_chunk_infos_of_version_2_come_back(info: ChunkInfo) -> None:
    """Version 2 keeps all fields, unknown flags too."""
    assert ChunkInfo.unpack_v2(info.pack_v2()) == info


def test_chunk_index_hides_high_bits_above_the_device_id() -> None:
    """EROFS's device id is blob index + 1; the chunk index's bits 16–23 hide above it."""
    assert ChunkIndex(2, 0x123456, 7).pack() == bytes.fromhex("5634 0312 07000000")
    with pytest.raises(ImageError, match="device 0"):
        ChunkIndex.unpack(bytes(8))


@pytest.mark.parametrize(
    ("unit", "down", "value", "up"),
    [(4096, 0, 0, 0), (4096, 0, 1, 4096), (4096, 4096, 4096, 4096), (512 << 10, 0, 3, 512 << 10)],
)
def test_alignment(unit: int, down: int, value: int, up: int) -> None:
    """Aligned values stay; others go to the multiple below or above."""
    assert (align_down(value, unit), align_up(value, unit)) == (down, up)


def test_formats_of_inodes_and_chunks() -> None:
    """The very numbers that are on disk for the usual files."""
    assert inode_format(DataLayout.CHUNK_BASED, extended=True) == 0x9
    assert inode_format(DataLayout.FLAT_INLINE, extended=False) == 0x4
    assert chunk_format(1 << 20) == 0x28


@given(st.integers(0, 0xFFF), uint(20))
def test_device_numbers_come_back(major: int, minor: int) -> None:
    """Device numbers are the kernel's new encoding: 12 bits of major, 20 of minor."""
    rdev = pack_rdev(major, minor)
    assert unpack_rdev(rdev) == (major, minor)
    assert rdev == (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


@given(st.dictionaries(NAMES, st.tuples(U64, st.sampled_from(FileType)), min_size=1, max_size=20))
def test_directory_blocks_come_back_padded_or_not(entries: dict[bytes, Any]) -> None:
    """The last name of a block ends where the block does, or at the first NUL of its padding."""
    dirents = [Dirent(name, *entries[name]) for name in sorted(entries)]
    block = pack_dirents(dirents)
    assert len(block) == sum(dirent_bytes(entry.name) for entry in dirents)
    assert list(unpack_dirents(block)) == dirents
    assert list(unpack_dirents(block.ljust(4096, b"\0"))) == dirents


@given(st.binary(max_size=200))
def test_any_directory_block_decodes_or_is_an_image_error(block: bytes) -> None:
    """Hostile directory blocks raise ImageError or give names within the block."""
    try:
        entries = list(unpack_dirents(block))
    except ImageError:
        return
    assert sum(dirent_bytes(entry.name) for entry in entries) <= len(block)


XATTR_NAMES = st.one_of(
    st.sampled_from([b"system.posix_acl_access", b"system.posix_acl_default"]),
    st.tuples(st.sampled_from([b"user.", b"trusted.", b"security."]), st.binary(max_size=50)).map(
        b"".join
    ),
)


@given(st.dictionaries(XATTR_NAMES, st.binary(max_size=100), max_size=6))
def test_xattrs_come_back(xattrs: dict[bytes, bytes]) -> None:
    """Names and values survive, and the inode's count says how long the area is."""
    area = pack_xattrs(xattrs)
    assert unpack_xattrs(area) == xattrs
    assert xattr_area_bytes(xattr_icount(len(area))) == len(area)


def test_xattrs_are_on_disk_as_erofs_has_them() -> None:
    """Twelve bytes of header, then name length, prefix, value length, name, value, padding."""
    area = pack_xattrs({b"user.b": b"xyz", b"system.posix_acl_access": b"\x01"})
    assert area == (bytes(12) + b"\x00\x02\x01\x00" + b"\x01\0\0\0" + b"\x01\x01\x03\x00" + b"bxyz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"system.nfs4_acl", b""),
        (b"system.posix_acl_accessx", b""),
        (b"user." + b"x" * 251, b""),
        (b"user.x", bytes(65536)),
    ],
)
def test_xattrs_erofs_cannot_say_are_refused(name: bytes, value: bytes) -> None:
    """Unknown prefixes, names over 255 and values over 65535 bytes are an ImageError."""
    with pytest.raises(ImageError, match="xattr"):
        pack_xattrs({name: value})


@given(st.binary(max_size=120))
def test_any_xattr_area_decodes_or_is_an_image_error(area: bytes) -> None:
    """Hostile xattr areas raise ImageError and nothing else."""
    try:
        xattrs = unpack_xattrs(area)
    except ImageError:
        return
    assert sum(map(len, xattrs.values())) <= len(area)


def test_blob_ids_that_do_not_fit_are_refused() -> None:
    """Neither cut silently when packed nor guessed when read."""
    with pytest.raises(ImageError, match="blob id"):
        DeviceSlot("a" * 65, 1, 0).pack()
    with pytest.raises(ImageError, match="blob id"):
        DeviceSlot.unpack(b"a\0b".ljust(128, b"\0"))

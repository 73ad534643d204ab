import mmap
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafs_v6 import ImageError
from rafs_v6.bootstrap import MAX_DEPTH, Bootstrap
from rafs_v6.layout import (
    BLOCK_BYTES,
    EXTENDED_OFFSET,
    SUPERBLOCK_OFFSET,
    UNKNOWN_BLOB_ID,
    BlobEntry,
    BlobFeatures,
    ChunkIndex,
    CompactInode,
    Compressor,
    DataLayout,
    DeviceSlot,
    Digest,
    Dirent,
    ExtendedInode,
    ExtendedSuperblock,
    FileType,
    RafsFlags,
    Superblock,
    align_up,
    chunk_format,
    inode_format,
    pack_dirents,
    pack_rdev,
    pack_xattrs,
    xattr_icount,
)

META = 12288
ROOT, LIB, SYNC = 128, 133, 136
DIRECTORY = 0o40755
REGULAR = 0o100644
SYMLINK = 0o120777

Patch = Callable[[bytearray], None]


def patched(image: bytes, *patches: Patch) -> bytearray:
    memory = bytearray(image)
    for patch in patches:
        patch(memory)
    return memory


def setting(structure: Any, offset: int, **fields: object) -> Patch:
    def patch(memory: bytearray) -> None:
        packed = structure.unpack(memory, offset)._replace(**fields).pack()
        memory[offset : offset + len(packed)] = packed

    return patch


def superblock(**fields: object) -> Patch:
    return setting(Superblock, SUPERBLOCK_OFFSET, **fields)


def extended(**fields: object) -> Patch:
    return setting(ExtendedSuperblock, EXTENDED_OFFSET, **fields)


def slot(**fields: object) -> Patch:
    return setting(DeviceSlot, 1408, **fields)


def entry(**fields: object) -> Patch:
    return setting(BlobEntry, 4096, **fields)


def named(blob_id: str) -> tuple[Patch, Patch]:
    return slot(tag=blob_id), entry(blob_id=blob_id)


def inode(nid: int, **fields: object) -> Patch:
    return setting(ExtendedInode, 2 * BLOCK_BYTES + nid * 32, **fields)


def everything(image: Bootstrap) -> Iterator[object]:
    for path, node in image.walk():
        yield path, image.xattrs(node)
        if node.type is FileType.REGULAR:
            yield from image.chunks(node)
        if node.type is FileType.SYMLINK:
            yield image.read_link(node)
    yield from image.chunk_table()
    yield image.prefetch_nids()


def test_it_reads_what_nydus_image_wrote(nydus_bootstrap: bytes) -> None:
    """Superblocks and blob table of a foreign image have the values nydus-image gave them."""
    image = Bootstrap(nydus_bootstrap)
    assert image.superblock.root_nid == ROOT
    assert (image.superblock.inos, image.superblock.blocks) == (3, 9)
    assert image.extended.flags == (
        RafsFlags.COMPRESSOR_ZSTD
        | RafsFlags.DIGEST_BLAKE3
        | RafsFlags.EXPLICIT_UIDGID
        | RafsFlags.INLINED_CHUNK_DIGEST
    )
    assert image.chunk_bytes == 1 << 20
    blob_id = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    assert image.devices == (DeviceSlot(blob_id, 9, 512),)
    assert image.blobs == (
        BlobEntry(
            blob_id=blob_id,
            blob_index=0,
            chunk_size=1 << 20,
            chunk_count=2,
            compressor=Compressor.ZSTD,
            digester=Digest.BLAKE3,
            features=BlobFeatures(0x70000021),
            compressed_size=14554,
            uncompressed_size=36864,
            toc_size=1024,
            ci_compressor=Compressor.NONE,
            ci_offset=8314,
            ci_compressed_size=32,
            ci_uncompressed_size=32,
            toc_digest=bytes.fromhex(
                "cfc89ed0739aef4eb1bf0904f0dfdb1c857134eca7319465baae95a99b84acde"
            ),
        ),
    )


def test_it_walks_what_nydus_image_wrote(nydus_bootstrap: bytes) -> None:
    """Inodes, names and chunk indexes of a foreign image are where they are known to be."""
    image = Bootstrap(nydus_bootstrap)
    assert [(path, node.nid, node.size) for path, node in image.walk()] == [
        (b"/", ROOT, 67),
        (b"/lib.rs", LIB, 16931),
        (b"/sync_io.rs", SYNC, 13400),
    ]
    assert list(image.chunks(image.inode(LIB))) == [ChunkIndex(0, 0, 0)]
    assert list(image.chunks(image.inode(SYNC))) == [ChunkIndex(0, 1, 5)]
    assert [row.digest.hex()[:16] for row in image.chunk_table(0)] == [
        "812465bcc9e88393",
        "f7e2735f1c6ae9cd",
    ]
    assert list(image.chunk_table(1)) == []


def test_a_mapping_is_as_good_as_bytes(nydus_bootstrap: bytes) -> None:
    """A bootstrap may be read through mmap, so that only what is asked for is read."""
    with mmap.mmap(-1, len(nydus_bootstrap)) as mapping:
        mapping[:] = nydus_bootstrap
        assert [path for path, _ in Bootstrap(mapping).walk()] == [b"/", b"/lib.rs", b"/sync_io.rs"]


REFUSALS: dict[str, tuple[str, tuple[Patch, ...]]] = {
    "magic": ("not an EROFS image", (lambda memory: memory.__setitem__(1024, 0),)),
    "RAFS v5 marker": ("not RAFS v6", (superblock(feature_compat=0),)),
    "16 KiB pages": ("another page size", (superblock(blkszbits=14),)),
    "tarfs blocks": ("another page size", (superblock(blkszbits=9),)),
    "unknown feature": ("incompatible features 0x4c", (superblock(feature_incompat=0x4C),)),
    "missing feature": ("incompatible features 0x4", (superblock(feature_incompat=0x4),)),
    "checksum": ("checksum is 1", (superblock(checksum=1),)),
    "extension slots": ("sb_extslots is 1", (superblock(sb_extslots=1),)),
    "shared xattrs": ("xattr_blkaddr is 5", (superblock(xattr_blkaddr=5),)),
    "EROFS compression": ("compression_algorithms is 1", (superblock(compression_algorithms=1),)),
    "device table": ("devt_slotoff is 12", (superblock(devt_slotoff=12),)),
    "directory blocks": ("dirblkbits is 1", (superblock(dirblkbits=1),)),
    "no inodes": ("no inodes", (superblock(inos=0),)),
    "volume name": ("without an end", (superblock(volume_name=b"x" * 16),)),
    "too many blobs": ("255 blobs", (superblock(extra_devices=255),)),
    "devices beyond the end": ("do not fit", (superblock(extra_devices=200),)),
    "metadata beyond the end": ("beyond the end", (superblock(meta_blkaddr=5),)),
    "sum of blocks": ("8 blocks", (superblock(blocks=8),)),
    "unknown flag": ("unknown flags 0x400", (extended(flags=RafsFlags(0x594)),)),
    "no compressor": ("not one compressor", (extended(flags=RafsFlags(0x114)),)),
    "two compressors": ("not one compressor", (extended(flags=RafsFlags(0x195)),)),
    "two digests": ("not one digest", (extended(flags=RafsFlags(0x19C)),)),
    "tarfs": ("tarfs", (extended(flags=RafsFlags(0x394)),)),
    "encrypted": ("encrypted", (extended(flags=RafsFlags(0x02000194)),)),
    "odd chunk size": ("power of two", (extended(chunk_size=5000),)),
    "small chunks": ("power of two", (extended(chunk_size=2048),)),
    "large chunks": ("power of two", (extended(chunk_size=1 << 25),)),
    "blob table on devices": ("blob table", (extended(blob_table_offset=1408),)),
    "blob table cut off": ("blob table", (extended(blob_table_offset=20480),)),
    "tables overlap": ("chunk table", (extended(chunk_table_offset=4096),)),
    "half an entry": ("chunk table", (extended(chunk_table_size=81),)),
    "prefetch table": (
        "prefetch table",
        (extended(prefetch_table_offset=20480, prefetch_table_size=4),),
    ),
    "device without blob": ("blob table of 0 bytes", (extended(blob_table_size=0),)),
    "blob without device": ("blob table of 512 bytes", (extended(blob_table_size=512),)),
    "tag is not id": ("differ", (slot(tag="f" * 64),)),
    "size is not blocks": ("differ", (slot(blocks=10), superblock(blocks=10))),
    "empty cache file": (
        "cache file of 0 bytes",
        (slot(blocks=0), entry(uncompressed_size=0), superblock(blocks=0)),
    ),
    "huge blob": ("over 1 TiB", (entry(compressed_size=(1 << 40) + 1),)),
    "path as id": ("cannot be a blob's id", named("../../etc/passwd")),
    "dots as id": ("cannot be a blob's id", named("..")),
    "control character in id": ("cannot be a blob's id", named("a\nb")),
    "own blob": ("does not know its own", named(UNKNOWN_BLOB_ID)),
    "blob index": ("says it is blob 1", (entry(blob_index=1),)),
    "chunk size of a blob": ("chunks of 4096", (entry(chunk_size=4096),)),
    "not aligned": ("not aligned", (entry(features=BlobFeatures(0x70000020)),)),
    "blob is tarfs": ("features 0x70000061", (entry(features=BlobFeatures(0x70000061)),)),
    "newer blob": ("features 0x70001021", (entry(features=BlobFeatures(0x70001021)),)),
    "chunk infos too few": ("chunk infos", (entry(chunk_count=3),)),
    "chunk infos of version 1 with batches": (
        "chunk infos",
        (entry(features=BlobFeatures(0x700000A1)),),
    ),
    "chunk infos beyond the end": ("chunk infos at", (entry(ci_offset=14554),)),
    "chunk infos that grow": ("chunk infos at", (entry(ci_compressed_size=33),)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_it_cannot_rely_on_is_refused(name: str, nydus_bootstrap: bytes) -> None:
    """Each rule of the superblocks and tables is an ImageError of its own when it is broken."""
    message, patches = REFUSALS[name]
    with pytest.raises(ImageError, match=message):
        Bootstrap(patched(nydus_bootstrap, *patches))


def test_flags_reserved_for_compatible_changes_are_accepted(nydus_bootstrap: bytes) -> None:
    """Bits that newer builders may set without harm do not make an image unreadable."""
    flags = RafsFlags(0x84000194)
    assert Bootstrap(patched(nydus_bootstrap, extended(flags=flags))).extended.flags == flags


def test_empty_ids_are_refused(nydus_bootstrap: bytes) -> None:
    """A device without a tag has no cookie."""

    def erase(memory: bytearray) -> None:
        memory[1408:1472] = memory[4096:4160] = bytes(64)

    with pytest.raises(ImageError, match="cannot be a blob's id"):
        Bootstrap(patched(nydus_bootstrap, erase))


def test_two_blobs_of_one_name_are_refused(nydus_bootstrap: bytes) -> None:
    """Two devices under one cookie would be one cache file for two contents."""

    def double(memory: bytearray) -> None:
        memory[1536:1664] = memory[1408:1536]
        memory[4352:4608] = memory[4096:4352]
        setting(BlobEntry, 4352, blob_index=1)(memory)

    patches = (double, superblock(extra_devices=2, blocks=18), extended(blob_table_size=512))
    with pytest.raises(ImageError, match="there twice"):
        Bootstrap(patched(nydus_bootstrap, *patches))


@pytest.mark.parametrize("size", [0, 1024, 4095, 4096, 8192, 16384, 20479])
def test_truncated_bootstraps_are_refused(size: int, nydus_bootstrap: bytes) -> None:
    """Half a download is an ImageError, whether whole blocks came or not."""
    with pytest.raises(ImageError):
        list(everything(Bootstrap(nydus_bootstrap[:size])))


def test_the_bootstrap_inside_its_blob_learns_the_blobs_name(nydus_bootstrap: bytes) -> None:
    """A layer's own bootstrap names its blob "xxx…"; who knows the name says it."""
    image = Bootstrap(patched(nydus_bootstrap, *named(UNKNOWN_BLOB_ID)), own_blob_id="cafe")
    assert (image.blobs[0].blob_id, image.devices[0].tag) == ("cafe", "cafe")


TREE_REFUSALS: dict[str, tuple[str, tuple[Patch, ...]]] = {
    "root is no directory": ("not a directory", (superblock(root_nid=LIB),)),
    "inode beyond the end": ("beyond the end", (superblock(root_nid=400),)),
    "compressed inode": ("no such file", (inode(LIB, format=0x7),)),
    "unknown format bit": ("no such file", (inode(LIB, format=0x29),)),
    "flat file": ("no such file", (inode(LIB, format=0x1),)),
    "chunked directory": ("no such file", (inode(ROOT, format=0x9),)),
    "no type": ("no such file", (inode(LIB, mode=0o644),)),
    "entry is of another type": ("is a regular here", (inode(LIB, mode=0o10644, format=0x1),)),
    "xattrs beyond the end": ("beyond the end", (inode(LIB, xattr_icount=0xFFFF),)),
    "directory beyond the end": ("beyond the end", (inode(ROOT, size=1 << 40),)),
    "inline data crosses a block": ("crosses a block", (inode(ROOT, size=4090),)),
    "chunk format": ("chunk format", (inode(LIB, u=0x68),)),
    "chunks too small for the kernel": ("less than the image's", (inode(LIB, u=0x20),)),
    "indexes beyond the end": ("beyond the end", (inode(LIB, size=1 << 40),)),
    "no such blob": (
        "of no blob",
        (lambda memory: memory.__setitem__(slice(12512, 12520), ChunkIndex(1, 0, 0).pack()),),
    ),
    "chunk beyond the cache file": (
        "beyond its blob",
        (lambda memory: memory.__setitem__(slice(12512, 12520), ChunkIndex(0, 0, 5).pack()),),
    ),
    "chunk index beyond the blob": (
        "beyond its blob",
        (lambda memory: memory.__setitem__(slice(12512, 12520), ChunkIndex(0, 2, 0).pack()),),
    ),
    "hole": (
        "beyond its blob",
        (lambda memory: memory.__setitem__(slice(12516, 12520), b"\xff" * 4),),
    ),
    "chunk table names no blob": (
        "no blob 7",
        (lambda memory: memory.__setitem__(16384 + 32, 7),),
    ),
}


@pytest.mark.parametrize("name", TREE_REFUSALS)
def test_what_the_tree_cannot_say_is_refused(name: str, nydus_bootstrap: bytes) -> None:
    """The superblock is fine, and the error comes when what is wrong is looked at."""
    message, patches = TREE_REFUSALS[name]
    image = Bootstrap(patched(nydus_bootstrap, *patches))
    with pytest.raises(ImageError, match=message):
        list(everything(image))


def image_of(nydus_bootstrap: bytes, meta: bytes, *patches: Patch) -> Bootstrap:
    """The foreign image with other inodes: `meta` begins with the root's."""

    def graft(memory: bytearray) -> None:
        memory[META:] = meta.ljust(align_up(len(meta)), b"\0")

    return Bootstrap(patched(nydus_bootstrap, graft, extended(chunk_table_size=0), *patches))


def node(
    mode: int,
    size: int,
    layout: DataLayout = DataLayout.FLAT_INLINE,
    u: int = 0,
    xattrs: bytes = b"",
) -> bytes:
    form = inode_format(layout, extended=True)
    head = ExtendedInode(form, xattr_icount(len(xattrs)), mode, size, u, 0, 7, 8, -9, 5, 1)
    return head.pack() + xattrs


def directory(*entries: tuple[bytes, int, FileType]) -> bytes:
    data = pack_dirents(Dirent(*entry) for entry in sorted(entries))
    return node(DIRECTORY, len(data)) + data


def inodes(*packed: bytes) -> bytes:
    """Inodes 128 bytes apart: numbers 128, 132, 136, …"""
    assert all(len(one) <= 128 for one in packed)
    return b"".join(one.ljust(128, b"\0") for one in packed)


def test_every_kind_of_inode(nydus_bootstrap: bytes) -> None:
    """Compact inodes, links, devices, xattrs and a file of many chunks come out as they went in."""
    kinds = [
        (b"!before-dots", 132, FileType.SYMLINK),
        (b"compact", 136, FileType.FIFO),
        (b"device", 140, FileType.BLOCK),
        (b"file", 144, FileType.REGULAR),
    ]
    data = pack_dirents(Dirent(*kind) for kind in kinds)
    xattrs = {b"user.a": b"1", b"security.capability": b"\x01\x02"}
    area = pack_xattrs(xattrs)
    file = node(REGULAR, 8197, DataLayout.CHUNK_BASED, chunk_format(1 << 14), area)
    file = file.ljust(align_up(len(file), 8), b"\0")
    plain = inode_format(DataLayout.FLAT_PLAIN, extended=False)
    meta = inodes(
        node(DIRECTORY, len(data), DataLayout.FLAT_PLAIN, u=4),
        node(SYMLINK, 6) + b"target",
        CompactInode(plain, 0, 0o10600, 2, 0, 0, 1, 3, 4).pack(),
        node(0o60600, 0, DataLayout.FLAT_PLAIN, u=pack_rdev(259, 1000)),
    )
    meta += file + b"".join(ChunkIndex(0, 0, block).pack() for block in (0, 1, 0))
    image = image_of(
        nydus_bootstrap,
        meta.ljust(BLOCK_BYTES, b"\0") + data,
        extended(chunk_size=4096),
        entry(chunk_size=4096),
        superblock(build_time=77),
    )
    found = dict(image.walk())
    assert list(found) == [b"/", b"/!before-dots", b"/compact", b"/device", b"/file"]
    assert image.read_link(found[b"/!before-dots"]) == b"target"
    compact, regular = found[b"/compact"], found[b"/file"]
    assert (compact.uid, compact.gid, compact.nlink, compact.mtime) == (3, 4, 2, 77)
    assert (regular.uid, regular.gid, regular.mtime, regular.mtime_nsec) == (7, 8, -9, 5)
    assert found[b"/device"].rdev == (259, 1000)
    assert image.xattrs(regular) == xattrs
    assert [index.start_block for index in image.chunks(regular)] == [0, 1, 0]


def test_a_directory_of_itself_ends_the_walk(nydus_bootstrap: bytes) -> None:
    """A loop in the tree is an error, not a walk without end."""
    image = image_of(nydus_bootstrap, directory((b"loop", ROOT, FileType.DIRECTORY)))
    with pytest.raises(ImageError, match="met twice"):
        list(image.walk())


def test_directories_that_share_their_entries_end_the_walk(nydus_bootstrap: bytes) -> None:
    """Few bytes cannot say millions of paths: names take room of their own."""
    shared, listing = 5, 4
    many = pack_dirents(Dirent(b"%03d" % i, 132, FileType.REGULAR) for i in range(200))
    lists = pack_dirents(Dirent(b"%03d" % i, 512 + 2 * i, FileType.DIRECTORY) for i in range(200))
    meta = inodes(
        node(DIRECTORY, len(lists), DataLayout.FLAT_PLAIN, u=listing),
        node(REGULAR, 0, DataLayout.CHUNK_BASED, u=0x28),
    )
    meta = meta.ljust(BLOCK_BYTES, b"\0") + lists.ljust(BLOCK_BYTES, b"\0")
    meta += many.ljust(BLOCK_BYTES, b"\0")
    hosts = node(DIRECTORY, len(many), DataLayout.FLAT_PLAIN, u=shared) * 200
    image = image_of(nydus_bootstrap, meta + hosts)
    with pytest.raises(ImageError, match="more entries than"):
        list(image.walk())


def test_a_tree_deeper_than_any_path_ends_the_walk(nydus_bootstrap: bytes) -> None:
    """Depth is limited, so that paths of hostile trees take no quadratic memory."""
    chain = [directory((b"d", 132 + 4 * i, FileType.DIRECTORY)) for i in range(MAX_DEPTH + 1)]
    image = image_of(nydus_bootstrap, inodes(*chain, directory((b"f", 128, FileType.REGULAR))))
    with pytest.raises(ImageError, match="deeper than"):
        list(image.walk())


@pytest.mark.parametrize("names", [(b"b", b"a"), (b"a", b"a"), (b"a/b",), (b"",)])
def test_names_out_of_order_or_impossible(names: tuple[bytes, ...], nydus_bootstrap: bytes) -> None:
    """The kernel searches directories by halves: what is not in order would not be found."""
    data = pack_dirents(Dirent(name, 128, FileType.DIRECTORY) for name in names)
    image = image_of(nydus_bootstrap, node(DIRECTORY, len(data)) + data)
    with pytest.raises(ImageError):
        list(image.children(image.root))


@pytest.mark.parametrize(("target", "message"), [(b"a\0b", "NUL"), (b"", "0 bytes")])
def test_links_that_lead_nowhere(target: bytes, message: str, nydus_bootstrap: bytes) -> None:
    """A target is a C string of the kernel's, and not empty."""
    meta = inodes(directory((b"link", 132, FileType.SYMLINK)), node(SYMLINK, len(target)) + target)
    image = image_of(nydus_bootstrap, meta)
    with pytest.raises(ImageError, match=message):
        list(everything(image))


def test_prefetch_nids_end_at_a_zero(nydus_bootstrap: bytes) -> None:
    """The prefetch table may be longer than what is in it; an offset of 0 means there is none."""

    def table(memory: bytearray) -> None:
        memory[4352:4364] = struct.pack("<3I", SYNC, LIB, 0)

    there = extended(prefetch_table_offset=4352, prefetch_table_size=12)
    nowhere = extended(prefetch_table_size=12)
    assert Bootstrap(patched(nydus_bootstrap, table, there)).prefetch_nids() == (SYNC, LIB)
    assert Bootstrap(patched(nydus_bootstrap, table, nowhere)).prefetch_nids() == ()


FULL_REGIONS = [(1024, 1544), (4096, 4352), (12288, 12560), (16384, 16544)]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of([st.integers(start, end) for start, end in FULL_REGIONS]),
            st.binary(max_size=8),
        ),
        max_size=4,
    )
)
def test_damaged_bootstraps_decode_or_are_an_image_error(
    nydus_bootstrap: bytes, damage: list[tuple[int, bytes]]
) -> None:
    """Whatever bytes are overwritten, nothing but ImageError is raised, and reading ends."""
    memory = bytearray(nydus_bootstrap)
    for offset, garbage in damage:
        memory[offset : offset + len(garbage)] = garbage
    try:
        list(everything(Bootstrap(memory)))
    except ImageError:
        return


@settings(max_examples=400, deadline=None)
@given(st.one_of([st.integers(8 * start, 8 * end - 1) for start, end in FULL_REGIONS]))
def test_flipped_bits_decode_or_are_an_image_error(nydus_bootstrap: bytes, bit: int) -> None:
    """One bit is as good as many to lead a reader astray."""
    memory = bytearray(nydus_bootstrap)
    memory[bit // 8] ^= 1 << bit % 8
    try:
        list(everything(Bootstrap(memory)))
    except ImageError:
        return

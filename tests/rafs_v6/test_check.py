import hashlib
from typing import Any

import pytest

from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.check import Finding, check, read_meta
from rafs_v6.layout import (
    EXTENDED_OFFSET,
    SUPERBLOCK_OFFSET,
    UNKNOWN_BLOB_ID,
    BlobEntry,
    ChunkEntry,
    ChunkIndex,
    DeviceSlot,
    Dirent,
    ExtendedInode,
    ExtendedSuperblock,
    FileType,
    Superblock,
    TocEntry,
    chunk_format,
    pack_dirents,
)

BLOB_ID = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
ROOT, LIB = 128, 133
ROOT_AT, LIB_AT, LIB_CHUNKS = 12288, 12448, 12512
TABLE, BLOB_TABLE, TOC = 16384, 4096, 13530
SYNC_DIGEST = TABLE
"""Random bytes: no inode has that number."""


def edit(memory: bytearray, structure: Any, offset: int, **fields: object) -> None:
    packed = structure.unpack(memory, offset)._replace(**fields).pack()
    memory[offset : offset + len(packed)] = packed


def dirents(*entries: tuple[bytes, int, FileType]) -> bytes:
    return pack_dirents(Dirent(*entry) for entry in entries)


def problems(findings: list[Finding]) -> str:
    return "\n".join(f"{where}: {problem}" for where, problem in findings)


def test_nothing_is_wrong_with_what_nydus_image_wrote(
    nydus_bootstrap: bytes, nydus_blob: bytes
) -> None:
    """A foreign image, with its blob and without, has no findings."""
    assert check(nydus_bootstrap) == []
    assert check(nydus_bootstrap, {BLOB_ID: nydus_blob}) == []


def test_a_bootstrap_that_does_not_open_is_one_finding(nydus_bootstrap: bytes) -> None:
    """Nothing else can be said of it."""
    (finding,) = check(nydus_bootstrap[:-1])
    assert finding.where == "bootstrap"


def test_the_own_blob_of_a_layers_bootstrap(nydus_bootstrap: bytes, nydus_blob: bytes) -> None:
    """A layer's bootstrap inside its blob is checked under the name it is given."""
    memory = bytearray(nydus_bootstrap)
    edit(memory, DeviceSlot, 1408, tag=UNKNOWN_BLOB_ID)
    edit(memory, BlobEntry, BLOB_TABLE, blob_id=UNKNOWN_BLOB_ID)
    assert check(memory, {"layer": nydus_blob}, own_blob_id="layer") == []
    assert len(check(memory)) == 1


BOOTSTRAP_FINDINGS: dict[str, tuple[str, Any, int, dict[str, object]]] = {
    "links of a file": ("/lib.rs: has 1 links", ExtendedInode, LIB_AT, {"nlink": 2}),
    "links of a directory": ("/: has 2 links", ExtendedInode, ROOT_AT, {"nlink": 3}),
    "inodes": ("says 4 inodes, there are 3", Superblock, SUPERBLOCK_OFFSET, {"inos": 4}),
    "size of a file": ("/lib.rs: chunk 0", ExtendedInode, LIB_AT, {"size": 16930}),
    "index not in the table": ("/lib.rs: chunk 0", ChunkIndex, LIB_CHUNKS, {"chunk_index": 1}),
    "block not in the table": ("/lib.rs: chunk 0", ChunkIndex, LIB_CHUNKS, {"start_block": 1}),
    "broken inode": ("/lib.rs: file 133: chunk format", ExtendedInode, LIB_AT, {"u": 0x68}),
    "table not sorted": ("not sorted", ChunkEntry, TABLE, {"digest": b"\xff" * 32}),
    "one chunk twice": ("there twice and differs", ChunkEntry, TABLE, {"chunk_index": 0}),
    "table with another placement": (
        "chunk table: blob",
        ChunkEntry,
        TABLE,
        {"uncompressed_offset": 4096},
    ),
    "no table": (
        "chunk table: missing",
        ExtendedSuperblock,
        EXTENDED_OFFSET,
        {"chunk_table_size": 0},
    ),
    "prefetch of nothing": (
        "prefetch table: entry 0: inode",
        ExtendedSuperblock,
        EXTENDED_OFFSET,
        {"prefetch_table_offset": SYNC_DIGEST, "prefetch_table_size": 4, "chunk_table_size": 0},
    ),
}


@pytest.mark.parametrize("name", BOOTSTRAP_FINDINGS)
def test_what_is_wrong_with_a_bootstrap_is_found(name: str, nydus_bootstrap: bytes) -> None:
    """Bootstraps that open and yet are wrong: each rule has a finding that says where."""
    expected, structure, offset, fields = BOOTSTRAP_FINDINGS[name]
    memory = bytearray(nydus_bootstrap)
    edit(memory, structure, offset, **fields)
    assert expected in problems(check(memory))


@pytest.mark.parametrize(
    ("expected", "entries"),
    [
        ("'.' is inode 133", [(b".", LIB, FileType.UNKNOWN), (b"..", ROOT, FileType.DIRECTORY)]),
        ("'..' is inode None", [(b".", ROOT, FileType.DIRECTORY), (b"..x", LIB, FileType.REGULAR)]),
        ("not in order", [(b"b", LIB, FileType.REGULAR), (b"a", LIB, FileType.REGULAR)]),
        ("met twice", [(b"a", ROOT, FileType.DIRECTORY)]),
    ],
)
def test_what_is_wrong_with_a_directory_is_found(
    expected: str, entries: list[tuple[bytes, int, FileType]], nydus_bootstrap: bytes
) -> None:
    """Dots that lead elsewhere, disorder and loops are findings; the rest is still checked."""
    memory, data = bytearray(nydus_bootstrap), dirents(*entries)
    edit(memory, ExtendedInode, ROOT_AT, size=len(data))
    memory[12352 : 12352 + len(data)] = data
    assert expected in problems(check(memory))


def test_an_extent_that_is_none_is_found(nydus_bootstrap: bytes) -> None:
    """Where the kernel is told a file is one extent, its chunks must lie in a row."""
    memory = bytearray(nydus_bootstrap)
    edit(memory, ExtendedSuperblock, EXTENDED_OFFSET, chunk_size=8192, chunk_table_size=0)
    edit(memory, BlobEntry, BLOB_TABLE, chunk_size=8192)
    edit(memory, ExtendedInode, LIB_AT, u=chunk_format(16384), size=16384)
    memory[12520:12528] = ChunkIndex(0, 1, 2).pack()
    assert "one extent" not in problems(check(memory))
    memory[12520:12528] = ChunkIndex(0, 1, 3).pack()
    assert "/lib.rs: chunk 1 does not follow" in problems(check(memory))


BLOB_FINDINGS: dict[str, tuple[int, list[str]]] = {
    "first chunk": (100, ["image.blob: not the content", "chunk 0"]),
    "last chunk": (5000, ["image.blob: not the content", "chunk 1"]),
    "tar header of the data": (7802 + 20, ["tail-tar header"]),
    "chunk infos": (8315, ["blob.meta: not the content"]),
    "header": (8400, ["blob.meta.header: not the content"]),
    "digests": (12960, ["blob.digest: not the content"]),
    "ToC": (TOC + 30, ["table of contents is not the one", "image.blob: not the content"]),
}


@pytest.mark.parametrize("name", BLOB_FINDINGS)
def test_what_is_wrong_with_a_blob_is_found(
    name: str, nydus_bootstrap: bytes, nydus_blob: bytes
) -> None:
    """A flipped bit anywhere in a blob file is a finding that names the part."""
    at, expected = BLOB_FINDINGS[name]
    damaged = bytearray(nydus_blob)
    damaged[at] ^= 0x10
    found = problems(check(nydus_bootstrap, {BLOB_ID: damaged}))
    assert [text for text in expected if text not in found] == []


def test_a_blob_that_is_cut_off_is_found(nydus_bootstrap: bytes, nydus_blob: bytes) -> None:
    """Half a file is said to be half a file, and nothing more."""
    (finding,) = check(nydus_bootstrap, {BLOB_ID: nydus_blob[:9000]})
    assert "9000 of 14554 bytes" in finding.problem


def test_a_blob_that_differs_from_the_chunk_table_is_found(
    nydus_bootstrap: bytes, nydus_blob: bytes
) -> None:
    """The two ways to a chunk must agree on where it is and what it must be."""
    memory = bytearray(nydus_bootstrap)
    edit(memory, ChunkEntry, TABLE, digest=b"\x81" * 32)
    assert "not that of the chunk table" in problems(check(memory, {BLOB_ID: nydus_blob}))


def test_a_blob_nobody_vouches_for_is_found(nydus_bootstrap: bytes, nydus_blob: bytes) -> None:
    """Neither chunk table nor trusted ToC: nothing could be verified when it is read."""
    memory = bytearray(nydus_bootstrap)
    edit(memory, ExtendedSuperblock, EXTENDED_OFFSET, chunk_table_size=0)
    edit(memory, BlobEntry, BLOB_TABLE, toc_digest=bytes(32))
    assert "nobody vouches" in problems(check(memory, {BLOB_ID: nydus_blob}))


def test_parts_of_absurd_size_are_not_unpacked(nydus_bootstrap: bytes, nydus_blob: bytes) -> None:
    """A ToC that promises a terabyte costs no memory."""
    blob, memory = bytearray(nydus_blob), bytearray(nydus_bootstrap)
    edit(blob, TocEntry, TOC + 3 * 128, uncompressed_size=1 << 40)
    edit(memory, BlobEntry, BLOB_TABLE, toc_digest=hashlib.sha256(blob[TOC:]).digest())
    assert "over the limit" in problems(check(memory, {BLOB_ID: blob}))


def test_reading_the_meta_of_a_file_that_ends_early(
    nydus_bootstrap: bytes, nydus_blob: bytes
) -> None:
    """A local file gets no more credit than a remote one."""
    entry = Bootstrap(nydus_bootstrap).blobs[0]
    with pytest.raises(ImageError, match="cut off"):
        read_meta(entry, nydus_blob[:9000])

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafs_v6 import ImageError, codec
from rafs_v6.blob import (
    BlobMeta,
    ChunkMap,
    TailEntry,
    data_end,
    has_trusted_toc,
    require_native,
    tail_entries,
    unpack_toc,
)
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.layout import (
    BLOCK_BYTES,
    META_HEADER_BYTES,
    TOC_FLAGS,
    BlobEntry,
    BlobFeatures,
    ChunkEntry,
    ChunkFlags,
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

FEATURES = (
    BlobFeatures.ALIGNED
    | BlobFeatures.INLINED_CHUNK_DIGEST
    | BlobFeatures.HAS_TAR_HEADER
    | BlobFeatures.HAS_TOC
    | BlobFeatures.CAP_TAR_TOC
)
TOC_START, META_START, DIGESTS_START = 13530, 8314, 12954


@pytest.fixture(scope="session")
def entry(nydus_bootstrap: bytes) -> BlobEntry:
    return Bootstrap(nydus_bootstrap).blobs[0]


def read(entry: BlobEntry, blob: Memory) -> ChunkMap:
    meta = BlobMeta(entry)
    while meta.wanted:
        start, end = meta.wanted[0]
        meta.feed(start, memoryview(blob)[start:end])
    return meta.chunks()


class Chunk(NamedTuple):
    offset: int
    size: int
    padded_end: int
    remote_offset: int
    remote_size: int
    compressed: bool
    digest: bytes | None


def listed(chunks: ChunkMap) -> list[Chunk]:
    return [
        Chunk(
            chunks.offset(i),
            chunks.size(i),
            chunks.padded_end(i),
            chunks.remote_offset(i),
            chunks.remote_size(i),
            chunks.compressed(i),
            chunks.digest(i),
        )
        for i in range(chunks.count)
    ]


def test_it_reads_what_nydus_image_wrote(entry: BlobEntry, nydus_blob: bytes) -> None:
    """One request brings the chunks of a foreign blob, and every chunk matches its digest."""
    assert BlobMeta(entry).wanted == ((8314, 14554),)
    chunks = read(entry, nydus_blob)
    assert (chunks.size_bytes, chunks.compressor, chunks.digester) == (36864, 3, 0)
    assert [chunk[:6] for chunk in listed(chunks)] == [
        (0, 16931, 20480, 0, 4828, True),
        (20480, 13400, 36864, 4828, 2974, True),
    ]
    digests = [chunk.digest or b"" for chunk in listed(chunks)]
    assert [digest.hex()[:16] for digest in digests] == ["f7e2735f1c6ae9cd", "812465bcc9e88393"]
    contents = [
        "1810eba864521293bb0d6b55a3c82318d4d89f294ed761c456d9088a17de0c69",
        "e629ab260ff0dc02a24648a3e0dd8c13a5daf233d535c330e3201925f5eeff96",
    ]
    for chunk, sha256 in zip(listed(chunks), contents, strict=True):
        plain = bytearray(chunk.size)
        remote = nydus_blob[chunk.remote_offset : chunk.remote_offset + chunk.remote_size]
        codec.decompress_into(chunks.compressor, remote, memoryview(plain))
        assert hashlib.sha256(plain).hexdigest() == sha256
        assert codec.digest(chunks.digester, plain) == chunk.digest


def test_the_chunk_table_says_the_same(
    entry: BlobEntry, nydus_bootstrap: bytes, nydus_blob: bytes
) -> None:
    """The bootstrap's chunk table and the blob's own infos are two ways to the same map."""
    table = ChunkMap.from_chunk_table(entry, Bootstrap(nydus_bootstrap).chunk_table(0))
    assert listed(table) == listed(read(entry, nydus_blob))


def test_the_tail_tar_of_nydus_image(entry: BlobEntry, nydus_blob: bytes) -> None:
    """Parts and ToC of a foreign blob are where they are known to be."""
    assert tail_entries(nydus_blob) == [
        TailEntry("rafs.blob.toc", TOC_START, 512),
        TailEntry("blob.digest", DIGESTS_START, 64),
        TailEntry("blob.meta", META_START, 4128),
        TailEntry("image.blob", 0, 7802),
    ]
    toc = unpack_toc(nydus_blob[TOC_START:])
    assert list(toc) == ["image.blob", "blob.meta", "blob.meta.header", "blob.digest"]
    assert toc["image.blob"].digest == hashlib.sha256(nydus_blob[: 7802 + 512]).digest()
    assert toc["image.blob"].uncompressed_size == entry.uncompressed_size


@pytest.mark.parametrize("size", [1, 511, 14553, 1024])
def test_a_blob_file_that_is_cut_off(size: int, nydus_blob: bytes) -> None:
    """Half a blob file has no tail tar."""
    with pytest.raises(ImageError):
        tail_entries(nydus_blob[:size])


LINKS: dict[str, tuple[int, str]] = {
    "ToC entry": (TOC_START + 200, "table of contents is not the one"),
    "ToC's tar header": (TOC_START + 600, "table of contents is not the one"),
    "chunk infos": (META_START + 3, "blob.meta is not what"),
    "header": (META_START + 32 + 20, "blob.meta.header is not what"),
    "reserved bytes of the header": (META_START + 32 + 100, "blob.meta.header is not what"),
    "chunk digests": (DIGESTS_START + 40, "blob.digest is not what"),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("bit", [0, 7])
def test_every_link_of_the_chain_holds(
    link: str, bit: int, entry: BlobEntry, nydus_blob: bytes
) -> None:
    """One flipped bit anywhere between the bootstrap and the digests is told apart."""
    at, message = LINKS[link]
    damaged = bytearray(nydus_blob)
    damaged[at] ^= 1 << bit
    with pytest.raises(ImageError, match=message):
        read(entry, damaged)


def test_the_chain_begins_in_the_bootstrap(entry: BlobEntry, nydus_blob: bytes) -> None:
    """A ToC the bootstrap does not vouch for is refused, however consistent the blob is."""
    digest = bytes([entry.toc_digest[0] ^ 1]) + entry.toc_digest[1:]
    with pytest.raises(ImageError, match="table of contents is not the one"):
        read(entry._replace(toc_digest=digest), nydus_blob)


def test_digests_of_other_content_do_not_pass(entry: BlobEntry, nydus_blob: bytes) -> None:
    """A ToC the bootstrap vouches for still has to fit the parts it names."""
    other = bytearray(nydus_blob)
    at = TOC_START + 128
    part = TocEntry.unpack(other, at)
    other[at : at + 128] = part._replace(digest=bytes(32)).pack()
    trusted = entry._replace(toc_digest=hashlib.sha256(other[TOC_START:]).digest())
    with pytest.raises(ImageError, match=r"blob\.meta is not what"):
        read(trusted, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ci_compressed_size": 16, "ci_uncompressed_size": 16}, "magic"),
        ({"chunk_count": 1}, "2 chunks, 1 in the bootstrap"),
        ({"ci_uncompressed_size": 48}, "header"),
        ({"ci_compressor": Compressor.ZSTD}, "header"),
        ({"features": FEATURES | BlobFeatures.CHUNK_INFO_V2}, "header"),
    ],
)
def test_the_header_must_be_what_the_bootstrap_says(
    change: dict[str, Any], message: str, entry: BlobEntry, nydus_blob: bytes
) -> None:
    """Without a trusted ToC the header is at least held to the bootstrap's blob table."""
    untrusted = entry._replace(toc_digest=bytes(32), **change)
    with pytest.raises(ImageError, match=message):
        read(untrusted, nydus_blob)


def test_without_a_trusted_toc_nobody_vouches_for_chunks(
    entry: BlobEntry, nydus_blob: bytes
) -> None:
    """Then only the infos are fetched, and chunks have a place but no digest."""
    untrusted = entry._replace(toc_digest=bytes(32))
    assert not has_trusted_toc(untrusted)
    assert BlobMeta(untrusted).wanted == ((8314, 8314 + 32 + META_HEADER_BYTES),)
    chunks = read(untrusted, nydus_blob)
    assert not chunks.verifiable
    assert [chunk.digest for chunk in listed(chunks)] == [None, None]


def test_only_what_is_wanted_may_be_fed(entry: BlobEntry, nydus_blob: bytes) -> None:
    """Bytes from elsewhere, too few of them, or twice: an error, and nothing is believed."""
    meta = BlobMeta(entry)
    for start, end in ((8314, 14553), (8313, 14554), (0, 14554)):
        with pytest.raises(ImageError, match="instead of"):
            meta.feed(start, nydus_blob[start:end])
    with pytest.raises(ImageError, match="not fetched"):
        meta.chunks()
    meta.feed(8314, nydus_blob[8314:])
    with pytest.raises(ImageError, match="instead of"):
        meta.feed(8314, nydus_blob[8314:])


class Made(NamedTuple):
    entry: BlobEntry
    blob: bytes
    infos: list[ChunkInfo]
    digests: bytes


def made(count: int, compressor: Compressor, version_2: bool, boot: bytes = b"") -> Made:
    """A blob of `count` chunks of 5000 zeros, as if each were compressed to 100."""
    flags = ChunkInfoFlags.COMPRESSED.value
    infos = [ChunkInfo(8192 * i, 5000, 100 * i, 100, flags) for i in range(count)]
    array = b"".join(info.pack_v2() if version_2 else info.pack_v1() for info in infos)
    digests = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(count))
    blob = bytearray(100 * count)
    toc: list[TocEntry] = []

    def append(name: str, *parts: tuple[str, bytes, bytes, TocFlags]) -> None:
        start = len(blob)
        for part, plain, stored, how in parts:
            digest = hashlib.sha256(plain).digest()
            toc.append(TocEntry(how, part, digest, len(blob), len(stored), len(plain)))
            blob.extend(stored)
        blob.extend(TailHeader(name, len(blob) - start).pack())

    plain = TocFlags.UNCOMPRESSED
    blob.extend(TailHeader("image.blob", 100 * count).pack())
    stored = codec.compress(compressor, array)
    if stored is None:
        stored, compressor = array, Compressor.NONE
    features = FEATURES | BlobFeatures.CHUNK_INFO_V2 if version_2 else FEATURES
    ci_offset, ci_sizes = len(blob), (len(stored), len(array))
    header = MetaHeader(features, compressor, count, ci_offset, *ci_sizes).pack()
    append(
        "blob.meta",
        ("blob.meta", array, stored, TOC_FLAGS[compressor]),
        ("blob.meta.header", header, header, plain),
    )
    append("blob.digest", ("blob.digest", digests, digests, plain))
    if boot:
        append("image.boot", ("image.boot", boot, boot, plain))
    raw = b"".join(part.pack() for part in toc)
    raw += TailHeader("rafs.blob.toc", len(raw)).pack()
    blob.extend(raw)
    entry = BlobEntry(
        blob_id="ab" * 32,
        blob_index=0,
        chunk_size=8192,
        chunk_count=count,
        compressor=Compressor.ZSTD,
        digester=Digest.SHA256,
        features=features,
        compressed_size=len(blob),
        uncompressed_size=8192 * count,
        toc_size=len(raw),
        ci_compressor=compressor,
        ci_offset=ci_offset,
        ci_compressed_size=ci_sizes[0],
        ci_uncompressed_size=ci_sizes[1],
        toc_digest=hashlib.sha256(raw).digest(),
    )
    return Made(entry, bytes(blob), infos, digests)


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
@pytest.mark.parametrize("version_2", [False, True])
def test_chunk_infos_of_both_versions_however_compressed(
    compressor: Compressor, version_2: bool
) -> None:
    """Plain, lz4 and zstd arrays of version 1 and 2 give the same chunks."""
    blob = made(100, compressor, version_2)
    assert blob.entry.ci_compressor is compressor
    chunks = read(blob.entry, blob.blob)
    assert [
        ChunkInfo(c.offset, c.size, c.remote_offset, c.remote_size, c.compressed)
        for c in listed(chunks)
    ] == blob.infos
    assert b"".join(c.digest or b"" for c in listed(chunks)) == blob.digests


def test_a_bootstrap_inside_the_blob_is_not_fetched_when_large() -> None:
    """First the ToC, then what it points to; a small bootstrap is not worth a second request."""
    small = made(100, Compressor.ZSTD, False, boot=bytes(1000))
    assert len(BlobMeta(small.entry).wanted) == 1
    large = made(100, Compressor.ZSTD, False, boot=bytes(1 << 20))
    meta, fetched = BlobMeta(large.entry), []
    while meta.wanted:
        start, end = meta.wanted[0]
        fetched.append(end - start)
        meta.feed(start, large.blob[start:end])
    assert len(fetched) == 2
    assert sum(fetched) < 64 << 10
    assert listed(meta.chunks()) == listed(read(small.entry, small.blob))


def test_hostile_sizes_are_not_fetched() -> None:
    """Neither the bootstrap nor a ToC makes us fetch more than the limit."""
    blob = made(100, Compressor.NONE, False)
    huge = blob.entry._replace(ci_uncompressed_size=1 << 40, ci_compressed_size=1 << 40)
    with pytest.raises(ImageError, match="over the limit"):
        BlobMeta(huge)
    raw = bytearray(blob.blob)
    at = len(raw) - blob.entry.toc_size + 2 * 128
    part = TocEntry.unpack(raw, at)
    raw[at : at + 128] = part._replace(compressed_size=1 << 40).pack()
    digest = hashlib.sha256(raw[-blob.entry.toc_size :]).digest()
    with pytest.raises(ImageError, match=r"blob\.digest of"):
        read(blob.entry._replace(toc_digest=digest), raw)


@pytest.mark.parametrize(
    "feature",
    [
        BlobFeatures.ZRAN,
        BlobFeatures.SEPARATE,
        BlobFeatures.BATCH,
        BlobFeatures.ENCRYPTED,
        BlobFeatures.EXTERNAL,
        BlobFeatures.TARFS,
    ],
)
def test_variants_are_refused_by_name(feature: BlobFeatures, entry: BlobEntry) -> None:
    """What cannot be loaded on demand says so before anything is fetched."""
    variant = entry._replace(features=entry.features | feature)
    for use in (require_native, BlobMeta, lambda entry: ChunkMap(entry, [])):
        with pytest.raises(ImageError, match="not supported"):
            use(variant)
    with pytest.raises(ImageError, match="eStargz"):
        require_native(entry._replace(compressor=Compressor.GZIP))


def test_where_chunk_data_ends(entry: BlobEntry) -> None:
    """Before the infos and their tar header; builders before 2.2 counted chunk data only."""
    assert data_end(entry) == 7802
    assert data_end(entry._replace(features=FEATURES & ~BlobFeatures.HAS_TAR_HEADER)) == 8314
    assert data_end(entry._replace(features=BlobFeatures.ALIGNED)) == 14554


GOOD = [ChunkInfo(0, 5000, 0, 100, 1), ChunkInfo(8192, 4096, 100, 4096)]


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, {"offset": 100}),
        (1, {"offset": 4096}),
        (1, {"offset": 36864}),
        (1, {"offset": 1 << 60}),
        (1, {"remote_offset": 1 << 60, "offset": 12288}),
        (0, {"size": 0}),
        (0, {"size": (1 << 20) + 1}),
        (0, {"remote_size": 0}),
        (0, {"remote_size": 5001}),
        (1, {"remote_size": 4095}),
        (1, {"remote_offset": 99}),
        (1, {"remote_offset": 101}),
        (1, {"remote_offset": 7802 - 4095, "offset": 12288}),
        (1, {"flags": ChunkInfoFlags.BATCH}),
        (1, {"flags": ChunkInfoFlags.ZRAN}),
        (1, {"flags": ChunkInfoFlags.ENCRYPTED}),
    ],
)
def test_chunks_that_cannot_be_so(index: int, change: dict[str, Any], entry: BlobEntry) -> None:
    """Out of order, overlapping, beyond either file, of impossible sizes: no map at all."""
    infos = list(GOOD)
    assert ChunkMap(entry, infos).count == 2
    infos[index] = infos[index]._replace(**change)
    with pytest.raises(ImageError, match="chunk"):
        ChunkMap(entry, infos)


def test_digests_and_chunks_must_be_as_many(entry: BlobEntry) -> None:
    """A digest array for another number of chunks is refused."""
    with pytest.raises(ImageError, match="32 bytes of digests for 2 chunks"):
        ChunkMap(entry, GOOD, bytes(32))


def test_a_checksum_flag_is_no_obstacle(entry: BlobEntry) -> None:
    """Chunks may have a crc32c; their digest says more."""
    info = GOOD[1]._replace(offset=0, flags=ChunkInfoFlags.HAS_CRC32.value, data=77)
    assert listed(ChunkMap(entry, [info]))[0].compressed is False


def row(index: int, info: ChunkInfo, **change: Any) -> ChunkEntry:
    return ChunkEntry(
        digest=bytes([index]) * 32,
        blob_index=0,
        flags=info.flags,
        compressed_size=info.remote_size,
        uncompressed_size=info.size,
        compressed_offset=info.remote_offset,
        uncompressed_offset=info.offset,
        file_offset=0,
        chunk_index=index,
    )._replace(**change)


def test_a_chunk_table_may_have_holes_and_repeat_itself(entry: BlobEntry) -> None:
    """Only its image's chunks are there, in any order, and those of two images may overlap."""
    rows = [row(7, GOOD[1]), row(3, GOOD[0]), row(7, GOOD[1], blob_index=2, file_offset=9)]
    chunks = ChunkMap.from_chunk_table(entry, rows)
    assert [chunk.digest for chunk in listed(chunks)] == [b"\x03" * 32, b"\x07" * 32]
    with pytest.raises(IndexError):
        chunks.find(12288)


@pytest.mark.parametrize(
    "wrong",
    [
        row(3, GOOD[0]._replace(remote_size=99)),
        row(7, GOOD[1], flags=ChunkFlags.BATCH),
        row(7, GOOD[1], flags=ChunkFlags.ENCRYPTED),
        row(7, GOOD[1], flags=ChunkFlags.HOLE),
    ],
)
def test_a_chunk_table_that_cannot_be_so(wrong: ChunkEntry, entry: BlobEntry) -> None:
    """Two placements of one chunk, or chunks of a kind that is not supported."""
    with pytest.raises(ImageError, match="chunk"):
        ChunkMap.from_chunk_table(entry, [row(3, GOOD[0]), wrong])


@st.composite
def chunk_maps(draw: Callable[[st.SearchStrategy[int]], int]) -> ChunkMap:
    infos, offset, remote = [], 0, 0
    for _ in range(draw(st.integers(0, 8))):
        gap = draw(st.integers(0, 2))
        offset += gap * BLOCK_BYTES
        remote += gap * 10
        size = draw(st.integers(1, 3 * BLOCK_BYTES))
        infos.append(ChunkInfo(offset, size, remote, 1, ChunkInfoFlags.COMPRESSED.value))
        offset, remote = align_up(offset + size), remote + 1
    entry = made(1, Compressor.NONE, False).entry
    return ChunkMap(
        entry._replace(chunk_size=1 << 20, uncompressed_size=offset + 8192, ci_offset=1 << 20),
        infos,
    )


@given(chunk_maps(), st.integers(0, 40 * BLOCK_BYTES))
def test_find_is_a_linear_search(chunks: ChunkMap, offset: int) -> None:
    """The binary search finds what looking at every chunk finds, or nothing."""
    holding = [i for i, c in enumerate(listed(chunks)) if c.offset <= offset < c.padded_end]
    if holding:
        assert [chunks.find(offset)] == holding
    else:
        with pytest.raises(IndexError):
            chunks.find(offset)


@given(chunk_maps(), st.integers(0, 40 * BLOCK_BYTES), st.integers(0, 40 * BLOCK_BYTES))
def test_overlapping_is_a_linear_search(chunks: ChunkMap, start: int, end: int) -> None:
    """So do ranges: exactly the chunks that have a byte in them."""
    expected = [i for i, c in enumerate(listed(chunks)) if c.offset < end and start < c.padded_end]
    assert list(chunks.overlapping(start, end)) == (expected if start < end else [])


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.integers(META_START * 8, (META_START + 100) * 8),
        st.integers(DIGESTS_START * 8, 14554 * 8 - 1),
    ),
    st.booleans(),
)
def test_flipped_bits_decode_or_are_an_image_error(
    entry: BlobEntry, nydus_blob: bytes, bit: int, trusted: bool
) -> None:
    """With a trusted ToC no flip passes; without one nothing but ImageError is raised."""
    damaged = bytearray(nydus_blob)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        chunks = read(entry if trusted else entry._replace(toc_digest=bytes(32)), damaged)
    except ImageError:
        return
    unprotected = range((DIGESTS_START + 64) * 8, TOC_START * 8)
    assert not trusted or bit in unprotected
    assert chunks.count == 2

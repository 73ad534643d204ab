"""Trees become images that our reader, fsck.erofs and the kernel read back as they were."""

import io
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.build import Image, ImageBuilder
from rafs_v6.layout import BlobEntry, Compressor, Digest, ExtendedInode
from rafs_v6.merge import merge
from rafs_v6.pack import Format, Ranking
from rafs_v6.tree import Node
from tests.rafs_v6.oracle import extracted, mounted, told_by_directory
from tests.rafs_v6.trees import (
    Built,
    build,
    directory,
    everything,
    regular,
    special,
    symlink,
    told_by_bootstrap,
    told_by_tree,
)

FORMATS = {
    "defaults": Format(),
    "zstd-4K": Format(chunk_bytes=4096),
    "lz4-v2": Format(
        compressor=Compressor.LZ4_BLOCK,
        chunk_bytes=8192,
        digester=Digest.SHA256,
        chunk_info_v2=True,
    ),
    "plain-16M": Format(compressor=Compressor.NONE, chunk_bytes=16 << 20),
}
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())


@formats
def test_reader_finds_what_was_built(form):
    """Every fact of a tree with one of everything comes back through our own reader."""
    tree = everything()
    assert told_by_bootstrap(build(tree, form=form)) == told_by_tree(tree)


@formats
def test_kernel_finds_what_was_built(form, tmp_path):
    """Every fact of the tree comes back through the kernel's own EROFS."""
    tree = everything()
    with mounted(build(tree, form=form), tmp_path) as root:
        assert told_by_directory(root) == told_by_tree(tree)


@formats
def test_fsck_finds_what_was_built(form, tmp_path):
    """fsck.erofs finds nothing wrong and extracts the same files; it leaves out devices."""
    tree = everything()
    del tree.children[b"dev"]
    found = told_by_directory(extracted(build(tree, form=form), tmp_path))
    wanted = told_by_tree(tree)
    assert found.keys() == wanted.keys()
    for path, facts in wanted.items():
        assert found[path].content == facts.content
        assert stat.S_IFMT(found[path].mode) == stat.S_IFMT(facts.mode)


names = st.binary(min_size=1, max_size=24).filter(
    lambda name: not set(name) & {0, 0x2F} and name not in (b".", b"..")
)
xattrs = st.dictionaries(
    st.sampled_from(
        [b"user.a", b"user.bb", b"trusted.c", b"security.d", b"system.posix_acl_access"]
    ),
    st.binary(max_size=300),
    max_size=3,
)
contents = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda unit, n: unit * n, st.binary(min_size=1, max_size=50), st.integers(1, 900)),
)
owners = st.integers(0, (1 << 32) - 1)
leaves = st.one_of(
    st.builds(regular, contents, mode=st.integers(0, 0o7777), uid=owners, xattrs=xattrs),
    st.builds(symlink, st.binary(min_size=1, max_size=4095).filter(lambda t: 0 not in t)),
    st.builds(
        special,
        st.sampled_from([stat.S_IFCHR, stat.S_IFBLK]),
        st.tuples(st.integers(1, 4095), st.integers(0, (1 << 20) - 1)),
    ),
    st.builds(special, st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK]), gid=owners),
)
trees = st.builds(
    directory,
    st.dictionaries(
        names,
        st.recursive(
            leaves,
            lambda inner: st.builds(
                directory, st.dictionaries(names, inner, max_size=6), xattrs=xattrs
            ),
            max_leaves=20,
        ),
        max_size=8,
    ),
    mtime=st.integers(-(1 << 40), 1 << 40),
    mtime_nsec=st.integers(0, 10**9 - 1),
)
forms = st.builds(
    Format,
    compressor=st.sampled_from([Compressor.NONE, Compressor.ZSTD, Compressor.LZ4_BLOCK]),
    digester=st.sampled_from(Digest),
    chunk_bytes=st.sampled_from([4096, 8192, 1 << 20]),
    chunk_info_v2=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(trees, min_size=1, max_size=3), forms)
def test_any_layers_come_back(layers, form):
    """What the merged tree says is what the image says, and the same every time."""
    merged = None
    for layer in layers:
        merged = merge(merged, layer)
    built = build(*layers, form=form)
    assert told_by_bootstrap(built) == told_by_tree(merged)
    assert build(*layers, form=form) == built


def test_layers_share_chunks():
    """Data that a lower layer has is not stored again; a layer without new data has no blob."""
    data = bytes(range(256)) * 64
    built = build(
        directory({b"a": regular(data)}),
        directory({b"b": regular(data)}),
        directory({b"c": regular(data + b"new")}),
        form=Format(chunk_bytes=4096),
    )
    assert [blob.chunk_count for blob in built.image.blobs] == [1, 1]
    assert [blob.blob_index for blob in built.image.blobs] == [0, 1]


def test_hidden_layers_leave_the_image():
    """A blob none of whose data is visible any more is neither in the table nor a device."""
    built = build(
        directory({b"old": regular(b"old")}),
        directory({b".wh.old": regular(), b"new": regular(b"new")}),
    )
    assert [blob.blob_index for blob in built.image.blobs] == [0]
    assert told_by_bootstrap(built).keys() == {b"", b"new"}


def test_lower_blobs_do_not_depend_on_upper_layers():
    """The blob of a base layer is the same under whatever stands on it: registries share it."""
    base, output = everything(), io.BytesIO()
    blob = ImageBuilder().add(base, output)
    built = build(base, directory({b"top": regular(b"top")}))
    assert built.image.blobs[0].blob_id == blob.blob_id


def test_contiguous_files_are_one_extent_for_the_kernel():
    """Only a file whose chunks follow each other gets a larger chunk format: the kernel would
    read wrong bytes of any other."""
    unit, other = b"u" * 4096, b"o" * 4096
    tree = directory({b"whole": regular(unit + other + b"end"), b"torn": regular(other + unit)})
    # `torn` comes first in the blob, so it is `whole` that shares its chunks out of order.
    image = Bootstrap(build(tree, form=Format(chunk_bytes=4096)).image.bootstrap)
    formats = {path.strip(b"/"): inode.u for path, inode in image.walk() if path.strip(b"/")}
    assert formats == {b"torn": 0x21, b"whole": 0x20}


def test_image_without_data_has_no_blob():
    """Directories and symlinks alone need no device, and the kernel takes that."""
    built = build(directory({b"d": directory(), b"l": symlink(b"d"), b"e": regular()}))
    assert built.image.blobs == () and built.blobs == {}
    assert Bootstrap(built.image.bootstrap).superblock.meta_blkaddr == 0


def test_kernel_mounts_an_image_without_data(tmp_path):
    """The kernel takes a bootstrap whose metadata begins in the superblock's block."""
    tree = directory({b"d": directory(), b"l": symlink(b"d"), b"e": regular()})
    with mounted(build(tree), tmp_path) as root:
        assert told_by_directory(root) == told_by_tree(tree)


def test_prefetch_names_come_first_and_are_in_the_table():
    """Named files lead the blob in the order given and their nids are recommended."""
    tree = directory(
        {b"a": regular(b"a"), b"z": directory({b"y": regular(b"y")}), b"b": regular(b"b")}
    )
    form = Format(prefetch=(b"/z", b"b"), compressor=Compressor.NONE)
    built = build(tree, form=form)
    (blob,) = built.blobs.values()
    image = Bootstrap(built.image.bootstrap)
    nids = {path.strip(b"/"): inode.nid for path, inode in image.walk()}
    assert blob.startswith(b"yba")
    assert image.prefetch_nids() == (nids[b"z"], nids[b"b"])


def test_any_name_of_a_hard_link_brings_it_forward():
    """A file is named as the program that reads it does, which may be its second name."""
    linked = regular(b"linked")
    tree = directory({b"a": linked, b"b": regular(b"b"), b"z": linked})
    built = build(tree, form=Format(prefetch=(b"z",), compressor=Compressor.NONE))
    (blob,) = built.blobs.values()
    assert blob.startswith(b"linkedb")


@given(
    st.lists(st.lists(st.sampled_from([b"a", b"bb", b"c"]), max_size=3).map(b"/".join), max_size=6),
    st.lists(st.sampled_from([b"a", b"bb", b"c"]), min_size=1, max_size=4).map(b"/".join),
)
def test_rank_is_the_first_name_that_has_the_path_in_it(prefetch, path):
    """The quick answer is the one that looking at every name gives."""
    inside = [
        not name or f"{path.decode()}/".startswith(f"{name}/")
        for name in map(bytes.decode, prefetch)
    ]
    expected = inside.index(True) if True in inside else len(prefetch)
    assert Ranking(prefetch).rank(path) == expected


def test_prefetch_of_what_is_not_there_is_refused():
    """A misspelt name is an error, not a hint that never helps."""
    with pytest.raises(ImageError, match="nowhere"):
        build(directory({b"a": regular(b"a")}), form=Format(prefetch=(b"nowhere",)))


def test_deep_trees_need_no_deep_stack():
    """Directories as deep as a path can be: no recursion."""
    tree = directory({b"f": regular(b"f")})
    for _ in range(1000):
        tree = directory({b"d": tree})
    assert b"d/" * 1000 + b"f" in told_by_bootstrap(build(tree))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (regular(xattrs={b"btrfs.compression": b"zstd"}), "btrfs"),
        (regular(xattrs={b"user.%d" % n: bytes(60_000) for n in range(5)}), "256 KiB"),
    ],
    ids=["unknown xattr", "too many xattrs"],
)
def test_what_cannot_be_said_is_refused_with_its_path(node, message):
    """EROFS has no form for some trees; the error names the file."""
    with pytest.raises(ImageError, match=message) as caught:
        build(directory({b"some": directory({b"file": node})}))
    assert "some/file" in str(caught.value)


@pytest.mark.parametrize("size", [2, 4], ids=["grown", "shrunk"])
def test_files_that_change_while_read_are_refused(size):
    """A file that is not as long as it was said to be never becomes wrong data."""
    node = Node(mode=stat.S_IFREG | 0o644, size=size, data=lambda: io.BytesIO(b"abc"))
    with pytest.raises(ImageError, match="busy"):
        build(directory({b"busy": node}))


@pytest.mark.parametrize("chunk_bytes", [0, 2048, 4097, 12288, 32 << 20])
def test_impossible_chunk_sizes_are_refused(chunk_bytes):
    """Chunks are a power of two of bytes between 4 KiB and 16 MiB."""
    with pytest.raises(ImageError, match="power of two"):
        Format(chunk_bytes=chunk_bytes)


def test_nydus_image_lays_it_out_so(nydus_bootstrap, nydus_blob):
    """The tree of nydus-image's own bootstrap gives the same bytes, but for what depends on the
    zstd library, the blob's id, and two fields its later versions write differently."""
    theirs = BlobEntry.unpack(nydus_bootstrap, 4096)
    data = Built(Image(nydus_bootstrap, (theirs,)), {theirs.blob_id: nydus_blob})
    cache = data.cache_file(theirs.blob_id)
    root, lib, sync_io = (
        ExtendedInode.unpack(nydus_bootstrap, 8192 + nid * 32) for nid in (128, 133, 136)
    )
    tree = directory(
        {
            b"lib.rs": _like(lib, cache[: lib.size]),
            b"sync_io.rs": _like(sync_io, cache[20480 : 20480 + sync_io.size]),
        },
        mtime=root.mtime,
    )
    ours = build(tree).image
    (blob,) = ours.blobs
    expected = bytearray(nydus_bootstrap)
    expected[4096 : 4096 + 256] = blob.pack()
    expected[1408 : 1408 + 64] = blob.blob_id.encode()
    expected[1476:1480] = (128).to_bytes(4, "little")  # mapped_blkaddr: 2 MiB-aligned in 2.2
    for offset in (0x3010, 0x3014):  # the root's i_u, meaningless when inline, and i_ino, once 0
        expected[offset : offset + 4] = ours.bootstrap[offset : offset + 4]
    ignored = set(range(0x4028, 0x4034)) | set(range(0x4078, 0x407C))  # sizes and offsets of zstd
    differing = {n for n, (a, b) in enumerate(zip(ours.bootstrap, expected, strict=True)) if a != b}
    assert differing <= ignored


def _like(inode: ExtendedInode, content: bytes) -> Node:
    return regular(content, mode=inode.mode, mtime=inode.mtime, mtime_nsec=inode.mtime_nsec)

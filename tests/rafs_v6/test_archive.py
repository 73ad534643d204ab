"""Layer archives, honest and hostile, become trees."""

import contextlib
import gzip
import io
import stat
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from rafs_v6 import ImageError
from rafs_v6.archive import Archive
from rafs_v6.merge import merge
from rafs_v6.tree import Node, lookup
from tests.rafs_v6.oracle import extracted, told_by_directory
from tests.rafs_v6.trees import build, directory, regular, symlink, told_by_tree

ALL_TYPES = Path(__file__).parents[1] / "data" / "nydus" / "all-entry-type.tar"


def entry(name: str, kind: bytes = tarfile.REGTYPE, **facts: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for fact, value in facts.items():
        setattr(member, fact, value)
    return member


def tar(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            member, content = member if isinstance(member, tuple) else (member, b"")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return output.getvalue()


def tree(archive: bytes, below: Node | None = None) -> Node:
    with Archive(io.BytesIO(archive)) as opened:
        return opened.tree(below)


def content(node: Node | None) -> bytes:
    assert node is not None
    return b"".join(node.chunks(4096))


def two_members(data: bytes) -> bytes:
    return gzip.compress(data[:512]) + gzip.compress(data[512:])


@pytest.mark.parametrize(
    "compress",
    [
        bytes,
        gzip.compress,
        zstandard.compress,
        lambda data: gzip.compress(data[:512]) + gzip.compress(data[512:]),
    ],
    ids=["plain", "gzip", "zstd", "two gzip members"],
)
def test_compression_is_found_out(compress):
    """What the archive is compressed with is in its first bytes; content stays readable."""
    data = bytes(range(256)) * 1000
    with Archive(io.BytesIO(compress(tar((entry("f"), data))))) as archive:
        assert content(archive.tree().children[b"f"]) == data


def test_every_type_of_entry_of_the_field(tmp_path):
    """The archive nydus tests with becomes an image that fsck.erofs extracts as tar does."""
    with ALL_TYPES.open("rb") as file, Archive(file) as archive:
        layer = archive.tree()
        built = build(layer)
        wanted = told_by_tree(layer)
    assert wanted[b"tar/dir1/hardlink2.txt"].nlink == 4
    assert wanted[b"tar/dir2/symlink1.txt"].content == b"../dir1/dir3/file1.txt"
    found = told_by_directory(extracted(built, tmp_path))
    assert {path: facts.content for path, facts in found.items()} == {
        path: facts.content for path, facts in wanted.items()
    }


def test_facts_of_entries():
    """Owner, mode, exact time, device numbers, binary xattrs and names that are not UTF-8."""
    capability = bytes.fromhex("0100000200200000ff00000000000000000000fe")
    pax = {
        "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
        "mtime": "-1.25",
    }
    found = tree(
        tar(
            entry("f", mode=0o4751, uid=70_000, gid=5, pax_headers=pax),
            entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mtime=1_700_000_000.0),
            entry("disk", tarfile.BLKTYPE, devmajor=259, devminor=70_000),
            entry("pipe", tarfile.FIFOTYPE),
            entry("odd\udcff\udcfe"),
        )
    )
    file = found.children[b"f"]
    assert (stat.S_IMODE(file.mode), file.uid, file.gid) == (0o4751, 70_000, 5)
    assert (file.mtime, file.mtime_nsec) == (-2, 750_000_000)
    assert file.xattrs == {b"security.capability": capability}
    assert found.children[b"null"].device == (1, 3)
    assert found.children[b"null"].mtime == 1_700_000_000
    assert stat.S_ISBLK(found.children[b"disk"].mode)
    assert stat.S_ISFIFO(found.children[b"pipe"].mode)
    assert b"odd\xff\xfe" in found.children


@pytest.mark.parametrize(
    "name", ["/etc/f", "./etc/f", "../etc/f", "../../etc/./x/../f", "etc//f", "/../../etc/f"]
)
def test_names_stay_below_the_root(name):
    """Absolute names and `..` lead nowhere else."""
    assert told_by_tree(tree(tar(entry(name)))).keys() == {b"", b"etc", b"etc/f"}


def test_missing_parents_are_like_those_below():
    """A directory that only the layer below describes keeps its facts."""
    below = directory({b"etc": directory(uid=3, mode=0o700, mtime=5)}, mtime=6)
    found = tree(tar(entry("etc/new/f")), below)
    assert (found.mtime, found.children[b"etc"].uid, found.children[b"etc"].mtime) == (6, 3, 5)
    assert lookup(found, b"etc/new").mode == stat.S_IFDIR | 0o755


def test_later_entries_replace_earlier_ones():
    """The last entry of a name counts; a directory named again keeps what is in it."""
    found = tree(
        tar(
            entry("d", tarfile.DIRTYPE, mode=0o700),
            entry("d/f"),
            (entry("d/f"), b"second"),
            entry("d/", tarfile.DIRTYPE, mode=0o711),
            entry("x", tarfile.DIRTYPE),
            entry("x"),
        )
    )
    assert content(lookup(found, b"d/f")) == b"second"
    assert stat.S_IMODE(found.children[b"d"].mode) == 0o711
    assert found.children[b"x"].is_regular


@pytest.mark.parametrize("where", ["layer", "below"])
@pytest.mark.parametrize("target", [b"usr/bin", b"/usr/bin", b"../../usr/./bin", b"usr/lib/../bin"])
def test_paths_run_through_symlinks_inside_the_root(where, target):
    """A file under a symlinked directory lands where the symlink leads, as when unpacked."""
    link = directory({b"bin": symlink(target)})
    first = [entry("bin", tarfile.SYMTYPE, linkname=target.decode())] if where == "layer" else []
    found = tree(tar(*first, entry("bin/f")), link if where == "below" else None)
    assert lookup(found, b"usr/bin/f") is not None


def test_a_whiteout_hides_the_symlink_below():
    """Where this layer removes the symlink, a directory takes its place."""
    found = tree(tar(entry(".wh.bin"), entry("bin/f")), directory({b"bin": symlink(b"usr")}))
    assert lookup(found, b"bin/f") is not None


def test_hard_links_lead_into_the_layer_or_below():
    """A link is the same node as what it names, here or in the layer below."""
    old = regular(b"old")
    found = tree(
        tar(
            (entry("new"), b"new"),
            entry("to-new", tarfile.LNKTYPE, linkname="./new"),
            entry("to-old", tarfile.LNKTYPE, linkname="/dir/old"),
        ),
        directory({b"dir": directory({b"old": old})}),
    )
    assert found.children[b"to-new"] is found.children[b"new"]
    assert found.children[b"to-old"] is old


def test_hard_links_below_share_their_chunks_in_the_image():
    """An image whose upper layer links to a lower file stores it once, with two names."""
    lower = directory({b"old": regular(b"data")})
    built = build(
        lower, tree(tar(entry("link", tarfile.LNKTYPE, linkname="old")), merge(None, lower))
    )
    assert len(built.blobs) == 1


SPARSE = {"GNU.sparse.size": "1000", "GNU.sparse.numblocks": "1"}


def test_sparse_files_have_their_holes_filled():
    """GNU tar's sparse files, as pax headers: data at the end, zeros before it."""
    member = entry("f", pax_headers=SPARSE | {"GNU.sparse.map": "997,3"})
    assert content(tree(tar((member, b"end"))).children[b"f"]) == bytes(997) + b"end"


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "empty"),
        (b"no archive at all" * 100, "damaged"),
        (tar(entry("f"))[:512], "cut short"),
        (tar((entry("f"), bytes(2000)))[:1500], "end of data"),
        (tar(entry("a"))[:512] + b"x" * 512, "cut short"),
        (gzip.compress(tar(entry("f")))[:-9], "unpack"),
        (gzip.compress(tar(entry("f")))[:-4] + b"\0\0\0\1", "unpack"),
        (zstandard.compress(tar(entry("f")))[:-4] + b"\xff" * 9, "unpack"),
        (tar(entry("l", tarfile.LNKTYPE, linkname="nowhere")), "hard link"),
        (tar(entry("d", tarfile.DIRTYPE), entry("l", tarfile.LNKTYPE, linkname="d")), "hard link"),
        (tar(entry("f"), entry("f/below")), "no directory"),
        (tar(entry("/")), "root"),
        (
            tar(
                entry("a", tarfile.SYMTYPE, linkname="b"),
                entry("b", tarfile.SYMTYPE, linkname="a"),
                entry("a/f"),
            ),
            "circle",
        ),
        (tar(entry("s", tarfile.SYMTYPE, linkname="")), "target of 0"),
        (tar(entry("s", tarfile.SYMTYPE, linkname="t" * 4096)), "target of 4096"),
        (tar(entry("n" * 256)), "too long"),
        (tar(entry("d/" * 3000 + "f")), "too long"),
        (tar(entry("f", pax_headers={"path": "a\0b"})), "NUL"),
        (tar(entry("f", b"V")), "unknown entry type"),
        (tar(entry("f", uid=-1)), "owner"),
        (tar(entry("c", tarfile.CHRTYPE, devmajor=4096)), "device 4096:0"),
        (tar(entry("f", pax_headers=SPARSE | {"GNU.sparse.map": "900,200"})), "holes"),
        (tar(entry("f", pax_headers=SPARSE | {"GNU.sparse.map": "0,600"})), "less data"),
        (tar(entry("f", pax_headers=SPARSE | {"GNU.sparse.map": "0,x"})), "damaged"),
        (tar(entry("f", pax_headers={"mtime": "1e9999999"})), "time"),
        (tar(entry("f", pax_headers={"size": "-1024"})), "size"),
    ],
)
def test_damaged_and_hostile_archives_are_refused(archive, message):
    """Every archive that is not what it should be is an ImageError that says why."""
    with pytest.raises(ImageError, match=message):
        tree(archive)


def test_headers_that_claim_much_are_not_read():
    """An extended header of 4 GiB costs no memory."""
    huge = entry("x", tarfile.XHDTYPE)
    huge.size = 4 << 30
    with pytest.raises(ImageError, match="claims a size"):
        tree(huge.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


def test_bombs_are_refused():
    """What unpacks to more than the limit is given up on the way."""
    with pytest.raises(ImageError, match="more than 65536"):
        Archive(io.BytesIO(gzip.compress(bytes(1 << 20))), limit_bytes=1 << 16)


@given(st.integers(0, 2047), st.integers(0, 255))
def test_any_damaged_byte_is_refused_or_harmless(position, value):
    """No damage to an archive raises anything but ImageError."""
    archive = bytearray(
        tar((entry("f", pax_headers={"SCHILY.xattr.user.k": "v"}), b"x"), entry("d/g"))
    )
    archive[position] = value
    with contextlib.suppress(ImageError):
        tree(bytes(archive))

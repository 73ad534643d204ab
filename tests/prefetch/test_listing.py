"""Files that come first: by the image's own table and by patterns, hostile images included."""

from __future__ import annotations

import pytest

from fscached.prefetch import listing
from fscached.prefetch.policy import Range
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.layout import FileType
from rafs_v6.pack import Format
from rafs_v6.prefetch_table import with_prefetch
from tests.rafs_v6.trees import build, directory, regular, symlink

BIG = b"".join(bytes([number]) * 1000 for number in range(200)) * 30


def tree():
    """A small Debian: /bin is a link, python3 too."""
    binaries = {
        b"python3": symlink(b"python3.11"),
        b"python3.11": regular(b"py" * 9000),
        b"perl": regular(b"pl" * 9000),
        b"[": regular(b"te" * 9000),
    }
    lib = directory({b"a.so": regular(b"a" * 9001), b"deep": directory({b"b.so": regular(BIG)})})
    return directory(
        {
            b"bin": symlink(b"usr/bin"),
            b"up": symlink(b"/usr/lib/../bin"),
            b"loop": symlink(b"loop"),
            b"broken": symlink(b"nowhere"),
            b"trick": symlink(b"/usr/*"),
            b"usr": directory({b"bin": directory(binaries), b"lib": lib}),
            b"empty": regular(b""),
        }
    )


@pytest.fixture(scope="module")
def image() -> Bootstrap:
    return Bootstrap(build(tree()).image.bootstrap)


def names(image: Bootstrap, found: list[Range]) -> list[str]:
    """Of which files the ranges are, in order."""
    by_start: dict[tuple[str, int], str] = {}
    for path, inode in image.walk():
        if inode.type is FileType.REGULAR:
            for index in image.chunks(inode):
                blob_id = image.blobs[index.blob_index].blob_id
                by_start[blob_id, index.start_block * 4096] = path.decode()
    assert all(0 <= found.start < found.end for found in found)
    return [by_start[found.blob_id, found.start] for found in found]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["/usr/bin/perl"], ["/usr/bin/perl"]),
        (["/usr/bin/perl", "/usr/lib/a.so"], ["/usr/bin/perl", "/usr/lib/a.so"]),
        (["/usr/lib/a.so", "/usr"], ["/usr/lib/a.so", "*"]),
        (["/usr/bin/p*"], ["/usr/bin/perl", "/usr/bin/python3.11"]),
        (["/usr/bin/python3"], ["/usr/bin/python3.11"]),
        (["/bin/python3"], ["/usr/bin/python3.11"]),
        (["/up/perl"], ["/usr/bin/perl"]),
        (["/usr/bin/[[]"], ["/usr/bin/["]),
        (["/usr/./bin/../lib/a.so"], ["/usr/lib/a.so"]),
        (["/../../usr/lib/a.so"], ["/usr/lib/a.so"]),
        (["/**/*.so"], ["/usr/lib/a.so", "/usr/lib/deep/b.so"]),
        (["/usr/**/b.so"], ["/usr/lib/deep/b.so"]),
        (["/usr/lib/a.so", "/usr/lib/a.so"], ["/usr/lib/a.so"]),
        (["/loop", "/broken", "/nothing", "/empty", "/empty/x", "/trick"], []),
        (["/"], ["*"]),
    ],
)
def test_patterns(image: Bootstrap, texts: list[str], expected: list[str]):
    """In the order of the patterns, each file once; what names nothing is nothing."""
    found = names(image, list(listing.patterns(image, texts)))
    if "*" in expected:
        known = expected[:-1]
        assert found[: len(known)] == known
        assert sorted(found) == sorted(
            path.decode()
            for path, inode in image.walk()
            if inode.type is FileType.REGULAR and inode.size
        )
    else:
        assert found == expected


def test_a_file_is_few_ranges(image: Bootstrap):
    """Chunks that follow each other are one range, of whole pages."""
    (found,) = listing.patterns(image, ["/usr/lib/deep/b.so"])
    assert found.size_bytes == -(-len(BIG) // 4096) * 4096


def test_the_images_own_table(image: Bootstrap):
    """In the table's order, a directory for all below it."""
    inodes = {path: inode.nid for path, inode in image.walk()}
    wanted = [inodes[b"/usr/lib/deep"], inodes[b"/usr/bin/perl"], inodes[b"/usr/lib"]]
    bootstrap = with_prefetch(build(tree()).image.bootstrap, wanted)
    found = names(Bootstrap(bootstrap), list(listing.table(Bootstrap(bootstrap))))
    assert found == ["/usr/lib/deep/b.so", "/usr/bin/perl", "/usr/lib/a.so"]


def test_an_image_without_a_table(image: Bootstrap):
    assert list(listing.table(image)) == []


def test_a_table_of_a_conversion():
    """What `image convert --prefetch` writes is what is read."""
    built = build(tree(), form=Format(prefetch=(b"/usr/lib/a.so",)))
    image = Bootstrap(built.image.bootstrap)
    assert names(image, list(listing.table(image))) == ["/usr/lib/a.so"]


def test_a_hostile_image_costs_no_more_than_its_size(monkeypatch: pytest.MonkeyPatch):
    """Links that lead on and on, and patterns that look everywhere again and again."""
    deep = symlink(b"/".join([b".."] * 1300 + [b"x"]))
    image = Bootstrap(build(directory({b"x": regular(b"x"), b"deep": deep})).image.bootstrap)
    with pytest.raises(ImageError, match="too deep"):
        list(listing.patterns(image, ["/deep/y"]))
    wide = directory(
        {b"%d" % n: directory({b"%d" % m: directory() for m in range(30)}) for n in range(30)}
    )
    image = Bootstrap(build(wide).image.bootstrap)
    assert list(listing.patterns(image, ["/**/**/x"])) == []
    # As if the same entries were met from everywhere.
    monkeypatch.setattr(listing, "DIRENT_BYTES", 4096)
    with pytest.raises(ImageError, match="more entries"):
        list(listing.patterns(image, ["/**/**/**/**/x"]))

"""Directories of this machine become trees."""

import os
import stat

import pytest

from rafs_v6 import ImageError
from rafs_v6.tree import groups, lookup, read_directory
from tests.rafs_v6.oracle import told_by_directory
from tests.rafs_v6.trees import directory, regular, told_by_tree


def test_directory_is_read_as_it_is(tmp_path):
    """Whatever lstat, readlink and listxattr say is in the tree; nlink of directories is ours."""
    (tmp_path / "sub").mkdir(mode=0o750)
    (tmp_path / "sub" / "file").write_bytes(b"content")
    os.link(tmp_path / "sub" / "file", tmp_path / "link")
    os.utime(tmp_path / "link", ns=(0, 1_234_567_890_123_456_789))
    (tmp_path / "symlink").symlink_to("/does/not/exist")
    os.mkfifo(tmp_path / "fifo")
    with open(os.path.join(os.fsencode(tmp_path), b"\xff"), "wb"):
        pass
    os.setxattr(tmp_path / "sub" / "file", "user.k", b"\0v")
    tree = read_directory(tmp_path)
    found, wanted = told_by_tree(tree), told_by_directory(tmp_path)
    for told in (found, wanted):
        for path, facts in told.items():
            told[path] = facts._replace(nlink=0 if stat.S_ISDIR(facts.mode) else facts.nlink)
    assert found == wanted
    assert lookup(tree, b"link") is lookup(tree, b"/sub/file")


def test_content_is_read_when_asked_and_only_if_it_is_a_file_still(tmp_path):
    """A file replaced by a fifo or a symlink after the tree was read is an error, not a hang."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"text")
    tree = read_directory(tmp_path)
    for name, replace in (("a", os.mkfifo), ("b", lambda path: os.symlink("/etc/passwd", path))):
        (tmp_path / name).unlink()
        replace(tmp_path / name)
        with pytest.raises((OSError, ImageError)):
            list(tree.children[name.encode()].chunks(10))


def test_a_file_is_no_tree(tmp_path):
    """Only directories are."""
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="not a directory"):
        read_directory(tmp_path / "file")


def test_groups_go_by_raw_bytes_and_depth_first():
    """A directory's entries all together, then each subdirectory: RAFS's order of everything."""
    tree = directory({b"b": directory({b"x": regular()}), b"a": directory(), b"\xff": regular()})
    assert [(group.path, [name for name, _ in group.entries]) for group in groups(tree)] == [
        (b"", [b"a", b"b", b"\xff"]),
        (b"a", []),
        (b"b", [b"x"]),
    ]


def test_chunks_are_of_the_size_asked_but_the_last():
    """Content comes in pieces of one size."""
    assert list(regular(b"0123456789").chunks(4)) == [b"0123", b"4567", b"89"]
    assert list(regular(b"").chunks(4)) == []

"""The system-call wrappers: the real calls, refused by the real kernel."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from cdefs import cachefiles, fanotify, files, mount


def test_read_complete_reports_errno_and_call(tmp_path: Path) -> None:
    """An ioctl on something that is no cache object says which READ it was for."""
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError) as caught:
        cachefiles.read_complete(file.fileno(), 7)
    assert caught.value.errno == errno.ENOTTY
    assert "READ_COMPLETE 7" in str(caught.value)


def test_fsopen_of_an_unknown_type() -> None:
    """A refused fsopen names the file system type."""
    with pytest.raises(OSError, match="fsopen no-such-fs") as caught:
        os.close(mount.fsopen("no-such-fs"))
    assert caught.value.errno in {errno.ENODEV, errno.EPERM}


def test_calls_on_a_wrong_descriptor(tmp_path: Path) -> None:
    """Each call on something that is no mount descriptor fails with its own name."""
    with open(tmp_path / "file", "wb") as file:
        fd = file.fileno()
        for what, call in (
            ("fsconfig fsid=x", lambda: mount.fsconfig_set_string(fd, "fsid", "x")),
            ("fsconfig ro", lambda: mount.fsconfig_set_flag(fd, "ro")),
            ("fsconfig create", lambda: mount.fsconfig_create(fd)),
            ("fsmount", lambda: mount.fsmount(fd)),
            ("move_mount to", lambda: mount.move_mount(fd, str(tmp_path))),
        ):
            with pytest.raises(OSError, match=what):
                call()


def test_calls_on_a_missing_path(tmp_path: Path) -> None:
    """A path that does not exist is in the error."""
    missing = str(tmp_path / "missing")
    with pytest.raises(OSError, match=missing):
        os.close(mount.open_tree_clone(missing))
    with pytest.raises(OSError, match=missing):
        mount.umount(missing, detach=False)


def test_fanotify_calls_on_a_wrong_descriptor(tmp_path: Path) -> None:
    """Marks and answers need a group."""
    with open(tmp_path / "file", "wb") as file:
        fd = file.fileno()
        for call in (fanotify.mark, fanotify.unmark):
            with pytest.raises(OSError, match="fanotify_mark") as caught:
                call(fd, fd)
            assert caught.value.errno == errno.EINVAL


def test_punched_blocks_are_a_hole(tmp_path: Path) -> None:
    """What was data is told as a hole, and the size stays."""
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"x" * 12288)
        file.flush()
        files.punch(file.fileno(), 4096, 8192)
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 4096
        assert os.lseek(file.fileno(), 4096, os.SEEK_DATA) == 8192
        assert os.fstat(file.fileno()).st_size == 12288


def test_no_hole_in_what_is_no_file() -> None:
    """The error says which bytes."""
    reader, writer = os.pipe()
    with pytest.raises(OSError, match=r"fallocate \[0, 4096\)"):
        files.punch(writer, 0, 4096)
    os.close(reader)
    os.close(writer)


def test_a_threads_directory_is_its_own(tmp_path: Path) -> None:
    """Where it goes, the process does not."""
    before, seen = os.getcwd(), []

    def go() -> None:
        files.own_directory()
        os.chdir(tmp_path)
        seen.append(os.getcwd())

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert seen == [str(tmp_path)] and os.getcwd() == before

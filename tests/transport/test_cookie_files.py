"""Where cachefiles' files are, and its commands for them, against a directory made like its own.

The hashes are those a kernel has used; the commands reach a real one in `vm-tests/`.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fscached.transport import ObjectKey
from fscached.transport.cookie_files import CookieFiles

KEY = ObjectKey("fscached", "b" * 64)


class Device:
    """The other end: what was written, and in which directory its writer was."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ours, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.files = CookieFiles(ours.detach(), str(directory))
        self.commands: list[tuple[str, str]] = []
        self.refusal = 0
        monkeypatch.setattr(os, "write", self._write)

    def _write(self, fd: int, data: bytes) -> int:
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        verb, name = data.decode().split(" ")
        self.commands.append((verb, os.path.join(os.getcwd(), name)))
        path = Path(name)
        if path.is_dir():
            os.rename(path, "../graveyard/1")
        else:
            path.unlink()
        return len(data)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    (tmp_path / "cache").mkdir()
    (tmp_path / "graveyard").mkdir()
    yield Device(tmp_path, monkeypatch)


def make(device: Device, key: ObjectKey, data: bytes = b"x" * 5000) -> Path:
    path = Path(device.files.path(key))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def apart(task):
    """Run in a thread of its own, as the daemon does."""
    seen = []

    def run():
        try:
            seen.append(task())
        except OSError as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen[0]


def test_files_are_listed_with_what_they_take(device: Device) -> None:
    """Keys as the kernel asks for them; what is no data file is left out."""
    path = make(device, KEY)
    make(device, ObjectKey("other,one", "c"))
    (path.parent / "Tnot-one-of-ours").write_bytes(b"")
    (path.parent.parent.parent / "Jstranger").mkdir()
    files = {file.key: file for file in device.files.listed()}
    assert set(files) == {KEY, ObjectKey("other,one", "c")}
    assert files[KEY].size_bytes == 5000
    assert files[KEY].allocated_bytes == path.stat().st_blocks * 512
    assert files[KEY].path == str(path)


def test_a_cookie_is_found_in_every_volume(device: Device) -> None:
    """A snapshotter names a blob, not its volume."""
    for volume in ("one", "two"):
        make(device, ObjectKey(volume, "same"))
    make(device, ObjectKey("two", "another"))
    assert {file.key.volume for file in device.files.found("same")} == {"one", "two"}
    assert device.files.found("none") == []


def test_a_file_is_culled_by_name_in_its_directory(device: Device) -> None:
    """In a thread's own directory: the process stays where it is."""
    path, before = make(device, KEY), os.getcwd()
    assert apart(lambda: device.files.cull(KEY)) is True
    assert device.commands == [("cull", str(path))]
    assert not path.exists() and os.getcwd() == before


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_what_is_gone_is_gone(device: Device, code: int) -> None:
    """Its directory may never have been, or the kernel was faster."""
    assert apart(lambda: device.files.cull(KEY)) is True
    make(device, KEY)
    device.refusal = code
    assert apart(lambda: device.files.cull(KEY)) is True


def test_what_is_in_use_is_no_error_and_what_is_one_says_which(device: Device) -> None:
    """EBUSY means later; anything else names command and file."""
    make(device, KEY)
    device.refusal = errno.EBUSY
    assert apart(lambda: device.files.cull(KEY)) is False
    device.refusal = errno.EIO
    assert f"cull D{KEY.cookie}" in str(apart(lambda: device.files.cull(KEY)))


def test_an_empty_volume_goes_by_the_graveyard(device: Device, tmp_path: Path) -> None:
    """Its directories are 257; with a file left in one of them it stays."""
    path = make(device, KEY)
    apart(lambda: device.files.tidy(KEY.volume))
    assert path.exists() and device.commands == []
    path.unlink()
    apart(lambda: device.files.tidy(KEY.volume))
    assert device.commands == [("cull", str(tmp_path / "cache/Ierofs,fscached"))]
    assert list((tmp_path / "cache").iterdir()) == []
    assert list((tmp_path / "graveyard").iterdir()) == []


def test_the_last_use_is_the_atime(device: Device) -> None:
    """Nothing else about a file is kept; the time of its last change stays."""
    path = make(device, KEY)
    changed = path.stat().st_mtime_ns
    device.files.touch(KEY, 1_000_000.5)
    [file] = device.files.listed()
    assert file.used_s == 1_000_000.5 and path.stat().st_mtime_ns == changed
    device.files.touch(ObjectKey("none", "none"), 1.0)


def test_the_directory_is_the_kernels(device: Device, tmp_path: Path) -> None:
    """As Linux 6.1 and 6.12 have made it (vm-tests/test_transport.py compares them all)."""
    path = tmp_path / "cache/Ierofs,domain/@12/Dimage"
    assert device.files.path(ObjectKey("domain", "image")) == str(path)

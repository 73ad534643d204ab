"""Judges that are not ours: the kernel's EROFS, and fsck.erofs of erofs-utils."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rafs_v6.trees import Built, Facts, Told, build, directory, regular

FSCK = shutil.which("fsck.erofs")
MS_RDONLY = 1
MNT_DETACH = 2


def cache_files(built: Built, where: Path) -> list[Path]:
    """Uncompressed blobs in the order of the device slots."""
    paths = []
    for blob in built.image.blobs:
        paths.append(where / f"{blob.blob_index}.cache")
        paths[-1].write_bytes(built.cache_file(blob.blob_id))
    return paths


def extracted(built: Built, where: Path) -> Path:
    """The directory fsck.erofs extracts, after it found nothing wrong."""
    if FSCK is None:
        pytest.skip("fsck.erofs is missing: install erofs-utils")
    bootstrap, target = where / "image.boot", where / "extracted"
    bootstrap.write_bytes(built.image.bootstrap)
    devices = [f"--device={path}" for path in cache_files(built, where)]
    done = subprocess.run(
        [FSCK, *devices, f"--extract={target}", str(bootstrap)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@contextmanager
def mounted(built: Built, where: Path) -> Iterator[Path]:
    """The image mounted by the kernel, from files: Linux 6.12 with EROFS, and root."""
    if reason := _cannot_mount():
        pytest.skip(reason)
    with _mounted(built, where) as target:
        yield target


@contextmanager
def _mounted(built: Built, where: Path) -> Iterator[Path]:
    bootstrap, target = where / "image.boot", where / "mounted"
    bootstrap.write_bytes(built.image.bootstrap)
    target.mkdir()
    options = ",".join(f"device={path}" for path in cache_files(built, where))
    _call(
        "mount", os.fsencode(bootstrap), os.fsencode(target), b"erofs", MS_RDONLY, options.encode()
    )
    try:
        yield target
    finally:
        _call("umount2", os.fsencode(target), MNT_DETACH)


@functools.cache
def _cannot_mount() -> str:
    if os.geteuid():
        return "mounting EROFS needs root"
    with tempfile.TemporaryDirectory() as where:
        try:
            with _mounted(build(directory({b"a": regular(b"a")})), Path(where)):
                return ""
        except OSError as error:
            return f"this kernel does not mount EROFS from files (needs 6.12): {error}"


def _call(name: str, *arguments: object) -> None:
    # By hand: mount(8) would put a loop device before the bootstrap, which then takes no files as
    # devices.
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def told_by_directory(root: Path) -> Told:
    """The facts lstat(2) and read(2) tell of a directory."""
    top = os.fsencode(root)
    told = {b"": _facts(top)}
    for where, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = os.path.join(where, name)
            told[os.path.relpath(path, top)] = _facts(path)
    return told


def _facts(path: bytes) -> Facts:
    status = os.lstat(path)
    content = b""
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    names = os.listxattr(path, follow_symlinks=False)
    return Facts(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        (status.st_mtime_ns // 10**9, status.st_mtime_ns % 10**9),
        status.st_nlink,
        (os.major(status.st_rdev), os.minor(status.st_rdev)),
        {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names},
        content,
    )

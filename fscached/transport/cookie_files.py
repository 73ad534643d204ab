"""Where cachefiles keeps its files, and its two commands for one that nobody needs any more.

    DIRECTORY/cache/Ierofs,VOLUME/@HASH/DCOOKIE

A new object is not among them before its first CLOSE: until then it is an unlinked O_TMPFILE.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from cdefs.files import own_directory
from fscached.transport import CacheFile, ObjectKey
from fscached.transport.cache_file import closing, described, touch

VOLUME_PREFIX = "erofs,"
_VOLUME_MARK = "I"
_DATA_MARK = "D"
_FANS = 256

_WORD = 0xFFFF_FFFF
_GOLDEN_RATIO = 0x61C8_8647
_GONE = {errno.ENOENT, errno.ESTALE}
"""What a command says of a file that is not there (cachefiles_lookup_for_cull in namei.c)."""


class CookieFiles:
    """`Files` of the cachefiles transport.

    `cull` and `inuse` take names in the caller's working directory (fs/cachefiles/daemon.c), so
    every thread that is in here has one of its own.
    """

    def __init__(self, device_fd: int, directory: str) -> None:
        self._device = device_fd
        self._cache = Path(directory, "cache")
        self._graveyard = Path(directory, "graveyard")
        self._thread = threading.local()

    def path(self, key: ObjectKey) -> str:
        fan = file_hash(key) % _FANS
        return str(self._volume(key.volume) / f"@{fan:02x}" / f"{_DATA_MARK}{key.cookie}")

    def listed(self) -> Iterator[CacheFile]:
        for volume in self._volumes():
            for fan in _entries(self._volume(volume)):
                for entry in _entries(fan.path):
                    if entry.name.startswith(_DATA_MARK):
                        key = ObjectKey(volume, entry.name.removeprefix(_DATA_MARK))
                        with contextlib.suppress(FileNotFoundError):
                            yield described(key, entry.path)

    def found(self, cookie: str) -> list[CacheFile]:
        found = []
        for volume in self._volumes():
            key = ObjectKey(volume, cookie)
            with contextlib.suppress(FileNotFoundError):
                found.append(described(key, self.path(key)))
        return found

    def touch(self, key: ObjectKey, used_s: float) -> None:
        touch(self.path(key), used_s)

    def cull(self, key: ObjectKey) -> bool:
        path = self.path(key)
        return self._command("cull", *os.path.split(path))

    def tidy(self, volume: str) -> None:
        """The directories of a volume without files go to the kernel's graveyard, and from there:
        they are 257, and while an image of the volume is mounted the kernel holds them."""
        if not any(True for fan in _entries(self._volume(volume)) for _ in _entries(fan.path)):
            self._command("cull", str(self._cache), self._volume(volume).name)
        for grave in _entries(self._graveyard):
            shutil.rmtree(grave.path, ignore_errors=True)

    def _volume(self, volume: str) -> Path:
        return self._cache / f"{_VOLUME_MARK}{VOLUME_PREFIX}{volume}"

    def _volumes(self) -> list[str]:
        prefix = _VOLUME_MARK + VOLUME_PREFIX
        names = [entry.name for entry in _entries(self._cache)]
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def _command(self, command: str, directory: str, name: str) -> bool:
        """False: the kernel has it in use. Raises OSError."""
        try:
            with closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
                self._enter(fd)
                os.write(self._device, os.fsencode(f"{command} {name}"))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno not in _GONE:
                what = f"cachefiles refused {command} {name}: {error.strerror}"
                raise OSError(error.errno, what) from error
        return True

    def _enter(self, directory_fd: int) -> None:
        if not getattr(self._thread, "apart", False):
            own_directory()
            self._thread.apart = True
        os.fchdir(directory_fd)


def file_hash(key: ObjectKey) -> int:
    """`key_hash` of a cookie; its low byte names the directory of its file.

    fscache_hash in fs/fscache/main.c (6.12: fs/netfs/fscache_main.c): of the volume's key, with its
    length before it, then of the cookie's, salted with that; both in whole words.
    """
    volume = os.fsencode(VOLUME_PREFIX + key.volume)
    salt = _hash(0, bytes([len(volume)]) + volume + b"\0")
    return _hash(salt, os.fsencode(key.cookie))


def _hash(salt: int, data: bytes) -> int:
    data += bytes(-len(data) % 4)
    x, y = 0, salt
    for (word,) in struct.iter_unpack("<I", data):
        x ^= word
        y ^= x
        x = _rotated(x, 7)
        x = (x + y) & _WORD
        y = _rotated(y, 20)
        y = y * 9 & _WORD
    return (y ^ x * _GOLDEN_RATIO & _WORD) * _GOLDEN_RATIO & _WORD


def _rotated(word: int, bits: int) -> int:
    return (word << bits | word >> 32 - bits) & _WORD


def _entries(directory: str | Path) -> list[os.DirEntry[str]]:
    """What is in it; nothing where it is none, or none any more."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []

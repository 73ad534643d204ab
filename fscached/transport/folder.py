"""The cache files of the fanotify transport: made, marked while they have holes, filled, let go.

A file that is open when its mark is set stays unwatched, one that is opened later is watched
(file_set_fsnotify_mode_from_watchers in fs/notify/fsnotify.c). So a file is marked before it is
mounted, and is filled through a descriptor from before the mark, or one that an event brought.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import mmap
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cdefs import fanotify
from fscached.transport import (
    BLOCK_BYTES,
    CacheFile,
    NotReady,
    ObjectId,
    ObjectKey,
    OutOfSpace,
)
from fscached.transport.cache_file import (
    NO_SPACE,
    check_blocks,
    closing,
    data_extents,
    described,
    punch_blocks,
    round_up,
    touch,
    write_all,
)
from fscached.transport.floor import Floor
from fscached.transport.mount import name_fault

log = logging.getLogger(__name__)

_F_SETLEASE = 1024  # <linux/fcntl.h>; Python has no name for it


@dataclass(slots=True, eq=False)
class File:
    """The cache file of one object."""

    key: ObjectKey
    path: Path
    inode: int
    size_bytes: int
    """In whole blocks."""
    marked: bool
    fill_fd: int | None
    """Raises no events on ourselves."""


class Folder:
    """Cache files as `VOLUME/COOKIE` below a directory, and their marks in a group."""

    def __init__(self, group_fd: int, directory: Path, floor: Floor) -> None:
        """Raises OSError: EWOULDBLOCK another process has this folder."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._group = group_fd
        self._directory = directory
        # What another daemon serves looks as if its daemon had died: see `condemn`.
        self._owned = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._floor = floor
        self._ids = itertools.count(1)
        self._files: dict[ObjectId, File] = {}
        self._by_inode: dict[int, ObjectId] = {}
        self._keys: set[ObjectKey] = set()
        self._marks: set[int] = set()
        """Inodes that are marked and no object: a predecessor's, or condemned."""
        self._inherits = False
        self._lock = threading.Lock()
        self._offering = threading.Lock()
        self._lures: queue.SimpleQueue[File] | None = None

    def close(self) -> None:
        """Forget all objects, and let another process have the folder."""
        for object in self.objects():
            self.drop(object)
        os.close(self._owned)

    def inherit(self, inodes: set[int]) -> None:
        """What a predecessor has marked. Until `inherited` such a file may be offered though it is
        mounted, since no read of it went unasked."""
        self._marks, self._inherits = inodes, True

    def inherited(self) -> None:
        """All that the predecessor had was offered again."""
        self._inherits = False

    def condemn(self) -> list[Path]:
        """The files that have holes while somebody has them open, from a time when they were
        marked in a group that is gone: their readers have been reading zeros. From now on their
        reads fail, and they cannot be offered before nobody has them open."""
        return [path for path in self._paths() if self._condemned(path)]

    def marked(self) -> list[Path]:
        """The files that are marked and no objects."""
        return [path for path in self._paths() if path.stat().st_ino in self._marks]

    def let_go(self) -> bool:
        """Take the marks off such files as nobody has open; whether that is all of them."""
        for path in self.marked():
            with closing(_open(path)) as fd, _alone(fd) as alone:
                if alone:
                    fanotify.unmark(self._group, fd)
                    self._marks.remove(os.fstat(fd).st_ino)
        return not self.marked()

    # `Files`, of the cache directory.

    def path(self, key: ObjectKey) -> str:
        for name in key:
            if fault := name_fault(name):
                raise OSError(errno.EINVAL, f"the name {name[:80]!r} {fault}")
        return str(self._directory / key.volume / key.cookie)

    def listed(self) -> Iterator[CacheFile]:
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError):
                yield described(ObjectKey(path.parent.name, path.name), str(path))

    def found(self, cookie: str) -> list[CacheFile]:
        found = []
        for path in sorted(self._directory.glob("*/")):
            with contextlib.suppress(FileNotFoundError):
                key = ObjectKey(path.name, cookie)
                found.append(described(key, self.path(key)))
        return found

    def touch(self, key: ObjectKey, used_s: float) -> None:
        touch(self.path(key), used_s)

    def cull(self, key: ObjectKey) -> bool:
        path = Path(self.path(key))
        # Whoever offers it next makes a new file, whoever offered it before keeps this one.
        with self._offering:
            if key in self._keys:
                return False
            try:
                fd = _open(path)
            except FileNotFoundError:
                return True
            with closing(fd), _alone(fd) as alone:
                if alone:
                    path.unlink()
                    self._marks.discard(os.fstat(fd).st_ino)
                return alone

    def tidy(self, volume: str) -> None:
        try:
            (self._directory / volume).rmdir()
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                raise

    def find(self, inode: int) -> ObjectId | None:
        """The object whose file has this inode."""
        return self._by_inode.get(inode)

    def file(self, object: ObjectId) -> File:
        """The file of an object. Raises OSError when it is closed."""
        try:
            return self._files[object]
        except KeyError:
            raise OSError(errno.EBADF, f"object {object} is closed") from None

    def objects(self) -> list[ObjectId]:
        """All that are open."""
        return list(self._files)

    def offer(self, key: ObjectKey, size_bytes: int) -> ObjectId | None:
        """Make an object's file ready to be mounted; None when it is already.

        Raises OutOfSpace, OSError (EBUSY: it is condemned).
        """
        with self._offering:
            if key in self._keys:
                return None
            file = self._prepared(key, Path(self.path(key)), round_up(size_bytes))
            object = ObjectId(next(self._ids))
            self._files[object] = file
            self._by_inode[file.inode] = object
            self._keys.add(key)
        if file.marked and file.fill_fd is None:
            self._lure(file)
        return object

    def withdraw(self, object: ObjectId) -> bool:
        """Close an object, unless somebody can still read a hole of its file."""
        file = self.file(object)
        if file.marked:
            with self._opened(file) as fd, _alone(fd) as alone:
                if not alone:
                    return False
                fanotify.unmark(self._group, fd)
                file.marked = False
        self.drop(object)
        return True

    def complete(self, object: ObjectId) -> None:
        """Remove the mark of a file that has no holes any more."""
        file = self.file(object)
        if not file.marked:
            return
        with self._opened(file) as fd:
            if not _is_whole(fd, file.size_bytes):
                return  # bytes between its chunks, which nobody can bring
            fanotify.unmark(self._group, fd)
        file.marked = False
        self._close_fill(file)
        log.info("complete, and read without asking from now on", extra={"blob": file.key.cookie})

    def resident(self, object: ObjectId) -> list[tuple[int, int]]:
        """Extents of an object's file that hold data. Raises NotReady, OSError."""
        file = self.file(object)
        if not file.marked:
            return [(0, file.size_bytes)]
        with self._filling(file) as fd:
            return list(data_extents(fd, file.size_bytes))

    def write(self, object: ObjectId, offset: int, memory: memoryview) -> None:
        """Raises OutOfSpace, NotReady, OSError."""
        check_blocks(offset, memory)
        file = self.file(object)
        self._floor.require(memory.nbytes)
        with self._opened(file) if not file.marked else self._filling(file) as fd:
            try:
                if offset + memory.nbytes > file.size_bytes:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
                write_all(fd, offset, memory)
            except OSError as error:
                what = f"{file.key}: {memory.nbytes} bytes at {offset}: {error.strerror}"
                kind = OutOfSpace if error.errno in NO_SPACE else OSError
                raise kind(error.errno, what) from error

    def discard(self, object: ObjectId, start: int, end: int) -> bool:
        """Punch a hole, where readers would be asked for. Raises NotReady, OSError."""
        file = self.file(object)
        if not file.marked:
            return False  # of a file that was opened without a mark a hole reads as zeros
        with self._filling(file) as fd:
            return punch_blocks(fd, start, end)

    def lend(self, object: ObjectId, event_fd: int) -> None:
        """An event's descriptor raises no events: fill the file through a copy of it, if that
        is still to come."""
        file = self._files.get(object)
        if file is None or file.fill_fd is not None or not file.marked:
            return
        with self._lock, contextlib.suppress(OSError):
            # Whoever closes the object or takes its mark does so first, then closes this.
            if file.marked and object in self._files:
                fd = fcntl.fcntl(event_fd, fcntl.F_DUPFD_CLOEXEC, 0)
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
                file.fill_fd = fd

    def drop(self, object: ObjectId) -> None:
        """Forget an object. A mark it has stays: reads of its file are to fail."""
        with self._lock:
            file = self._files.pop(object)
            del self._by_inode[file.inode]
            self._keys.remove(file.key)
            if file.marked:
                self._marks.add(file.inode)
        self._close_fill(file)

    def _paths(self) -> list[Path]:
        return [path for path in sorted(self._directory.glob("*/*")) if path.is_file()]

    def _made(self, path: Path, size_bytes: int) -> int:
        """A descriptor of the file, which has this size."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            self._floor.require_file()
        fd = _open(path, os.O_CREAT)
        if os.fstat(fd).st_size not in {0, size_bytes}:
            log.warning("%s has another size than the image says and is made anew", path)
            os.close(fd)
            path.unlink()
            fd = _open(path, os.O_CREAT)
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, size_bytes)
        return fd

    def _prepared(self, key: ObjectKey, path: Path, size_bytes: int) -> File:
        """The file, marked unless it is whole."""
        with closing(self._made(path, size_bytes)) as fd:
            inode, whole = os.fstat(fd).st_ino, _is_whole(fd, size_bytes)
            if inode in self._marks:
                if not self._inherits:
                    _require_alone(fd, path)
                elif not whole:
                    self._marks.remove(inode)
                    return File(key, path, inode, size_bytes, True, None)
                fanotify.unmark(self._group, fd)
                self._marks.remove(inode)
            if whole:
                return File(key, path, inode, size_bytes, False, None)
        fd = _open(path)
        try:
            _require_alone(fd, path)
            fanotify.mark(self._group, fd)
        except OSError:
            os.close(fd)
            raise
        return File(key, path, inode, size_bytes, True, fd)

    def _condemned(self, path: Path) -> bool:
        with closing(_open(path)) as fd, _alone(fd) as alone:
            state = os.fstat(fd)
            if alone or _is_whole(fd, state.st_size):
                return False
            fanotify.mark(self._group, fd)
            self._marks.add(state.st_ino)
            return True

    @contextlib.contextmanager
    def _filling(self, file: File) -> Iterator[int]:
        """A descriptor that raises no events, for one call. Its own: the file's may be closed
        meanwhile, and the number be another's. Raises NotReady."""
        with self._lock:
            if file.fill_fd is None:
                raise NotReady(f"{file.key}: no descriptor yet that raises no events")
            fd = fcntl.fcntl(file.fill_fd, fcntl.F_DUPFD_CLOEXEC, 0)
        with closing(fd):
            yield fd

    @contextlib.contextmanager
    def _opened(self, file: File) -> Iterator[int]:
        """Any descriptor: neither marks nor seeks raise events."""
        try:
            with self._filling(file) as fd:
                yield fd
        except NotReady:
            with closing(_open(file.path)) as fd:
                yield fd

    def _close_fill(self, file: File) -> None:
        with self._lock:
            fd, file.fill_fd = file.fill_fd, None
        if fd is not None:
            os.close(fd)

    def _lure(self, file: File) -> None:
        """Have an event of our own bring a descriptor for a file that is marked already: a thread
        reads it and waits, like any reader, until the event is answered."""
        if self._lures is None:
            self._lures = queue.SimpleQueue()
            threading.Thread(target=self._read_lures, name="lure", daemon=True).start()
        self._lures.put(file)

    def _read_lures(self) -> None:
        assert self._lures is not None
        while True:
            file = self._lures.get()
            if file.fill_fd is None and file.marked:
                with contextlib.suppress(OSError), closing(_open(file.path)) as fd:
                    os.preadv(fd, [mmap.mmap(-1, BLOCK_BYTES)], 0)


def _open(path: Path, flags: int = 0) -> int:
    flags |= os.O_RDWR | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _is_whole(fd: int, size_bytes: int) -> bool:
    """Whether a file has no hole before this byte."""
    return not size_bytes or os.lseek(fd, 0, os.SEEK_HOLE) >= size_bytes


def _require_alone(fd: int, path: Path) -> None:
    with _alone(fd) as alone:
        if not alone:
            raise OSError(
                errno.EBUSY,
                "a mount whose daemon has ended, or another program, has it open: end that first",
                str(path),
            )


@contextlib.contextmanager
def _alone(fd: int) -> Iterator[bool]:
    """Whether nobody else has the file open, EROFS included; nobody can open it meanwhile. A
    write lease says so (check_conflicting_open in fs/locks.c; tried on 6.18)."""
    try:
        fcntl.fcntl(fd, _F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.fcntl(fd, _F_SETLEASE, fcntl.F_UNLCK)

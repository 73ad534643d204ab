"""A stand-in for /dev/cachefiles that lives in the test's process, for daemons in others.

The device is a connection of a SEQPACKET socket: one message per read, passed on like any
descriptor, and gone when its last copy is closed. Modelled after fs/cachefiles/{daemon,ondemand}.c:
one opener at a time (EBUSY); a READ goes out once, until `restore` has all that is unanswered sent
again; an object whose descriptor is closed is opened anew when somebody reads it; a READ of an
object that somebody still has open goes nowhere else. `nydusd.py` is the daemon's side of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OPEN, CLOSE, READ = 0, 1, 2
BUSY, GRANTED, RESTORED, DRAINED = b"busy", b"granted", b"restored", b"drained"
MESSAGE_BYTES = 4096
PATIENCE_S = 30.0


@dataclass(slots=True, eq=False)
class Read:
    """A READ without an answer."""

    ticket: int
    start: int
    end: int
    sent: bool = False
    answered: bool = False


@dataclass(slots=True, eq=False)
class Object:
    """A cookie in use. `answer` is what copen said of it: a size, or an errno below zero."""

    volume: str
    cookie: str
    path: Path
    id: int = 0
    opening: bool = False
    answer: int | None = None
    reads: list[Read] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether a descriptor that was handed out is open somewhere."""
        fd = os.open(self.path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


class Device:
    """The kernel, and everybody who mounts and reads."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "cachefiles")
        self.commands: list[str] = []
        """All but answers."""
        self.opened = 0
        """How often the device was opened."""
        self._files = directory / "objects"
        self._files.mkdir()
        self._objects: dict[tuple[str, str], Object] = {}
        self._numbers = itertools.count(1)
        self._daemon: socket.socket | None = None
        self._restoring = False
        self._changed = threading.Condition()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No such device any more."""
        self._listener.close()

    @property
    def in_use(self) -> bool:
        """Whether anybody has it open, a supervisor as well."""
        return self._daemon is not None

    def until_free(self) -> None:
        """Wait until nobody has it open."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._daemon is None, PATIENCE_S), "still open"

    def open(self, volume: str, cookie: str) -> int:
        """Use an object as a mount does; its size in bytes. Raises OSError as copen says."""
        with self._changed:
            path = self._files / f"{volume},{cookie}"
            path.touch()
            object = self._objects[volume, cookie] = Object(volume, cookie, path)
            self._send_open(object)
            assert self._changed.wait_for(lambda: object.answer is not None, PATIENCE_S), "hangs"
            assert object.answer is not None
            if object.answer < 0:
                del self._objects[volume, cookie]
                raise OSError(-object.answer, os.strerror(-object.answer))
            return object.answer

    def begin_read(self, volume: str, cookie: str, start: int, end: int) -> Read:
        """Ask for bytes that are not there."""
        with self._changed:
            object = self._objects[volume, cookie]
            read = Read(next(self._numbers), start, end)
            object.reads.append(read)
            self._ask(object)
            return read

    def end_read(self, volume: str, cookie: str, read: Read) -> bytes:
        """Wait for the answer, and look again. Raises OSError (EIO) for a hole."""
        object = self._objects[volume, cookie]
        with self._changed:
            assert self._changed.wait_for(lambda: read.answered, PATIENCE_S), "a reader hangs"
        with object.path.open("rb") as file, contextlib.suppress(OSError):
            data = os.lseek(file.fileno(), read.start, os.SEEK_DATA)
            if data == read.start and os.lseek(file.fileno(), data, os.SEEK_HOLE) >= read.end:
                return os.pread(file.fileno(), read.end - read.start, read.start)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, volume: str, cookie: str, start: int, end: int) -> bytes:
        """Bytes [start, end), asked for. Raises OSError (EIO)."""
        return self.end_read(volume, cookie, self.begin_read(volume, cookie, start, end))

    def held(self) -> list[str]:
        """Objects that some process has a descriptor of."""
        return [object.cookie for object in self._objects.values() if object.held]

    def close_object(self, volume: str, cookie: str) -> None:
        """The last mount is gone."""
        with self._changed:
            object = self._objects.pop((volume, cookie))
            self._send(struct.pack("=IIII", next(self._numbers), CLOSE, 16, object.id))

    # The daemon's side.

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._daemon is not None:
                    connection.send(BUSY)
                    connection.close()
                    continue
                self._daemon, self._restoring = connection, False
                self.opened += 1
                connection.send(GRANTED)
            threading.Thread(target=self._obey, args=[connection], daemon=True).start()

    def _obey(self, connection: socket.socket) -> None:
        while command := _received(connection):
            with self._changed:
                self._command(command)
                self._changed.notify_all()
        with self._changed:
            connection.close()
            self._daemon = None
            for object in self._objects.values():
                object.answer = object.answer or -errno.EIO
                for read in object.reads:
                    read.answered = True
            self._changed.notify_all()

    def _command(self, command: str) -> None:
        verb, _, rest = command.partition(" ")
        if verb == "copen":
            number, _, answer = rest.partition(",")
            for object in self._objects.values():
                if object.opening and object.id == int(number):
                    object.opening, object.answer = False, int(answer)
                    if object.answer > 0:
                        os.truncate(object.path, -(-object.answer // 4096) * 4096)
                    self._ask(object)
        elif verb == "complete":
            for read in self._reads():
                read.answered = read.answered or read.ticket == int(rest)
        else:
            self.commands.append(command)
            if verb == "restore":
                # What was sent and not read is sent again, and the kernel has it but once.
                self._send(RESTORED)
                self._restoring = True
            elif command == DRAINED.decode():
                self._restoring = False
                self._restore()

    def _restore(self) -> None:
        for object in self._objects.values():
            for read in object.reads:
                read.sent = False
            if object.opening:
                self._send_open(object)
            elif any(not read.answered for read in object.reads):
                self._ask(object)

    def _reads(self) -> Iterator[Read]:
        return (read for object in self._objects.values() for read in object.reads)

    def _ask(self, object: Object) -> None:
        if object.opening:
            return
        if not object.held:
            self._send_open(object)
            return
        for read in object.reads:
            if not read.sent and not read.answered:
                read.sent = True
                body = struct.pack("=QQ", read.start, read.end - read.start)
                self._send(struct.pack("=IIII", read.ticket, READ, 32, object.id) + body)

    def _send_open(self, object: Object) -> None:
        """The number of the message is the object's too, which is new each time."""
        object.id, object.opening = next(self._numbers), True
        volume, cookie = f"erofs,{object.volume}\0".encode(), object.cookie.encode()
        body = struct.pack("=IIII", len(volume), len(cookie), 0, 0) + volume + cookie
        fd = os.open(object.path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        head = struct.pack("=IIII", object.id, OPEN, 16 + len(body), object.id)
        self._send(head + body, [fd])
        os.close(fd)

    def _send(self, message: bytes, fds: list[int] | None = None) -> None:
        if self._daemon is not None and not self._restoring:
            socket.send_fds(self._daemon, [message], fds or [])


def _received(connection: socket.socket) -> str:
    """The next command; empty when the last copy is closed."""
    try:
        return connection.recv(MESSAGE_BYTES).decode()
    except ConnectionResetError:
        return ""

"""A stand-in for /dev/cachefiles: a SEQPACKET socket (one message per read), and ordinary files for
the descriptors of objects."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from fscached.transport import ObjectId
from fscached.transport.cachefiles import Cachefiles

OBJECT = ObjectId(5)
SIZE = 40_000


def message(opcode: int, body: bytes = b"", msg_id: int = 1, object: int = OBJECT) -> bytes:
    return struct.pack("=IIII", msg_id, opcode, 16 + len(body), object) + body


def open_message(
    fd: int, volume: bytes = b"erofs,dom\0", cookie: bytes = b"blob", object: int = OBJECT
) -> bytes:
    body = struct.pack("=IIII", len(volume), len(cookie), fd, 0) + volume + cookie
    return message(0, body, msg_id=3, object=object)


def read_message(start: int, count: int, msg_id: int = 9, object: int = OBJECT) -> bytes:
    return message(2, struct.pack("=QQ", start, count), msg_id, object)


class Kernel:
    """The other end of the device."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "object"
        ours, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._end.setblocking(False)
        self.transport = Cachefiles(ours.detach(), str(directory))

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._end.send(message)

    def commands(self) -> list[str]:
        """What was written to the device since the last look."""
        commands = []
        while True:
            try:
                commands.append(self._end.recv(4096).decode())
            except BlockingIOError:
                return commands

    def object_fd(self) -> int:
        """A descriptor as the kernel hands it over: for writing and seeking, inherited."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(fd, SIZE)
        os.set_inheritable(fd, True)
        return fd

    def open(self, **how: int | bytes) -> int:
        """An OPEN that the daemon has drained, and its descriptor."""
        fd = self.object_fd()
        self.send(open_message(fd, **how))  # type: ignore[arg-type]
        assert len(self.transport.drain()) == 1
        return fd

    def hang_up(self) -> None:
        self._end.close()

"""The daemon itself, on the device of `device.py`: what the snapshotter starts as nydusd.

Three calls of `fscached.transport.cachefiles` go to the stand-in: opening the device, reading a
message (the kernel brings an object's descriptor along, a socket as a control message), and the
READ_COMPLETE ioctl, for which objects are ordinary files here.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
from typing import Any

from fscached.cli import main as command_line
from fscached.transport import cachefiles
from tests.snapshotter.device import BUSY, DRAINED, MESSAGE_BYTES, RESTORED

_FD_OFFSET = 24  # struct cachefiles_open, `fd`


class _Calls:
    """The module `os` of `cachefiles`, with the device's read and write."""

    def __init__(self) -> None:
        self.device: socket.socket | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def read(self, fd: int, count: int) -> bytes:
        assert self.device is not None and fd == self.device.fileno()
        message, fds = self._received()
        for received in fds:
            os.set_inheritable(received, True)
            place = struct.pack("=I", received)
            message = message[:_FD_OFFSET] + place + message[_FD_OFFSET + 4 :]
        return message

    def write(self, fd: int, data: bytes) -> int:
        assert self.device is not None and fd == self.device.fileno()
        self.device.send(data)
        if data == b"restore":
            while (
                select.select([self.device], [], []) and (stale := self._received())[0] != RESTORED
            ):
                for received in stale[1]:
                    os.close(received)
            self.device.send(DRAINED)
        return len(data)

    def _received(self) -> tuple[bytes, list[int]]:
        assert self.device is not None
        message, ancillary, _, _ = self.device.recvmsg(
            MESSAGE_BYTES, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT
        )
        return message, [struct.unpack("=i", data[:4])[0] for _, _, data in ancillary]


def main(config: str, words: list[str]) -> int:
    """nydusd's command line, with `config` for what it does not say."""
    calls = _Calls()

    def use(device: socket.socket) -> None:
        if calls.device is not None:
            calls.device.detach()  # closed by its number
        calls.device = device

    def opened(directory: str, device: str) -> cachefiles.Cachefiles:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(device)
        except ConnectionRefusedError:
            raise OSError(errno.ENOENT, "no such device") from None
        if connection.recv(MESSAGE_BYTES) == BUSY:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        use(connection)
        return cachefiles.Cachefiles(connection.fileno(), directory)

    def adopted(fd: int, directory: str) -> cachefiles.Cachefiles:
        use(socket.socket(fileno=fd))
        return cachefiles.Cachefiles(fd, directory)

    def complete(fd: int, ticket: int) -> None:
        assert calls.device is not None
        calls.device.send(b"complete %d" % ticket)

    vars(cachefiles).update(os=calls, read_complete=complete)
    cachefiles.Cachefiles.open = staticmethod(opened)  # type: ignore[method-assign,assignment]
    cachefiles.Cachefiles.adopt = staticmethod(adopted)  # type: ignore[method-assign,assignment]
    if words[:1] == ["singleton"]:
        words = [*words, "--config", config]
    return command_line(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

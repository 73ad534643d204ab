"""Stands in for nydus-snapshotter's supervisor, as 0.13.4 behaves: it listens around one transfer,
reads 32 KiB at once, keeps the first descriptor, and gives both back in one message."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

READ_BYTES = 32 << 10


class Custodian:
    """One that keeps what one daemon left."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "supervisor.sock")
        self.message = b""
        self.fd: int | None = None
        self._thread: threading.Thread | None = None

    def receives(self) -> None:
        """Take what comes over the next connection."""
        self.around(self._receive)

    def gives(self) -> None:
        """Hand over to the next connection what is kept."""
        self.around(self._give)

    def done(self) -> None:
        """Wait for the end of the transfer."""
        assert self._thread is not None
        self._thread.join(20)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """Let go."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def around(self, transfer: Callable[[socket.socket], None]) -> None:
        """Listen for one connection, and no longer."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()

        def run() -> None:
            with listener, listener.accept()[0] as connection:
                transfer(connection)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _receive(self, connection: socket.socket) -> None:
        self.message, fds, _, _ = socket.recv_fds(connection, READ_BYTES, 16)
        self.close()
        if fds:
            self.fd, *leaked = fds
            assert not leaked, "the snapshotter would leak these"

    def _give(self, connection: socket.socket) -> None:
        if self.fd is None:
            return
        socket.send_fds(connection, [self.message], [self.fd])

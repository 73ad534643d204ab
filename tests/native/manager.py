"""Stand-in for systemd, which a test cannot be below: its file descriptor store, as sd_notify(3)
and sd_listen_fds(3) describe it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

DATAGRAM_BYTES = 8192
DESCRIPTORS_MAX = 16

BEGIN = """
import fcntl, os, sys
count = int(sys.argv[1])
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[2:2 + count]]
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""
"""Becomes the service, with what was stored at 3 and up."""


class Manager:
    """Holds what its service stores, until it is removed by name or the manager ends."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._stored: list[tuple[str, int]] = []
        self._changed = threading.Lock()
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(str(address))
        threading.Thread(target=self._receive, daemon=True).start()

    def start(self, command: Sequence[str], log: BinaryIO) -> subprocess.Popen[bytes]:
        """Start the service with what is stored."""
        with self._changed:
            names, fds = [name for name, _ in self._stored], [fd for _, fd in self._stored]
            begin = [sys.executable, "-c", BEGIN, str(len(fds)), *map(str, fds)]
            environment = {
                **os.environ,
                "NOTIFY_SOCKET": str(self._address),
                "LISTEN_FDS": str(len(fds)),
                "LISTEN_FDNAMES": ":".join(names),
            }
            return subprocess.Popen(
                [*begin, *command], stdout=log, stderr=log, env=environment, pass_fds=fds
            )

    def end(self) -> None:
        """Let go of everything."""
        with self._changed:
            self._forget({name for name, _ in self._stored})
        self._inbox.close()

    def _receive(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._inbox, DATAGRAM_BYTES, DESCRIPTORS_MAX)
            except OSError:
                return
            lines = dict(line.split("=", 1) for line in data.decode().splitlines())
            name = lines.get("FDNAME", "stored")
            with self._changed:
                if "FDSTOREREMOVE" in lines:
                    self._forget({name})
                elif "FDSTORE" in lines:
                    self._stored += [(name, fd) for fd in fds]

    def _forget(self, names: set[str]) -> None:
        for name, fd in self._stored:
            if name in names:
                os.close(fd)
        self._stored = [(name, fd) for name, fd in self._stored if name not in names]

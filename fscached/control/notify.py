"""systemd's protocol to whoever started the daemon: readiness, signs of life, a socket that listens
already, and fds that outlive it.

A stored fd is a promise that a successor finds it: sd_notify(3) FDSTORE=1 hands it over in a
datagram, sd_listen_fds(3) LISTEN_FDS gives it back at fd 3 and up. `fscached supervise` speaks the
same protocol, so there is one way for both. Standard library only: the supervisor imports this.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Final

log = logging.getLogger(__name__)

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
STORED_LIMIT: Final = 64
SEND_TIMEOUT_S: Final = 1.0
API: Final = "api"
"""What a socket unit calls the API's listener (FileDescriptorName=); nothing is stored as that."""


def notify(
    *lines: str,
    fds: Sequence[int] = (),
    environment: Mapping[str, str],
    patience_s: float = SEND_TIMEOUT_S,
) -> bool:
    """Send one datagram of `KEY=VALUE` lines to NOTIFY_SOCKET; False when there is none.

    What is in the socket's queue counts as received even when this process dies now. Raises
    OSError: the supervisor is gone, or does not read for `patience_s`.
    """
    if not (address := environment.get("NOTIFY_SOCKET", "")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(patience_s)
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sender.sendmsg(["\n".join(lines).encode()], rights)
    return True


def alive(environment: Mapping[str, str]) -> None:
    """Give a sign of life, or drop it: one that nobody reads now is of no use later."""
    with contextlib.suppress(OSError):
        notify("WATCHDOG=1", environment=environment, patience_s=0.0)


def heartbeat_s(environment: Mapping[str, str]) -> float | None:
    """From one sign of life to the next: half of what somebody waits for one
    (sd_watchdog_enabled(3)); None when nobody waits for one of this process."""
    limit_us = environment.get("WATCHDOG_USEC", "")
    ours = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    return int(limit_us) / 2e6 if ours and limit_us.isdecimal() and int(limit_us) else None


class FdStore:
    """The fds that this process' predecessor stored, and the place to store more of them."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._environment = environment

    def take(self) -> dict[str, int]:
        """The stored fds and the API's listener by name, CLOEXEC from now on. To be called once,
        before any other thing of the process is opened or started; takes LISTEN_* out of the
        environment."""
        found: dict[str, int] = {}
        for fd, name in self._inherited():
            # The flag is the daemon's promise that no child keeps the kernel's cache alive.
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            found[name] = fd
        return found

    def put(self, name: str, fd: int) -> bool:
        """Store a copy of `fd`, under a name that is not in use: systemd would keep both. False
        when nobody stores it: without a supervisor, or when it is gone (which is logged)."""
        return self._send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])

    def ready(self, status: str) -> None:
        """Say that the daemon serves now; `status` is one line for people."""
        self._send("READY=1", f"STATUS={status}")

    def _send(self, *lines: str, fds: Sequence[int] = ()) -> bool:
        try:
            return notify(*lines, fds=fds, environment=self._environment)
        except OSError as error:
            log.error(
                "the supervisor does not take %s: %s; when this daemon ends, mounts end with it. "
                "Restart it when the images can be unmounted",
                lines[0],
                error,
            )
            return False

    def _inherited(self) -> list[tuple[int, str]]:
        count = self._environment.pop("LISTEN_FDS", "0")
        owner = self._environment.pop("LISTEN_PID", "")
        names = self._environment.pop("LISTEN_FDNAMES", "").split(":")
        if owner != str(os.getpid()) or not count.isdecimal():
            return []
        fds = range(FIRST_FD, FIRST_FD + min(int(count), STORED_LIMIT))
        return list(zip(fds, names, strict=False))

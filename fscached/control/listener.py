"""The API's socket: it listens before anything is there that could answer.

A successor that nydus-snapshotter starts has 2 to 4 s until somebody listens where its predecessor
did, however busy the machine is, and then 30 s to answer. So nothing slow is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import resource
import socket
from typing import Final

from fscached.failure import Failure

log = logging.getLogger(__name__)

PATH_LIMIT_BYTES: Final = 107  # sun_path of struct sockaddr_un without its NUL, unix(7)
DESCRIPTOR_LIMIT: Final = 1 << 16  # each number below one in use costs the kernel 8 bytes
_HIGH_NUMBERS: Final = 16


def inherited(path: str) -> socket.socket | None:
    """A listener in the place of a dead daemon's; None where there is none. Raises Failure."""
    return listen(path) if os.path.exists(path) and not _is_served(path) else None


def lent(fd: int, path: str) -> socket.socket:
    """What a service manager listens on for this daemon (a socket unit). Raises Failure."""
    listener = socket.socket(fileno=fd)
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        listener.close()
        raise Failure(
            "the socket unit has no socket for the API",
            "give it a path to listen on: ListenStream=, as in docs/fscached.socket",
        )
    if listener.getsockname() != path:
        log.warning(
            "the socket unit listens elsewhere than [api] socket says: who asks there gets no "
            "answer; have both say the same",
            extra={"unit": listener.getsockname(), "configured": path},
        )
    listener.setblocking(False)
    return listener


def listen(path: str) -> socket.socket:
    """Listen. The path appears when the socket already listens, in place of a dead one.

    Raises Failure: somebody else listens there, or the path cannot be a socket.
    """
    if len(os.fsencode(path)) > PATH_LIMIT_BYTES - len(".new"):
        raise Failure("too long for a socket", "set a shorter [api] socket", where=str(path))
    if _is_served(path):
        raise Failure(
            "another daemon listens there", "stop it, or set another [api] socket", where=str(path)
        )
    return replaced(path)


def replaced(path: str) -> socket.socket:
    """Listen in the place of whoever does. Raises Failure: the path cannot be a socket."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    fresh = f"{path}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        listener.bind(fresh)
        os.chmod(fresh, 0o600)
        listener.listen(socket.SOMAXCONN)
        listener = highest(listener)
        # Whoever polls for the path must not find a socket that refuses connections.
        os.rename(fresh, path)
    except OSError as error:
        listener.close()
        raise Failure(
            f"cannot listen: {error.strerror}",
            "make its directory, writable for root, or set another [api] socket",
            where=str(path),
        ) from None
    return listener


def highest(listener: socket.socket) -> socket.socket:
    """The same under a number above those of all connections. The descriptors of a process that is
    killed are closed from the highest down (task_work_run in kernel/task_work.c): whoever takes the
    end of a connection for the end of the daemon must not find somebody who still listens."""
    limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], DESCRIPTOR_LIMIT)
    with listener:
        number = fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, limit - _HIGH_NUMBERS)
        return socket.socket(fileno=number)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # EAGAIN: somebody listens whose backlog is full.
        return probe.connect_ex(path) in (0, errno.EAGAIN)

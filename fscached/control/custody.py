"""What a daemon leaves with nydus-snapshotter's supervisor: a message and one descriptor.

The snapshotter listens only around a transfer, takes one message of at most 32 KiB (0.13.4) and
keeps one descriptor. So the descriptor is a socket in whose queue the others lie: they live for as
long as it does, and looking at them (MSG_PEEK) takes none out, however many successors look. The
registrations are in a memfd among them, so what is kept is always what was saved last, and the
message is as long for a thousand images as for none (docs/decisions/nydusd.md).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from fscached import __version__
from fscached.malformed import MALFORMED
from fscached.version import COMMIT

MESSAGE_LIMIT_BYTES: Final = 30 << 10
"""Of what is sent and of what is taken; the snapshotter reads 32 KiB in one piece."""
NAMES_LIMIT_BYTES: Final = 4 << 10
DESCRIPTORS_LIMIT: Final = 16
SOCKETS_LIMIT: Final = 16
"""Of those that upgrades brought; each has at most 107 bytes."""
SEND_LIMIT_S: Final = 2.0
"""The snapshotter listens before it asks; for the other way it has a limit of 10 s itself."""
COLLECT_LIMIT_S: Final = 10.0
_RETRY_PAUSE_S: Final = 0.01


class CustodyError(Exception):
    """The supervisor cannot be reached, or what it keeps is nothing that can be gone on with."""


class Testament(msgspec.Struct, frozen=True, tag_field="testament", tag="fscached"):
    """The message: who left this. Nothing secret is in it."""

    pid: int
    """Of the predecessor, as itself sees it."""
    sockets: tuple[str, ...] = ()
    """Where it could be asked, the oldest first."""
    version: str = __version__
    git_commit: str = COMMIT


def parcel(holdings: Mapping[str, int]) -> socket.socket:
    """One descriptor that keeps all of these alive."""
    names = "\n".join(holdings).encode()
    fds = array.array("i", holdings.values())
    ours, kept = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.sendmsg([names], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    return kept


def unparcel(kept: socket.socket) -> dict[str, int]:
    """What `parcel` put in, as new descriptors. Raises CustodyError."""
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    space = socket.CMSG_SPACE(DESCRIPTORS_LIMIT * 4)
    try:
        names, ancillary, _, _ = kept.recvmsg(NAMES_LIMIT_BYTES, space, flags)
    except OSError as error:
        raise CustodyError(f"the supervisor's descriptor holds nothing of ours: {error}") from None
    fds = _descriptors(ancillary)
    found = dict(zip(names.decode(errors="replace").splitlines(), fds, strict=False))
    if len(found) != len(fds) or not found:
        _close(fds)
        raise CustodyError(f"the supervisor's descriptor holds {len(fds)} others, not ours")
    return found


async def leave(path: str, kept: socket.socket, sockets: Sequence[str] = ()) -> None:
    """Give a parcel to the supervisor that listens on `path`, and say where this daemon is asked,
    as far as the message has room for it; the supervisor is connected to when this
    returns, so that whoever told it to accept does not wait in vain. Raises CustodyError.

    The same one each time: 0.13.4 closes none that it was given before.
    """
    sockets = (*sockets[:1], *sockets[1:][-SOCKETS_LIMIT:])
    message = msgspec.json.encode(Testament(os.getpid(), sockets))
    rights = array.array("i", [kept.fileno()])
    async with _connected(path, SEND_LIMIT_S) as sock:
        # A fresh connection takes this whole, before anybody has accepted it.
        sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


async def collect(path: str) -> tuple[Testament, dict[str, int]]:
    """What a predecessor left with the supervisor that listens on `path`. Raises CustodyError."""
    async with _connected(path, COLLECT_LIMIT_S) as sock:
        message, fds = await _received(sock)
    kept = [socket.socket(fileno=fd) for fd in fds if _is_socket(fd)]
    _close(fd for fd in fds if fd not in {sock.fileno() for sock in kept})
    with contextlib.ExitStack() as stack:
        for sock in kept:
            stack.enter_context(sock)
        testament = _testament(message)
        if len(kept) != 1:
            raise CustodyError(f"the supervisor gave {len(fds)} descriptors, not one socket")
        return testament, unparcel(kept[0])


def _testament(message: bytes) -> Testament:
    if not message:
        raise CustodyError("the supervisor has nothing: no daemon has left anything with it")
    try:
        return msgspec.json.decode(message, type=Testament)
    except MALFORMED:
        raise CustodyError(
            f"the {len(message)} bytes that the supervisor has are not of fscached: mounts of "
            "another nydusd end with it"
        ) from None


@contextlib.asynccontextmanager
async def _connected(path: str, limit_s: float) -> AsyncIterator[socket.socket]:
    """A connection to the supervisor, for `limit_s` with all that is done on it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with sock:
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    try:
                        sock.connect(path)
                        break
                    except BlockingIOError:  # its queue is full
                        await asyncio.sleep(_RETRY_PAUSE_S)
                yield sock
        except TimeoutError:
            raise CustodyError(f"supervisor {path}: no end of it within {limit_s:g} s") from None
        except OSError as error:
            raise CustodyError(f"supervisor {path}: {error.strerror}") from None


async def _received(sock: socket.socket) -> tuple[bytes, list[int]]:
    """All that comes until the other side ends."""
    message, fds = bytearray(), list[int]()
    space = socket.CMSG_SPACE(DESCRIPTORS_LIMIT * 4)
    try:
        while True:
            try:
                data, ancillary, _, _ = sock.recvmsg(
                    MESSAGE_LIMIT_BYTES, space, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await _readable(sock)
                continue
            fds += _descriptors(ancillary)
            message += data
            if not data:
                return bytes(message), fds
            if len(message) > MESSAGE_LIMIT_BYTES or len(fds) > DESCRIPTORS_LIMIT:
                raise CustodyError("the supervisor sends more than any daemon has left with it")
    except BaseException:
        _close(fds)
        raise


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)

"""What is left with the snapshotter's supervisor, and what becomes of supervisors that lie."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fscached.control import custody
from fscached.control.custody import CustodyError
from tests.control.custodian import READ_BYTES, Custodian

pytestmark = pytest.mark.asyncio


def memory(text: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


def open_fds() -> int:
    gc.collect()  # what earlier tests left
    return len(os.listdir("/proc/self/fd"))


async def test_what_is_left_is_found_again_and_again(custodian: Custodian) -> None:
    """The daemon may be gone, and a successor that dies takes nothing along."""
    before = open_fds()
    holdings = {"state": memory(b"registrations"), "cachefiles": memory(b"device")}
    custodian.receives()
    with custody.parcel(holdings) as kept:
        await custody.leave(custodian.path, kept)
    custodian.done()
    for fd in holdings.values():
        os.close(fd)
    for _ in range(3):
        custodian.gives()
        testament, found = await custody.collect(custodian.path)
        custodian.done()
        assert testament.pid == os.getpid()
        assert {name: os.pread(fd, 99, 0) for name, fd in found.items()} == {
            "state": b"registrations",
            "cachefiles": b"device",
        }
        for fd in found.values():
            assert not os.get_inheritable(fd)
            os.close(fd)
    custodian.close()
    assert open_fds() == before


async def test_what_is_saved_later_is_found_too(custodian: Custodian) -> None:
    """Nothing that the snapshotter keeps is ever stale."""
    state = memory(b"one image")
    custodian.receives()
    with custody.parcel({"state": state}) as kept:
        await custody.leave(custodian.path, kept)
    custodian.done()
    os.pwrite(state, b"two images", 0)
    os.close(state)
    custodian.gives()
    _, found = await custody.collect(custodian.path)
    assert os.pread(found["state"], 99, 0) == b"two images"
    os.close(found["state"])


async def test_the_message_is_small(custodian: Custodian) -> None:
    """It is read in one piece of 32 KiB, and does not grow with what is left."""
    state = memory(b"x" * (1 << 20))
    custodian.receives()
    with custody.parcel({"state": state}) as kept:
        await custody.leave(custodian.path, kept)
    custodian.done()
    os.close(state)
    assert 0 < len(custodian.message) < 1024 < READ_BYTES


async def test_nothing_waits_for_the_supervisor_to_accept(tmp_path: Path) -> None:
    """The snapshotter accepts only after the reply to `sendfd`."""
    state = memory(b"x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with custody.parcel({"state": state}) as kept:
            await custody.leave(str(tmp_path / "s"), kept)
        connection, _ = listener.accept()
        with connection:
            message, fds, _, _ = socket.recv_fds(connection, READ_BYTES, 16)
            assert message and len(fds) == 1
            assert connection.recv(1) == b""
    os.close(fds[0])
    os.close(state)


async def test_nobody_listens(tmp_path: Path) -> None:
    """Each way says the path and why."""
    path = str(tmp_path / "away")
    with custody.parcel({}) as kept:
        for transfer in (custody.leave(path, kept), custody.collect(path)):
            with pytest.raises(CustodyError, match="away: No such file"):
                await transfer


async def test_a_supervisor_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that neither speaks nor closes, and one that never accepts."""
    monkeypatch.setattr(custody, "COLLECT_LIMIT_S", 0.05)
    monkeypatch.setattr(custody, "SEND_LIMIT_S", 0.05)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with pytest.raises(CustodyError, match=r"no end of it within 0\.05 s"):
            await custody.collect(path)
        with (
            custody.parcel({}) as kept,
            pytest.raises(CustodyError, match=r"no end of it within 0\.05 s"),
        ):
            await custody.leave(path, kept)


def _nothing(connection: socket.socket) -> None:
    """The other side ends at once."""


def _nydusds(connection: socket.socket) -> None:
    device = memory(b"device")
    socket.send_fds(connection, [b"\x00\x01snapshot\x00" * 200], [device])
    os.close(device)


def _flood(connection: socket.socket) -> None:
    connection.settimeout(20)
    try:
        while True:
            connection.sendall(b'{"testament"' * 4096)
    except OSError:
        pass


def _many(connection: socket.socket) -> None:
    device = memory(b"device")
    with contextlib.suppress(BrokenPipeError):
        for _ in range(20):
            socket.send_fds(connection, [b" "], [device] * 10)
    os.close(device)


def _file(connection: socket.socket) -> None:
    device = memory(b"device")
    socket.send_fds(connection, [b'{"testament":"fscached","pid":1}'], [device])
    os.close(device)


def _none(connection: socket.socket) -> None:
    connection.sendall(b'{"testament":"fscached","pid":1}')


def _empty_socket(connection: socket.socket) -> None:
    one, other = socket.socketpair()
    with one, other:
        socket.send_fds(connection, [b'{"testament":"fscached","pid":1}'], [one.fileno()])


def _nameless(connection: socket.socket) -> None:
    one, other = socket.socketpair()
    device = memory(b"device")
    with one, other:
        socket.send_fds(other, [b"cachefiles"], [device, device])
        socket.send_fds(connection, [b'{"testament":"fscached","pid":1}'], [one.fileno()])
    os.close(device)


@pytest.mark.parametrize(
    ("speak", "says"),
    [
        (_nothing, "has nothing"),
        (_nydusds, "not of fscached"),
        (_flood, "more than any daemon"),
        (_many, "more than any daemon"),
        (_file, "1 descriptors, not one socket"),
        (_none, "0 descriptors, not one socket"),
        (_empty_socket, "holds nothing of ours|holds 0 others"),
        (_nameless, "holds 2 others, not ours"),
    ],
)
async def test_a_supervisor_that_lies(
    tmp_path: Path, speak: Callable[[socket.socket], None], says: str
) -> None:
    """One clear error, in bounded memory, and no descriptor stays."""
    custodian = Custodian(tmp_path)
    custodian.around(speak)
    before = open_fds()
    with pytest.raises(CustodyError, match=says):
        await asyncio.wait_for(custody.collect(custodian.path), 20)
    custodian.done()
    assert open_fds() <= before

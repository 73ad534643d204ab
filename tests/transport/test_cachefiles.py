"""The on-demand device: what each message becomes, what is answered, what goes wrong.

Stand-ins: those of `device.py`, and a list for the READ_COMPLETE ioctl that no ordinary file takes.
The real device runs in `vm-tests/`.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fscached.transport import (
    Closed,
    NotReady,
    ObjectKey,
    Opened,
    OutOfSpace,
    Ticket,
    Transport,
    Wanted,
    descriptors,
)
from fscached.transport import cachefiles as module
from fscached.transport.cachefiles import Cachefiles, Culling, NoRestore
from tests.transport.device import OBJECT, SIZE, Kernel, message, open_message, read_message


def aligned(blocks: int) -> memoryview:
    memory = mmap.mmap(-1, blocks * 4096)
    memory.write(os.urandom(len(memory)))
    return memoryview(memory)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.transport.close()
    kernel.hang_up()


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(descriptor, ticket) of every READ_COMPLETE."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "read_complete", lambda fd, id: calls.append((fd, id)))
    return calls


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_open_gives_the_keys_and_takes_the_descriptor(kernel: Kernel) -> None:
    """The volume loses its prefix and NUL; the descriptor is close-on-exec from now on."""
    fd = kernel.object_fd()
    kernel.send(open_message(fd))
    assert kernel.transport.drain() == [Opened(OBJECT, ObjectKey("dom", "blob"))]
    assert not os.get_inheritable(fd)


def test_messages_come_in_the_kernels_order(kernel: Kernel) -> None:
    """One drain returns everything that waits, then nothing."""
    kernel.send(open_message(kernel.object_fd()), read_message(4096, 131072), message(1))
    assert kernel.transport.drain() == [
        Opened(OBJECT, ObjectKey("dom", "blob")),
        Wanted(OBJECT, 4096, 135168, Ticket(9)),
        Closed(OBJECT),
    ]
    assert kernel.transport.drain() == []


def test_zero_bytes_is_nothing_to_read() -> None:
    """The device says 0 where a socket says EAGAIN."""
    transport = Cachefiles.open("/var/cache/x", "/dev/null")
    assert transport.drain() == []
    transport.close()


def test_copen_answers_the_open(kernel: Kernel) -> None:
    """The size goes out under the OPEN's message number, once."""
    fd = kernel.open()
    kernel.transport.open_ok(OBJECT, SIZE)
    kernel.transport.open_failed(OBJECT, errno.EIO)
    assert kernel.commands() == ["copen 3,40000"]
    assert is_open(fd)


def test_open_failed_sends_the_errno_and_closes(kernel: Kernel) -> None:
    """A refused object leaves nothing behind."""
    fd = kernel.open()
    kernel.transport.open_failed(OBJECT, errno.ENOENT)
    assert kernel.commands() == ["copen 3,-2"]
    assert not is_open(fd)


def test_copen_nobody_waits_for_closes_the_object(kernel: Kernel) -> None:
    """When the kernel refuses copen the object is gone, and the next drain says so."""
    fd = kernel.open()
    kernel.hang_up()
    kernel.transport.open_ok(OBJECT, SIZE)
    assert not is_open(fd)
    assert kernel.transport.drain() == [Closed(OBJECT)]


def test_read_complete_goes_through_the_objects_descriptor(
    kernel: Kernel, completed: list[tuple[int, int]]
) -> None:
    """Success and failure look the same to the kernel."""
    fd = kernel.open()
    kernel.transport.done(OBJECT, Ticket(9))
    kernel.transport.failed(OBJECT, Ticket(10), errno.EIO)
    assert completed == [(fd, 9), (fd, 10)]


def test_a_killed_reader_is_no_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL from the ioctl is counted; any other errno is a bug and comes out."""
    kernel.open()
    codes = iter([errno.EINVAL, errno.EBADF])

    def refuse(fd: int, msg_id: int) -> None:
        raise OSError(next(codes), "refused")

    monkeypatch.setattr(module, "read_complete", refuse)
    kernel.transport.done(OBJECT, Ticket(9))
    assert kernel.transport.counts.readers_gone == 1
    with pytest.raises(OSError, match="refused"):
        kernel.transport.done(OBJECT, Ticket(9))


def test_a_read_of_an_unknown_object_is_an_orphan(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported as wanted, counted, said with its remedy (a flood in few lines); an answer
    to it goes nowhere."""
    kernel.send(*[read_message(0, 4096)] * 5)
    with caplog.at_level(logging.ERROR):
        events = kernel.transport.drain()
    assert events == [Wanted(OBJECT, 0, 4096, Ticket(9))] * 5
    assert kernel.transport.counts.orphans == 5
    assert len(caplog.records) == 3
    assert "restore" in caplog.text
    kernel.transport.failed(OBJECT, Ticket(9), errno.EIO)
    assert kernel.transport.counts.readers_gone == 1


@pytest.mark.parametrize(
    "bad",
    [
        b"\1\0\0",
        message(0),
        message(7),
        message(1, b"more"),
        message(2, b"\0" * 8),
        message(1)[:8] + struct.pack("=II", 99, OBJECT),
        read_message(0, 0),
        read_message(1, 4096),
        read_message(0, 4097),
        read_message((1 << 63) - 4096, 8192),
        message(0, struct.pack("=IIII", 4096, 4, 0, 0) + b"erofs,x\0blob"),
        message(0, struct.pack("=IIII", 8, 4, 1 << 20, 0) + b"erofs,x\0blob"),
    ],
)
def test_a_malformed_message_is_counted_and_skipped(kernel: Kernel, bad: bytes) -> None:
    """What comes after it is served."""
    kernel.send(bad, read_message(0, 4096))
    assert kernel.transport.drain() == [Wanted(OBJECT, 0, 4096, Ticket(9))]
    assert kernel.transport.counts.malformed == 1


def test_a_malformed_read_of_a_known_object_is_answered(
    kernel: Kernel, completed: list[tuple[int, int]]
) -> None:
    """Its reader gets EIO rather than waiting for ever."""
    fd = kernel.open()
    kernel.send(read_message(0, 0))
    assert kernel.transport.drain() == []
    assert completed == [(fd, 9)]


@pytest.mark.parametrize(
    ("volume", "cookie"),
    [
        (b"nfs,dom\0", b"blob"),
        (b"erofs,\0", b"blob"),
        (b"erofs,dom\0", b""),
        (b"", b"blob"),
        (b"erofs,dom\0", b"\xff\xfe"),
    ],
)
def test_an_open_of_something_else_is_refused(kernel: Kernel, volume: bytes, cookie: bytes) -> None:
    """Keys that no EROFS sends get EINVAL, and the descriptor is closed."""
    fd = kernel.object_fd()
    kernel.send(open_message(fd, volume, cookie))
    assert kernel.transport.drain() == []
    assert kernel.commands() == ["copen 3,-22"]
    assert not is_open(fd)


def test_an_object_number_is_opened_once(kernel: Kernel) -> None:
    """A second OPEN of a live number is refused and the first stays."""
    first = kernel.open()
    second = kernel.object_fd()
    kernel.send(open_message(second))
    assert kernel.transport.drain() == []
    assert is_open(first) and not is_open(second)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(min_size=1, max_size=1024),
        st.builds(message, st.integers(0, 3), st.binary(max_size=100)),
        st.builds(
            lambda sizes, keys: message(0, struct.pack("=II", *sizes) + b"\0" * 8 + keys),
            st.tuples(st.integers(0, 40), st.integers(0, 40)),
            st.one_of(st.binary(max_size=80), st.just(b"erofs,domain\0cookie")),
        ),
    )
)
def test_any_message_is_an_event_or_counted(data: bytes) -> None:
    """No bytes crash the drain; where an OPEN has its descriptor there is a real one."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    transport = Cachefiles(ours.detach(), "/var/cache/x")
    spare = os.open(os.devnull, os.O_WRONLY)
    if len(data) >= 28:
        data = data[:24] + struct.pack("=I", spare) + data[28:]
    kernel.send(data)
    unknown_close = len(data) == 16 and data[4:12] == struct.pack("=II", 1, 16)
    events = transport.drain()
    assert len(events) + transport.counts.malformed == (0 if unknown_close else 1)
    transport.close()
    if is_open(spare):
        assert not any(isinstance(event, Opened) for event in events)
        os.close(spare)
    kernel.close()


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EMFILE, errno.ENFILE])
def test_a_failing_read_is_one_lost_open(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The device goes on behind it."""
    read, failures = os.read, [OSError(code, os.strerror(code))]

    def flaky(fd: int, count: int) -> bytes:
        if failures:
            raise failures.pop()
        return read(fd, count)

    kernel.send(read_message(0, 4096))
    monkeypatch.setattr(os, "read", flaky)
    assert kernel.transport.drain() == [Wanted(OBJECT, 0, 4096, Ticket(9))]
    assert kernel.transport.counts.opens_failed == 1
    assert ("LimitNOFILE" in caplog.text) == (code != errno.EEXIST)


def test_a_broken_device_comes_out(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An errno that takes nothing out of the queue must not be drained for ever."""

    def broken(fd: int, count: int) -> bytes:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(os, "read", broken)
    with pytest.raises(OSError, match="Bad file"):
        kernel.transport.drain()


def test_one_drain_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood leaves the event loop its turn; the rest comes with the next drain."""
    monkeypatch.setattr(os, "read", lambda fd, count: read_message(0, 4096))
    assert len(kernel.transport.drain()) == 1024


def test_write_and_resident_agree(kernel: Kernel) -> None:
    """What was written is data, the rest is holes, up to the last whole block."""
    kernel.open()
    blocks = aligned(2)
    kernel.transport.write(OBJECT, 4096, blocks)
    kernel.transport.write(OBJECT, 36864, blocks[:4096])
    assert kernel.transport.resident(OBJECT, SIZE) == [(4096, 12288), (36864, 40960)]
    assert kernel.transport.resident(OBJECT, 8192) == [(4096, 8192)]
    assert kernel.transport.resident(OBJECT, 4096) == []
    assert kernel.path.read_bytes()[4096:12288] == blocks


@pytest.mark.parametrize(("offset", "length"), [(1, 4096), (4096, 4095), (512, 512)])
def test_write_refuses_parts_of_blocks(kernel: Kernel, offset: int, length: int) -> None:
    """The kernel would write them at the rounded-down offset."""
    kernel.open()
    with pytest.raises(OSError, match="whole blocks") as caught:
        kernel.transport.write(OBJECT, offset, aligned(1)[:length])
    assert caught.value.errno == errno.EINVAL


def test_a_short_write_goes_on_at_a_block(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-written block is written again; no progress at all is EIO."""
    kernel.open()
    calls: list[tuple[int, int]] = []
    counts = [5000, 4096, 100]

    def short(fd: int, memory: memoryview, offset: int) -> int:
        calls.append((offset, memory.nbytes))
        return counts.pop(0)

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="short") as caught:
        kernel.transport.write(OBJECT, 8192, aligned(3))
    assert caught.value.errno == errno.EIO
    assert calls == [(8192, 12288), (12288, 8192), (16384, 4096)]


def refused(code: int) -> object:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def test_enobufs_is_not_ready_until_the_first_read(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel uses one errno for an object without a file and for a full disk."""
    kernel.open()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refused(errno.ENOBUFS))
        patched.setattr(os, "lseek", refused(errno.ENOBUFS))
        with pytest.raises(NotReady):
            kernel.transport.resident(OBJECT, SIZE)
        with pytest.raises(NotReady):
            kernel.transport.write(OBJECT, 0, aligned(1))
        kernel.send(read_message(0, 4096))
        kernel.transport.drain()
        with pytest.raises(OutOfSpace, match="free space"):
            kernel.transport.write(OBJECT, 0, aligned(1))


@pytest.mark.parametrize("prove", ["resident", "write"])
def test_an_answer_proves_the_object_ready(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, prove: str
) -> None:
    """A seek or a write that worked means the same as a READ."""
    kernel.open()
    if prove == "resident":
        kernel.transport.resident(OBJECT, SIZE)
    else:
        kernel.transport.write(OBJECT, 0, aligned(1))
    monkeypatch.setattr(os, "pwrite", refused(errno.ENOBUFS))
    with pytest.raises(OutOfSpace):
        kernel.transport.write(OBJECT, 0, aligned(1))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_out_of_space(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """These two never mean anything else, ready or not."""
    kernel.open()
    monkeypatch.setattr(os, "pwrite", refused(code))
    with pytest.raises(OutOfSpace) as caught:
        kernel.transport.write(OBJECT, 0, aligned(1))
    assert caught.value.errno == code


def test_other_errors_keep_their_errno(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL gets the likely reason, a failing seek is no NotReady."""
    kernel.open()
    monkeypatch.setattr(os, "pwrite", refused(errno.EINVAL))
    monkeypatch.setattr(os, "lseek", refused(errno.EIO))
    with pytest.raises(OSError, match="aligned to a page"):
        kernel.transport.write(OBJECT, 0, aligned(1))
    with pytest.raises(OSError) as caught:
        kernel.transport.resident(OBJECT, SIZE)
    assert caught.value.errno == errno.EIO


def test_a_closed_object_takes_nothing(kernel: Kernel) -> None:
    """After CLOSE its number is unknown."""
    fd = kernel.open()
    kernel.send(message(1), message(1))
    assert kernel.transport.drain() == [Closed(OBJECT)]
    assert not is_open(fd)
    for call in (
        lambda: kernel.transport.write(OBJECT, 0, aligned(1)),
        lambda: kernel.transport.resident(OBJECT, SIZE),
    ):
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_a_descriptor_outlives_close_until_its_last_writer(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CLOSE during a write leaves the number taken until the write is over."""
    fd = kernel.open()
    inside, go_on = threading.Event(), threading.Event()

    def slow(fd: int, memory: memoryview, offset: int) -> int:
        inside.set()
        assert go_on.wait(10)
        os.fstat(fd)
        return memory.nbytes

    monkeypatch.setattr(os, "pwrite", slow)
    errors: list[BaseException] = []

    def write() -> None:
        try:
            kernel.transport.write(OBJECT, 0, aligned(1))
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(10)
    kernel.send(message(1))
    kernel.transport.drain()
    assert is_open(fd)
    go_on.set()
    writer.join()
    assert not is_open(fd)
    assert errors == []


def test_bind_writes_one_command_at_a_time(kernel: Kernel) -> None:
    """Limits are set in an order in which each is valid next to the others."""
    kernel.transport.bind("tag", Culling(30, 20, 10), Culling(3, 2, 1))
    assert kernel.commands() == [
        f"dir {kernel.path.parent}",
        "tag tag",
        *("brun 99%", "bstop 0%", "bcull 20%", "bstop 10%", "brun 30%"),
        *("frun 99%", "fstop 0%", "fcull 2%", "fstop 1%", "frun 3%"),
        "bind ondemand",
        "restore",
    ]
    assert kernel.transport.supports_restore


def test_bind_finds_out_whether_restore_exists(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without it binds all the same; asking for it is a typed error."""
    monkeypatch.setattr(os, "write", only_restore_fails)
    kernel.transport.bind()
    assert not kernel.transport.supports_restore
    with pytest.raises(NoRestore, match=r"6\.8"):
        kernel.transport.restore()


def only_restore_fails(fd: int, data: bytes) -> int:
    if data == b"restore":
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    return len(data)


def test_a_refused_command_is_named(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which command it was."""
    monkeypatch.setattr(os, "write", refused(errno.EBUSY))
    with pytest.raises(OSError, match="'dir /") as caught:
        kernel.transport.bind()
    assert caught.value.errno == errno.EBUSY
    with pytest.raises(OSError, match="'restore'"):
        kernel.transport.restore()


@pytest.mark.parametrize("directory", ["/a\nbind", "/a\0"])
def test_a_command_is_one_line(directory: str) -> None:
    """A directory name cannot smuggle in a second command."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as written:
        transport = Cachefiles(writer, directory)
        with pytest.raises(OSError, match="one line"):
            transport.bind()
        transport.close()
        assert written.read() == b""


def test_adopt_takes_the_descriptor(tmp_path: Path) -> None:
    """An adopted device does not survive exec either, and is a Transport."""
    fd = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(fd, True)
    transport: Transport = Cachefiles.adopt(fd, str(tmp_path))
    assert transport.fileno() == fd and not os.get_inheritable(fd)
    transport.close()
    assert not is_open(fd)


@pytest.mark.parametrize(
    ("limits", "privileged", "now"),
    [
        ((1024, 4096), True, (8000, 8000)),
        ((1024, 524288), True, (8000, 524288)),
        ((1024, 4096), False, (4096, 4096)),
        ((9000, 9000), False, (9000, 9000)),
    ],
)
def test_the_limit_of_descriptors_is_raised(
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    privileged: bool,
    now: tuple[int, int],
) -> None:
    """To what is needed, as far as the hard limit without privilege; never lowered."""
    state = list(limits)

    def setrlimit(which: int, new: tuple[int, int]) -> None:
        if new[1] > state[1] and not privileged:
            raise ValueError("not allowed to raise maximum limit")
        state[:] = new

    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(state))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert descriptors.allow(8000) == now[0]
    assert tuple(state) == now


def test_close_closes_the_objects_too(tmp_path: Path) -> None:
    """Nothing stays open."""
    kernel = Kernel(tmp_path)
    fd = kernel.open()
    kernel.transport.close()
    assert not is_open(fd) and not is_open(kernel.transport.fileno())
    kernel.hang_up()

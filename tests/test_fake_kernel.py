"""The stand-in for the kernel: the quirks the daemon's tests lean on."""

from __future__ import annotations

import asyncio
import errno
import mmap
import selectors
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fscached.transport import (
    Closed,
    NotReady,
    ObjectKey,
    Opened,
    OutOfSpace,
    Ticket,
    Transport,
    Wanted,
)
from tests.fake_kernel import FakeKernel

KEY = ObjectKey("volume", "cookie")
SIZE = 300_000


def filled(byte: int, blocks: int) -> memoryview:
    memory = mmap.mmap(-1, blocks * 4096)
    memory.write(bytes([byte]) * len(memory))
    return memoryview(memory)


@pytest_asyncio.fixture
async def kernel() -> AsyncIterator[FakeKernel]:
    """A kernel with one open object that is ready."""
    kernel = FakeKernel(deaf_answers=0)
    await opened(kernel)
    yield kernel
    kernel.close()


async def opened(kernel: FakeKernel, size: int = SIZE) -> None:
    opening = asyncio.create_task(kernel.open(KEY))
    [event] = await drained(kernel)
    assert isinstance(event, Opened) and event.key == KEY
    kernel.open_ok(event.object, size)
    assert await opening == size


async def drained(kernel: Transport) -> list[Opened | Wanted | Closed]:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return kernel.drain()


@pytest.mark.asyncio
async def test_not_ready_until_the_first_read() -> None:
    """Before copen and for some calls after it nothing answers; a READ ends that."""
    kernel = FakeKernel(deaf_answers=99)
    opening = asyncio.create_task(kernel.open(KEY))
    [event] = await drained(kernel)
    with pytest.raises(NotReady):
        kernel.write(event.object, 0, filled(1, 1))
    kernel.open_ok(event.object, SIZE)
    await opening
    with pytest.raises(NotReady):
        kernel.resident(event.object, SIZE)
    reading = asyncio.create_task(kernel.read(KEY, 0, 1))
    await drained(kernel)
    assert kernel.resident(event.object, SIZE) == []
    kernel.close()
    with pytest.raises(OSError):
        await reading


@pytest.mark.asyncio
async def test_reads_are_segments_of_128_kib(kernel: FakeKernel) -> None:
    """One application read becomes READs one after another, each woken by its own bytes."""
    reading = asyncio.create_task(kernel.read(KEY, 5, SIZE - 5))
    ranges = []
    while not reading.done():
        for event in await drained(kernel):
            assert isinstance(event, Wanted)
            ranges.append((event.start, event.end))
            kernel.write(event.object, event.start, filled(7, (event.end - event.start) // 4096))
            kernel.done(event.object, event.ticket)
    assert ranges == [(0, 131072), (131072, 262144), (262144, 303104)]
    assert await reading == bytes([7]) * (SIZE - 10)
    assert await kernel.read(KEY, 0, 10) == bytes([7]) * 10
    assert kernel.resident(kernel.object_id(KEY), SIZE) == [(0, 303104)]


@pytest.mark.asyncio
@pytest.mark.parametrize("asks", [2, 3, 4])
async def test_a_hole_is_asked_for_again_and_then_eio(kernel: FakeKernel, asks: int) -> None:
    """Completing without data is asked again, from now on for one page, then EIO at once."""
    reading = asyncio.create_task(kernel.read(KEY, 0, SIZE, asks=asks))
    while not reading.done():
        for event in await drained(kernel):
            kernel.failed(event.object, event.ticket, errno.EIO)  # type: ignore[union-attr]
    with pytest.raises(OSError) as caught:
        await reading
    assert caught.value.errno == errno.EIO
    assert [w.end for w in kernel.asked] == [131072] + [4096] * (asks - 1)


@pytest.mark.asyncio
@pytest.mark.parametrize(("block", "next_range"), [(0, (4096, 8192)), (1, (0, 4096))])
async def test_a_prefix_is_progress_and_a_suffix_is_not(
    kernel: FakeKernel, block: int, next_range: tuple[int, int]
) -> None:
    """After a prefix the rest is asked for; after a suffix the same front page once more."""
    reading = asyncio.create_task(kernel.read(KEY, 0, 8192))
    [first] = await drained(kernel)
    assert isinstance(first, Wanted)
    kernel.write(first.object, block * 4096, filled(1, 1))
    kernel.done(first.object, first.ticket)
    [second] = await drained(kernel)
    assert isinstance(second, Wanted) and (second.start, second.end) == next_range
    kernel.done(second.object, second.ticket)
    reading.cancel()


@pytest.mark.asyncio
async def test_a_killed_reader_takes_its_read_along(kernel: FakeKernel) -> None:
    """A READ that was not drained vanishes, an answer to a drained one is no error, two are."""
    reading = asyncio.create_task(kernel.read(KEY, 0, 4096))
    [wanted] = await drained(kernel)
    assert isinstance(wanted, Wanted)
    reading.cancel()
    late = asyncio.create_task(kernel.read(KEY, 0, 4096))
    await asyncio.sleep(0)
    late.cancel()
    assert await drained(kernel) == []
    kernel.done(wanted.object, wanted.ticket)
    assert kernel.unanswered == 0
    with pytest.raises(AssertionError, match="twice"):
        kernel.done(wanted.object, Ticket(999))


@pytest.mark.asyncio
async def test_writes_are_direct_io_above_a_floor(kernel: FakeKernel) -> None:
    """Misaligned memory is EINVAL; below the floor is OutOfSpace; a closed object EBADF."""
    object = kernel.object_id(KEY)
    with pytest.raises(OSError) as caught:
        kernel.write(object, 0, filled(1, 3)[16 : 16 + 4096])
    assert caught.value.errno == errno.EINVAL
    kernel.free_bytes, kernel.floor_bytes = 8192, 4096
    kernel.write(object, 0, filled(1, 1))
    with pytest.raises(OutOfSpace):
        kernel.write(object, 4096, filled(1, 1))
    kernel.umount(KEY)
    assert kernel.drain() == [Closed(object)]
    with pytest.raises(OSError) as caught:
        kernel.write(object, 0, filled(1, 1))
    assert caught.value.errno == errno.EBADF


@pytest.mark.asyncio
async def test_files_outlive_objects_unless_the_size_changes(kernel: FakeKernel) -> None:
    """A file is found again by the next OPEN of its size; another size drops it."""
    kernel.write(kernel.object_id(KEY), 0, filled(1, 1))
    for size, kept in ((SIZE, 4096), (SIZE + 1, 0)):
        kernel.umount(KEY)
        kernel.drain()
        await opened(kernel, size)
        assert kernel.resident_bytes(KEY) == kept


@pytest.mark.asyncio
async def test_a_restart_keeps_tickets_and_changes_objects(kernel: FakeKernel) -> None:
    """After `restore` a pending READ comes back, once its object was opened again."""
    reading = asyncio.create_task(kernel.read(KEY, 0, 4096))
    [before] = await drained(kernel)
    kernel.restart()
    [reopened] = kernel.drain()
    assert isinstance(before, Wanted) and isinstance(reopened, Opened)
    kernel.done(before.object, before.ticket)
    assert kernel.orphans == [before.ticket]
    kernel.open_ok(reopened.object, SIZE)
    [after] = kernel.drain()
    assert after == before._replace(object=reopened.object)
    kernel.write(reopened.object, 0, filled(9, 1))
    kernel.done(reopened.object, before.ticket)
    assert await reading == bytes([9]) * 4096


@pytest.mark.asyncio
async def test_a_restart_opens_idle_objects_at_their_next_read(kernel: FakeKernel) -> None:
    """An object nobody reads is not opened again before somebody does."""
    kernel.restart()
    assert kernel.drain() == []
    reading = asyncio.create_task(kernel.read(KEY, 0, 4096))
    [reopened] = await drained(kernel)
    assert isinstance(reopened, Opened)
    kernel.open_failed(reopened.object, errno.ENOENT)
    [again] = await drained(kernel)
    assert isinstance(again, Opened)
    kernel.open_failed(again.object, errno.ENOENT)
    with pytest.raises(OSError):
        await reading


@pytest.mark.asyncio
async def test_the_descriptor_is_readable_while_something_waits(kernel: FakeKernel) -> None:
    """`fileno` is for a selector: readable after a message, quiet after `drain`."""
    selector = selectors.DefaultSelector()
    selector.register(kernel.fileno(), selectors.EVENT_READ)
    assert selector.select(0) == []
    reading = asyncio.create_task(kernel.read(KEY, 0, 1))
    await asyncio.sleep(0)
    assert selector.select(0)
    kernel.drain()
    assert selector.select(0) == []
    reading.cancel()


@pytest.mark.asyncio
async def test_a_failed_open_is_the_mounts_errno() -> None:
    """`open_failed` is what the mount fails with."""
    kernel = FakeKernel()
    opening = asyncio.create_task(kernel.open(KEY))
    [event] = await drained(kernel)
    kernel.open_failed(event.object, errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        await opening
    kernel.close()

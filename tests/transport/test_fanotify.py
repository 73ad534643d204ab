"""The fanotify transport without a kernel: records, slots, numbers, the floor of free space.

The kernel's half is tried in `tests/native`.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdefs import fanotify as abi
from fscached.transport import BLOCK_BYTES, Event, ObjectId, ObjectKey, OutOfSpace, Ticket
from fscached.transport import fanotify as module
from fscached.transport.fanotify import ERRNOS, wanted_extent
from fscached.transport.floor import Floor
from fscached.transport.slots import RECORD_BYTES, SLOT_BYTES, Slots, reserve
from tests.transport.group import Group, event, record

SIZE = 100 * BLOCK_BYTES
OBJECT = ObjectId(1)


@given(st.integers(0, 2 * SIZE), st.integers(1, 2 * SIZE))
def test_what_is_wanted_is_whole_blocks_within_the_file(offset: int, count: int) -> None:
    """All that is asked for and less than a block more on either side."""
    found = wanted_extent(record(offset, count), SIZE)
    assert found is not None
    start, end = found
    assert start % BLOCK_BYTES == end % BLOCK_BYTES == 0 and end <= SIZE
    assert offset - BLOCK_BYTES < start <= offset
    if start < end:
        assert min(offset + count, SIZE) <= end < offset + count + BLOCK_BYTES


def test_no_range_or_none_of_it_is_the_whole_file() -> None:
    """Nothing less would be safe: an allowed hole reads as zeros."""
    assert wanted_extent(record(), SIZE) == (0, SIZE)
    assert wanted_extent(record(8192, 0), SIZE) == (0, SIZE)


def test_other_records_before_the_range_are_passed_over() -> None:
    """The range is found by its type."""
    other = struct.pack("=BBHI", 7, 0, 8, 0)
    extent = abi.RANGE.pack(abi.INFO_RANGE, 0, 24, 0, 4096, 4096)
    head = abi.METADATA.pack(24 + 32, abi.VERSION, 0, 24, abi.PRE_ACCESS, 9, 1)
    assert wanted_extent(head + other + extent, SIZE) == (4096, 8192)


@pytest.mark.parametrize(
    "bad",
    [record(mask=2), abi.METADATA.pack(24, abi.VERSION + 1, 0, 24, abi.PRE_ACCESS, 9, 1)],
    ids=["no read before its content", "another version"],
)
def test_what_is_no_such_event_wants_nothing(bad: bytes) -> None:
    """It is denied."""
    assert wanted_extent(bad.ljust(RECORD_BYTES, b"\0"), SIZE) is None


@given(st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES))
def test_no_record_leads_out_of_itself(data: bytes) -> None:
    """Lengths are checked before they are believed."""
    head = abi.METADATA.pack(RECORD_BYTES, abi.VERSION, 0, 24, abi.PRE_ACCESS, 9, 1)
    found = wanted_extent(head + data[len(head) :], SIZE)
    assert found is not None and found[1] <= SIZE


@pytest.fixture
def slots() -> Iterator[Slots]:
    found = Slots(None, 4)
    yield found
    os.close(found.fd)


def fill(slots: Slots, number: int, inode: int = 0) -> int:
    slot = slots.take()
    assert slot is not None
    slots.record(slot)[:] = record(0, 4096, number)
    slots.note(slot, inode)
    return slot


def test_slots_outlive_the_process(slots: Slots) -> None:
    """Whoever has the memory knows what waits, of which file, and nothing that was answered."""
    fill(slots, 11, 7)
    slots.clear(fill(slots, 12, 8))
    fill(slots, 13)
    successor = Slots(os.dup(slots.fd), 0)
    left = {(event.number, event.inode) for event in successor.left()}
    assert left == {(11, 7), (13, 0)} and successor.count == 4
    free = {successor.take(), successor.take()}
    assert None not in free and free.isdisjoint({event.slot for event in successor.left()})
    assert successor.take() is None
    os.close(successor.fd)


def test_a_slot_killed_while_it_was_cleared_is_free(slots: Slots) -> None:
    """The first word decides; what is left behind it is forgotten."""
    slot = fill(slots, 11, 7)
    os.pwrite(slots.fd, bytes(8), slot * SLOT_BYTES)
    successor = Slots(os.dup(slots.fd), 0)
    assert list(successor.left()) == []
    for _ in range(4):
        taken = successor.take()
        assert taken is not None
        successor.record(taken)[:8] = bytes([1] * 8)
    assert {event.inode for event in successor.left()} == {0}
    os.close(successor.fd)


def test_numbers_that_wait_are_not_handed_out_again() -> None:
    """Free ones are taken, holdings on one move, and what somebody else has open stays."""
    numbers = [os.dup(1) for _ in range(6)]
    one, two, holding, other, three, _ = numbers
    inode = os.fstat(holding).st_ino
    for number in (one, two, three):
        os.close(number)
    holdings = {"fanotify": holding}
    reserved = reserve([one, two, holding, other, three], holdings)
    try:
        assert reserved == {one, two, holding, three}
        assert holdings["fanotify"] not in numbers
        assert os.fstat(holdings["fanotify"]).st_ino == inode
        fresh = os.dup(1)
        assert fresh not in {one, two, holding, three}
        os.close(fresh)
    finally:
        for number in {*reserved, other, numbers[-1], holdings["fanotify"]}:
            os.close(number)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    found = Group(tmp_path, monkeypatch)
    yield found
    found.transport.close()
    os.close(found.write)


def test_an_event_of_no_object_is_denied_at_once(group: Group, tmp_path: Path) -> None:
    """With EIO; its descriptor is closed and its slot free after that."""
    fd = event(group, tmp_path / "stranger")
    assert list(group.transport.drain()) == []
    assert group.answers == [(fd, errno.EIO)] and list(group.slots.left()) == []
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ETIMEDOUT, errno.ENOENT])
def test_only_errnos_that_the_kernel_takes(group: Group, code: int) -> None:
    """With another one the reader would wait for ever."""
    group.waiting.add(77)
    slot = fill(group.slots, 77)
    group.transport._unanswered[Ticket(1)] = module._Unanswered(slot, 77, False)
    group.transport.failed(OBJECT, Ticket(1), code)
    assert group.answers == [(77, code if code in ERRNOS else errno.EIO)]


def test_an_answer_comes_once(group: Group) -> None:
    """A deadline and a worker may both have one; a reader may be gone."""
    slot = fill(group.slots, 77)
    group.transport._unanswered[Ticket(1)] = module._Unanswered(slot, 77, False)
    group.transport.done(OBJECT, Ticket(1))
    group.transport.failed(OBJECT, Ticket(1), errno.EIO)
    assert group.answers == [] and group.transport.counts.readers_gone == 2
    assert list(group.slots.left()) == []


def test_without_a_slot_nothing_is_read(group: Group, tmp_path: Path) -> None:
    """And the loop is not told of events meanwhile; the first answer changes that."""
    taken = [fill(group.slots, 50 + number) for number in range(4)]
    fd = event(group, tmp_path / "stranger")
    assert list(group.transport.drain()) == [] and group.answers == []
    assert group.transport._epoll.poll(0) == []
    group.waiting.add(50)
    group.transport._unanswered[Ticket(1)] = module._Unanswered(taken[0], 50, False)
    group.transport.done(OBJECT, Ticket(1))
    assert group.transport._epoll.poll(0) != []
    assert list(group.transport.drain()) == []
    assert group.answers == [(50, 0), (fd, errno.EIO)]


@contextmanager
def attended(group: Group) -> Iterator[None]:
    """A thread that attends meanwhile, and whom nothing is asked that others must answer."""
    found: list[Event] = []
    thread = threading.Thread(target=lambda: found.extend(group.transport.attend()))
    thread.start()
    yield
    group.transport.dismiss()
    thread.join()
    assert found == []


def test_a_thread_acts_on_events_until_it_is_dismissed(group: Group, tmp_path: Path) -> None:
    """As the event loop would."""
    with attended(group):
        fd = event(group, tmp_path / "stranger")
        group.answered.wait()
    assert group.answers == [(fd, errno.EIO)] and list(group.slots.left()) == []
    assert {group.slots.take() for _ in range(4)} == {0, 1, 2, 3}


def test_a_thread_without_a_slot_waits_for_one(group: Group, tmp_path: Path) -> None:
    """For the next answer, or to be dismissed."""
    taken = [fill(group.slots, 50 + number) for number in range(4)]
    with attended(group):
        fd = event(group, tmp_path / "stranger")
        group.waiting.add(50)
        group.transport._unanswered[Ticket(1)] = module._Unanswered(taken[0], 50, False)
        group.transport.done(OBJECT, Ticket(1))
        while len(group.answers) < 2:
            group.answered.wait()
            group.answered.clear()
    assert group.answers == [(50, 0), (fd, errno.EIO)]
    fill(group.slots, 60)
    with attended(group):
        pass


def test_the_end_of_a_thread_is_no_event(group: Group) -> None:
    """Who drains after it, to take images down, waits between events as before."""
    with attended(group):
        pass
    assert select.select([group.transport], [], [], 0) == ([], [], [])


def test_a_takeover_answers_slots_and_denies_the_rest(group: Group) -> None:
    """Numbers of no known file, and those in no slot, before anything new is read."""
    fill(group.slots, 21, inode=1)
    group.waiting = {20, 21, 30}
    group.transport._left = list(group.slots.left())
    group.transport._descriptors_max = 64
    group.transport.take_over()
    assert group.answers == [(20, errno.EIO), (30, errno.EIO), (21, errno.EIO)]
    assert (group.transport.counts.swept, group.transport.counts.taken_over) == (2, 1)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 201])
def test_names_stay_in_the_folder(group: Group, name: str) -> None:
    """A blob's id comes from an image, and images are hostile."""
    with pytest.raises(OSError) as caught:
        group.transport.offer(ObjectKey("domain", name), SIZE)
    assert caught.value.errno == errno.EINVAL


def room(**changes: int) -> os.statvfs_result:
    state = {"f_frsize": 4096, "f_blocks": 10_000, "f_bavail": 5000, "f_files": 100, "f_ffree": 50}
    return SimpleNamespace(**(state | changes))  # type: ignore[return-value]


def test_the_floor_of_blocks() -> None:
    """What other programs write counts at once."""
    free = [9000]
    floor = Floor("/cache", 10, 10, lambda _: room(f_bavail=free[0]))
    floor.require(4096 * 8000)
    free[0] = 1001
    floor.require(4096)
    with pytest.raises(OutOfSpace, match="free space on the cache file system"):
        floor.require(4096 * 2)
    free[0] = 5000
    floor.require(4096 * 2)


def test_the_floor_of_inodes() -> None:
    """A file system that counts none has enough."""
    with pytest.raises(OutOfSpace):
        Floor("/cache", 1, 50, lambda _: room()).require_file()
    Floor("/cache", 1, 49, lambda _: room()).require_file()
    Floor("/cache", 1, 50, lambda _: room(f_files=0, f_ffree=0)).require_file()

"""Images in the background: all of them once, within budgets, in nobody's way, with pauses instead
of failures. Time is the test's; only the loop and the workers are real."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from itertools import pairwise

import pytest

from fscached.prefetch.phase import Phase
from fscached.prefetch.trace import Access, Trace
from fscached.source import Priority
from fscached.transport import ObjectKey, OutOfSpace
from tests.fill.conftest import KEY, MIB, until
from tests.prefetch.conftest import IMAGE, Make

pytestmark = pytest.mark.asyncio

CHUNK = 65536


def offsets(here, priority: Priority = Priority.PREFETCH) -> list[int]:
    """Where requests began, in chunks; chunks are stored as they are."""
    return [start // CHUNK for start, _, asked in here.source.asked if asked is priority]


async def test_an_image_is_brought_without_a_reader(desk: Make):
    """Nobody reads; the kernel answers for the file only after a while; all of it comes, once."""
    it = desk([CHUNK] * 64, range_bytes=MIB)
    here = it.here
    await here.kernel.open(KEY)
    await it.complete()
    await until(lambda: it.report.phase is Phase.DONE)
    assert here.kernel.content(KEY) == here.remote.content
    assert {priority for _, _, priority in here.source.asked} == {Priority.PREFETCH}
    assert sum(end - start for start, end, _ in here.source.asked) == 64 * CHUNK
    assert all(end - start <= MIB for start, end, _ in here.source.asked)
    assert here.kernel.asked == []
    report = it.report
    assert (report.left_bytes, report.eta_s, report.brought_bytes) == (0, 0.0, 64 * CHUNK)
    assert report.requests == len(here.source.asked)
    await it.close()


async def test_what_a_trace_expects_comes_first(desk: Make):
    """In the trace's order, nearby chunks as one request, then the rest."""
    it = desk([CHUNK] * 64, {"concurrency": 1}, policies=("trace", "whole"), range_bytes=CHUNK)
    accesses = tuple(
        Access(KEY.cookie, chunk * CHUNK, (chunk + 1) * CHUNK, moment / 10)
        for moment, chunk in enumerate([40, 41, 10, 63])
    )
    it.traces.adopt(Trace(IMAGE.cookie, "host/app:1", 1, accesses))
    await it.here.kernel.open(KEY)
    await it.complete()
    assert offsets(it.here, Priority.EXPECTED) == [40, 41, 10, 63]
    assert offsets(it.here)[0] == 0
    assert len(it.here.source.asked) == 64
    await it.close()


async def test_what_gives_way_to_readers_is_not_in_the_way_of_what_a_trace_expects(desk: Make):
    """Another image's prefetch stands still in the middle of its requests; what is expected of
    this one comes."""
    it = desk([CHUNK] * 8, {"concurrency": 1}, policies=("trace", "whole"), range_bytes=CHUNK)
    here, read = it.here, it.here.source.read
    quiet = asyncio.Event()

    async def beside_readers(blob_id, start, end, priority, *rest):
        if priority is Priority.PREFETCH:
            await quiet.wait()
        return await read(blob_id, start, end, priority, *rest)

    here.source.read = beside_readers  # type: ignore[method-assign]
    access = Access(KEY.cookie, 5 * CHUNK, 6 * CHUNK, 0.0)
    await here.kernel.open(KEY)
    await until(lambda: it.report.requests == 1)
    other = ObjectKey(KEY.volume, "e" * 64)
    image = replace(it.image, fsid=other.cookie)
    it.traces.adopt(Trace(image.identity, "", 1, (access,)))
    [opened] = here.objects.blobs(KEY.volume).values()
    it.service.begin(other, image, it.settings, KEY.cookie, opened)
    await until(lambda: offsets(here, Priority.EXPECTED) == [5])
    await until(lambda: here.kernel.resident_bytes(KEY) == CHUNK)
    quiet.set()
    await it.complete()
    await it.close()


async def test_only_what_the_policies_name_is_brought(desk: Make):
    """Without `whole` the rest stays where it is, and that is no reason to be busy."""
    it = desk([CHUNK] * 64, policies=("trace",))
    access = Access(KEY.cookie, 5 * CHUNK, 7 * CHUNK, 0.0)
    it.traces.adopt(Trace(IMAGE.cookie, "", 1, (access,)))
    await it.here.kernel.open(KEY)
    await until(lambda: it.report.phase is Phase.DONE)
    assert it.here.kernel.resident_bytes(KEY) == 2 * CHUNK
    assert it.service.insist(IMAGE)
    assert it.report.left_bytes == 62 * CHUNK
    await it.complete()
    await it.close()


async def test_nothing_is_brought_of_an_image_that_wants_none(desk: Make):
    """Until somebody insists."""
    it = desk([CHUNK] * 8, enabled=False)
    assert not it.service.insist(IMAGE)
    await it.here.kernel.open(KEY)
    await it.here.kernel.read(KEY, 0, 4096)
    assert (it.report.phase, offsets(it.here)) == (Phase.OFF, [])
    assert it.service.insist(IMAGE)
    await it.complete()
    await it.close()


async def test_a_sequential_reader_finds_what_follows(desk: Make):
    """Two READs without a gap, and what comes after them is on its way; a random reader has
    nothing brought."""
    one_chunk = {"window_bytes": 4096, "window_limit_bytes": 4096}
    it = desk([CHUNK] * 64, limits=one_chunk, policies=("sequential",), ahead_bytes=8 * CHUNK)
    here = it.here
    await here.kernel.open(KEY)
    await here.kernel.read(KEY, 60 * CHUNK, 61 * CHUNK)
    await here.kernel.read(KEY, 50 * CHUNK, 51 * CHUNK)
    assert offsets(here) == []
    read = 0
    while not offsets(here):  # what has come in time is read unasked, and says nothing
        assert read < 12, "nothing was brought"
        await here.kernel.read(KEY, read * CHUNK, (read + 1) * CHUNK)
        read += 1
    assert read >= 2
    assert set(offsets(here)) <= set(range(2, read + 8))
    await it.close()


async def test_the_budget_is_never_exceeded_for_long(desk: Make):
    """1 MiB/s: what was asked for by any moment is what the limit gives until then, and what may
    begin before it is spent."""
    it = desk([CHUNK] * 64, {"bandwidth_bytes_per_s": MIB}, range_bytes=MIB)
    moments: list[tuple[float, int]] = []
    read = it.here.source.read

    async def timed(blob_id, start, end, *rest):
        moments.append((it.clock.time_s, end - start))
        return await read(blob_id, start, end, *rest)

    it.here.source.read = timed  # type: ignore[method-assign]
    await it.here.kernel.open(KEY)
    await it.complete()
    spent, began_s = 0, moments[0][0]
    for at_s, size in moments:
        assert spent <= MIB * (at_s - began_s) + MIB // 2 + 1
        spent += size
    assert moments[-1][0] - began_s >= 2.5
    await it.close()


async def test_each_image_has_its_own_limit_too(desk: Make):
    """The tighter of the two counts."""
    it = desk([CHUNK] * 16, {"bandwidth_bytes_per_s": 0}, image_bandwidth_bytes_per_s=CHUNK)
    began_s = it.clock.time_s
    await it.here.kernel.open(KEY)
    await it.complete()
    assert it.clock.time_s - began_s >= 13
    await it.close()


async def test_demand_spends_the_budget_and_never_waits_for_it(desk: Make):
    """Readers take what they need at once; prefetch waits until the budget has recovered."""
    it = desk([CHUNK] * 64, {"bandwidth_bytes_per_s": CHUNK}, range_bytes=CHUNK)
    here = it.here
    it.clock.held = True
    await here.kernel.open(KEY)
    await here.kernel.read(KEY, 0, 16 * CHUNK)
    assert offsets(here) == []
    it.clock.held = False
    before_s = it.clock.time_s
    await until(lambda: offsets(here))
    assert it.clock.time_s - before_s >= 1
    await it.close()


async def test_a_source_that_fails_is_tried_again(desk: Make, caplog):
    """A registry that is down for a moment costs a pause and a line; pauses grow."""
    it = desk([CHUNK] * 8)
    it.here.source.break_after_bytes = 0
    await it.here.kernel.open(KEY)
    await until(lambda: caplog.text.count("pauses") >= 3)
    assert it.report.phase is Phase.PAUSED and "broken off" in it.report.why
    it.here.source.break_after_bytes = None
    await it.complete()
    await until(lambda: it.report.phase is Phase.DONE)
    pauses = [seconds for seconds in it.clock.slept_s if seconds >= 1]
    assert any(later > sooner for sooner, later in pairwise(pauses))
    await it.close()


async def test_a_chunk_that_is_always_wrong_is_no_reason_to_be_busy(desk: Make):
    """All others come; it is tried again after pauses that grow."""
    it = desk([CHUNK] * 16, range_bytes=CHUNK)
    it.here.source.file[3 * CHUNK] ^= 1
    await it.here.kernel.open(KEY)
    await until(lambda: len([s for s in it.clock.slept_s if s >= 16]) > 2)
    assert it.here.kernel.resident_bytes(KEY) == 15 * CHUNK
    assert it.report.phase is Phase.PAUSED and "not what the image says" in it.report.why
    tries = [start for start, _, _ in it.here.source.asked if start == 3 * CHUNK]
    assert len(tries) <= 60
    await it.close()


async def test_a_nearly_full_disk_stops_it_and_space_lets_it_go_on(desk: Make, caplog):
    """Said once; readers are served meanwhile."""
    full = [True]

    def room() -> None:
        if full[0]:
            raise OutOfSpace(28, "/cache: at most 4 % of its blocks are free")

    caplog.set_level(logging.INFO)
    one_chunk = {"window_bytes": 4096, "window_limit_bytes": 4096}
    it = desk([CHUNK] * 8, {"room": room}, limits=one_chunk)
    await it.here.kernel.open(KEY)
    await until(lambda: len([s for s in it.clock.slept_s if s == 10.0]) > 5)
    assert it.report.phase is Phase.STOPPED and "4 %" in it.report.why
    assert caplog.text.count("prefetch stops") == 1
    await it.here.kernel.read(KEY, 0, 4096)
    assert offsets(it.here) == []
    full[0] = False
    await it.complete()
    assert caplog.text.count("there is room again") == 1
    await it.close()


async def test_a_write_that_finds_no_space_stops_it_too(desk: Make, caplog):
    """A quota is nothing that statvfs(3) knows."""
    it = desk([CHUNK] * 8, {"concurrency": 1}, range_bytes=CHUNK)
    it.here.kernel.write_errors = [OutOfSpace(122, "quota") for _ in range(6)]
    await it.here.kernel.open(KEY)
    await until(lambda: not it.here.kernel.write_errors)
    await it.complete()
    assert it.here.kernel.content(KEY) == it.here.remote.content
    assert caplog.text.count("prefetch stops") == 1
    await it.close()


async def test_a_closed_image_is_left_alone(desk: Make):
    """After CLOSE nothing is fetched any more."""
    it = desk([CHUNK] * 64, range_bytes=CHUNK)
    here = it.here
    here.source.gate.clear()
    await here.kernel.open(KEY)
    await until(lambda: here.source.asked)
    here.kernel.umount(KEY)
    await until(lambda: here.objects.tally.closes)
    asked = len(here.source.asked)
    here.source.gate.set()
    await until(lambda: it.report.phase is Phase.UNMOUNTED)
    assert len(here.source.asked) == asked
    await it.close()


async def test_a_successor_fetches_nothing_twice(desk: Make):
    """The daemon is replaced halfway; at the object's next READ prefetch goes on with the rest."""
    it = desk([CHUNK] * 64, range_bytes=4 * CHUNK)
    here = it.here
    await here.kernel.open(KEY)
    await until(lambda: here.kernel.resident_bytes(KEY) >= 16 * CHUNK)
    here.replace_daemon()
    here.objects.on_blob = it.opened
    before = here.kernel.resident_bytes(KEY)
    await asyncio.sleep(0)
    await here.kernel.read(KEY, 63 * CHUNK, 63 * CHUNK + 4096)
    await it.complete()
    assert here.kernel.content(KEY) == here.remote.content
    assert here.kernel.rewritten_bytes == 0
    assert before < 64 * CHUNK
    await it.close()


async def test_readers_are_right_while_prefetch_runs(desk: Make):
    """Demand and prefetch bring the same blob together, and every byte is right."""
    it = desk([50_000] * 80, range_bytes=MIB)
    here = it.here
    await here.kernel.open(KEY)
    reads = [
        here.kernel.read(KEY, start, start + 4096)
        for start in range(0, len(here.remote.content), 7 * 4096)
        if start + 4096 <= len(here.remote.content)
    ]
    for index, data in enumerate(await asyncio.gather(*reads)):
        assert data == here.remote.content[index * 7 * 4096 : index * 7 * 4096 + 4096]
    await it.complete()
    assert here.kernel.content(KEY) == here.remote.content
    assert here.kernel.rewritten_bytes == 0
    await it.close()


async def test_a_run_is_recorded_and_known_to_the_next_daemon(desk: Make, tmp_path):
    """What was read, in order; of the run that goes on, and settled when it ends."""
    it = desk([CHUNK] * 64, enabled=False)
    here = it.here
    await here.kernel.open(KEY)
    await here.kernel.read(KEY, 7 * CHUNK, 7 * CHUNK + 4096)
    it.clock.time_s += 1.5
    await here.kernel.read(KEY, 3 * CHUNK, 5 * CHUNK)
    present = await it.service.trace(IMAGE, it.image, run=True)
    assert present is not None
    assert [access.start // CHUNK for access in present.accesses] == [7, 3, 4]
    assert present.accesses[0].after_s == 0.0 and present.accesses[1].after_s >= 1.5
    here.kernel.umount(KEY)
    await until(lambda: it.traces.load(IMAGE.cookie))
    assert it.traces.load(IMAGE.cookie) == present
    await until(lambda: len(list((tmp_path / "traces").iterdir())) == 1)
    (file,) = (tmp_path / "traces").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    await here.kernel.open(KEY)
    await here.kernel.read(KEY, 40 * CHUNK, 40 * CHUNK + 4096)
    known = await it.service.trace(IMAGE, it.image)
    assert known is not None and known.runs == 1
    assert [access.start // CHUNK for access in known.accesses] == [7, 40, 3, 4]
    await it.close()
    assert it.traces.load(IMAGE.cookie) == known


async def test_what_is_being_written_when_a_run_ends_is_not_written_after_it(desk: Make, tmp_path):
    """An old state behind the last one would count as a run of its own."""
    it = desk([CHUNK] * 64, enabled=False)
    old, keep_run = threading.Event(), it.traces.keep_run
    began = threading.Event()

    def slow_at_first(run: Trace, number: str) -> None:
        if not began.is_set():
            began.set()
            old.wait(20)
        keep_run(run, number)

    it.traces.keep_run = slow_at_first  # type: ignore[method-assign]
    await it.here.kernel.open(KEY)
    await it.here.kernel.read(KEY, 7 * CHUNK, 7 * CHUNK + 4096)
    await until(began.is_set)
    await it.here.kernel.read(KEY, 40 * CHUNK, 40 * CHUNK + 4096)
    it.here.kernel.umount(KEY)
    await until(lambda: it.report.phase is Phase.OFF)
    for _ in range(50):  # turns enough for an end that does not wait
        await asyncio.to_thread(lambda: None)
    old.set()
    await until(lambda: (known := it.traces.load(IMAGE.cookie)) and len(known.accesses) == 2)
    await it.service.close()  # which waits for the end of the run
    assert [file.name for file in (tmp_path / "traces").iterdir()] == [f"{IMAGE.cookie}.trace"]
    it.here.close()


async def test_a_run_cut_short_by_a_kill_is_not_lost(desk: Make):
    """What was kept of it counts as a run, once."""
    it = desk([CHUNK] * 8, enabled=False)
    run = Trace(IMAGE.cookie, "", 1, (Access(KEY.cookie, 0, CHUNK, 0.0),))
    it.traces.keep_run(run, "abcd")
    it.traces.recover()
    it.traces.recover()
    assert it.traces.load(IMAGE.cookie) == run
    await it.close()


async def test_a_bug_in_the_recording_is_no_readers_error(desk: Make, monkeypatch, caplog):
    """The READ is answered; the log has the trace."""
    it = desk([CHUNK] * 8, enabled=False)
    await it.here.kernel.open(KEY)
    (blob,) = it.here.objects.blobs(KEY.volume).values()
    job = next(iter(blob.watcher.jobs.values()))
    monkeypatch.setattr(job.recording, "read", lambda *_: 1 / 0)
    assert await it.here.kernel.read(KEY, 0, 4096) == it.here.remote.content[:4096]
    assert "is not recorded" in caplog.text
    await it.close()

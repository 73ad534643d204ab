"""A source that is away: readers wait for it or get EIO, as configured, and never longer than they
may. Everything else fails as soon as ever."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fscached.fill import scout as module
from fscached.source import Fault, Refusal, SourceError
from fscached.transport import OutOfSpace
from rafs_v6 import ImageError
from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, Remote, Scene, settled, until
from tests.fill.ends import ENDS, Device, Files, Node

pytestmark = pytest.mark.asyncio

CHUNK = 65536
WAIT = {"window_bytes": CHUNK, "window_limit_bytes": CHUNK, "refusal_s": 5.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scouts that do not dawdle."""
    monkeypatch.setattr(module, "PAUSE_S", 0.002)
    monkeypatch.setattr(module, "PAUSE_LIMIT_S", 0.02)


async def test_readers_wait_until_the_source_is_back(scene, caplog):
    """Sixteen of them: none fails, one scout at a time, and each chunk comes once."""
    here: Scene = scene([CHUNK] * 64, Compressor.NONE, outage_limit_s=100.0, **WAIT)
    try:
        await here.kernel.open(KEY)
        here.source.break_after_bytes = 0
        reads = [here.kernel.read(KEY, 4 * i * CHUNK, 4 * i * CHUNK + CHUNK) for i in range(16)]
        readers = [asyncio.create_task(read) for read in reads]
        await until(lambda: len(here.source.asked) >= 20)
        assert here.objects.waiting == 16
        scouts = here.source.asked[16:]
        assert {start for start, _, _ in scouts} == {0}
        here.source.asked.clear()
        here.source.break_after_bytes = None
        for index, data in enumerate(await asyncio.gather(*readers)):
            assert data == here.remote.content[4 * index * CHUNK :][:CHUNK]
        await settled(here.objects)
        assert sorted(start for start, _, _ in here.source.asked) == [
            4 * i * CHUNK for i in range(16)
        ]
        assert here.objects.tallies[KEY].reads_failed == 0
        assert here.kernel.rewritten_bytes == 0
        assert caplog.text.count("readers wait for its source") == 1
    finally:
        here.close()


async def test_a_source_that_says_nothing_is_waited_for(scene, caplog):
    """Deadlines of fetches come and go; the reader is served when it speaks again."""
    here: Scene = scene([CHUNK] * 4, deadline_s=0.05, outage_limit_s=100.0, **WAIT)
    try:
        await here.kernel.open(KEY)
        here.source.gate.clear()
        reader = asyncio.create_task(here.kernel.read(KEY, 0, CHUNK))
        await until(lambda: len(here.source.asked) >= 3)
        here.source.gate.set()
        assert await reader == here.remote.content[:CHUNK]
    finally:
        here.close()


@pytest.mark.parametrize("asks", [2, 4])
async def test_nobody_waits_longer_than_the_limit(scene, asks, caplog):
    """However often the kernel asks: the hung-task detector counts the seconds of one wait."""
    here: Scene = scene([CHUNK] * 4, deadline_s=0.1, outage_limit_s=0.4, **WAIT)
    try:
        await here.kernel.open(KEY)
        here.source.break_after_bytes = 0
        began = asyncio.get_running_loop().time()
        with pytest.raises(OSError) as caught:
            await here.kernel.read(KEY, 0, CHUNK, asks=asks)
        assert caught.value.errno == errno.EIO
        assert 0.4 <= asyncio.get_running_loop().time() - began < 0.8
        here.source.break_after_bytes = None
        assert here.objects.waiting == 0
    finally:
        here.close()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Awaitable[None]]:
    """Moves the loop's clock on, and lets it do what is due then."""

    async def move(seconds: float) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + seconds)
        for _ in range(2):
            await asyncio.sleep(0)

    return move


@pytest.mark.parametrize("in_time", [True, False], ids=["right bytes", "EIO"])
@pytest.mark.parametrize(
    "limits", [{"deadline_s": 30.0}, {"deadline_s": 30.0, "outage_limit_s": 100.0}], ids=str
)
async def test_every_daemon_of_a_chain_counts_anew(scene, later, limits, in_time, caplog):
    """Five die before a reader's time is up, which has waited for far longer than it may when the
    sixth is asked: that has as long as the first had, and no longer."""
    here: Scene = scene([CHUNK] * 4, **limits, **WAIT)
    limit_s = max(limits.values())
    try:
        await here.kernel.open(KEY)
        here.source.gate.clear()
        reader = asyncio.create_task(here.kernel.read(KEY, 0, CHUNK))
        for _ in range(5):
            await until(lambda: here.source.asked)
            await later(0.9 * limit_s)
            here.replace_daemon()
            here.source.asked.clear()
        await until(lambda: here.source.asked)
        if in_time:
            await later(0.9 * limit_s)
            here.source.gate.set()
            assert await reader == here.remote.content[:CHUNK]
        else:
            await later(1.1 * limit_s)
            with pytest.raises(OSError):
                await reader
    finally:
        here.close()


async def test_a_chunk_map_that_is_away_is_waited_for(scene, caplog):
    """A mount whose tail was never fetched; its first reader waits as any other."""
    here: Scene = scene([CHUNK] * 4, outage_limit_s=100.0, **WAIT)
    try:
        here.chunks_error = SourceError("registry is down", Fault.NETWORK)
        await here.kernel.open(KEY)
        reader = asyncio.create_task(here.kernel.read(KEY, 0, CHUNK))
        await until(lambda: caplog.text.count("registry is down") >= 3)
        here.chunks_error = None
        assert await reader == here.remote.content[:CHUNK]
    finally:
        here.close()


async def test_a_chunk_map_that_stays_away_fails_at_the_limit(scene, caplog):
    """Within one limit, as a chunk."""
    here: Scene = scene([CHUNK] * 4, deadline_s=0.1, outage_limit_s=0.4, **WAIT)
    try:
        here.chunks_error = SourceError("registry is down", Fault.NETWORK)
        await here.kernel.open(KEY)
        began = asyncio.get_running_loop().time()
        with pytest.raises(OSError):
            await here.kernel.read(KEY, 0, CHUNK, asks=4)
        assert 0.3 < asyncio.get_running_loop().time() - began < 0.8
    finally:
        here.close()


def _map_is_wrong(here: Scene) -> None:
    here.chunks_error = ImageError("a bit flipped")


def _map_is_refused(here: Scene) -> None:
    here.chunks_error = Refusal("404", Fault.ORIGIN)


def _disk_is_full(here: Scene) -> None:
    here.kernel.write_errors = [OutOfSpace(errno.ENOSPC, "full")] * 9


def _bytes_are_wrong(here: Scene) -> None:
    here.source.file[here.remote.chunks.remote_offset(0) + 20] ^= 1


def _source_refuses(here: Scene) -> None:
    here.source.error = Refusal("404", Fault.ORIGIN)


def _login_is_refused(here: Scene) -> None:
    here.source.error = SourceError("401", Fault.AUTH)


@pytest.mark.parametrize(
    "fault",
    [
        *(_map_is_wrong, _map_is_refused, _disk_is_full, _bytes_are_wrong),
        *(_source_refuses, _login_is_refused),
    ],
)
async def test_what_is_no_outage_is_not_waited_for(
    scene, fault: Callable[[Scene], None], caplog
) -> None:
    """An answer is an answer, and the disk is ours."""
    here: Scene = scene([CHUNK] * 4, Compressor.NONE, outage_limit_s=100.0, **WAIT)
    try:
        await here.kernel.open(KEY)
        fault(here)
        with pytest.raises(OSError):
            await asyncio.wait_for(here.kernel.read(KEY, 0, CHUNK), 20)
    finally:
        here.close()


async def test_a_stuck_writer_is_not_waited_for(scene, caplog):
    """Its bytes have come, so the source is not what keeps it."""
    here: Scene = scene([CHUNK] * 4, deadline_s=0.2, outage_limit_s=100.0, **WAIT)
    try:
        await here.kernel.open(KEY)
        here.kernel.freeze()
        with pytest.raises(OSError):
            await asyncio.wait_for(here.kernel.read(KEY, 0, CHUNK), 20)
    finally:
        here.kernel.thaw()
        here.close()


@ENDS
async def test_both_transports_hold_their_readers(
    kind: type[Device] | type[Files],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not answered while the source is away, answered once when it is back, failed at the limit."""
    remote = Remote([CHUNK] * 4, Compressor.NONE)
    node = Node(kind(tmp_path, monkeypatch), remote, deadline_s=0.1, outage_limit_s=60.0)
    try:
        node.source.break_after_bytes = 0
        reader = asyncio.create_task(node.end.ask(0))
        await until(lambda: len(node.source.asked) >= 3)
        assert not reader.done() and node.objects.waiting == 1
        node.source.break_after_bytes = None
        assert await reader
        await settled(node.objects)
        tally = node.objects.tallies[node.end.key]
        assert (tally.reads, tally.reads_completed, tally.reads_failed) == (1, 1, 0)
    finally:
        node.close()


@ENDS
async def test_both_transports_fail_their_readers_at_the_limit(
    kind: type[Device] | type[Files],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing of the file is there, and the reader knows."""
    remote = Remote([CHUNK] * 4, Compressor.NONE)
    node = Node(kind(tmp_path, monkeypatch), remote, deadline_s=0.1, outage_limit_s=0.3)
    try:
        node.source.break_after_bytes = 0
        began = asyncio.get_running_loop().time()
        assert not await node.end.ask(0)
        assert asyncio.get_running_loop().time() - began >= 0.3
        assert node.held_bytes == 0
        tally = node.objects.tallies[node.end.key]
        assert (tally.reads, tally.reads_completed, tally.reads_failed) == (1, 0, 1)
    finally:
        node.close()

"""READs in, right bytes or EIO out, whatever goes wrong between."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fscached.fill.blob import Brought
from fscached.source import Fault, Priority, SourceError
from fscached.transport import ObjectId, ObjectKey, Ticket, Wanted
from rafs_v6 import ImageError
from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, MIB, Scene, settled, until

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def opened(scene: Scene) -> AsyncIterator[Scene]:
    """The scene with its blob mounted."""
    try:
        await scene.kernel.open(KEY)
        yield scene
    finally:
        scene.close()


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])
async def test_every_byte_is_right(scene, compressor):
    """A blob of odd chunks, read whole, is its content and its padding is zeros."""
    rng = random.Random(1)
    sizes = [rng.randrange(1, 300_000) for _ in range(40)] + [MIB] * 4
    async with opened(scene(sizes, compressor)) as here:
        size = len(here.remote.content)
        assert await here.kernel.read(KEY, 0, size) == here.remote.content
        await settled(here.objects)
        assert here.objects.tallies[KEY].bad_chunks == 0
        assert here.objects.waiting == 0
        assert here.kernel.rewritten_bytes == 0


async def test_a_read_of_the_last_byte(scene):
    """A READ that ends at the padded end of the blob is filled."""
    async with opened(scene([5000, 1])) as here:
        size = len(here.remote.content)
        assert await here.kernel.read(KEY, size - 1, size) == here.remote.content[-1:]


async def test_one_request_brings_a_window(scene):
    """A read of four KiB asks the source for one MiB, starting at its own chunk."""
    async with opened(scene([65536] * 64, Compressor.NONE)) as here:
        await here.kernel.read(KEY, 8 * 65536, 8 * 65536 + 4096)
        assert here.source.asked == [(8 * 65536, 24 * 65536, Priority.DEMAND)]


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.ZSTD])
async def test_bytes_of_no_chunk_come_along_and_are_not_written(scene, compressor):
    """One request over two holes; what is in them belongs to other images, and stays a hole."""
    unknown = frozenset({2, 5})
    async with opened(scene([65536] * 8, compressor, unknown)) as here:
        (blob,) = here.objects.blobs("domain").values()
        here.kernel.settle(KEY)
        await blob.learn()
        blob.blob._planner.gap_bytes = 65536
        assert await here.kernel.read(KEY, 0, 4096) == here.remote.content[:4096]
        await settled(here.objects)
        assert [(start, end) for start, end, _ in here.source.asked] == [(0, len(here.remote.file))]
        for number in range(8):
            found = here.kernel.content(KEY)[number * 65536 :][:65536]
            right = here.remote.content[number * 65536 :][:65536]
            assert found == (bytes(65536) if number in unknown else right)
        assert here.kernel.resident_bytes(KEY) == 6 * 65536


async def test_readers_of_one_chunk_share_one_fetch(scene):
    """Sixty-four readers, every chunk fetched once, nothing written twice."""
    async with opened(scene([65536] * 64, Compressor.NONE)) as here:
        reads = [here.kernel.read(KEY, i * 65536, i * 65536 + 65536) for i in range(64)]
        for index, data in enumerate(await asyncio.gather(*reads)):
            assert data == here.remote.content[index * 65536 : (index + 1) * 65536]
        fetched = sorted(byte for start, end, _ in here.source.asked for byte in (start, end))
        assert sum(end - start for start, end, _ in here.source.asked) == 64 * 65536, fetched
        assert here.kernel.rewritten_bytes == 0


async def test_a_reader_wakes_before_its_window_has_come(scene):
    """The source stops after the first chunk: its reader has its bytes all the same."""
    async with opened(scene([65536] * 16, Compressor.NONE)) as here:
        reader = asyncio.create_task(here.kernel.read(KEY, 0, 4096))
        original = here.source.gate.wait
        pieces = 0

        async def stop_after_one() -> bool:
            nonlocal pieces
            pieces += 1
            if pieces > 1:
                here.source.gate.clear()
            return await original()

        here.source.gate.wait = stop_after_one  # type: ignore[method-assign]
        assert await asyncio.wait_for(reader, 10) == here.remote.content[:4096]
        here.source.gate.set()


async def test_wrong_bytes_are_fetched_again_and_never_written(scene, caplog):
    """A flipped bit at the source costs one more request, and the reader never sees it."""
    async with opened(scene([65536] * 4, Compressor.NONE)) as here:
        here.source.flip_once = 70_000
        data = await here.kernel.read(KEY, 65536, 131072)
        assert data == here.remote.content[65536:131072]
        await settled(here.objects)
        assert here.objects.tallies[KEY].bad_chunks == 1
        assert "digest" in caplog.text


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.ZSTD])
async def test_bytes_that_stay_wrong_are_eio(scene, compressor, caplog):
    """Two tries, then EIO; the neighbours in the window are served."""
    async with opened(scene([65536] * 4, compressor)) as here:
        here.source.file[here.remote.chunks.remote_offset(1) + 20] ^= 1
        with pytest.raises(OSError) as error:
            await here.kernel.read(KEY, 65536, 131072, asks=4)
        assert error.value.errno == errno.EIO
        assert here.objects.tallies[KEY].bad_chunks == 2
        assert caplog.text.count("chunk 1") == 2
        assert await here.kernel.read(KEY, 0, 65536) == here.remote.content[:65536]


async def test_a_failed_read_fails_within_one_deadline(scene, caplog):
    """The kernel asks four times for a page of a mapping: only the first waits for the source."""
    async with opened(scene([65536] * 4, deadline_s=0.5, refusal_s=5.0)) as here:
        here.source.gate.clear()
        began = asyncio.get_running_loop().time()
        with pytest.raises(OSError):
            await here.kernel.read(KEY, 0, 4096, asks=4)
        assert asyncio.get_running_loop().time() - began < 2 * 0.5
        assert len(here.source.asked) == 1


async def test_a_slow_source_is_waited_for_chunk_by_chunk(scene, caplog):
    """A window that takes longer than the deadline of a chunk costs nobody an EIO."""
    async with opened(scene([65536] * 16, Compressor.NONE, deadline_s=1.0)) as here:
        original = here.source.gate.wait

        async def drip() -> bool:
            await asyncio.sleep(0.08)
            return await original()

        here.source.gate.wait = drip  # type: ignore[method-assign]
        for index in range(16):
            at = index * 65536
            assert await here.kernel.read(KEY, at, at + 65536) == here.remote.content[at:][:65536]
        assert here.objects.tallies[KEY].source_errors > 0


async def test_learning_and_fetching_share_one_deadline(scene, caplog):
    """A chunk map that comes late leaves its reader only the rest of the time."""
    here = scene([65536] * 4, deadline_s=1.0, refusal_s=5.0)
    original = here.chunks

    async def late():
        await asyncio.sleep(0.7)
        return await original()

    here.chunks = late
    here.source.gate.clear()
    async with opened(here):
        began = asyncio.get_running_loop().time()
        with pytest.raises(OSError):
            await here.kernel.read(KEY, 0, 4096, asks=4)
        assert 0.7 < asyncio.get_running_loop().time() - began < 1.65


async def test_a_source_that_returns_is_used_again(scene, caplog):
    """No object is dead for good because a registry was down for a minute."""
    async with opened(scene([65536] * 4, refusal_s=0.0)) as here:
        here.source.break_after_bytes = 0
        with pytest.raises(OSError):
            await here.kernel.read(KEY, 0, 4096)
        here.source.break_after_bytes = None
        assert await here.kernel.read(KEY, 0, 4096) == here.remote.content[:4096]


async def test_a_missing_chunk_map_fails_only_who_waits(scene, caplog):
    """The blob's tail cannot be fetched, later it can."""
    async with opened(scene([65536] * 4, refusal_s=0.0)) as here:
        for error in (SourceError("registry is down", Fault.NETWORK), ImageError("a bit flipped")):
            here.chunks_error = error
            with pytest.raises(OSError):
                await here.kernel.read(KEY, 0, 4096)
        assert "a bit flipped" in caplog.text
        here.chunks_error = None
        assert await here.kernel.read(KEY, 0, 4096) == here.remote.content[:4096]


async def test_a_full_disk_fails_reads_and_recovers(scene, caplog):
    """Resident data is unaffected; after space is freed reads work without a restart."""
    async with opened(scene([65536] * 32, Compressor.NONE, refusal_s=0.0)) as here:
        await here.kernel.read(KEY, 0, 4096)
        await settled(here.objects)
        here.kernel.floor_bytes = here.kernel.free_bytes
        with pytest.raises(OSError):
            await here.kernel.read(KEY, 31 * 65536, 32 * 65536)
        assert await here.kernel.read(KEY, 0, 4096) == here.remote.content[:4096]
        here.kernel.floor_bytes = 0
        data = await here.kernel.read(KEY, 31 * 65536, 32 * 65536)
        assert data == here.remote.content[31 * 65536 :]


async def test_deadlines_fire_while_a_writer_is_stuck(scene, caplog):
    """A frozen cache file system does not hang the reader."""
    async with opened(scene([65536] * 4, deadline_s=0.2)) as here:
        here.kernel.freeze()
        try:
            with pytest.raises(OSError):
                await asyncio.wait_for(here.kernel.read(KEY, 0, 4096), 5)
        finally:
            here.kernel.thaw()
        await settled(here.objects)


async def test_a_successor_fetches_nothing_that_is_resident(scene):
    """After `kill -9` in the middle of reads: right bytes, nothing written twice."""
    async with opened(scene([65536] * 64, Compressor.NONE)) as here:
        await here.kernel.read(KEY, 0, 16 * 65536)
        await settled(here.objects)
        before = here.kernel.resident_bytes(KEY)
        here.source.gate.clear()
        reader = asyncio.create_task(here.kernel.read(KEY, 0, 64 * 65536))
        await until(lambda: here.kernel.unanswered)
        here.replace_daemon()
        here.source.asked.clear()
        here.source.gate.set()
        assert await reader == here.remote.content
        assert sum(end - start for start, end, _ in here.source.asked) == 64 * 65536 - before
        assert here.kernel.rewritten_bytes == 0


async def test_a_killed_reader_leaves_nothing_behind(scene):
    """Its chunk lands, its ticket is nobody's."""
    async with opened(scene([65536] * 4)) as here:
        here.source.gate.clear()
        reader = asyncio.create_task(here.kernel.read(KEY, 0, 4096))
        await until(lambda: here.objects.waiting)
        reader.cancel()
        here.source.gate.set()
        assert await here.kernel.read(KEY, 0, 4096) == here.remote.content[:4096]
        await settled(here.objects)
        assert here.objects.waiting == 0


async def test_an_unknown_key_fails_the_mount_with_a_line(scene, caplog):
    """ENOENT at once, and the log says what to do."""
    here = scene([4096])
    try:
        with pytest.raises(FileNotFoundError):
            await here.kernel.open(ObjectKey("domain", "stranger"))
        assert "stranger" in caplog.text and "fscached mount" in caplog.text
    finally:
        here.close()


async def test_a_bug_of_ours_fails_the_reader_instead_of_hanging_it(scene, caplog):
    """Whatever raises inside, the READ is answered."""
    async with opened(scene([65536] * 4)) as here:
        here.objects._open[here.kernel.object_id(KEY)].wanted = None  # type: ignore[assignment]
        with pytest.raises(OSError):
            await asyncio.wait_for(here.kernel.read(KEY, 0, 4096), 5)
        assert caplog.records[-1].levelno == logging.ERROR


async def test_a_bug_while_learning_fails_who_waits(scene, caplog):
    """No deadline of a chunk is there yet to end their waiting."""
    async with opened(scene([65536] * 4)) as here:
        here.chunks_error = RuntimeError("a bug")
        with pytest.raises(OSError):
            await asyncio.wait_for(here.kernel.read(KEY, 0, 4096), 5)
        assert "a bug of ours" in caplog.text


async def test_a_read_of_an_unknown_object_is_answered(scene, caplog):
    """nydusd leaves such a reader hanging."""
    here = scene([4096])
    answered = []
    here.kernel.failed = lambda *arguments: answered.append(arguments)  # type: ignore[method-assign]
    here.objects.handle(Wanted(ObjectId(77), 0, 4096, Ticket(5)))
    assert answered == [(77, 5, errno.EIO)]
    here.close()


async def test_prefetch_brings_what_nobody_asked_for(scene):
    """All of the blob is resident in the end, fetched once, demand included."""
    async with opened(scene([65536] * 64, Compressor.NONE)) as here:
        await here.kernel.read(KEY, 5 * 65536, 5 * 65536 + 1)
        (blob,) = here.objects.blobs("domain").values()
        while fetch := blob.take(0, 1 << 40, 4 * MIB):
            await blob.prefetch(fetch, 60.0)
        await settled(here.objects)
        assert here.kernel.content(KEY) == here.remote.content
        assert here.kernel.rewritten_bytes == 0
        assert blob.blob.complete


async def test_a_reader_joins_a_prefetch_that_is_on_its_way(scene):
    """What it waits for comes once; when the prefetch stalls, what it wants comes by itself."""
    async with opened(scene([65536] * 16, Compressor.NONE)) as here:
        (blob,) = here.objects.blobs("domain").values()
        here.kernel.settle(KEY)
        await blob.learn()
        fetch = blob.take(0, 1 << 40, 4 * MIB)
        assert fetch is not None
        prefetch = asyncio.create_task(blob.prefetch(fetch, 60.0))
        await until(lambda: here.source.given_bytes >= 65536)
        here.source.gate.clear()
        joined = asyncio.create_task(here.kernel.read(KEY, 14 * 65536, 15 * 65536))
        await until(lambda: blob.waiting)
        assert len(here.source.asked) == 1
        await until(lambda: len(here.source.asked) == 2)
        assert here.source.asked[1] == (14 * 65536, 16 * 65536, Priority.DEMAND)
        here.source.gate.set()
        assert await joined == here.remote.content[14 * 65536 :][:65536]
        assert await prefetch is Brought.OVERTAKEN
        while fetch := blob.take(0, 1 << 40, 4 * MIB):
            assert await blob.prefetch(fetch, 60.0) is Brought.ALL
        assert here.kernel.content(KEY) == here.remote.content
        assert here.kernel.rewritten_bytes == 0


async def test_whoever_prefetches_can_be_cancelled_while_readers_take_over(scene):
    """The end of a daemon and the end of its prefetch at once: neither is taken for the other."""
    async with opened(scene([65536] * 8, Compressor.NONE)) as here:
        (blob,) = here.objects.blobs("domain").values()
        here.kernel.settle(KEY)
        await blob.learn()
        here.source.gate.clear()
        fetch = blob.take(0, 1 << 40, 4 * MIB)
        assert fetch is not None
        prefetch = asyncio.create_task(blob.prefetch(fetch, 60.0))
        await until(lambda: here.source.asked)
        blob._forecast.stop(fetch.number)
        prefetch.cancel()
        await asyncio.wait([prefetch])
        assert prefetch.cancelled()
        here.source.gate.set()


async def test_a_reader_takes_over_from_a_prefetch_that_stands_still(scene):
    """It is served by a window of its own, and what nobody brought is there to be taken."""
    async with opened(scene([65536] * 8, Compressor.NONE, window_bytes=131072)) as here:
        (blob,) = here.objects.blobs("domain").values()
        here.kernel.settle(KEY)
        await blob.learn()
        read = here.source.read

        async def prefetch_stands_still(blob_id, start, end, priority, feed, deadline_s):
            if priority is Priority.PREFETCH:
                here.source.asked.append((start, end, priority))
                await asyncio.Event().wait()
            return await read(blob_id, start, end, priority, feed, deadline_s)

        here.source.read = prefetch_stands_still  # type: ignore[method-assign]
        fetch = blob.take(0, 1 << 40, 4 * MIB)
        assert fetch is not None
        prefetch = asyncio.create_task(blob.prefetch(fetch, 60.0))
        await until(lambda: here.source.asked)
        for index in (3, 3, 6):
            at = index * 65536
            assert await here.kernel.read(KEY, at, at + 65536) == here.remote.content[at:][:65536]
        assert await prefetch is Brought.OVERTAKEN
        await settled(here.objects)
        demanded = [asked[:2] for asked in here.source.asked if asked[2] is Priority.DEMAND]
        assert demanded == [(at * 65536, (at + 2) * 65536) for at in (3, 6)]
        here.source.read = read  # type: ignore[method-assign]
        while fetch := blob.take(0, 1 << 40, 4 * MIB):
            assert await blob.prefetch(fetch, 60.0) is Brought.ALL
        assert here.kernel.content(KEY) == here.remote.content
        assert here.kernel.rewritten_bytes == 0

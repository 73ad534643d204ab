"""Chunks that the disk has spoiled come again, whoever reads meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from fscached.source import Fault, SourceError
from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, settled, until
from tests.fill.test_objects import opened

pytestmark = pytest.mark.asyncio

CHUNK = 65_536


def spoil(here, index: int) -> None:
    """What bit rot does."""
    data = here.kernel.cache_files[KEY].data
    data[index * CHUNK] ^= 1


async def test_a_spoiled_chunk_is_fetched_again(scene):
    """It alone; its neighbours stay as they are, and nothing is asked of what is absent."""
    async with opened(scene([CHUNK] * 64, Compressor.NONE)) as here:
        await here.kernel.read(KEY, 0, 16 * CHUNK)
        await settled(here.objects)
        spoil(here, 3)
        assert await here.objects.renew(KEY, [3 * CHUNK, 40 * CHUNK]) == 1
        assert here.source.asked[1:] == [(3 * CHUNK, 4 * CHUNK, here.source.asked[-1][2])]
        assert await here.kernel.read(KEY, 0, 16 * CHUNK) == here.remote.content[: 16 * CHUNK]
        assert here.kernel.rewritten_bytes == 0
        assert here.objects.blobs(KEY.volume)[KEY.cookie].blob.resident_bytes == 16 * CHUNK


async def test_readers_wait_for_it(scene):
    """From the moment it is known to be wrong: nobody gets the old bytes, nobody an error."""
    async with opened(scene([CHUNK] * 4, Compressor.NONE)) as here:
        await here.kernel.read(KEY, 0, 4 * CHUNK)
        await settled(here.objects)
        spoil(here, 2)
        here.source.gate.clear()
        renewing = asyncio.create_task(here.objects.renew(KEY, [2 * CHUNK]))
        await until(lambda: len(here.source.asked) == 2)
        reading = asyncio.create_task(here.kernel.read(KEY, 2 * CHUNK, 3 * CHUNK))
        await until(lambda: here.objects.waiting)
        here.source.gate.set()
        assert await renewing == 1
        assert await reading == here.remote.content[2 * CHUNK : 3 * CHUNK]


async def test_what_does_not_come_is_absent(scene, caplog):
    """A source that is away costs the chunk, not the blob; later it is fetched as any."""
    async with opened(scene([CHUNK] * 4, Compressor.NONE, refusal_s=0)) as here:
        await here.kernel.read(KEY, 0, 4 * CHUNK)
        await settled(here.objects)
        spoil(here, 1)
        here.source.error = SourceError("memory: away", Fault.NETWORK)
        with pytest.raises(SourceError, match="away"):
            await here.objects.renew(KEY, [CHUNK])
        assert here.kernel.resident_bytes(KEY) == 3 * CHUNK
        here.source.error = None
        assert await here.kernel.read(KEY, 0, 4 * CHUNK) == here.remote.content


async def test_nothing_is_open_of_an_unknown_blob(scene):
    """Whoever asks has another way for it."""
    async with opened(scene([CHUNK])) as here:
        assert await here.objects.renew(KEY._replace(cookie="other"), [0]) is None


async def test_a_blob_that_nobody_has_read_yet_is_looked_at_first(scene):
    """Its chunks are learnt, as for a READ."""
    async with opened(scene([CHUNK] * 4, Compressor.NONE)) as here:
        await here.kernel.read(KEY, 0, 4 * CHUNK)
        await settled(here.objects)
        here.replace_daemon()
        spoil(here, 0)
        here.kernel.cache_files[KEY].resident.discard(17)
        reading = asyncio.create_task(here.kernel.read(KEY, CHUNK, 2 * CHUNK))
        await until(lambda: here.objects.blobs(KEY.volume))
        assert await here.objects.renew(KEY, [0]) == 1
        await reading
        assert await here.kernel.read(KEY, 0, 4 * CHUNK) == here.remote.content

"""Whole blobs in the background, and pauses instead of failures."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from fscached.prefetch import service as module
from fscached.prefetch.service import Plan, Service
from fscached.source import Priority
from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, MIB, Scene, scene  # noqa: F401

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def prefetching(here: Scene):
    """The scene with a prefetch service that begins with every opened blob."""
    service = Service(Plan(range_bytes=MIB, deadline_s=60.0, concurrency=2))
    here.objects.on_blob = lambda key, blob: service.begin(blob)
    try:
        await here.kernel.open(KEY)
        yield service
    finally:
        await service.close()
        here.close()


async def complete(here: Scene) -> None:
    """The whole blob is resident; the test's own time limit bounds it."""
    while here.kernel.resident_bytes(KEY) < len(here.remote.content):  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_a_blob_is_brought_without_a_reader(scene):  # noqa: F811
    """Nobody reads; the kernel answers for the file only after a while; all of it comes, once."""
    here = scene([65536] * 64, Compressor.NONE)
    async with prefetching(here):
        await complete(here)
        assert here.kernel.content(KEY) == here.remote.content
        assert {priority for _, _, priority in here.source.asked} == {Priority.PREFETCH}
        assert sum(end - start for start, end, _ in here.source.asked) == 64 * 65536
    assert here.kernel.asked == []


async def test_a_source_that_fails_is_tried_again(scene, monkeypatch, caplog):  # noqa: F811
    """A registry that is down for a moment costs a pause and a line."""
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.01)
    here = scene([65536] * 8, Compressor.NONE)
    here.source.break_after_bytes = 0
    async with prefetching(here):
        while "pauses" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        here.source.break_after_bytes = None
        await complete(here)


async def test_a_closed_blob_is_left_alone(scene):  # noqa: F811
    """After CLOSE nothing is fetched any more."""
    here = scene([65536] * 64, Compressor.NONE)
    async with prefetching(here):
        here.source.gate.clear()
        while not here.source.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        here.kernel.umount(KEY)
        while here.objects.tally.closes == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        asked = len(here.source.asked)
        here.source.gate.set()
        await asyncio.sleep(0)
        assert len(here.source.asked) == asked


async def test_readers_are_right_while_prefetch_runs(scene):  # noqa: F811
    """Demand and prefetch bring the same blob together, and every byte is right."""
    here = scene([50_000] * 80)
    async with prefetching(here):
        reads = [
            here.kernel.read(KEY, start, start + 4096)
            for start in range(0, len(here.remote.content), 7 * 4096)
            if start + 4096 <= len(here.remote.content)
        ]
        for index, data in enumerate(await asyncio.gather(*reads)):
            assert data == here.remote.content[index * 7 * 4096 : index * 7 * 4096 + 4096]
        await complete(here)
        assert here.kernel.content(KEY) == here.remote.content
        assert here.kernel.rewritten_bytes == 0

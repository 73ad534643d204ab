"""A bounded pool of aligned memory, demand first."""

from __future__ import annotations

import asyncio
import weakref

import pytest

from fscached.fill.memory import GRAIN_BYTES, KEEP_BYTES, Pool

pytestmark = pytest.mark.asyncio


async def turn() -> None:
    """Let everything that can run, run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_buffers_are_reused():
    """What is given back is handed out again."""
    pool = Pool(4 * GRAIN_BYTES)
    first = await pool.take(100, True)
    pool.give(first)
    assert await pool.take(GRAIN_BYTES, True) is first


async def test_what_is_over_goes_when_its_last_view_does():
    """The traceback of a write that failed holds views of what it could not write."""
    pool = Pool(4 * KEEP_BYTES)
    buffer = await pool.take(KEEP_BYTES + GRAIN_BYTES, True)
    view = memoryview(buffer)
    pool.give(buffer)
    view[0] = 1
    assert await pool.take(KEEP_BYTES + GRAIN_BYTES, True) is not buffer


async def test_the_limit_makes_takers_wait_demand_first():
    """A prefetch that asked earlier is served after a demand."""
    pool = Pool(2 * GRAIN_BYTES)
    held = [await pool.take(GRAIN_BYTES, True) for _ in range(2)]
    order: list[str] = []

    async def take(name: str, demand: bool) -> None:
        buffer = await pool.take(GRAIN_BYTES, demand)
        order.append(name)
        pool.give(buffer)

    waiting = [asyncio.create_task(take("prefetch", False))]
    await turn()
    waiting.append(asyncio.create_task(take("demand", True)))
    await turn()
    assert order == []
    pool.give(held[0])
    await asyncio.gather(*waiting)
    assert order == ["demand", "prefetch"]


async def test_a_buffer_larger_than_the_pool_is_given_alone():
    """A chunk that is larger than the pool is no deadlock."""
    pool = Pool(GRAIN_BYTES)
    small = await pool.take(1, True)
    large = asyncio.create_task(pool.take(5 * GRAIN_BYTES, True))
    await turn()
    assert not large.done()
    pool.give(small)
    assert len(await large) >= 5 * GRAIN_BYTES


async def test_a_taker_that_gives_up_leaves_its_place():
    """Cancelled before or after its turn has come, the memory is not lost."""
    pool = Pool(GRAIN_BYTES)
    held = await pool.take(1, True)
    waiting = [asyncio.create_task(pool.take(1, True)) for _ in range(2)]
    await turn()
    waiting[0].cancel()
    await turn()
    pool.give(held)
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert len(await asyncio.wait_for(pool.take(1, True), 5)) == GRAIN_BYTES


async def test_idle_memory_is_bounded():
    """What is over KEEP_BYTES goes back to the kernel."""
    pool = Pool(4 * KEEP_BYTES)
    buffers = [await pool.take(KEEP_BYTES, True) for _ in range(3)]
    mapped = [weakref.ref(buffer) for buffer in buffers]
    while buffers:
        pool.give(buffers.pop())
    assert [it() is not None for it in mapped] == [False, False, True]


async def test_what_is_given_back_fits_a_request_that_is_a_little_shorter():
    """No two windows have as many compressed bytes."""
    pool = Pool(64 * GRAIN_BYTES)
    first = await pool.take(15 * GRAIN_BYTES, True)
    pool.give(first)
    assert await pool.take(11 * GRAIN_BYTES + 5, True) is first

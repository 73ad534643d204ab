"""Who asked to be left alone is, by everybody."""

from __future__ import annotations

import asyncio

import pytest

from fscached.source import Priority
from fscached.source.exchange import Exchange
from fscached.source.origin import Traffic, Trust
from fscached.source.request import Request
from fscached.source.respite import ORIGINS_LIMIT, Respites
from fscached.source.transfer import Transfers
from tests.source.faulty import FaultyServer, answer

pytestmark = pytest.mark.asyncio


async def test_the_longest_wish_counts() -> None:
    """A shorter one does not end it, another origin is not meant, and an old one is forgotten."""
    respites, loop = Respites(), asyncio.get_running_loop()
    began = loop.time()
    respites.grant("http://a.org:80", 0.1)
    respites.grant("http://a.org:80", 0.01)
    respites.grant("http://b.org:80", 0)
    await respites.over("http://b.org/x")
    assert loop.time() - began < 0.1
    await respites.over("http://a.org/x")
    assert loop.time() - began >= 0.1


async def test_one_plane_speaks_for_both(server: FaultyServer, other_server: FaultyServer) -> None:
    """A 429 to the control plane keeps the data plane away, from that origin alone."""
    respites = Respites()
    exchange = Exchange(Trust(), connect_timeout_s=5, stall_timeout_s=5, respites=respites)
    transfers = Transfers(respites=respites)
    server.answers = [answer(429, {"Retry-After": "1"})]
    await exchange.send("GET", f"http://{server.host}/v2/", {}, Traffic(), limit_bytes=99)

    async def read(host: str) -> None:
        request = Request(f"http://{host}/blob", (), 0, 9, Priority.DEMAND, Trust())
        await transfers.get(request, lambda _: None, Traffic())

    waiting = asyncio.create_task(read(server.host))
    await read(other_server.host)
    assert not waiting.done() and len(server.seen) == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await transfers.close()
    await exchange.close()


async def test_who_waits_longest_goes_first() -> None:
    """Further tries go one after the other; an answer lets the next ones go at once."""
    respites, came = Respites(retries_s=1), list[int]()

    async def again(number: int) -> None:
        await respites.again("http://a.org:80")
        came.append(number)

    async with asyncio.timeout(20):
        waiting = [asyncio.create_task(again(number)) for number in range(7)]
        while len(came) < 7:
            await asyncio.sleep(0)
            respites.answered("http://a.org:80")
        assert came == list(range(7))
        await asyncio.gather(*waiting)


async def test_each_origin_has_its_own_budget() -> None:
    """One that fails keeps nobody away from another; those who give up leave their place."""
    respites = Respites(retries_s=0.1)
    for name in ("a", "b", "c"):
        await respites.again(name)
    waiting = [asyncio.create_task(respites.again("a")) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    waiting[1].cancel()
    respites.answered("a")
    async with asyncio.timeout(5):
        await waiting[2]


async def test_origins_without_end() -> None:
    """Redirects lead to as many hosts as somebody likes; what is remembered has a limit."""
    respites = Respites()
    for number in range(3 * ORIGINS_LIMIT):
        await respites.again(f"http://{number}")
    assert len(respites._queues) <= ORIGINS_LIMIT

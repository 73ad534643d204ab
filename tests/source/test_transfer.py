"""The curl lanes: both event loops, priorities, limits, closing."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
import trustme
import uvloop

from fscached.source import Fault, Priority, SourceError
from fscached.source.link import Link
from fscached.source.origin import Traffic, Trust
from fscached.source.request import Reply, Request
from fscached.source.transfer import Transfers
from tests.source.conftest import BLOB
from tests.source.faulty import FaultyServer, Seen, answer, faulty_server, late_part, part_head

MIB = 1 << 20


class Fetch:
    """One request under way; `came` holds what was fed."""

    def __init__(
        self,
        transfers: Transfers,
        host: str,
        start: int,
        end: int,
        priority: Priority = Priority.DEMAND,
        *,
        scheme: str = "http",
        trust: Trust = Trust(),  # noqa: B008
    ) -> None:
        self.came = bytearray()
        self.began = asyncio.Event()
        self.traffic = Traffic()
        request = Request(f"{scheme}://{host}/blob", (), start, end, priority, trust)
        self.task = asyncio.create_task(transfers.get(request, self._feed, self.traffic))

    def _feed(self, view: memoryview) -> None:
        self.came += view
        self.began.set()

    async def reply(self) -> Reply:
        return await self.task


@pytest_asyncio.fixture
async def transfers() -> AsyncIterator[Transfers]:
    """Three demand connections, two for prefetch; no link is fast."""
    slow = Link(float("inf"))
    transfers = Transfers(
        demand_connections=3, prefetch_connections=2, prefetch_quiet_s=0.001, link=slow
    )
    yield transfers
    await transfers.close()


async def read_on_this_loop() -> None:
    async with faulty_server(BLOB) as server:
        transfers = Transfers()
        fetches = [Fetch(transfers, server.host, at, at + MIB) for at in (0, MIB, 2 * MIB)]
        for fetch in fetches:
            assert (await fetch.reply()).fault is None
        assert b"".join(fetch.came for fetch in fetches) == BLOB
        assert (await Fetch(transfers, server.host, 0, 9).reply()).fed_bytes == 9
        await transfers.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_event_loops(new_loop: type[asyncio.AbstractEventLoop]) -> None:
    """Ranges arrive whole on the standard library's event loop and on uvloop."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(read_on_this_loop())


@pytest.mark.asyncio
async def test_connections_are_kept(transfers: Transfers, server: FaultyServer) -> None:
    """Requests in a row use one connection."""
    connections: set[object] = set()
    serve = server.default

    async def watched(seen: Seen, writer: asyncio.StreamWriter) -> None:
        connections.add(writer.get_extra_info("peername"))
        await serve(seen, writer)

    server.default = watched
    for _ in range(5):
        await Fetch(transfers, server.host, 0, MIB).reply()
    assert len(connections) == 1
    assert server.seen[0].headers["accept-encoding"] == "identity"


@pytest.mark.asyncio
async def test_limit_of_connections(transfers: Transfers, server: FaultyServer) -> None:
    """No more requests than connections are under way; the others take turns."""
    now, most = 0, 0
    serve = server.default

    async def counted(seen: Seen, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        await serve(seen, writer)

    server.default = counted
    fetches = [Fetch(transfers, server.host, at, at + 9) for at in range(20)]
    for fetch in fetches:
        await fetch.reply()
    assert 1 < most <= 3 and len(server.seen) == 20


@pytest.mark.asyncio
async def test_prefetch_stands_still_under_demand(
    transfers: Transfers, server: FaultyServer, other_server: FaultyServer
) -> None:
    """While a demand read waits, a prefetch under way takes no byte, and goes on afterwards."""
    rest, last = asyncio.Event(), asyncio.Event()

    async def two_halves(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(part_head(0, len(BLOB), len(BLOB)) + BLOB[:1000])
        await rest.wait()
        writer.write(BLOB[1000:])

    server.default = two_halves
    prefetch = Fetch(transfers, server.host, 0, len(BLOB), Priority.PREFETCH)
    await prefetch.began.wait()
    other_server.answers = [late_part(BLOB, last)]
    waiting = Fetch(transfers, other_server.host, 0, 9)
    await asyncio.sleep(0)
    rest.set()
    for _ in range(50):  # time enough for a prefetch that did not stand still
        await Fetch(transfers, other_server.host, 0, MIB).reply()
    assert len(prefetch.came) == 1000
    last.set()
    await waiting.reply()
    assert (await prefetch.reply()).fault is None
    assert prefetch.came == BLOB


@pytest.mark.asyncio
async def test_on_a_fast_link_prefetch_gets_something_under_constant_demand(
    server: FaultyServer, other_server: FaultyServer
) -> None:
    """Somebody always waits; once the link is known to be fast, prefetch goes on beside it."""
    transfers = Transfers(demand_connections=3, link=Link(1.0))
    last = asyncio.Event()
    other_server.answers = [late_part(BLOB, last)]
    waiting = Fetch(transfers, other_server.host, 0, 9)
    await asyncio.sleep(0)
    prefetch = Fetch(transfers, server.host, 0, len(BLOB), Priority.PREFETCH)
    for _ in range(3):
        await Fetch(transfers, other_server.host, 0, MIB).reply()
        assert transfers.readers_alone
    assert server.seen == []
    await Fetch(transfers, other_server.host, 0, MIB).reply()
    assert (await prefetch.reply()).fault is None
    assert prefetch.came == BLOB and not waiting.task.done()
    last.set()
    await waiting.reply()
    await transfers.close()


@pytest.mark.asyncio
async def test_what_is_expected_comes_beside_demand_on_any_link(
    transfers: Transfers, server: FaultyServer, other_server: FaultyServer
) -> None:
    """A reader waits all the time, and prefetch for it: neither holds up what is expected."""
    last = asyncio.Event()
    other_server.answers = [late_part(BLOB, last)]
    waiting = Fetch(transfers, other_server.host, 0, 9)
    await asyncio.sleep(0)
    queued = [Fetch(transfers, server.host, 0, 9, Priority.PREFETCH) for _ in range(3)]
    expected = Fetch(transfers, server.host, 0, len(BLOB), Priority.EXPECTED)
    assert (await expected.reply()).fault is None
    assert expected.came == BLOB
    assert transfers.readers_alone
    assert not any(fetch.task.done() for fetch in (waiting, *queued))
    last.set()
    for fetch in (waiting, *queued):
        assert (await fetch.reply()).fault is None


@pytest.mark.asyncio
async def test_a_link_that_becomes_slow_is_the_readers_alone_again(server: FaultyServer) -> None:
    """One slow read is enough."""
    link = Link(1.0)
    transfers = Transfers(link=link, prefetch_quiet_s=60.0)
    for _ in range(4):
        await Fetch(transfers, server.host, 0, MIB).reply()
        link.brought(MIB, 0.001)
    assert not transfers.readers_alone and link.fast
    link.brought(MIB, 2 * MIB)
    await Fetch(transfers, server.host, 0, 9).reply()
    assert transfers.readers_alone
    await transfers.close()


@pytest.mark.asyncio
async def test_only_what_nobody_waits_for_has_a_narrow_window(server: FaultyServer) -> None:
    """A demand read over a long link would be as slow as its window is small."""
    limits = {"prefetch_window_bytes": 64 << 10, "prefetch_window_limit_bytes": 64 << 10}
    transfers = Transfers(prefetch_connections=2, prefetch_quiet_s=0.001, **limits)
    before = set(_receive_buffers(server.host))
    windows = {}
    for priority in Priority:
        assert (await Fetch(transfers, server.host, 0, MIB, priority).reply()).fault is None
        now = _receive_buffers(server.host)
        [new] = set(now) - before
        windows[priority], before = now[new], set(now)
    await transfers.close()
    # The kernel doubles what it is told (socket(7)).
    assert windows[Priority.PREFETCH] == windows[Priority.EXPECTED] == 64 << 10
    assert windows[Priority.DEMAND] > 64 << 10


@pytest.mark.asyncio
async def test_a_new_connection_begins_with_the_window_that_the_last_one_had(
    server: FaultyServer,
) -> None:
    """A transfer that is given up takes its connection along, and not what it has found out."""
    limits = {"prefetch_window_bytes": 32 << 10, "prefetch_window_limit_bytes": 1 << 20}
    transfers = Transfers(prefetch_connections=1, **limits)
    before = set(_receive_buffers(server.host))
    for _ in range(3):
        await Fetch(transfers, server.host, 0, len(BLOB), Priority.EXPECTED).reply()
    [(grown, size_bytes)] = set(_receive_buffers(server.host).items())
    assert grown not in before and size_bytes > 4 * 64 << 10
    never = asyncio.Event()

    async def half(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(part_head(0, len(BLOB), len(BLOB)) + BLOB[:1000])
        await never.wait()

    server.answers = [half]
    given_up = Fetch(transfers, server.host, 0, len(BLOB), Priority.EXPECTED)
    await given_up.began.wait()
    given_up.task.cancel()
    await asyncio.wait([given_up.task])
    again = Fetch(transfers, server.host, 0, len(BLOB), Priority.EXPECTED)
    await again.began.wait()
    [(new, begun_bytes)] = set(_receive_buffers(server.host).items())
    assert new != grown and begun_bytes >= size_bytes / 2
    await again.reply()
    never.set()
    await transfers.close()


def _receive_buffers(host: str) -> dict[int, int]:
    """Of our connections to a server, by their local ports."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.getpeername() == ("127.0.0.1", int(host.rpartition(":")[2])):
                    size = connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
                    found[connection.getsockname()[1]] = size
    return found


@pytest.mark.asyncio
async def test_prefetch_does_not_begin_under_demand(
    transfers: Transfers, server: FaultyServer, other_server: FaultyServer
) -> None:
    """A prefetch that comes while a demand read waits sends its request after it."""
    last = asyncio.Event()
    server.answers = [late_part(BLOB, last)]
    waiting = Fetch(transfers, server.host, 0, 9)
    prefetch = Fetch(transfers, other_server.host, 0, 9, Priority.PREFETCH)
    for _ in range(5):
        await Fetch(transfers, server.host, 0, 9).reply()
    assert other_server.seen == []
    last.set()
    await waiting.reply()
    assert (await prefetch.reply()).fed_bytes == 9


@pytest.mark.asyncio
async def test_prefetch_that_waits_for_its_answer_is_held(
    transfers: Transfers, server: FaultyServer, other_server: FaultyServer
) -> None:
    """A prefetch is held in every state: connecting, asked, before its answer; it loses nothing."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def late(seen: Seen, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await go.wait()
        writer.write(part_head(*seen.range, len(BLOB)) + BLOB[slice(*seen.range)])

    server.default = late
    asking = Fetch(transfers, server.host, 0, MIB, Priority.PREFETCH)
    await asked.wait()
    connecting = Fetch(transfers, server.host, MIB, 2 * MIB, Priority.PREFETCH)
    await asyncio.sleep(0)
    waiting = Fetch(transfers, server.host, 0, 9)
    await asyncio.sleep(0)
    go.set()
    for _ in range(20):
        await Fetch(transfers, other_server.host, 0, 9).reply()
    await waiting.reply()
    assert (await asking.reply()).fault is (await connecting.reply()).fault is None
    assert asking.came + connecting.came == BLOB[: 2 * MIB]


@pytest.mark.asyncio
async def test_a_held_prefetch_has_not_stalled(
    server: FaultyServer, other_server: FaultyServer
) -> None:
    """The time a prefetch was told to wait does not count as silence of its server's."""
    transfers = Transfers(stall_timeout_s=0.1, prefetch_quiet_s=0.001)
    rest = asyncio.Event()

    async def two_halves(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(part_head(0, MIB, len(BLOB)) + BLOB[:1000])
        await rest.wait()
        writer.write(BLOB[1000:MIB])

    async def silent(_: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server.default = two_halves
    prefetch = Fetch(transfers, server.host, 0, MIB, Priority.PREFETCH)
    await prefetch.began.wait()
    for _ in range(2):
        other_server.answers = [silent]
        stalled = await Fetch(transfers, other_server.host, 0, 9).reply()
        assert stalled.fault is Fault.NETWORK and "no byte came" in stalled.reason
    rest.set()
    assert (await prefetch.reply()).fault is None
    await transfers.close()


@pytest.mark.asyncio
async def test_cancelling_a_waiting_prefetch(transfers: Transfers, server: FaultyServer) -> None:
    """A cancelled one leaves nothing behind: as many as there are connections still run."""
    asked = asyncio.Event()

    async def silent(_: Seen, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.Event().wait()

    server.answers = [silent]
    demand = Fetch(transfers, server.host, 0, 9)
    queued = [Fetch(transfers, server.host, 0, 9, Priority.PREFETCH) for _ in range(6)]
    await asked.wait()
    for fetch in (demand, *queued):
        fetch.task.cancel()
    await asyncio.gather(demand.task, *(fetch.task for fetch in queued), return_exceptions=True)
    fetches = [Fetch(transfers, server.host, 0, 9, Priority.PREFETCH) for _ in range(4)]
    for fetch in fetches:
        assert (await fetch.reply()).fed_bytes == 9


@pytest.mark.asyncio
async def test_closing_ends_what_is_under_way(server: FaultyServer) -> None:
    """Readers get an error at once, and so do those that come later."""
    transfers = Transfers(demand_connections=1)

    async def silent(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(part_head(0, 9, len(BLOB)) + b"x")
        await asyncio.Event().wait()

    server.default = silent
    running = Fetch(transfers, server.host, 0, 9)
    queued = Fetch(transfers, server.host, 0, 9)
    await running.began.wait()
    await transfers.close()
    assert (await running.reply()).fault is Fault.LOCAL
    with pytest.raises(SourceError, match="closing"):
        await queued.reply()


@pytest.mark.asyncio
async def test_a_long_refusal_is_cut(transfers: Transfers, server: FaultyServer) -> None:
    """The body of an error is drained for the connection's sake, but not without end."""
    server.answers = [answer(404, body=bytes(16 * MIB))]
    fetch = Fetch(transfers, server.host, 0, 9)
    reply = await fetch.reply()
    assert reply.status == 404 and reply.fault is None
    assert fetch.traffic.received_bytes < MIB and fetch.came == b""
    assert (await Fetch(transfers, server.host, 0, 9).reply()).fed_bytes == 9


@pytest.mark.asyncio
async def test_an_interim_answer(transfers: Transfers, server: FaultyServer) -> None:
    """A 103 before the answer is not the answer."""
    serve = server.default

    async def hinted(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nContent-Range: bytes 5-6/7\r\n\r\n")
        await serve(seen, writer)

    server.default = hinted
    fetch = Fetch(transfers, server.host, 3, MIB)
    assert (await fetch.reply()).fault is None
    assert fetch.came == BLOB[3:MIB]


@pytest.mark.asyncio
async def test_tls(transfers: Transfers, tmp_path: Path) -> None:
    """A server is believed by the authorities that are given, or by none with verify off."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    async with faulty_server(BLOB, context) as server:
        for trust, believed in (
            (Trust(ca_files=(str(tmp_path / "ca.pem"),)), True),
            (Trust(), False),
            (Trust(verify=False), True),
        ):
            fetch = Fetch(transfers, server.host, 0, MIB, scheme="https", trust=trust)
            reply = await fetch.reply()
            if believed:
                assert reply.fault is None and fetch.came == BLOB[:MIB]
            else:
                assert reply.fault is Fault.PROTOCOL and "certificate" in reply.reason

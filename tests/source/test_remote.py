"""Reads through peers: who is asked when, and that every byte is right whatever they do.

The peers are the stand-in for dfdaemon; the registry behind them counts what it is asked for.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import pytest_asyncio
import trustme

from fscached import config
from fscached.config import Config, Mirror, Proxy
from fscached.source import Answer, Fault, Giver, Priority, SourceError
from fscached.source.auth import Credential, Secret
from fscached.source.registries import Registries
from fscached.source.remote import Remote
from fscached.transport import ObjectKey
from rafs_v6 import codec
from rafs_v6.layout import Digest
from tests.source import docker_registry as registry_program
from tests.source.conftest import BLOB_ID, REPOSITORY
from tests.source.dfdaemon import PIECE_BYTES, Behaviour, Dfdaemon, Scheduler, behaviour_of
from tests.source.docker_registry import docker_registry
from tests.source.faulty import (
    FaultyServer,
    Seen,
    answer,
    broken_part,
    faulty_server,
    part_of,
    silence,
)
from tests.source.swarm_node import Reader, Task
from tests.source.token_server import TokenServer

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
LARGE = random.Random(12).randbytes(9 * MIB + 5)
PIECES = (0, PIECE_BYTES, 2 * PIECE_BYTES, len(LARGE))


class World:
    """A registry, peers before it, and the registries of one daemon of ours."""

    def __init__(self, origin: FaultyServer, stack: AsyncExitStack) -> None:
        self.origin = origin
        self.stall_timeout_s = 20.0
        self._stack = stack
        self._registries: Registries | None = None

    async def daemon(
        self,
        behaviour: Behaviour | None = None,
        certificate: Callable[[str], ssl.SSLContext] | None = None,
    ) -> Dfdaemon:
        daemon = Dfdaemon(behaviour, certificate=certificate)
        return await self._stack.enter_async_context(daemon.running())

    async def faulty(self, blob: bytes = LARGE) -> FaultyServer:
        return await self._stack.enter_async_context(faulty_server(blob))

    def mirror(self, host: str, **settings: object) -> Mirror:
        given: dict[str, object] = {"ping_interval_s": 300.0, "failure_limit": 3, "timeout_s": 60.0}
        return Mirror(host=f"http://{host}", **(given | settings))  # type: ignore[arg-type]

    def source(
        self,
        *mirrors: Mirror,
        proxy: Proxy | None = None,
        credential: Credential | None = None,
        host: str = "",
        repository: str = REPOSITORY,
        scheme: str = "http",
        sized: bool = True,
    ) -> Remote:
        if self._registries is None:
            settings = config.Source(
                retry_pause_s=0.01,
                retry_pause_limit_s=0.02,
                stall_timeout_s=self.stall_timeout_s,
                distrust_s=300,
            )
            self._registries = Registries(Config(source=settings))
            self._stack.push_async_callback(self._registries.close)
        return self._registries.source(
            host or self.origin.host,
            repository,
            credential,
            scheme,
            mirrors,
            proxy,
            sizes={BLOB_ID: len(LARGE)} if sized else {},
        )

    def asked(self) -> list[tuple[int, int]]:
        """The ranges the registry was asked for, by whomever, without those for a size."""
        ranges = [seen.range for seen in self.origin.seen]
        return [part for part in ranges if part != (0, 1)]

    def asked_by_us(self) -> list[Seen]:
        return [seen for seen in self.origin.seen if "x-dragonfly-registry" not in seen.headers]


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(faulty_server(LARGE))
        yield World(origin, stack)


async def read(
    source: Remote,
    start: int,
    end: int,
    *,
    blob_id: str = BLOB_ID,
    priority: Priority = Priority.DEMAND,
    deadline_s: float = 20,
) -> tuple[bytes, Answer]:
    got = bytearray()
    spent = await source.read(blob_id, start, end, priority, got.extend, deadline_s)
    return bytes(got), spent


async def right(source: Remote, start: int, end: int, deadline_s: float = 20) -> Answer:
    """Read a range of LARGE, and see that it is what it should be."""
    got, spent = await read(source, start, end, deadline_s=deadline_s)
    assert got == LARGE[start:end]
    assert sum(spent.given.values()) == end - start
    return spent


def by_peer(spent: Answer) -> int:
    """Bytes a dfdaemon gave. Whether it had the whole blob by then depends on its prefetch."""
    return spent.given[Giver.PEER] + spent.given[Giver.LOCAL_PEER]


async def test_a_mirror_gives_all(world: World) -> None:
    """The registry hears of it from the peer alone, each piece once, however small the reads; who
    gave the bytes is counted."""
    daemon = await world.daemon()
    source = world.source(world.mirror(daemon.proxy))
    spent = await right(source, MIB, 2 * MIB)
    assert spent.given == {Giver.PEER: MIB} and spent.requests == 1
    assert spent.source == f"http://{daemon.proxy}"
    for start in range(0, len(LARGE), MIB):
        spent = await right(source, start, min(start + MIB, len(LARGE)))
    (task,) = daemon.tasks.values()
    assert task.finished and spent.given == {Giver.LOCAL_PEER: len(LARGE) % MIB}
    assert world.asked_by_us() == []
    assert sorted(world.asked()) == list(pairwise(PIECES))
    assert source.traffic.given[Giver.ORIGIN] == 0


async def test_small_reads_are_asked_large(world: World) -> None:
    """Of a peer on this machine: what is wanted first, and over 4 MiB. One at the blob's end begins
    earlier, as does one of a blob whose size nobody told. What is there is asked for as it is."""
    daemon = await world.daemon()
    end = len(LARGE)
    for sized, wanted, asked in (
        (True, (MIB, 2 * MIB), (MIB, MIB + PIECE_BYTES + 1)),
        (True, (end - 100, end), (end - PIECE_BYTES - 1, end)),
        (True, (0, 6 * MIB), (0, 6 * MIB)),
        (False, (5 * MIB, 6 * MIB), (2 * MIB - 1, 6 * MIB)),
        (False, (0, MIB), (0, MIB)),
    ):
        source = world.source(world.mirror(daemon.proxy), sized=sized)
        await right(source, *wanted)
        assert daemon.seen[-1].headers["range"] == f"bytes={asked[0]}-{asked[1] - 1}"
        again = wanted[1] - 9, wanted[1]
        await right(source, *again)
        small = asked[1] - asked[0] > PIECE_BYTES
        assert (daemon.seen[-1].headers["range"] == f"bytes={again[0]}-{again[1] - 1}") or not small


async def test_two_nodes_ask_the_registry_once(world: World) -> None:
    """Small demand reads of the same blob, each through a peer of its own, at the same time."""
    scheduler = Scheduler()
    async with AsyncExitStack() as stack:
        daemons = [
            await stack.enter_async_context(Dfdaemon(None, scheduler).running()) for _ in range(3)
        ]
        sources = [world.source(world.mirror(daemon.proxy)) for daemon in daemons]
        for start in (5 * MIB, 0, len(LARGE) - MIB):
            await asyncio.gather(*(right(source, start, start + MIB) for source in sources))
        assert sorted(world.asked()) == list(pairwise(PIECES))


async def test_two_nodes_that_share_small_ranges(world: World) -> None:
    """Peers from v1.5.3 on do as they are told, for a blob of one piece too; what is wanted is all
    that is asked for."""
    scheduler, behaviour = Scheduler(), behaviour_of("1.5.3")
    async with AsyncExitStack() as stack:
        daemons = [
            await stack.enter_async_context(Dfdaemon(behaviour, scheduler).running())
            for _ in range(3)
        ]
        sources = [
            world.source(world.mirror(daemon.proxy, small_ranges=True)) for daemon in daemons
        ]
        await asyncio.gather(*(right(source, 5 * MIB, 6 * MIB) for source in sources))
        assert world.asked() == [PIECES[1:3]]


async def test_what_comes_behind_has_no_reader(world: World) -> None:
    """A read ends well though the peer breaks within what was asked for beyond it."""
    daemon = await world.daemon()
    daemon.faults.breaks_after_pieces = 1
    source = world.source(world.mirror(daemon.proxy, failure_limit=1))
    for _ in range(3):
        spent = await right(source, 0, MIB)
        assert by_peer(spent) == MIB and spent.requests == 1
    assert world.asked_by_us() == []


@pytest.mark.parametrize("version", ["1.3.10", "1.4.0", "1.5.1", "1.5.3"])
async def test_versions(world: World, version: str) -> None:
    """A 200 with a Content-Range is the range; bytes are right with every version."""
    daemon = await world.daemon(behaviour_of(version))
    source = world.source(world.mirror(daemon.proxy))
    for start, end in ((5 * MIB, 6 * MIB), (0, len(LARGE)), (len(LARGE) - 5, len(LARGE))):
        spent = await right(source, start, end)
        assert spent.given[Giver.ORIGIN] == 0


async def test_the_go_daemon(world: World) -> None:
    """It is asked for what is wanted and no more: each range is a task of its own."""
    daemon = await world.daemon(Behaviour(dialect="go", registry=f"http://{world.origin.host}"))
    source = world.source(world.mirror(daemon.proxy))
    await right(source, 0, MIB)
    spent = await right(source, 5 * MIB, 6 * MIB)
    assert spent.given == {Giver.PEER: MIB}
    assert daemon.seen[-1].headers["range"] == f"bytes={5 * MIB}-{6 * MIB - 1}"
    assert daemon.seen[-1].headers["x-dragonfly-filter"] == "Expires&Signature&ns"


async def test_one_mirror_after_the_other(world: World, unused_tcp_port: int) -> None:
    """The first that can is asked; the registry only when none can, or when all were asked."""
    daemon, plain = await world.daemon(), await world.faulty()
    dead, good = world.mirror(f"127.0.0.1:{unused_tcp_port}"), world.mirror(daemon.proxy)
    spent = await right(world.source(dead, good), 0, MIB)
    assert spent.given == {Giver.PEER: MIB}
    spent = await right(world.source(dead, world.mirror(plain.host)), 0, MIB)
    assert spent.given == {Giver.MIRROR: MIB}
    assert world.asked_by_us() == []
    spent = await right(world.source(dead), 0, MIB)
    assert spent.given == {Giver.ORIGIN: MIB} and len(world.asked_by_us()) == 1


async def test_a_plain_mirror(world: World) -> None:
    """It may not know the rest of the world: no login, and after its first answer no more than is
    wanted."""
    plain = await world.faulty()
    source = world.source(
        world.mirror(plain.host), credential=Credential("alice", Secret("open sesame"))
    )
    await right(source, 0, MIB)
    await right(source, MIB, 2 * MIB)
    assert plain.seen[1].range == (MIB, 2 * MIB)
    assert not any("authorization" in seen.headers for seen in plain.seen)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (500, {"x-dragonfly-error-type": "dfdaemon"}),
        (500, {"x-dragonfly-error-type": "proxy"}),
        (503, {}),
        (416, {"x-dragonfly-error-type": "dfdaemon"}),
    ],
)
async def test_a_mirror_that_fails_for_ever(
    world: World, status: int, headers: dict[str, str]
) -> None:
    """After its limit of failures it costs reads nothing more, unlike nydusd's."""
    bad = await world.faulty()
    bad.default = answer(status, headers)
    source = world.source(world.mirror(bad.host))
    for _ in range(6):
        assert (await right(source, 0, 9)).given == {Giver.ORIGIN: 9}
    assert len(bad.seen) == 3 and len(world.origin.seen) == 6


@pytest.mark.parametrize("kind", ["backend", "proxy", ""])
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_mirror_that_may_not(world: World, status: int, kind: str) -> None:
    """Its no is no fault of its own: it is not asked for this blob for a while, but for others."""
    bad = await world.faulty()
    bad.default = answer(status, {"x-dragonfly-error-type": kind} if kind else {})
    source = world.source(world.mirror(bad.host, failure_limit=1))
    for _ in range(3):
        assert (await right(source, 0, 9)).given == {Giver.ORIGIN: 9}
    assert len(bad.seen) == 1
    bad.default = part_of(LARGE)
    got, spent = await read(source, 0, 9, blob_id="6b" * 32)
    assert got == LARGE[:9] and spent.given == {Giver.MIRROR: 9}


async def test_a_mirror_over_its_limit(world: World) -> None:
    """Its own 429 keeps reads away for as long as it says, and is no failure."""
    bad = await world.faulty()
    headers = {"x-dragonfly-error-type": "proxy", "retry-after": "60"}
    bad.answers = [answer(429, headers)]
    source = world.source(world.mirror(bad.host, failure_limit=1))
    for _ in range(3):
        assert (await right(source, 0, 9)).given == {Giver.ORIGIN: 9}
    assert len(bad.seen) == 1


async def test_the_registrys_limit_through_a_mirror(world: World) -> None:
    """Retry-After passed on by a peer is the registry's: it is left alone, the peer is asked."""
    daemon = await world.daemon()
    daemon.faults.answers.append(
        (429, {"x-dragonfly-error-type": "backend", "retry-after": "60"}, b"")
    )
    source = world.source(world.mirror(daemon.proxy))
    with pytest.raises(SourceError, match="429"):
        await right(source, 0, 9, deadline_s=1)
    assert world.asked_by_us() == []
    assert (await right(source, 0, 9)).given == {Giver.PEER: 9}


@pytest.mark.parametrize("bad", ["silent", "hangs", "breaks", "reset", "short"])
async def test_what_a_peer_did_not_bring(world: World, bad: str) -> None:
    """What came before it stopped is kept, the rest is asked elsewhere, each byte once."""
    peer = await world.faulty()
    came = 2 * MIB
    if bad in ("silent", "hangs"):
        world.stall_timeout_s = 0.2
    peer.default = {
        "silent": silence(),
        "hangs": _hanging(came),
        "breaks": broken_part(LARGE, came),
        "reset": broken_part(LARGE, came, reset=True),
        "short": answer(
            206,
            {"Content-Range": f"bytes 0-{came - 1}/{len(LARGE)}", "Connection": "close"},
            LARGE[:came],
        ),
    }[bad]
    source = world.source(world.mirror(peer.host))
    spent = await right(source, 0, 6 * MIB)
    if bad in ("hangs", "breaks"):
        assert spent.given == {Giver.MIRROR: came, Giver.ORIGIN: 4 * MIB}
        assert world.asked() == [(came, 6 * MIB)]
    elif bad == "silent":
        assert spent.given == {Giver.ORIGIN: 6 * MIB}
    elif bad == "short":  # it gave a beginning, as a server may, and is asked on
        assert peer.seen[1].range[0] == came
    assert spent.received_bytes >= 6 * MIB


def _hanging(length: int):  # type: ignore[no-untyped-def]
    async def write(seen: Seen, writer: asyncio.StreamWriter) -> None:
        start, end = seen.range
        head = {"Content-Range": f"bytes {start}-{end - 1}/{len(LARGE)}"}
        head |= {"Content-Length": str(end - start)}
        text = "\r\n".join(["HTTP/1.1 206 X", *(f"{k}: {v}" for k, v in head.items()), "", ""])
        writer.write(text.encode() + LARGE[start : start + length])
        await writer.drain()
        await asyncio.Event().wait()

    return write


@pytest.mark.parametrize("aborts", [True, False])
async def test_a_dfdaemon_that_breaks_in_the_middle(world: World, aborts: bool) -> None:
    """Whether it resets the connection or sends too little: the registry has the rest."""
    daemon = await world.daemon(Behaviour(aborts=aborts))
    daemon.faults.breaks_after_pieces = 1
    source = world.source(world.mirror(daemon.proxy))
    spent = await right(source, 0, len(LARGE))
    assert spent.given[Giver.PEER] <= PIECE_BYTES
    assert spent.given[Giver.PEER] + spent.given[Giver.ORIGIN] == len(LARGE)
    assert len(world.asked_by_us()) == 1


async def test_a_dfdaemon_without_an_origin(world: World) -> None:
    """What it has it gives, though the registry is away; what it does not have fails in time."""
    daemon = await world.daemon()
    source = world.source(world.mirror(daemon.proxy))
    await right(source, 0, MIB)
    world.origin.default = answer(503)
    assert (await right(source, 2 * MIB, 4 * MIB)).given == {Giver.PEER: 2 * MIB}
    with pytest.raises(SourceError, match="503") as caught:
        await right(source, 8 * MIB, 9 * MIB, deadline_s=1)
    assert caught.value.fault is Fault.ORIGIN


async def test_a_peer_that_lies(world: World) -> None:
    """Its bytes are fetched again elsewhere, it is set aside for the image, and for all images when
    it lies about several."""
    daemon = await world.daemon()
    daemon.faults.lie = lambda _, data: bytes(len(data))
    sources = [
        world.source(world.mirror(daemon.proxy), repository=name) for name in ("a/a", "b/b", "c/c")
    ]
    for source in sources[:2]:
        got, _ = await read(source, 0, MIB)
        assert got == bytes(MIB)
        assert source.distrust(BLOB_ID, MIB - 9, MIB)
        spent = await right(source, 0, MIB)
        assert spent.given == {Giver.ORIGIN: MIB}
        assert not source.distrust(BLOB_ID, 0, MIB), "the registry's own bytes: nobody else to ask"
    before = len(daemon.seen)
    assert (await right(sources[2], 0, MIB)).given == {Giver.ORIGIN: MIB}
    assert len(daemon.seen) == before == 2


async def test_the_liar_of_two(world: World) -> None:
    """Of a read that two gave only he is set aside whose bytes were wrong."""
    first, second = await world.faulty(), await world.daemon()
    first.default = broken_part(bytes(len(LARGE)), MIB)
    source = world.source(world.mirror(first.host), world.mirror(second.proxy))
    got, spent = await read(source, 0, 2 * MIB)
    assert got == bytes(MIB) + LARGE[MIB : 2 * MIB]
    assert spent.given == {Giver.MIRROR: MIB, Giver.PEER: MIB}
    assert source.distrust(BLOB_ID, 0, MIB)
    assert by_peer(await right(source, 0, 2 * MIB)) == 2 * MIB


async def test_a_ping_brings_it_back(world: World) -> None:
    """A peer that was down is pinged, answers again, and is tried by one read."""
    peer = await world.faulty()
    peer.default = answer(503)
    pinged = asyncio.Event()

    async def alive(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.target == "/healthy":
            pinged.set()
            return await answer(401)(seen, writer)
        await part_of(LARGE)(seen, writer)

    mirror = world.mirror(
        peer.host,
        ping_url=f"http://{peer.host}/healthy",
        ping_interval_s=0.1,
        failure_limit=1,
    )
    source = world.source(mirror)
    for _ in range(3):
        await right(source, 0, 9)
    assert len(peer.seen) == 1
    peer.default = alive
    async with asyncio.timeout(20):
        await pinged.wait()
        while Giver.MIRROR not in (await right(source, 0, 9)).given:
            pass


async def test_a_proxy(world: World) -> None:
    """Asked for the registry's own address, with its login; the registry when it fails."""
    daemon = await world.daemon()
    challenged = answer(401, {"WWW-Authenticate": 'Basic realm="x"'})

    async def guarded(seen: Seen, writer: asyncio.StreamWriter) -> None:
        good = seen.headers.get("authorization", "").startswith("Basic ")
        await (part_of(LARGE) if good else challenged)(seen, writer)

    world.origin.default = guarded
    proxy = Proxy(url=f"http://{daemon.proxy}")
    source = world.source(proxy=proxy, credential=Credential("alice", Secret("x")))
    spent = await right(source, 0, MIB)
    assert spent.given == {Giver.PEER: MIB} and spent.requests == 2
    assert daemon.seen[0].target.startswith(f"http://{world.origin.host}/v2/")
    daemon.faults.answers.append((500, {"x-dragonfly-error-type": "proxy"}, b""))
    assert (await right(source, 0, MIB)).given == {Giver.ORIGIN: MIB}


async def test_a_proxy_and_nobody_else(world: World) -> None:
    """Without fallback the registry is never asked directly; tries go on until the deadline."""
    daemon = await world.daemon()
    source = world.source(proxy=Proxy(url=f"http://{daemon.proxy}", fallback=False))
    for _ in range(3):
        daemon.faults.answers.append((500, {"x-dragonfly-error-type": "dfdaemon"}, b""))
    spent = await right(source, 0, MIB)
    assert spent.given == {Giver.PEER: MIB} and spent.requests == 4
    daemon.faults.answers.extend([(503, {}, b"")] * 1000)
    with pytest.raises(SourceError, match="503"):
        await right(source, 0, MIB, deadline_s=1)
    assert world.asked_by_us() == []


@pytest.mark.parametrize("use_http", [False, True])
async def test_a_proxy_before_https(tmp_path: Path, use_http: bool) -> None:
    """It opens TLS with an authority of its own, which is believed of it alone; with use_http it is
    asked by http and speaks https itself."""
    theirs, ours = trustme.CA(), trustme.CA()
    tls, opened = (ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) for _ in range(2))
    theirs.issue_cert("127.0.0.1").configure_cert(tls)
    ours.issue_cert("127.0.0.1").configure_cert(opened)
    ours.cert_pem.write_to_path(tmp_path / "dragonfly.pem")
    async with AsyncExitStack() as stack, faulty_server(LARGE, tls) as origin:
        world = World(origin, stack)
        daemon = await world.daemon(Behaviour(use_tls=use_http), lambda _: opened)
        proxy = Proxy(
            url=f"http://{daemon.proxy}", use_http=use_http, ca_file=str(tmp_path / "dragonfly.pem")
        )
        source = world.source(proxy=proxy, scheme="https")
        assert (await right(source, 0, MIB)).given == {Giver.PEER: MIB}
        assert daemon.seen[0].method == ("GET" if use_http else "CONNECT")
        assert sorted(world.asked())[0] == PIECES[:2]
        daemon.faults.answers.append((500, {"x-dragonfly-error-type": "proxy"}, b""))
        with pytest.raises(SourceError, match="certificate"):
            await right(source, 0, MIB)


@pytest.mark.skipif(registry_program.PROGRAM is None, reason="docker-registry is not installed")
@pytest.mark.parametrize("authorization", [True, False])
async def test_tokens_through_a_peer(
    world: World, server: FaultyServer, tmp_path: Path, authorization: bool
) -> None:
    """The registry's challenge comes back through the peer, and the token goes the same way, where
    that is configured; where it is not, the blob is read at the registry."""
    alice = Credential("alice", Secret("open sesame"))
    issuer = TokenServer(tmp_path)
    issuer.authorization = alice.basic
    server.default = issuer.serve
    daemon = await world.daemon()
    with docker_registry(tmp_path / "r", issuer.auth(f"http://{server.host}/token")) as real:
        blob_id = real.put_blob(REPOSITORY, LARGE)
        mirror = world.mirror(daemon.proxy, authorization=authorization)
        source = world.source(mirror, host=real.host, credential=alice)
        for start in (0, 5 * MIB):
            got, spent = await read(source, start, start + MIB, blob_id=blob_id)
            assert got == LARGE[start : start + MIB]
            assert by_peer(spent) == (MIB if authorization else 0)
        assert len(server.seen) == 1 and "/token" in server.seen[0].target
        sent = ["authorization" in seen.headers for seen in daemon.seen]
        assert sent == ([False, True, True] if authorization else [False])


async def test_prefetch_says_what_it_is(world: World) -> None:
    """Priority 3: this node's peer fetches, no seed is sent ahead."""
    daemon = await world.daemon()
    source = world.source(world.mirror(daemon.proxy))
    await read(source, 0, 9, priority=Priority.PREFETCH)
    await read(source, 0, 9)
    assert [seen.headers["x-dragonfly-priority"] for seen in daemon.seen] == ["3", "6"]


async def test_cancelling_says_nothing_of_a_peer(world: World) -> None:
    """Readers that go away while it works do not bring it down."""
    peer = await world.faulty()
    asked = asyncio.Event()

    async def slow(seen: Seen, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.Event().wait()

    peer.answers = [slow]
    source = world.source(world.mirror(peer.host, failure_limit=1))
    reading = asyncio.create_task(read(source, 0, 9))
    await asked.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert (await right(source, 0, 9)).given == {Giver.MIRROR: 9}


@pytest.mark.parametrize("fixed", [True, False])
async def test_a_lie_is_never_written(world: World, fixed: bool) -> None:
    """From READ to cache file: chunks a peer made up are fetched again from the registry, counted,
    and the reader gets what the image says; where the registry has them wrong too, an error."""
    daemon = await world.daemon()
    daemon.faults.lie = lambda _, data: bytes(len(data))
    digests = [
        codec.digest(Digest.BLAKE3, LARGE[at : at + MIB]).hex() for at in range(0, len(LARGE), MIB)
    ]
    image = {BLOB_ID: {"size_bytes": len(LARGE), "digests": digests}}
    source = world.source(world.mirror(daemon.proxy))
    reader = Reader(Task(registry="", scheduler="", image=image), source)
    await reader.open()
    if not fixed:
        world.origin.default = part_of(bytes(len(LARGE)))
        with pytest.raises(OSError):
            await reader.read(BLOB_ID, 0, 4096)
    else:
        await reader.read(BLOB_ID, 0, len(LARGE))
        assert reader.kernel.content(ObjectKey("swarm", BLOB_ID))[: len(LARGE)] == LARGE
        tally = reader.objects.tallies[ObjectKey("swarm", BLOB_ID)]
        assert tally.bad_chunks > 0 and tally.reads_failed == 0
        assert source.traffic.given[Giver.ORIGIN] == len(LARGE)
    assert len(daemon.seen) == 1
    reader.close()

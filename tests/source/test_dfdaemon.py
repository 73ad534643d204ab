"""The stand-in for dfdaemon does what is documented of the real one, quirks included."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
import trustme

from tests.source import dfdaemon
from tests.source.dfdaemon import (
    PIECE_BYTES,
    Answer,
    Behaviour,
    Dfdaemon,
    Faults,
    Http,
    RemoteScheduler,
    Scheduler,
    behaviour_of,
    piece_bytes_of,
    serve_scheduler,
)
from tests.source.faulty import FaultyServer, Seen, answer, broken_part, faulty_server, part_of

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
LARGE = random.Random(11).randbytes(9 * MIB + 5)
PATH = "/v2/library/thing/blobs/sha256:" + "ab" * 32


@pytest_asyncio.fixture
async def origin() -> AsyncIterator[FaultyServer]:
    async with faulty_server(LARGE) as server:
        yield server


@asynccontextmanager
async def swarm(
    origin: FaultyServer, count: int, behaviour: Behaviour | None = None, *, seed: bool = False
) -> AsyncIterator[list[Dfdaemon]]:
    """Daemons of one scheduler; with `seed` the first is a seed peer."""
    scheduler = Scheduler()
    behaviour = behaviour or Behaviour()
    async with AsyncExitStack() as stack:
        daemons = []
        for index in range(count):
            own = dfdaemon.replace(
                behaviour, registry=f"http://{origin.host}", seed=seed and index == 0
            )
            daemons.append(await stack.enter_async_context(Dfdaemon(own, scheduler).running()))
        yield daemons


async def get(daemon: Dfdaemon, part: str = "", **headers: str) -> Answer:
    """A GET of the blob in mirror mode."""
    said = {name.replace("_", "-"): value for name, value in headers.items()}
    if part:
        said["range"] = f"bytes={part}"
    http = Http()
    try:
        return await http.send("GET", f"http://{daemon.proxy}{PATH}", said)
    finally:
        http.close()


def brought(origin: FaultyServer) -> int:
    """Bytes that the origin was asked for, without the sizes."""
    ranges = [seen.range for seen in origin.seen]
    return sum(end - start for start, end in ranges if end - start > 1)


async def test_a_small_range_costs_a_piece(origin: FaultyServer) -> None:
    """One byte to learn the size, then the whole piece; the next range of it costs nothing."""
    async with swarm(origin, 1) as (daemon,):
        got = await get(daemon, "100-199")
        assert (got.status, got.body) == (206, LARGE[100:200])
        assert got.headers["content-range"] == f"bytes 100-199/{len(LARGE)}"
        assert "x-dragonfly-task-id" in got.headers
        assert [seen.range for seen in origin.seen] == [(0, 1), (0, PIECE_BYTES)]
        assert (await get(daemon, "5000-5999")).body == LARGE[5000:6000]
        assert len(origin.seen) == 2
        assert daemon.traffic == {"BACK_TO_SOURCE": PIECE_BYTES, "LOCAL_PEER": PIECE_BYTES}


async def test_the_whole_blob(origin: FaultyServer) -> None:
    """200, all pieces; once they are here an answer says so."""
    async with swarm(origin, 1) as (daemon,):
        got = await get(daemon)
        assert (got.status, got.body) == (200, LARGE)
        assert "x-dragonfly-task-download-finished" not in got.headers
        again = await get(daemon, "0-0")
        assert again.headers["x-dragonfly-task-download-finished"] == "true"


@pytest.mark.parametrize(
    ("part", "behaviour", "headers", "times"),
    [
        ("0-1048575", Behaviour(), {}, 2),
        ("0-4194303", Behaviour(), {}, 2),
        ("0-4194304", Behaviour(), {}, 1),
        ("0-1048575", Behaviour(small_to_origin=False), {}, 1),
        ("0-1048575", Behaviour(), {"x-dragonfly-scheduling-policy": "always"}, 2),
        (
            "0-1048575",
            Behaviour(scheduling_policy=True),
            {"x-dragonfly-scheduling-policy": "always"},
            1,
        ),
        ("0-1048575", Behaviour(scheduling_policy=True), {}, 2),
        ("0-1048575", Behaviour(disable_back_to_source=True), {}, 0),
    ],
)
async def test_who_is_asked(
    origin: FaultyServer, part: str, behaviour: Behaviour, headers: dict[str, str], times: int
) -> None:
    """Up to 4 MiB goes to the origin without a question to others, from each peer."""
    async with swarm(origin, 2, behaviour) as daemons:
        for daemon in daemons:
            got = await get(daemon, part, **headers)
            assert got.status == (206 if times else 500)
        assert sum(seen.range == (0, PIECE_BYTES) for seen in origin.seen) == times


async def test_a_blob_of_one_piece(origin: FaultyServer) -> None:
    """However much of it is asked for, it is small."""
    async with faulty_server(LARGE[:MIB]) as small, swarm(small, 2) as daemons:
        for daemon in daemons:
            assert (await get(daemon, x_dragonfly_prefetch="true")).body == LARGE[:MIB]
        assert brought(small) == 2 * MIB


async def test_prefetch_brings_the_blob_once_through_peers(origin: FaultyServer) -> None:
    """A small range starts a task for the whole blob, which the scheduler knows of."""
    async with swarm(origin, 3) as daemons:
        for daemon in daemons:
            got = await get(daemon, "0-99", x_dragonfly_prefetch="true")
            assert got.body == LARGE[:100]
            (task,) = daemon.tasks.values()
            assert task.prefetching is not None
            await task.prefetching
            assert task.finished
        # Each had its small range from the origin, all the rest came through the first.
        assert brought(origin) == len(LARGE) + 2 * PIECE_BYTES


async def test_pieces_are_waited_for(origin: FaultyServer) -> None:
    """Readers of one daemon at the same time make one request for a piece."""
    async with swarm(origin, 1) as (daemon,):
        got = await asyncio.gather(*(get(daemon, f"{at}-{at + 9}") for at in range(0, 90, 10)))
        assert b"".join(each.body for each in got) == LARGE[:90]
        assert brought(origin) == PIECE_BYTES and daemon.stats == 1


async def test_readers_at_once_on_many_peers(origin: FaultyServer) -> None:
    """The scheduler sends one to the origin for each piece, and the others to that one."""
    async with swarm(origin, 8) as daemons:
        got = await asyncio.gather(*(get(daemon) for daemon in daemons))
        assert {each.body for each in got} == {LARGE}
        assert brought(origin) == len(LARGE)


async def test_a_seed_peer_is_first(origin: FaultyServer) -> None:
    """With priority 6 it fetches; with 3 the reader's own peer does."""
    async with swarm(origin, 2, seed=True) as (seed, first):
        await get(first, f"0-{PIECE_BYTES}", x_dragonfly_priority="3")
        assert seed.traffic == {} and first.traffic == {"BACK_TO_SOURCE": 2 * PIECE_BYTES}
    async with swarm(origin, 2, seed=True) as (seed, first):
        await get(first, f"0-{PIECE_BYTES}", x_dragonfly_priority="6")
        assert seed.traffic == {"BACK_TO_SOURCE": 2 * PIECE_BYTES}
        assert first.traffic == {"REMOTE_PEER": 2 * PIECE_BYTES}


async def test_a_parent_that_goes_away(origin: FaultyServer) -> None:
    """Another is asked, or the origin."""
    async with swarm(origin, 1) as (child,):
        async with Dfdaemon(child.behaviour, child._scheduler).running() as parent:
            await get(parent)
        assert (await get(child)).body == LARGE
        assert child.traffic["REMOTE_PEER"] == 0 and brought(origin) == 2 * len(LARGE)


async def test_a_known_task_asks_nobody(origin: FaultyServer) -> None:
    """Who has no token can read what is here; the headers are those of the first answer."""
    moments = iter(range(100))

    async def dated(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.headers.get("authorization") != "Bearer x":
            challenge = {"WWW-Authenticate": 'Bearer realm="http://r/"', "Content-Length": "3"}
            return await answer(401, challenge, b"no!")(seen, writer)
        start, end = seen.range
        extra = {"Date": str(next(moments)), "Content-Range": f"bytes {start}-{end - 1}/{5 * MIB}"}
        await answer(206, extra, LARGE[start:end])(seen, writer)

    origin.default = dated
    async with swarm(origin, 1) as (daemon,):
        refused = await get(daemon, "0-9")
        assert (refused.status, refused.body) == (401, b"")
        assert refused.headers["x-dragonfly-error-type"] == "backend"
        assert refused.headers["www-authenticate"].startswith("Bearer realm")
        assert (await get(daemon, "0-9", authorization="Bearer x")).body == LARGE[:10]
        again = await get(daemon, "10-19")
        assert (again.status, again.body) == (206, LARGE[10:20])
        assert again.headers["date"] == "0"
        assert (await get(daemon, f"{PIECE_BYTES}-{PIECE_BYTES + 1}")).status == 401


@pytest.mark.parametrize(
    ("part", "stats"), [(f"{len(LARGE)}-{len(LARGE) + 9}", 2), ("9-5", 1), ("-7", 1), ("x", 1)]
)
async def test_a_range_that_cannot_be(origin: FaultyServer, part: str, stats: int) -> None:
    """500 of dfdaemon's own, not 416; one behind the end fails the task: its size is asked anew."""
    async with swarm(origin, 1) as (daemon,):
        got = await get(daemon, part)
        assert (got.status, got.headers["x-dragonfly-error-type"]) == (500, "dfdaemon")
        await get(daemon, "0-0")
        assert daemon.stats == stats


@pytest.mark.parametrize(
    ("behaviour", "status", "kind"),
    [
        (Behaviour(rate_limit=0), 429, "proxy"),
        (Behaviour(blocked=("thing",)), 403, "proxy"),
        (Behaviour(basic_auth="Basic eDp5"), 401, "proxy"),
    ],
)
async def test_refusals_of_its_own(
    origin: FaultyServer, behaviour: Behaviour, status: int, kind: str
) -> None:
    """They say so, and the origin hears nothing."""
    async with swarm(origin, 1, behaviour) as (daemon,):
        got = await get(daemon, "0-9")
        assert (got.status, got.headers["x-dragonfly-error-type"]) == (status, kind)
        assert origin.seen == []


async def test_basic_authentication_is_in_the_way_of_tokens(origin: FaultyServer) -> None:
    """It is looked for where the registry's token is."""
    async with swarm(origin, 1, Behaviour(basic_auth="Basic eDp5")) as (daemon,):
        assert (await get(daemon, "0-9", authorization="Bearer x")).status == 400
        assert (await get(daemon, "0-9", authorization="Basic eDp5")).status == 206


@pytest.mark.parametrize("aborts", [True, False])
async def test_a_body_that_ends_early(origin: FaultyServer, aborts: bool) -> None:
    """What fails after the first piece has no status: the connection breaks, or the body is
    short."""
    async with swarm(origin, 1, Behaviour(aborts=aborts)) as (daemon,):
        daemon.faults.breaks_after_pieces = 1
        with pytest.raises((OSError, EOFError)):
            await get(daemon)


async def test_an_origin_that_breaks_in_the_middle(origin: FaultyServer) -> None:
    """A piece is tried twice; then the answer breaks off after the pieces that came."""

    async def bad(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.range[0] == PIECE_BYTES:
            return await broken_part(LARGE, 1000)(seen, writer)
        await good(seen, writer)

    good, origin.default = origin.default, bad
    async with swarm(origin, 1) as (daemon,):
        with pytest.raises((OSError, EOFError)):
            await get(daemon)
        assert sum(seen.range[0] == PIECE_BYTES for seen in origin.seen) == 2
        assert (await get(daemon, "0-9")).body == LARGE[:10]


async def test_versions(origin: FaultyServer) -> None:
    """What changed in the client, by version."""
    assert behaviour_of("1.3.10") == Behaviour(
        small_to_origin=False, partial_status=200, aborts=False, checks_whole_answers=False
    )
    assert behaviour_of("1.5.1") == Behaviour()
    assert behaviour_of("1.5.3") == Behaviour(scheduling_policy=True)
    async with swarm(origin, 1, behaviour_of("1.3.10")) as (daemon,):
        got = await get(daemon, "0-9")
        assert (got.status, got.body) == (200, LARGE[:10])
        assert got.headers["content-range"] == f"bytes 0-9/{len(LARGE)}"


@pytest.mark.parametrize("checks", [True, False])
async def test_an_origin_that_ignores_range(origin: FaultyServer, checks: bool) -> None:
    """Newer ones refuse all pieces but the first; older ones took the first's bytes for them."""
    origin.default = answer(200, body=LARGE)
    async with swarm(origin, 1, Behaviour(checks_whole_answers=checks)) as (daemon,):
        got = await get(daemon, f"{PIECE_BYTES}-{PIECE_BYTES + 9}")
        if checks:
            assert (got.status, got.headers["x-dragonfly-error-type"]) == (500, "dfdaemon")
        else:
            assert got.body == LARGE[:10]


async def test_a_redirect_is_kept_too_long(
    origin: FaultyServer, other_server: FaultyServer
) -> None:
    """A 307 is remembered whatever its signature's life; a 403 there does not end it."""
    origin.default = answer(307, {"Location": f"http://{other_server.host}/store?sig=x"})
    other_server.default = part_of(LARGE)
    async with swarm(origin, 1) as (daemon,):
        assert (await get(daemon, "0-9", authorization="Bearer x")).body == LARGE[:10]
        assert len(origin.seen) == 1 and "authorization" not in other_server.seen[0].headers
        other_server.default = answer(403)
        got = await get(daemon, f"{PIECE_BYTES}-{PIECE_BYTES + 9}")
        assert (got.status, got.headers["x-dragonfly-error-type"]) == (403, "backend")
        assert len(origin.seen) == 1


async def test_what_is_not_p2p_is_passed_on(origin: FaultyServer) -> None:
    """Without a rule that matches, only a header makes it P2P's; manifests never are."""
    async with swarm(origin, 1, Behaviour(rules=())) as (daemon,):
        got = await get(daemon, "0-9", x_dragonfly_registry=f"http://{origin.host}")
        assert got.body == LARGE[:10] and "x-dragonfly-task-id" not in got.headers
        assert [seen.range for seen in origin.seen] == [(0, 10)]
        got = await get(daemon, "0-9", x_dragonfly_use_p2p="true")
        assert "x-dragonfly-task-id" in got.headers


@pytest.mark.parametrize("dialect", ["rust", "go"])
async def test_connect(dialect: str, tmp_path: Path) -> None:
    """The Rust client opens TLS with its own authority; the Go daemon is a tunnel and keeps
    nothing."""
    theirs, ours = trustme.CA(), trustme.CA()
    tls, mine = (ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) for _ in range(2))
    theirs.issue_cert("127.0.0.1").configure_cert(tls)
    ours.issue_cert("127.0.0.1").configure_cert(mine)
    async with faulty_server(LARGE, tls) as origin:
        daemon = Dfdaemon(Behaviour(dialect=dialect), certificate=lambda _: mine)
        async with daemon.running():
            context = ssl.create_default_context()
            (ours if dialect == "rust" else theirs).configure_trust(context)
            import httpx

            proxy = f"http://{daemon.proxy}"
            async with httpx.AsyncClient(verify=context, proxy=proxy) as client:
                url = f"https://{origin.host}{PATH}"
                for _ in range(2):
                    got = await client.get(url, headers={"range": "bytes=0-9"})
                    assert got.content == LARGE[:10]
        kept = {"rust": [(0, 1), (0, PIECE_BYTES)], "go": [(0, 10), (0, 10)]}
        assert [seen.range for seen in origin.seen] == kept[dialect]


async def test_every_range_is_a_task_of_go(origin: FaultyServer) -> None:
    """The same range is shared, another is not; with prefetch the whole blob serves later ones."""
    async with swarm(origin, 2, Behaviour(dialect="go")) as (first, second):
        got = await get(first, "100-299")
        assert (got.status, got.body) == (206, LARGE[100:300])
        assert got.headers["content-range"] == f"bytes 100-299/{len(LARGE)}"
        assert "x-dragonfly-task" in got.headers and "x-dragonfly-peer" in got.headers
        assert (await get(second, "100-299")).body == LARGE[100:300]
        assert brought(origin) == 200
        await get(second, "100-298")
        assert brought(origin) == 200 + 199
    async with swarm(origin, 1, Behaviour(dialect="go", prefetch=True)) as (daemon,):
        await get(daemon, "0-99")
        (prefetching,) = [task.prefetching for task in daemon.tasks.values() if task.prefetching]
        await prefetching
        before = len(origin.seen)
        got = await get(daemon, f"5-{6 * MIB}")
        assert got.body == LARGE[5 : 6 * MIB + 1] and len(origin.seen) == before


async def test_refusals_of_go(origin: FaultyServer) -> None:
    """An origin's status is passed on; its own errors are texts."""
    async with swarm(origin, 1, Behaviour(dialect="go")) as (daemon,):
        assert (await get(daemon, "0-1,3-4")).status == 501
        assert (await get(daemon, "9-5")).status == 400
        origin.answers = [answer(404)]
        assert (await get(daemon, "0-9")).status == 404
        origin.default = broken_part(LARGE, 1)
        got = await get(daemon, "0-99")
        assert got.status == 500 and b"task and peer" in got.body
        assert "x-dragonfly-error-type" not in got.headers


async def test_health(origin: FaultyServer) -> None:
    """Each dialect has its own path for it; metrics are counted and reset."""
    http = Http()
    for dialect, good in (("rust", "/healthy"), ("go", "/server/ping")):
        async with swarm(origin, 1, Behaviour(dialect=dialect)) as (daemon,):
            statuses = {
                path: (await http.send("GET", f"http://{daemon.health}{path}", {})).status
                for path in ("/healthy", "/server/ping")
            }
            assert {path for path, status in statuses.items() if status == 200} == {good}
            await get(daemon, "0-9")
            url = f"http://{daemon.health}/metrics"
            assert b"BACK_TO_SOURCE" in (await http.send("GET", url, {})).body
            await http.send("DELETE", url, {})
            assert b"BACK_TO_SOURCE" not in (await http.send("GET", url, {})).body
    http.close()


async def test_pieces_grow_with_the_blob() -> None:
    """4 MiB up to 2000 MiB, never more than 64."""
    assert piece_bytes_of(2000 * MIB) == 4 * MIB
    assert piece_bytes_of(2000 * MIB + 1) == 8 * MIB
    assert piece_bytes_of(1 << 50) == 64 * MIB


async def test_faults_on_demand(origin: FaultyServer) -> None:
    """Lies, and answers that a test puts in."""
    async with swarm(origin, 1) as (daemon,):
        daemon.faults = Faults(lie=lambda _, data: bytes(len(data)))
        assert (await get(daemon, "0-9")).body == bytes(10)
        daemon.faults = Faults()
        daemon.faults.answers.append((503, {"x-a": "b"}, b"no"))
        assert (await get(daemon, "0-9"))[::2] == (503, b"no")
        assert (await get(daemon, "0-9")).body == LARGE[:10]


async def test_alone_in_processes_of_their_own(origin: FaultyServer) -> None:
    """As a program: a scheduler and two daemons that share by it."""
    command = [sys.executable, dfdaemon.__file__]
    async with AsyncExitStack() as stack:

        async def run(*arguments: str) -> dict[str, str]:
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*command, *arguments, stdout=pipe)
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            ready: dict[str, str] = json.loads(await process.stdout.readline())
            return ready

        scheduler = await run("--only-scheduler", "--listen", "127.0.0.1:0")
        any_ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "health", "upload")]
        registry = f"--registry=http://{origin.host}"
        shared = f"--scheduler={scheduler['scheduler']}"
        for _ in range(2):
            daemon = Dfdaemon()
            daemon.proxy = (await run(*any_ports, registry, shared))["proxy"]
            assert (await get(daemon)).body == LARGE
    assert brought(origin) == len(LARGE)


async def test_a_scheduler_elsewhere() -> None:
    """Questions by line; nobody is made to wait for who asked later."""
    async with serve_scheduler("127.0.0.1", 0) as address:
        remote = RemoteScheduler(address)
        assert (await remote.register("t", "a", [0, 1], [], False)).parents == {0: [], 1: []}
        assert (await remote.register("t", "b", [0], [], False)).parents == {0: ["a"]}
        await remote.lost("t", "a", 0)
        assert (await remote.register("t", "a", [0], [], False)).parents == {0: ["b"]}
        assert (await remote.register("t", "b", [0], ["a"], False)).parents == {0: []}
        await remote.has("t", "b", 0)
        assert (await remote.register("t", "c", [0], [], True)).parents == {0: ["b", "a"]}
        await remote.seed("s")
        assert (await remote.register("t", "c", [7], [], True)).parents == {7: ["s"]}
        remote.close()

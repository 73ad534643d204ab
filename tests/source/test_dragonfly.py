"""What is said to a peer, what its answers mean, and how much it is asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from fscached.source import Fault, Giver, Priority, SourceError
from fscached.source.auth import Credential, FixedCredential, Secret, Tokens
from fscached.source.dragonfly import (
    BUSY_PAUSE_S,
    DENIED_S,
    PIECE_BYTES,
    Peer,
    Verdict,
    Way,
    verdict,
    widened,
)
from fscached.source.exchange import Exchange
from fscached.source.health import Health, State, Watch
from fscached.source.origin import Trust, origin_of
from fscached.source.patience import Busy, Refusal
from fscached.source.redirect import Route
from fscached.source.registry import Registry
from fscached.source.request import Pace, Reply, Request
from tests.source.conftest import BLOB_ID, REPOSITORY
from tests.source.faulty import FaultyServer, answer

SIZES = st.integers(0, 1 << 26)


@given(start=SIZES, length=st.integers(1, 1 << 24), size=st.one_of(st.just(0), SIZES))
def test_the_range_that_others_are_asked_for(start: int, length: int, size: int) -> None:
    """It holds what is wanted, ends no later than the blob, is over 4 MiB wherever that can be, and
    no longer than it has to be."""
    end = start + length
    size = size and max(size, end)
    first, last = widened(start, end, size)
    assert 0 <= first <= start and end <= last <= max(end, size)
    possible = max(end, size) > PIECE_BYTES
    assert (last - first > PIECE_BYTES) == possible
    assert last - first == (max(length, PIECE_BYTES + 1) if possible else length)
    if last < max(size, end):
        assert first == start, "what is wanted comes first"


@pytest.mark.parametrize(
    ("error_type", "status", "whose"),
    [
        *(
            (kind, status, Verdict.DENIED)
            for kind in ("backend", "proxy", "")
            for status in (401, 403, 404)
        ),
        *(("dfdaemon", status, Verdict.FAULT) for status in (401, 403, 404, 416, 500, 503)),
        ("backend", 429, Verdict.ORIGINS),
        *(("backend", status, Verdict.ORIGINS) for status in (416, 500, 502, 503)),
        *((kind, 429, Verdict.BUSY) for kind in ("proxy", "dfdaemon", "")),
        *(
            (kind, status, Verdict.FAULT)
            for kind in ("proxy", "")
            for status in (400, 500, 501, 503)
        ),
        ("something new", 500, Verdict.FAULT),
    ],
)
def test_whose_fault_it_is(error_type: str, status: int, whose: Verdict) -> None:
    """Who says so decides, as far as it is said."""
    assert verdict(error_type, status) is whose


class Site:
    """A registry with a login, and peers for it."""

    def __init__(self, host: str, exchange: Exchange, *, login: bool = False) -> None:
        credential = Credential("alice", Secret("hush")) if login else None
        self.registry = Registry(
            host,
            REPOSITORY,
            scheme="http",
            tokens=Tokens(exchange),
            keychain=FixedCredential(credential),
            trust=Trust(),
        )
        self.watch = Watch(
            "peer",
            Health(failure_limit=2, pause_s=5, lie_pause_s=50),
            ping=None,
            interval_s=5,
            idle_s=5,
        )

    def peer(
        self,
        *,
        base: str = "http://127.0.0.1:4001",
        proxy: str = "",
        headers: dict[str, str] | None = None,
        authorised: bool = False,
        small_ranges: bool = False,
    ) -> Peer:
        way = Way(
            name=proxy or base,
            base="" if proxy else base,
            proxy=proxy,
            headers=headers or {},
            authorised=authorised,
            small_ranges=small_ranges,
            timeout_s=5,
            lie_pause_s=50,
        )
        return Peer(self.registry, way, self.watch, Trust())


@pytest_asyncio.fixture
async def exchange() -> AsyncIterator[Exchange]:
    exchange = Exchange(Trust(), connect_timeout_s=5, stall_timeout_s=5)
    yield exchange
    await exchange.close()


@pytest.fixture
def site(exchange: Exchange) -> Site:
    return Site("r.example.org", exchange)


async def lines(peer: Peer, priority: Priority = Priority.DEMAND, at: str = "") -> dict[str, str]:
    """The headers of a request to a peer, or where it sends us."""
    url = at or peer.url(BLOB_ID)
    request = await peer.request(Route(url, origin_of(url), 0, 9.0), 0, 9, priority)
    return dict(line.split(": ", 1) for line in request.headers)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("priority", "level"),
    [(Priority.DEMAND, "6"), (Priority.EXPECTED, "3"), (Priority.PREFETCH, "3")],
)
@pytest.mark.parametrize(
    ("base", "more"),
    [("http://127.0.0.1:4001", {}), ("http://10.0.0.1:4001", {"X-Dragonfly-Prefetch": "true"})],
)
async def test_what_a_peer_is_told(
    site: Site, priority: Priority, level: str, base: str, more: dict[str, str]
) -> None:
    """Both dialects at once; the registry as text without a slash at its end. A shared one brings
    the whole blob."""
    assert await lines(site.peer(base=base), priority) == more | {
        "X-Dragonfly-Registry": "http://r.example.org",
        "X-Dragonfly-Use-P2P": "true",
        "X-Dragonfly-Scheduling-Policy": "always",
        "X-Dragonfly-Filter": "Expires&Signature&ns",
        "X-Dragonfly-Priority": level,
    }


@pytest.mark.asyncio
async def test_where_a_peer_is_asked(site: Site) -> None:
    """A mirror at its own address, a proxy at the registry's; not too slowly."""
    mirror, proxied = site.peer(), site.peer(proxy="http://127.0.0.1:4001")
    path = f"/v2/{REPOSITORY}/blobs/sha256:{BLOB_ID}"
    assert mirror.url(BLOB_ID) == f"http://127.0.0.1:4001{path}"
    assert proxied.url(BLOB_ID) == f"http://r.example.org{path}"
    for peer, through in ((mirror, ""), (proxied, "http://127.0.0.1:4001")):
        url = peer.url(BLOB_ID)
        request = await peer.request(Route(url, origin_of(url), 0, 9.0), 5, 9, Priority.DEMAND)
        assert (request.start, request.end, request.proxy) == (5, 9, through)
        assert request.pace == Pace((1 << 20) // 5, 5)


@pytest.mark.asyncio
async def test_configured_headers(site: Site) -> None:
    """They are sent too; one of ours gives way to one of the same name, however it is written."""
    own = {"x-dragonfly-PREFETCH": "false", "X-Dragonfly-Tag": "blue"}
    told = await lines(site.peer(base="http://10.0.0.1:4001", headers=own))
    assert told["x-dragonfly-PREFETCH"] == "false" and told["X-Dragonfly-Tag"] == "blue"
    assert "X-Dragonfly-Prefetch" not in told


@pytest.mark.asyncio
@pytest.mark.parametrize("bad", [{"X": "a\r\nY: b"}, {"X: Y\r\n": "a"}, {"": "a"}, {"X": "ü"}])
async def test_a_header_that_is_none(site: Site, bad: dict[str, str]) -> None:
    """It becomes no line of a request."""
    with pytest.raises(SourceError, match="cannot be sent") as caught:
        site.peer(headers=bad)
    assert caught.value.fault is Fault.LOCAL


@pytest.mark.asyncio
async def test_nothing_is_said_where_a_peer_sends_us(site: Site) -> None:
    """Neither its headers nor a login belong to another origin."""
    assert await lines(site.peer(authorised=True), at="http://store.example.org/x") == {}


@pytest.mark.asyncio
@pytest.mark.parametrize("authorised", [False, True])
async def test_the_login_is_for_who_may_have_it(
    exchange: Exchange, server: FaultyServer, authorised: bool
) -> None:
    """A mirror gets it only when that is configured; its 401 is the registry's challenge then."""
    site = Site(server.host, exchange, login=True)
    peer = site.peer(authorised=authorised)
    challenge = Reply(401, {"www-authenticate": 'Basic realm="x"'}, 0, None, "")
    request = Request(peer.url(BLOB_ID), (), 0, 9, Priority.DEMAND, Trust())
    if authorised:
        await peer.refused(request, challenge)
        assert (await lines(peer))["Authorization"].startswith("Basic ")
    else:
        with pytest.raises(Refusal):
            await peer.refused(request, challenge)
        assert "Authorization" not in await lines(peer)


@pytest.mark.asyncio
async def test_a_token_that_cannot_be_had_is_no_fault_of_the_peer(
    exchange: Exchange, server: FaultyServer
) -> None:
    """The token server fails: the registry is busy, and the peer stays."""
    server.default = answer(503)
    site = Site(server.host, exchange, login=True)
    peer = site.peer(authorised=True)
    bearer = f'Bearer realm="http://{server.host}/token",service="x"'
    request = Request(peer.url(BLOB_ID), (), 0, 9, Priority.DEMAND, Trust())
    with pytest.raises(Busy) as caught:
        await peer.refused(request, Reply(401, {"www-authenticate": bearer}, 0, None, ""))
    assert caught.value.origin == site.registry.origin
    peer.admit(BLOB_ID, 0)
    peer.failed(BLOB_ID, caught.value, 0)
    assert site.watch.state is State.UP and peer.admit(BLOB_ID, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("status", "headers", "error", "origin", "pause_s"),
    [
        (403, {"x-dragonfly-error-type": "proxy"}, Refusal, None, None),
        (404, {"x-dragonfly-error-type": "backend"}, Refusal, None, None),
        (416, {"x-dragonfly-error-type": "backend"}, Refusal, None, None),
        (429, {"x-dragonfly-error-type": "proxy"}, Busy, "peer", BUSY_PAUSE_S),
        (429, {"x-dragonfly-error-type": "proxy", "retry-after": "7"}, Busy, "peer", 7),
        (429, {"x-dragonfly-error-type": "backend", "retry-after": "7"}, Busy, "registry", 7),
        (503, {"x-dragonfly-error-type": "backend"}, Busy, "registry", 0),
        (500, {"x-dragonfly-error-type": "dfdaemon"}, SourceError, None, None),
        (503, {}, SourceError, None, None),
    ],
)
async def test_refusals(
    site: Site,
    status: int,
    headers: dict[str, str],
    error: type[SourceError],
    origin: str | None,
    pause_s: float | None,
) -> None:
    """Each becomes what the next step depends on."""
    peer = site.peer()
    request = Request(peer.url(BLOB_ID), (), 0, 9, Priority.DEMAND, Trust())
    with pytest.raises(SourceError) as caught:
        await peer.refused(request, Reply(status, headers, 0, None, ""))
    assert type(caught.value) is error and str(status) in str(caught.value)
    assert (caught.value.fault is Fault.PEER) == (error is SourceError)
    if isinstance(caught.value, Busy):
        origins = {"peer": peer.origin, "registry": site.registry.origin}
        assert caught.value.origin == origins[origin or ""]
        assert caught.value.retry_after_s == pause_s


@pytest.mark.asyncio
async def test_what_follows_from_a_failure(site: Site) -> None:
    """The origin's no keeps a blob away for a while, the peer's own faults count, and its wish to
    be left alone is heeded."""
    peer, other = site.peer(), "6b" * 32
    assert peer.admit(BLOB_ID, 0)
    peer.failed(BLOB_ID, Refusal("404", Fault.ORIGIN), 0)
    assert not peer.admit(BLOB_ID, DENIED_S - 0.1) and peer.admit(BLOB_ID, DENIED_S)
    assert peer.admit(other, 0)
    peer.failed(other, Busy("429", 3, peer.origin), 0)
    assert not peer.admit(other, 2.9) and peer.admit(other, 3)
    peer.failed(other, Busy("503", 3, site.registry.origin), 3)
    assert peer.admit(other, 3) and site.watch.state is State.UP
    for _ in range(2):
        peer.failed(other, SourceError("reset", Fault.NETWORK), 3)
    assert site.watch.state is State.DOWN


@pytest.mark.asyncio
async def test_lies_set_it_aside(exchange: Exchange) -> None:
    """For the image; for all when there are several of them."""
    sites = [Site(f"r{number}.example.org", exchange) for number in range(3)]
    for site in sites[1:]:
        site.watch = sites[0].watch
    first, second, third = (site.peer() for site in sites)
    first.lied(0)
    assert not first.admit(BLOB_ID, 49) and second.admit(BLOB_ID, 0)
    second.lied(1)
    assert not third.admit(BLOB_ID, 50)
    assert third.admit(BLOB_ID, 51)


def answer_of(
    peer: Peer, headers: dict[str, str], start: int, end: int, fault: Fault | None = None
) -> Giver:
    """A peer answers a request for [start, end) with such headers."""
    request = Request(peer.url(BLOB_ID), (), start, end, Priority.DEMAND, Trust())
    return peer.answered(BLOB_ID, request, Reply(206, headers, end - start, fault, ""))


RUST = {"x-dragonfly-task-id": "ab", "x-dragonfly-server-ip": "10.0.0.1"}
FINISHED = RUST | {"x-dragonfly-task-download-finished": "true"}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("host", "headers", "who"),
    [
        ("127.0.0.1:4001", FINISHED, Giver.LOCAL_PEER),
        ("localhost:4001", FINISHED, Giver.LOCAL_PEER),
        ("10.0.0.1:4001", FINISHED, Giver.REMOTE_PEER),
        ("127.0.0.1:4001", RUST, Giver.PEER),
        ("127.0.0.1:65001", {"x-dragonfly-task": "ab", "x-dragonfly-peer": "p"}, Giver.PEER),
        ("127.0.0.1:5000", {"server": "nginx"}, Giver.MIRROR),
    ],
)
async def test_who_gave_it(site: Site, host: str, headers: dict[str, str], who: Giver) -> None:
    """As far as the answer tells."""
    peer = site.peer(base=f"http://{host}")
    assert answer_of(peer, headers, 0, 9) is who


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("host", "headers", "before", "after"),
    [
        ("127.0.0.1:4001", RUST, True, True),
        ("127.0.0.1:65001", {"x-dragonfly-task": "ab"}, True, False),
        ("127.0.0.1:5000", {}, True, False),
        ("10.0.0.1:4001", RUST, False, False),
    ],
)
async def test_who_is_asked_for_more(
    site: Site, host: str, headers: dict[str, str], before: bool, after: bool
) -> None:
    """A Rust client on this machine, and one here that may be."""
    peer = site.peer(base=f"http://{host}")
    for more in (before, after):
        assert (peer.extent(BLOB_ID, 0, 9, 1 << 30) != (0, 9)) == more
        answer_of(peer, headers, PIECE_BYTES, PIECE_BYTES + 9)


@pytest.mark.asyncio
async def test_one_that_shares_small_ranges(site: Site) -> None:
    """As configured: it is asked for what is wanted, before its first answer and after."""
    peer = site.peer(small_ranges=True)
    for _ in range(2):
        assert peer.extent(BLOB_ID, 0, 9, 1 << 30) == (0, 9)
        answer_of(peer, RUST, 0, 9)


@pytest.mark.asyncio
async def test_pieces_that_are_there(site: Site) -> None:
    """Of what it has it is asked for no more than is wanted, until it fails: then it may be a new
    one. What broke off is not there, nor is what another blob has."""
    peer, size = site.peer(), 1 << 30
    large = (0, PIECE_BYTES + 1)
    assert peer.extent(BLOB_ID, 0, 9, size) == large
    answer_of(peer, RUST, *large, Fault.NETWORK)
    assert peer.extent(BLOB_ID, 0, 9, size) == large
    answer_of(peer, RUST, *large)
    assert peer.extent(BLOB_ID, 0, 9, size) == (0, 9)
    assert peer.extent(BLOB_ID, 0, 2 * PIECE_BYTES, size) == (0, 2 * PIECE_BYTES)
    second = 2 * PIECE_BYTES
    assert peer.extent(BLOB_ID, second - 9, second + 1, size) == (
        second - 9,
        second - 8 + PIECE_BYTES,
    )
    assert peer.extent("6b" * 32, 0, 9, size) == large
    peer.failed(BLOB_ID, SourceError("reset", Fault.NETWORK), 0)
    assert peer.extent(BLOB_ID, 0, 9, size) == large

"""Logins: challenges, credentials, tokens, and that no secret gets anywhere else."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import pickle
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source import Fault, SourceError
from fscached.source.auth import (
    Authorization,
    Challenge,
    Credential,
    FixedCredential,
    Kind,
    Secret,
    Tokens,
    parse_challenges,
)
from fscached.source.exchange import Exchange, Response
from fscached.source.origin import Traffic
from tests.source.conftest import BLOB, REPOSITORY, Client
from tests.source.docker_registry import PROGRAM, docker_registry
from tests.source.faulty import FaultyServer, answer
from tests.source.token_server import SERVICE, TokenServer

ALICE = Credential("alice", Secret("open sesame"))


def grant(token: str = "t0ken", **more: object) -> bytes:
    return json.dumps({"token": token} | more).encode()


class FakeExchange(Exchange):
    """A stand-in for the network to token servers: answers from a list, and counts."""

    def __init__(self, *bodies: bytes, status: int = 200) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self._bodies = list(bodies)
        self._status = status
        self.hold: asyncio.Event | None = None

    async def send(  # type: ignore[override]
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        traffic: Traffic,
        *,
        limit_bytes: int,
        content: bytes = b"",
    ) -> Response:
        self.asked.append((method, url, headers, content))
        if self.hold is not None:
            await self.hold.wait()
        return Response(self._status, {}, self._bodies.pop(0))


def authorization(
    exchange: FakeExchange,
    credential: Credential | None = ALICE,
    registry: str = "https://r.org:443",
) -> Authorization:
    scope = "repository:a/b:pull"
    return Authorization(registry, "r.org", scope, FixedCredential(credential), Tokens(exchange))


async def settled() -> None:
    """When all other tasks have ended."""
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})


def bearer(realm: str = "https://auth.org/token", more: str = ',service="s"') -> str:
    return f'Bearer realm="{realm}"{more}'


@pytest.mark.parametrize(
    ("value", "challenges"),
    [
        ('Basic realm="a, b"', [("basic", {"realm": "a, b"})]),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"',
            [
                (
                    "bearer",
                    {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"},
                )
            ],
        ),
        (
            'Negotiate, BEARER Realm=x , service = "s" , Basic realm="y"',
            [
                ("negotiate", {}),
                ("bearer", {"realm": "x", "service": "s"}),
                ("basic", {"realm": "y"}),
            ],
        ),
        (
            'Negotiate YWJj==, Basic realm="q\\"q"',
            [("negotiate", {}), ("basic", {"realm": 'q"q'})],
        ),
        ("Basic", [("basic", {})]),
        ('Bearer realm="unclosed', [("bearer", {})]),
        ('="', []),
        ("", []),
    ],
)
def test_challenges(value: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    """Quoted commas, odd case, several schemes, and rubbish that ends the list."""
    assert parse_challenges(value)[: len(challenges)] == [Challenge(*each) for each in challenges]


@given(st.text())
def test_any_challenge(value: str) -> None:
    """No header raises, and parsing it ends."""
    for challenge in parse_challenges(value):
        assert challenge.scheme == challenge.scheme.lower() != ""


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Basic", "Bearer", "Digest"]),
            st.dictionaries(
                st.sampled_from(["realm", "service", "scope", "error"]),
                st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])),
                min_size=1,
            ),
        ),
        max_size=4,
    )
)
def test_challenges_are_read_as_they_were_meant(meant: list[tuple[str, dict[str, str]]]) -> None:
    """Any list of challenges with quoted parameters is understood."""

    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    value = ", ".join(
        f"{scheme} " + ", ".join(f"{name}={quoted(text)}" for name, text in parameters.items())
        for scheme, parameters in meant
    )
    assert parse_challenges(value) == [Challenge(scheme.lower(), each) for scheme, each in meant]


def test_secrets_do_not_show() -> None:
    """Neither their text nor any object that has one."""
    for thing in (ALICE.secret, ALICE, FixedCredential(ALICE), {"key": ALICE}):
        assert "sesame" not in f"{thing!r} {thing!s}"
    assert ALICE.secret == Secret("open sesame") != Secret("other")
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        json.dumps(ALICE)


@pytest.mark.parametrize("encoded", ["", "!!!", "bm9jb2xvbg==", "/w=="])
def test_bad_basic(encoded: str) -> None:
    """What is not base64 of a pair is refused and not repeated."""
    with pytest.raises(ValueError, match="base64 of user:password"):
        Credential.from_basic(encoded)


@given(st.text(st.characters(exclude_characters=":")), st.text())
def test_basic_reads_back(user: str, password: str) -> None:
    """A password may contain colons."""
    try:
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
    except UnicodeEncodeError:
        return
    credential = Credential.from_basic(encoded)
    assert credential.username == user
    assert credential.secret.reveal() == password.rstrip("\0")


@pytest.mark.asyncio
async def test_a_token_is_fetched() -> None:
    """With service, scope and the login in Basic, as every token server takes it."""
    exchange = FakeExchange(grant())
    gate = authorization(exchange)
    assert await gate.header() is None
    await gate.refused(bearer(), None)
    assert await gate.header() == Secret("Bearer t0ken")
    [(method, url, headers, _)] = exchange.asked
    query = parse_qs(urlsplit(url).query)
    assert method == "GET" and url.startswith("https://auth.org/token?")
    assert query["service"] == ["s"] and query["scope"] == ["repository:a/b:pull"]
    assert headers == {"Authorization": ALICE.basic}


@pytest.mark.asyncio
async def test_nobody_gets_a_token_too() -> None:
    """Without a credential the token server is asked without one."""
    exchange = FakeExchange(json.dumps({"access_token": "anonymous"}).encode())
    gate = authorization(exchange, credential=None)
    await gate.refused(bearer(more=',scope="repository:a/b:pull repository:c:pull"'), None)
    assert await gate.header() == Secret("Bearer anonymous")
    [(_, url, headers, _)] = exchange.asked
    assert headers == {}
    assert parse_qs(urlsplit(url).query)["scope"] == ["repository:a/b:pull", "repository:c:pull"]


@pytest.mark.asyncio
async def test_an_identity_token_is_traded() -> None:
    """It goes into a form, not into a header."""
    exchange = FakeExchange(grant())
    gate = authorization(exchange, Credential("<token>", Secret("refresh"), Kind.IDENTITY))
    await gate.refused(bearer(), None)
    [(method, url, headers, content)] = exchange.asked
    assert (method, url) == ("POST", "https://auth.org/token") and "Authorization" not in headers
    form = parse_qs(content.decode())
    assert form["grant_type"] == ["refresh_token"] and form["refresh_token"] == ["refresh"]


@pytest.mark.asyncio
async def test_a_ready_token_needs_no_server() -> None:
    """A bearer token that was given is sent as it is, and refused it is a fault."""
    gate = authorization(FakeExchange(), Credential("", Secret("ready"), Kind.BEARER))
    await gate.refused(bearer(), None)
    sent = await gate.header()
    assert sent == Secret("Bearer ready")
    with pytest.raises(SourceError, match=r"refuses the credential for r\.org"):
        await gate.refused(bearer(), sent)


@pytest.mark.asyncio
async def test_one_request_for_many() -> None:
    """All who are refused at once share one token request, also across repositories' readers."""
    exchange = FakeExchange(grant())
    exchange.hold = asyncio.Event()
    gate = authorization(exchange)
    waiting = [asyncio.create_task(gate.refused(bearer(), None)) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    exchange.hold.set()
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert ends[1:] == [None] * 4 and isinstance(ends[0], asyncio.CancelledError)
    assert len(exchange.asked) == 1
    await gate.refused(bearer(), None)  # one that was sent before the token came
    assert len(exchange.asked) == 1


@pytest.mark.asyncio
async def test_a_token_is_renewed_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near its end a token is still used while the next one is fetched; at its end it is not."""
    loop, shift_s = asyncio.get_running_loop(), 0.0
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + shift_s)
    exchange = FakeExchange(*(grant(f"t{n}", expires_in=100) for n in range(3)))
    gate = authorization(exchange)
    await gate.refused(bearer(), None)
    shift_s = 65
    assert await gate.header() == Secret("Bearer t0") and len(exchange.asked) == 1
    shift_s = 81
    assert await gate.header() == Secret("Bearer t0")
    await settled()
    assert await gate.header() == Secret("Bearer t1")
    shift_s = 300
    assert await gate.header() == Secret("Bearer t2")
    assert len(exchange.asked) == 3


@pytest.mark.asyncio
async def test_renewals_do_not_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that were fetched together are renewed up to a tenth of their lives apart."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    moments = []
    for _ in range(20):
        gate = authorization(FakeExchange(grant(expires_in=3600)))
        await gate.refused(bearer(), None)
        moments.append(gate._renew_at - now)
    assert 3600 * 0.9 - 20 <= min(moments) < max(moments) <= 3600 - 20


@pytest.mark.asyncio
async def test_a_failed_renewal_is_not_tried_with_every_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the old token is good a token server in trouble is left alone for some seconds."""
    loop, shift_s = asyncio.get_running_loop(), 0.0
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + shift_s)
    exchange = FakeExchange(grant("t0", expires_in=100), b"down", grant("t1", expires_in=100))
    gate = authorization(exchange)
    await gate.refused(bearer(), None)
    shift_s = 81
    await gate.header()
    await settled()
    for shift_s in (82, 83, 84):  # noqa: B007 - the clock reads it
        assert await gate.header() == Secret("Bearer t0")
    assert len(exchange.asked) == 2
    shift_s = 93
    assert await gate.header() == Secret("Bearer t0")
    await settled()
    assert await gate.header() == Secret("Bearer t1")


@pytest.mark.asyncio
async def test_a_refused_token_is_not_used_again() -> None:
    """A token the registry no longer takes is replaced although its time is not over."""
    exchange = FakeExchange(grant("old", expires_in=3600), grant("new", expires_in=3600))
    gate = authorization(exchange)
    await gate.refused(bearer(), None)
    await gate.refused(bearer(), await gate.header())
    assert await gate.header() == Secret("Bearer new")


@pytest.mark.asyncio
async def test_harbor_answers_an_ended_token_with_basic() -> None:
    """A challenge of another kind than what was sent means: ask again with nothing."""
    exchange = FakeExchange(grant("old"), grant("new"))
    gate = authorization(exchange)
    await gate.refused(bearer(), None)
    await gate.refused('Basic realm="harbor"', await gate.header())
    assert await gate.header() is None
    await gate.refused(bearer(), None)
    assert (await gate.header()) in (Secret("Bearer old"), Secret("Bearer new"))


@pytest.mark.asyncio
async def test_a_403_without_a_challenge_may_be_an_ended_token() -> None:
    """What the registry asked for last is asked for again, if it ever asked."""
    exchange = FakeExchange(grant("old"), grant("new"))
    gate = authorization(exchange)
    with pytest.raises(SourceError) as caught:
        await gate.refused("", None)
    assert caught.value.fault is Fault.AUTH
    await gate.refused(bearer(), None)
    await gate.refused("", await gate.header())
    assert await gate.header() == Secret("Bearer new")


@pytest.mark.parametrize(
    ("registry", "realm"),
    [
        ("https://r.org:443", "http://auth.org/token"),
        ("https://r.org:443", "https://169.254.169.254/token"),
        ("https://r.org:443", "https://10.0.0.1/token"),
        ("https://r.org:443", "https://127.0.0.1/token"),
        ("https://r.org:443", "https://localhost/token"),
        ("https://r.org:443", "https://[::1]/token"),
        ("http://127.0.0.1:80", "http://10.0.0.1/token"),
        ("https://r.org:443", "file:///etc/passwd"),
        ("https://r.org:443", "https://user:hush@auth.org/"),
        ("https://r.org:443", "https://auth.org/#x"),
        ("https://r.org:443", ""),
    ],
)
@pytest.mark.asyncio
async def test_hostile_realms(registry: str, realm: str) -> None:
    """A registry cannot send our credentials inward, or in the clear."""
    exchange = FakeExchange()
    with pytest.raises(SourceError) as caught:
        await authorization(exchange, registry=registry).refused(bearer(realm), None)
    assert caught.value.fault is Fault.PROTOCOL and exchange.asked == []
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("registry", "realm"),
    [
        ("https://r.org:443", "https://auth.org/token?x=y"),
        ("https://10.0.0.1:5000", "https://10.0.0.1/token"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5001/token"),
        ("http://r.org:80", "https://auth.org/token"),
    ],
)
@pytest.mark.asyncio
async def test_good_realms(registry: str, realm: str) -> None:
    """The registry's own address may be inside; others by their names."""
    exchange = FakeExchange(grant())
    await authorization(exchange, registry=registry).refused(bearer(realm), None)
    assert exchange.asked[0][1].count("?") == 1


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (401, b"", Fault.AUTH),
        (403, b"", Fault.AUTH),
        (302, b"", Fault.AUTH),
        (503, b"", Fault.ORIGIN),
        (200, b"", Fault.PROTOCOL),
        (200, b"[1]", Fault.PROTOCOL),
        (200, b'{"token": ""}', Fault.PROTOCOL),
        (200, b'{"token": "a\\r\\nX: y"}', Fault.PROTOCOL),
        (200, b'{"token": "\xff"}', Fault.PROTOCOL),
        (200, b'{"x": ' + b"[" * 100_000, Fault.PROTOCOL),
    ],
)
@pytest.mark.asyncio
async def test_bad_answers_of_token_servers(status: int, body: bytes, fault: Fault) -> None:
    """Each is an error that names the server; nothing of them becomes a header."""
    exchange = FakeExchange(body, status=status)
    gate = authorization(exchange)
    with pytest.raises(SourceError, match=r"https://auth\.org:443") as caught:
        await gate.refused(bearer(), None)
    assert caught.value.fault is fault
    assert await gate.header() is None


@pytest.mark.asyncio
async def test_a_credential_that_is_no_header() -> None:
    """A ready token with a line end is refused before it is sent."""
    gate = authorization(FakeExchange(), Credential("", Secret("a\r\nX: y"), Kind.BEARER))
    with pytest.raises(SourceError, match="characters") as caught:
        await gate.refused(bearer(), None)
    assert "X: y" not in str(caught.value)


@pytest.mark.asyncio
async def test_a_real_registry_and_its_tokens(
    client: Client, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """docker-registry takes the tokens we bring; 401s are counted here, token requests there."""
    if PROGRAM is None:
        pytest.skip("docker-registry is not installed")
    caplog.set_level(logging.INFO)
    issuer = TokenServer(tmp_path)
    issuer.authorization = ALICE.basic
    server.default = issuer.serve
    auth = issuer.auth(f"http://{server.host}/token")
    with docker_registry(tmp_path / "registry", auth) as real:
        blob_id = real.put_blob(REPOSITORY, BLOB)
        registry = client.registry(real.host, credential=ALICE)
        for _ in range(2):
            assert await client.collect(registry, 0, 9, blob_id=blob_id) == BLOB[:9]
        log = real.accesses(3, "/blobs/")
        assert [line.status for line in log] == [401, 206, 206]
        assert registry.traffic.requests == 3 and client.tokens.traffic.requests == 1
        assert parse_qs(urlsplit(server.seen[0].target).query)["service"] == [SERVICE]

        with pytest.raises(SourceError) as caught:
            await client.collect(client.registry(real.host), 0, 9, blob_id=blob_id)
        assert caught.value.fault is Fault.AUTH
    assert "sesame" not in caplog.text and ALICE.basic not in caplog.text


@pytest.mark.asyncio
async def test_a_token_server_in_trouble(client: Client, server: FaultyServer) -> None:
    """Its passing troubles are the read's: tried again; a denial is not."""
    challenge = {"WWW-Authenticate": bearer(f"http://{server.host}/token")}
    server.answers = [
        answer(401, challenge),
        answer(503),
        answer(401, challenge),
        answer(200, body=grant()),
    ]
    registry = client.registry(server.host)
    assert await client.collect(registry, 0, 9) == BLOB[:9]
    assert server.seen[-1].headers["authorization"] == "Bearer t0ken"

    server.answers = [answer(401, challenge), answer(403)]
    before = len(server.seen)
    with pytest.raises(SourceError, match="token server"):
        await client.collect(client.registry(server.host, credential=ALICE), 0, 9)
    assert len(server.seen) == before + 2


@pytest.mark.asyncio
async def test_a_token_that_never_helps(client: Client, server: FaultyServer) -> None:
    """A registry that refuses every token is asked a few times, not for ever."""
    challenge = {"WWW-Authenticate": bearer(f"http://{server.host}/token")}

    async def refuse(seen: object, writer: asyncio.StreamWriter) -> None:
        token = answer(200, body=grant())
        await (token if "/token" in server.seen[-1].target else answer(401, challenge))(
            server.seen[-1], writer
        )

    server.default = refuse
    with pytest.raises(SourceError) as caught:
        await client.collect(client.registry(server.host), 0, 9)
    assert caught.value.fault is Fault.AUTH
    assert len(server.seen) == 5

"""Reads of a repository: what a real registry serves, and what a bad one may not do to us."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import pytest

from fscached.source import Fault, Priority, SourceError
from fscached.source.auth import Credential, FixedCredential, Secret
from fscached.source.patience import Patience
from tests.source.conftest import BLOB, BLOB_ID, REPOSITORY, Client
from tests.source.docker_registry import DockerRegistry
from tests.source.faulty import (
    Answer,
    FaultyServer,
    answer,
    broken_part,
    part_head,
    raw,
    silence,
    slow_part,
)

pytestmark = pytest.mark.asyncio
MIB = 1 << 20


class Changing:
    """A keychain with another password each time, since the one before it was refused."""

    def __init__(self) -> None:
        self.asked = 0

    async def find(self, image: str) -> Credential:
        self.asked += 1
        return Credential("alice", Secret(f"password {self.asked}"))


async def failure(client: Client, server: FaultyServer, **options: float) -> SourceError:
    """What a read of BLOB's first MiB ends with."""
    with pytest.raises(SourceError) as caught:
        await client.collect(client.registry(server.host), 0, MIB, **options)  # type: ignore[arg-type]
    return caught.value


async def test_a_real_registry_serves_ranges(client: Client, open_registry: DockerRegistry) -> None:
    """Bytes of any range arrive exactly, and its access log agrees with what was counted."""
    blob_id = open_registry.put_blob("counted/blob", BLOB)
    registry = client.registry(open_registry.host, repository="counted/blob")
    for start, end in ((0, MIB), (MIB, 2 * MIB), (1, 2), (len(BLOB) - 5, len(BLOB))):
        got = await client.collect(registry, start, end, blob_id=blob_id)
        assert got == BLOB[start:end]
    log = open_registry.accesses(4, "counted/blob")
    assert registry.traffic.requests == len(log) == 4
    assert registry.traffic.received_bytes == sum(line.body_bytes for line in log)


async def test_a_real_registry_wants_a_password(
    client: Client, basic_registry: DockerRegistry
) -> None:
    """One 401 tells what is wanted; it is counted, and later reads send the login at once."""
    blob_id = basic_registry.put_blob(REPOSITORY, BLOB)
    registry = client.registry(
        basic_registry.host, credential=Credential("alice", Secret("open sesame"))
    )
    assert await client.collect(registry, 0, MIB, blob_id=blob_id) == BLOB[:MIB]
    assert await client.collect(registry, 5, 9, blob_id=blob_id) == BLOB[5:9]
    log = basic_registry.accesses(3, "/blobs/")
    assert [line.status for line in log] == [401, 206, 206]
    assert registry.traffic.requests == 3
    assert registry.traffic.received_bytes == sum(line.body_bytes for line in log)


@pytest.mark.parametrize("credential", [None, Credential("alice", Secret("wrong horse"))])
async def test_a_real_registry_refuses(
    client: Client, basic_registry: DockerRegistry, credential: Credential | None
) -> None:
    """No login, or a wrong one, is a fault of AUTH that says where to log in and no secret."""
    blob_id = basic_registry.put_blob(REPOSITORY, BLOB)
    registry = client.registry(basic_registry.host, credential=credential)
    with pytest.raises(SourceError) as caught:
        await client.collect(registry, 0, 1, blob_id=blob_id)
    assert caught.value.fault is Fault.AUTH
    assert basic_registry.host in str(caught.value) and "horse" not in str(caught.value)


async def test_a_new_password_takes_effect(client: Client, basic_registry: DockerRegistry) -> None:
    """A repository that was refused can be read once the login was mended."""
    blob_id = basic_registry.put_blob(REPOSITORY, BLOB)
    keychain = FixedCredential(Credential("alice", Secret("old")))
    registry = client.registry(basic_registry.host, keychain=keychain)
    with pytest.raises(SourceError):
        await client.collect(registry, 0, 1, blob_id=blob_id)
    keychain.credential = Credential("alice", Secret("open sesame"))
    assert await client.collect(registry, 0, 1, blob_id=blob_id) == BLOB[:1]


async def test_an_unknown_blob(client: Client, open_registry: DockerRegistry) -> None:
    """A 404 is not tried again, and the error names host, blob and status."""
    with pytest.raises(SourceError, match=rf"{open_registry.host}.*5a5a5a5a5a5a.*404.*1 requests"):
        await client.collect(client.registry(open_registry.host), 0, 1)


@pytest.mark.parametrize("blob_id", ["../../etc/passwd", "5A" * 32, "", "5a" * 32 + "/x"])
async def test_a_blob_id_is_a_digest(client: Client, server: FaultyServer, blob_id: str) -> None:
    """A hostile id never becomes a part of a URL."""
    with pytest.raises(SourceError, match="no sha256"):
        await client.collect(client.registry(server.host), 0, 1, blob_id=blob_id)
    assert server.seen == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (answer(200, body=BLOB), "ignored Range"),
        (raw(part_head(1, MIB, len(BLOB)) + BLOB[1:MIB]), "bytes 1-1048575 were sent"),
        (raw(part_head(0, MIB, MIB // 2) + BLOB[:MIB]), "behind its own total"),
        (raw(part_head(0, 9, 9) + BLOB[:9]), "only 9 bytes"),
        (answer(206, {"Content-Type": "multipart/byteranges"}, BLOB[:MIB]), "Content-Range"),
        (answer(206, {"Content-Range": "bytes 0-1048575/*"}, BLOB[:5]), "contradicts"),
        (
            answer(
                206,
                {"Content-Range": "bytes 0-1048575/*", "Content-Encoding": "gzip"},
                BLOB[:MIB],
            ),
            "encoded",
        ),
        (
            raw(
                b"HTTP/1.1 206 X\r\nContent-Range: bytes 0-1048575/*\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n110000\r\n"
                + BLOB[: 17 << 16]
                + b"\r\n0\r\n\r\n"
            ),
            "goes on behind the range",
        ),
        (raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", close=True), "HTTP/0.9"),
    ],
)
async def test_wrong_answers(client: Client, server: FaultyServer, bad: Answer, says: str) -> None:
    """An answer that is not the range is a fault of PROTOCOL, tried once."""
    server.answers = [bad]
    error = await failure(client, server)
    assert error.fault is Fault.PROTOCOL
    assert says in str(error) and server.host in str(error)
    assert len(server.seen) == 1


@pytest.mark.parametrize("filler", [b"X: %s\r\n" % (b"x" * 60_000) * 20, b"X: " + b"x" * (2 << 20)])
async def test_headers_without_end(client: Client, server: FaultyServer, filler: bytes) -> None:
    """Headers are read up to a limit."""
    server.default = raw(b"HTTP/1.1 206 X\r\n" + filler)
    error = await failure(client, server)
    assert "header" in str(error) or "larger than allowed" in str(error)


@pytest.mark.parametrize(
    "bad",
    [
        answer(200, body=BLOB),
        raw(part_head(1, MIB, len(BLOB)) + BLOB[1:MIB]),
        answer(404, body=b"no such blob"),
        answer(500, body=b"sorry"),
    ],
)
async def test_nothing_of_a_wrong_answer_is_fed(
    client: Client, server: FaultyServer, bad: Answer
) -> None:
    """The headers are judged before the body is handed on."""
    server.default = bad
    fed: list[bytes] = []
    with pytest.raises(SourceError):
        await client.registry(server.host).read(
            BLOB_ID, 0, MIB, Priority.DEMAND, lambda view: fed.append(bytes(view)), 20
        )
    assert fed == []


async def test_a_200_with_exactly_the_range(client: Client, server: FaultyServer) -> None:
    """A registry may answer 200 where the range is the whole blob."""
    server.answers = [answer(200, body=BLOB)]
    assert await client.collect(client.registry(server.host), 0, len(BLOB)) == BLOB


async def test_less_than_asked(client: Client, server: FaultyServer) -> None:
    """A registry may send a beginning of the range: the rest is asked for."""
    server.answers = [raw(part_head(0, 10, len(BLOB)) + BLOB[:10])]
    assert await client.collect(client.registry(server.host), 0, MIB) == BLOB[:MIB]
    assert server.seen[1].range == (10, MIB)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_broken_body_goes_on(client: Client, server: FaultyServer, reset: bool) -> None:
    """A transfer that breaks continues where it stopped, each byte once, more often than the
    patience for failures in a row."""
    server.answers = [broken_part(BLOB, 100_000, reset=reset) for _ in range(8)]
    registry = client.registry(server.host)
    assert await client.collect(registry, 7, MIB) == BLOB[7:MIB]
    assert [seen.range[1] for seen in server.seen] == [MIB] * 9
    starts = [seen.range[0] for seen in server.seen]
    assert starts == sorted(starts) and starts[0] == 7
    if not reset:  # a reset may throw away what the client's kernel already had
        assert starts[1] == 100_007


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_passing_trouble(client: Client, server: FaultyServer, status: int) -> None:
    """What may pass is tried again on the same connection, and every try is counted."""
    server.answers = [answer(status, body=b"later"), answer(status, body=b"later")]
    registry = client.registry(server.host)
    assert await client.collect(registry, 0, 9) == BLOB[:9]
    assert client.answer is not None and client.answer.requests == 3
    assert registry.traffic.received_bytes == 5 + 5 + 9


async def test_a_lasting_trouble(client: Client, server: FaultyServer) -> None:
    """Patience ends after its retries, and the error says what happened at last."""
    server.default = answer(503)
    error = await failure(client, server)
    assert error.fault is Fault.ORIGIN and "503 (4 requests)" in str(error)


@pytest.mark.parametrize("status", [400, 404, 405, 416, 501])
async def test_a_refusal_is_final(client: Client, server: FaultyServer, status: int) -> None:
    """What the registry will say again is not asked again."""
    server.default = answer(status)
    error = await failure(client, server)
    assert error.fault is Fault.ORIGIN and len(server.seen) == 1


async def test_forbidden(client: Client, server: FaultyServer) -> None:
    """A 403 without a login is final, nothing of its body is taken, and the next read asks anew."""
    server.answers = [answer(403, body=b"not you")]
    error = await failure(client, server)
    assert error.fault is Fault.AUTH and len(server.seen) == 1
    registry = client.registry(server.host)
    assert await client.collect(registry, 0, 9) == BLOB[:9]
    assert (registry.traffic.requests, registry.traffic.received_bytes) == (1, 9)


@pytest.mark.parametrize("value", ["1", formatdate(time.time() + 3600, usegmt=True)])
async def test_retry_after(client: Client, server: FaultyServer, value: str) -> None:
    """The whole host is left alone for as long as it asked, within the reader's deadline."""
    server.answers = [answer(429, {"Retry-After": value})]
    registry = client.registry(server.host)
    for _ in range(2):
        with pytest.raises(SourceError) as caught:
            await client.collect(registry, 0, 1, deadline_s=0.05)
    assert len(server.seen) == 1
    assert caught.value.fault is Fault.DEADLINE


async def test_hanging_before_the_body(impatient: Client, server: FaultyServer) -> None:
    """A connection that stands still is given up and another one brings the bytes."""
    server.answers = [silence(part_head(0, 9, len(BLOB))), silence()]
    assert await impatient.collect(impatient.registry(server.host), 0, 9) == BLOB[:9]
    assert len(server.seen) == 3


async def test_hanging_within_the_body(impatient: Client, server: FaultyServer) -> None:
    """What came before the silence is not asked for again."""
    server.answers = [silence(part_head(0, 9, len(BLOB)) + BLOB[:4])]
    assert await impatient.collect(impatient.registry(server.host), 0, 9) == BLOB[:9]
    assert server.seen[1].range == (4, 9)


async def test_the_deadline_ends_it(client: Client, server: FaultyServer) -> None:
    """A registry that never answers costs the reader its deadline and no more."""
    server.default = silence()
    error = await failure(client, server, deadline_s=0.05)
    assert error.fault is Fault.DEADLINE and "0.05 s" in str(error)


async def test_every_mib_has_the_whole_deadline(client: Client, server: FaultyServer) -> None:
    """A long range on a slow link takes longer than the deadline, and arrives."""
    server.default = slow_part(BLOB, MIB, 0.4)
    got = await client.collect(client.registry(server.host), 0, 3 * MIB, deadline_s=0.9)
    assert got == BLOB[: 3 * MIB]


async def test_a_trickle_does_not_hold_off_the_deadline(
    client: Client, server: FaultyServer
) -> None:
    """A server that sends a little now and then, too little, is given up."""
    server.default = slow_part(BLOB, MIB // 8, 0.1)
    error = await failure(client, server, deadline_s=0.3)
    assert error.fault is Fault.DEADLINE
    assert len(server.seen) == 1


async def test_the_deadline_remembers_why(client: Client, server: FaultyServer) -> None:
    """Where tries failed before the deadline, the last failure is the error's."""
    server.answers = [answer(503)]
    server.default = silence()
    error = await failure(client, server, deadline_s=0.1)
    assert error.fault is Fault.ORIGIN and "503" in str(error)


async def test_nobody_listens(client: Client, unused_tcp_port: int) -> None:
    """A refused connection is tried again, is no request, and the error says whom to look for."""
    registry = client.registry(f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(SourceError, match=r"can be reached") as caught:
        await client.collect(registry, 0, 1)
    assert caught.value.fault is Fault.NETWORK
    assert registry.traffic.requests == 0


async def test_a_401_in_the_middle(client: Client, server: FaultyServer) -> None:
    """A login that ends between two parts of a blob is renewed, as often as it takes; what came
    before is not asked for again."""
    refused = answer(401, {"WWW-Authenticate": 'Basic realm="x"'})
    pieces = [broken_part(BLOB, 100_000), refused]
    server.answers = [refused, *pieces * 5]
    keychain = Changing()
    registry = client.registry(server.host, keychain=keychain)
    assert await client.collect(registry, 0, MIB) == BLOB[:MIB]
    starts = [seen.range[0] for seen in server.seen]
    assert starts == sorted(starts) and starts[-1] == 500_000
    assert registry.traffic.requests == 1 + 10 + 1
    assert registry.traffic.received_bytes == MIB
    assert keychain.asked == 6


async def test_a_name_nobody_knows(client: Client) -> None:
    """A failure of DNS is the network's, is no request, and the error has the name."""
    registry = client.registry("registry.invalid")
    with pytest.raises(SourceError, match=r"registry\.invalid.*\(0 requests\)") as caught:
        await client.collect(registry, 0, 1, deadline_s=3)
    assert caught.value.fault in (Fault.NETWORK, Fault.DEADLINE)
    assert registry.traffic.requests == 0


async def test_cancelling_closes_the_connection(client: Client, server: FaultyServer) -> None:
    """A reader that goes away ends its transfer at once, and its request is counted."""
    came = asyncio.Event()
    server.default = raw(part_head(0, MIB, len(BLOB)) + b"x")
    registry = client.registry(server.host)
    reading = asyncio.create_task(
        registry.read(BLOB_ID, 0, MIB, Priority.DEMAND, lambda _: came.set(), 20)
    )
    await came.wait()
    reading.cancel()
    await server.left.wait()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert registry.traffic.requests == 1


async def test_what_feed_raises(client: Client, server: FaultyServer) -> None:
    """An error of the consumer's is the reader's, unchanged, and never a reason to try again."""

    def feed(_: memoryview) -> None:
        raise TimeoutError("of the consumer")

    registry = client.registry(server.host)
    with pytest.raises(TimeoutError, match="of the consumer"):
        await registry.read(BLOB_ID, 0, MIB, Priority.DEMAND, feed, 20)
    assert len(server.seen) == 1
    assert await client.collect(registry, 0, MIB) == BLOB[:MIB]


async def test_many_readers_at_once(client: Client, open_registry: DockerRegistry) -> None:
    """More readers than connections all get their own bytes."""
    blob_id = open_registry.put_blob(REPOSITORY, BLOB)
    registry = client.registry(open_registry.host)
    ranges = [(start, start + 65_536) for start in range(0, len(BLOB), 65_536)]
    got = await asyncio.gather(
        *(client.collect(registry, *piece, blob_id=blob_id) for piece in ranges)
    )
    assert b"".join(got) == BLOB
    assert registry.traffic.requests == len(ranges)


async def test_a_redirect_is_followed_and_remembered(
    client: Client, server: FaultyServer, other_server: FaultyServer
) -> None:
    """The registry is asked once per blob, by one reader even when many come at once."""
    target = f"http://{other_server.host}/store?sig=hush"
    server.default = answer(307, {"Location": target}, b"<a>moved</a>")
    registry = client.registry(server.host)
    reads = (client.collect(registry, 0, 9) for _ in range(5))
    assert await asyncio.gather(*reads) == [BLOB[:9]] * 5
    assert await client.collect(registry, 3, 5) == BLOB[3:5]
    assert len(server.seen) == 1
    assert [seen.target for seen in other_server.seen] == ["/store?sig=hush"] * 6
    assert registry.traffic.requests == 7
    assert registry.traffic.received_bytes == 12 + 5 * 9 + 2


async def test_a_login_stays_at_its_origin(
    client: Client, server: FaultyServer, other_server: FaultyServer
) -> None:
    """Another port is another origin: no Authorization goes there; a relative location keeps it."""
    server.answers = [
        answer(401, {"WWW-Authenticate": 'Basic realm="x"'}),
        answer(302, {"Location": "../../elsewhere"}),
        answer(307, {"Location": f"http://{other_server.host}/store"}),
    ]
    registry = client.registry(server.host, credential=Credential("alice", Secret("hush")))
    assert await client.collect(registry, 0, 9) == BLOB[:9]
    assert ["authorization" in seen.headers for seen in server.seen] == [False, True, True]
    assert server.seen[2].target == "/v2/library/elsewhere"
    assert "authorization" not in other_server.seen[0].headers
    assert other_server.seen[0].range == (0, 9)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_stale_target(
    client: Client, server: FaultyServer, other_server: FaultyServer, status: int
) -> None:
    """A target that is no longer good is asked for anew, once per read."""
    server.default = answer(307, {"Location": f"http://{other_server.host}/store?sig=hush"})
    registry = client.registry(server.host)
    await client.collect(registry, 0, 9)
    other_server.answers = [answer(status)]
    assert await client.collect(registry, 0, 9) == BLOB[:9]
    assert len(server.seen) == 2
    other_server.default = answer(status)
    with pytest.raises(SourceError) as caught:
        await client.collect(registry, 0, 9)
    assert str(status) in str(caught.value) and "hush" not in str(caught.value)
    assert other_server.host in str(caught.value)


async def test_a_target_that_says_when_it_ends(
    client: Client, server: FaultyServer, other_server: FaultyServer
) -> None:
    """A signature that ends within the margin is not used for a second read."""
    target = f"http://{other_server.host}/store?Expires={int(time.time())}"
    server.default = answer(307, {"Location": target})
    registry = client.registry(server.host)
    for _ in range(2):
        assert await client.collect(registry, 0, 9) == BLOB[:9]
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "http://user:hush@127.0.0.1/", "gopher://x/", "http://a b/", "//[", ""],
)
async def test_a_hostile_redirect(client: Client, server: FaultyServer, location: str) -> None:
    """Only plain http and https are followed, and nothing of the target is shown."""
    server.answers = [answer(307, {"Location": location})]
    server.default = answer(500)
    error = await failure(client, server)
    assert error.fault in (Fault.PROTOCOL, Fault.ORIGIN) and "hush" not in str(error)


async def test_a_redirect_in_circles(client: Client, server: FaultyServer) -> None:
    """Hops are counted."""
    server.default = answer(302, {"Location": "/again"})
    error = await failure(client, server)
    assert error.fault is Fault.PROTOCOL and len(server.seen) == 6


async def test_scouts_that_fail_do_not_queue(client: Client, server: FaultyServer) -> None:
    """Readers of an unknown blob wait for the first one's answer, not for its patience."""
    server.default = answer(500)
    patience = Patience(retries=1, pause_s=0.4, pause_limit_s=0.4)
    registry = client.registry(server.host, patience=patience)
    began = time.monotonic()
    ends = await asyncio.gather(
        *(client.collect(registry, 0, 1) for _ in range(8)), return_exceptions=True
    )
    assert all(isinstance(end, SourceError) for end in ends)
    assert time.monotonic() - began < 3

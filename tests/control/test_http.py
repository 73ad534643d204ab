"""The HTTP server: framing, limits, connections, errors; real unix sockets."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fscached import config
from fscached.control import api, http
from fscached.control.succession import Succession
from fscached.failure import Failure
from tests.control.conftest import StandInService
from tests.fill.conftest import until

Exchange = Callable[..., Coroutine[Any, Any, bytes]]
GET = b"GET /api/v1/daemon HTTP/1.1\r\nHost: unix\r\n\r\n"
PUT = b"PUT /api/v1/daemon/exit HTTP/1.1\r\nHost: unix\r\nContent-Length: 0\r\n\r\n"


async def reply_of(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes], bytes]:
    """One reply: status, headers in lower case, body."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(b": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
    return int(first.split()[1]), headers, body


@pytest_asyncio.fixture
async def connection(
    server: http.Server, socket_path: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's connection to the API."""
    reader, writer = await asyncio.open_unix_connection(socket_path)
    yield reader, writer
    writer.close()


@pytest.mark.asyncio
async def test_replies_look_like_nydusds(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """200 with JSON, 204 with nothing, on one connection that stays open."""
    reader, writer = connection
    for request, wanted in [(GET, 200), (PUT, 204), (GET, 200)]:
        writer.write(request)
        status, headers, body = await reply_of(reader)
        assert status == wanted
        assert headers[b"server"] == b"Nydus API"
        assert headers[b"connection"] == b"keep-alive"
        assert headers[b"content-type"] == b"application/json"
        assert bool(body) == (status == 200)
        assert (b"content-length" in headers) == (status == 200)


@pytest.mark.asyncio
async def test_who_is_killed_stops_listening_before_its_connections_end(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """The kernel closes the highest descriptor first, and a snapshotter connects anew as soon as
    its connection ends: to a daemon that is still dying, and then its failover fails."""
    highest = max(int(number) for number in os.listdir("/proc/self/fd"))
    with socket.socket(fileno=os.dup(highest)) as found:
        assert found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


@pytest.mark.asyncio
async def test_it_answers_where_another_does(server: http.Server, tmp_path: Path) -> None:
    """And withdraws from there at its end, unless somebody else has come."""
    place = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place))
        other.listen()
        await server.answer_at(str(place))
        reader, writer = await asyncio.open_unix_connection(place)
        writer.write(GET)
        assert (await reply_of(reader))[0] == 200
        writer.close()
        await server.close()
        assert not place.exists()


@pytest.mark.asyncio
async def test_who_asks_between_two_daemons_is_answered_by_the_second(
    life: Succession, service: StandInService, tmp_path: Path
) -> None:
    """Where a socket unit listens: its path stays, and its queue."""
    place = str(tmp_path / "lent.sock")
    handler = api.routes(life, lambda: service)
    with socket.socket(socket.AF_UNIX) as unit:
        unit.bind(place)
        unit.listen()
        first, second = (http.Server(place, handler, config.Api()) for _ in range(2))
        await first.start(unit.dup(), lent=True)
        await first.close()
        reader, writer = await asyncio.open_unix_connection(place)
        writer.write(GET)
        await second.start(unit.dup(), lent=True)
        assert (await reply_of(reader))[0] == 200
        writer.close()
        await second.close()


@pytest.mark.asyncio
async def test_pipelined_requests_are_answered_in_order(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Several requests in one write."""
    reader, writer = connection
    writer.write(GET + PUT + GET)
    assert [(await reply_of(reader))[0] for _ in range(3)] == [200, 204, 200]


@pytest.mark.asyncio
async def test_the_socket_is_for_root_alone(server: http.Server, socket_path: str) -> None:
    """Mode 0600, and no other name left beside it."""
    assert stat.S_IMODE(os.stat(socket_path).st_mode) == 0o600
    assert os.listdir(Path(socket_path).parent) == ["api.sock"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("raw", "status", "what"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host"),
        (b"nonsense\r\n\r\n", 400, "BadRequest"),
        (b"GET /x HTTP/1.1\r\nHost: unix\r\n\r\n", 404, "NoRoute: there is no /x"),
        (b"DELETE /metrics HTTP/1.1\r\nHost: unix\r\n\r\n", 400, "/metrics takes GET"),
        (b"GET /" + b"x" * 4096 + b" HTTP/1.1\r\nHost: unix\r\n\r\n", 431, "BadRequest"),
        (b"GET /?" + b"a=b&" * 40 + b" HTTP/1.1\r\nHost: unix\r\n\r\n", 400, "QueryString"),
        (
            b"PUT /api/v2/images HTTP/1.1\r\nHost: u\r\nContent-Length: 9999\r\n\r\n" + b"x" * 9999,
            413,
            "more than 8192 bytes",
        ),
        (
            b"PUT /api/v2/images HTTP/1.1\r\nHost: u\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"1000\r\n%s\r\n" % (b"x" * 4096) * 3,
            413,
            "more than 8192 bytes",
        ),
        (b"PUT /x HTTP/1.1\r\nHost: u\r\nContent-Length: 9\r\n\r\nxx", 400, "BadRequest"),
    ],
)
async def test_every_error_is_json(
    server: http.Server, exchange: Exchange, raw: bytes, status: int, what: str
) -> None:
    """Whatever is wrong: a status and an object with code and message."""
    head, _, body = (await exchange(raw)).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["code"] == "UNDEFINED"
    assert what in json.loads(body)["message"]


@given(raw=st.binary(max_size=200))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_can_break_the_server(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After any garbage the next connection is served as ever."""

    async def scenario() -> None:
        path = str(tmp_path_factory.mktemp("s") / "s")
        server = http.Server(path, _hello, config.Api(header_limit_bytes=1024))
        await server.start()
        try:
            for request in (raw, GET):
                reader, writer = await asyncio.open_unix_connection(path)
                writer.write(request)
                writer.write_eof()
                reply = await reader.read()
                writer.close()
            assert reply.endswith(b"hello")
        finally:
            await server.close()

    asyncio.run(scenario())


async def _hello(request: http.Request) -> http.Reply:
    return http.Reply(b"hello", "text/plain")


@pytest.mark.asyncio
async def test_a_head_request_gets_no_body(server: http.Server, exchange: Exchange) -> None:
    """HEAD is answered like any wrong method, but its reply ends with the head."""
    head, _, body = (await exchange(GET.replace(b"GET", b"HEAD"))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert body == b""


@pytest.mark.asyncio
async def test_a_client_that_waits_for_continue_is_told_to_go_on(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """curl sends `Expect: 100-continue` before larger bodies."""
    reader, writer = connection
    body = b'{"log_level": "loud"}'
    writer.write(b"PUT /api/v1/daemon HTTP/1.1\r\nHost: u\r\nExpect: 100-continue\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n" % len(body))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
    writer.write(body)
    assert (await reply_of(reader))[0] == 400


@pytest.mark.asyncio
async def test_a_slow_request_stops_no_other(
    service: Any, server: http.Server, exchange: Exchange
) -> None:
    """While one image is pulled, other connections are answered."""
    pulled = asyncio.Event()
    service.pull = pulled.wait
    body = b'{"reference": "registry.test/app:1"}'
    put = b"PUT /api/v2/images HTTP/1.1\r\nHost: u\r\nContent-Length: %d\r\n\r\n" % len(body)
    slow = asyncio.create_task(exchange(put + body))
    assert b"RUNNING" in await exchange(GET)
    assert not slow.done()
    pulled.set()
    assert b"200 OK" in await slow


@pytest.mark.asyncio
async def test_silent_connections_stay_open_up_to_a_limit(
    server: http.Server, socket_path: str
) -> None:
    """The fifth of at most four is told so; one of the four still works afterwards."""
    silent = [await asyncio.open_unix_connection(socket_path) for _ in range(4)]
    reader, writer = await asyncio.open_unix_connection(socket_path)
    status, _, body = await reply_of(reader)
    assert (status, b"more than 4 connections" in body) == (503, True)
    assert await reader.read() == b""
    writer.close()
    silent[0][1].write(GET)
    assert (await reply_of(silent[0][0]))[0] == 200
    for _, open_writer in silent:
        open_writer.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("begun", [b"GET /api", GET[:-2], PUT.replace(b"th: 0", b"th: 9") + b"x"])
async def test_a_request_that_does_not_go_on_makes_room(
    server: http.Server, socket_path: str, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    """Silence before it is for ever, silence within it is not."""
    silent = await asyncio.open_unix_connection(socket_path)
    monkeypatch.setattr(http, "REQUEST_LIMIT_S", 0.05)
    reader, writer = await asyncio.open_unix_connection(socket_path)
    writer.write(begun)
    status, _, body = await reply_of(reader)
    assert (status, b"not all here after 0.05 s" in body) == (408, True)
    assert await reader.read() == b""
    silent[1].write(GET)
    assert (await reply_of(silent[0]))[0] == 200
    for each in (writer, silent[1]):
        each.close()


@pytest.mark.asyncio
async def test_a_client_that_takes_no_reply_is_left(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be sent does not stay in memory."""
    monkeypatch.setattr(http, "REQUEST_LIMIT_S", 0.05)

    async def handler(request: http.Request) -> http.Reply:
        return http.Reply(b"x" * (8 << 20))

    server = http.Server(socket_path, handler, config.Api())
    await server.start()
    reader, writer = await asyncio.open_unix_connection(socket_path, limit=1 << 10)
    writer.write(GET)
    await until(lambda: bool(reader._buffer) and not server._connections)  # type: ignore[attr-defined]
    with pytest.raises(asyncio.IncompleteReadError):
        await reader.readexactly(8 << 20)
    writer.close()
    await server.close()


@pytest.mark.asyncio
async def test_a_bug_becomes_a_500_and_a_trace_in_the_log(
    service: Any, server: http.Server, exchange: Exchange, caplog: pytest.LogCaptureFixture
) -> None:
    """The reply says where to look, not what was in memory."""

    def broken() -> None:
        raise KeyError("hunter2")

    service.status = broken
    reply = await exchange(GET.replace(b"/v1/daemon", b"/v2/status"))
    assert b"500 Internal Server Error" in reply
    assert b"hunter2" not in reply
    assert "a bug of ours: GET /api/v2/status" in caplog.text


@pytest.mark.asyncio
async def test_a_dead_predecessors_socket_is_replaced(socket_path: str) -> None:
    """A socket file nobody listens on is no obstacle."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(socket_path)
    server = http.Server(socket_path, _hello, config.Api())
    await server.start()
    reader, writer = await asyncio.open_unix_connection(socket_path)
    writer.write(GET)
    assert (await reply_of(reader))[2] == b"hello"
    writer.close()
    await server.close()
    assert os.listdir(Path(socket_path).parent) == []


@pytest.mark.asyncio
async def test_a_living_daemon_is_not_pushed_aside(server: http.Server, socket_path: str) -> None:
    """A second server on the same path fails and says what to do."""
    with pytest.raises(Failure, match="another daemon listens there: stop it, or set another"):
        await http.Server(socket_path, _hello, config.Api()).start()


@pytest.mark.asyncio
async def test_a_successors_socket_is_left_alone(socket_path: str, tmp_path: Path) -> None:
    """A daemon that ends removes only its own socket file."""
    server = http.Server(socket_path, _hello, config.Api())
    await server.start()
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(tmp_path / "new"))
        os.rename(tmp_path / "new", socket_path)
    await server.close()
    assert os.listdir(tmp_path) == ["api.sock"]


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/" + "x" * 120, "/nowhere/api.sock"])
async def test_a_path_that_cannot_be_a_socket_is_named(path: str) -> None:
    """Too long, or in no directory."""
    with pytest.raises(Failure, match=r"too long for a socket|cannot listen: No such file"):
        await http.Server(path, _hello, config.Api()).start()


@pytest.mark.asyncio
async def test_close_lets_a_reply_go_out_and_ends_silent_connections(socket_path: str) -> None:
    """`PUT exit` gets its 204 although the daemon ends because of it."""
    entered, leave = asyncio.Event(), asyncio.Event()

    async def handler(request: http.Request) -> http.Reply:
        entered.set()
        await leave.wait()
        return http.Reply(b"last")

    server = http.Server(socket_path, handler, config.Api())
    await server.start()
    silent, silent_writer = await asyncio.open_unix_connection(socket_path)
    reader, writer = await asyncio.open_unix_connection(socket_path)
    writer.write(GET)
    await entered.wait()
    closing = asyncio.create_task(server.close())
    assert await silent.read() == b""
    leave.set()
    assert (await reply_of(reader))[2] == b"last"
    await closing
    silent_writer.close()
    writer.close()


@pytest.mark.asyncio
async def test_close_does_not_wait_for_ever(
    socket_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that never ends is cancelled after the grace."""
    monkeypatch.setattr(http, "CLOSE_GRACE_S", 0.01)
    entered = asyncio.Event()

    async def handler(request: http.Request) -> http.Reply:
        entered.set()
        await asyncio.Event().wait()
        return http.Reply()

    server = http.Server(socket_path, handler, config.Api())
    await server.start()
    reader, writer = await asyncio.open_unix_connection(socket_path)
    writer.write(GET)
    await entered.wait()
    await server.close()
    assert await reader.read() == b""
    writer.close()


def test_it_works_on_uvloop_too(tmp_path: Path) -> None:
    """The daemon runs on uvloop."""

    async def scenario() -> bytes:
        path = str(tmp_path / "u")
        server = http.Server(path, _hello, config.Api())
        await server.start()
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(GET)
        _, _, body = await reply_of(reader)
        await server.close()
        assert await reader.read() == b""
        writer.close()
        return body

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scenario()) == b"hello"

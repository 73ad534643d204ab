"""HTTP/1.1 on a unix socket: h11 knows the protocol, asyncio moves the bytes.

nydus-snapshotter keeps one connection open and silent for as long as the daemon lives and takes its
end for the daemon's death: no connection is ever closed for being idle. It reads the JSON
`{"code", "message"}` out of every reply that is not 200 or 204, so every error carries one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

import h11
import msgspec

from fscached.config import Api as Limits
from fscached.control.listener import highest, listen, replaced
from fscached.control.messages import ErrorBody

log = logging.getLogger(__name__)

SERVER: Final = b"Nydus API"
JSON: Final = "application/json"
QUERY_FIELDS_LIMIT: Final = 16
CLOSE_GRACE_S: Final = 1.0
REQUEST_LIMIT_S: Final = 30.0
"""For a request that has begun, and for a reply that nobody takes; to be silent is no request."""
_READ_BYTES: Final = 1 << 12  # by how much a head may exceed its limit
# From 3.13 on a server that ends unlinks the path of its socket, whoever made it.
_WITHDRAWN_HERE: Final[dict[str, Any]] = (
    {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
)


class Request(NamedTuple):
    """A whole request. `query` has decoded names and values; of a repeated name, the last."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes


class Reply(NamedTuple):
    """A whole reply; without a body it is 204."""

    body: bytes = b""
    content_type: str = JSON
    status: int = HTTPStatus.OK

    @property
    def code(self) -> HTTPStatus:
        """The status that goes out."""
        return HTTPStatus(self.status if self.body else HTTPStatus.NO_CONTENT)


class ApiError(Exception):
    """A request that is refused or failed, with the status and the `code` of its reply."""

    def __init__(self, status: HTTPStatus, message: str, code: str = "UNDEFINED") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


Handler = Callable[[Request], Awaitable[Reply]]
"""Answers one request, or raises ApiError. Many run at once, one per connection."""


class Server:
    """Serves one handler on one unix socket, mode 0600."""

    def __init__(self, path: str, handler: Handler, limits: Limits) -> None:
        self._path = path
        self._handler = handler
        self._limits = limits
        self._inodes: dict[str, int] = {}
        self._servers: list[asyncio.AbstractServer] = []
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    async def start(self, listener: socket.socket | None = None, lent: bool = False) -> None:
        """Answer, on a listener that is there already or a new one. One that is `lent` stays where
        it is when this ends: whoever made it has the next daemon answer there.

        Raises Failure: somebody else listens there, or the path cannot be a socket.
        """
        await self._serve(highest(listener) if listener else listen(self._path))
        if not lent:
            self._inodes[self._path] = os.stat(self._path).st_ino

    async def answer_at(self, path: str) -> None:
        """Answer there as well, in the place of whoever did. Raises Failure."""
        await self._serve(replaced(path))
        self._inodes[path] = os.stat(path).st_ino

    async def _serve(self, listener: socket.socket) -> None:
        serving = asyncio.start_unix_server(
            self._connected, sock=listener, backlog=socket.SOMAXCONN, **_WITHDRAWN_HERE
        )
        self._servers.append(await serving)

    async def close(self) -> None:
        """Stop listening, let replies under way go out for CLOSE_GRACE_S, end all connections."""
        for server in self._servers:
            server.close()
        self._withdraw()
        for task, connection in self._connections.items():
            connection.ending = True
            if not connection.busy:
                task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=CLOSE_GRACE_S)
        for task in (left := list(self._connections)):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _withdraw(self) -> None:
        # A successor may have put its own socket there already.
        for path, inode in self._inodes.items():
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(reader, writer, self._handler, self._limits)
        refused = len(self._connections) >= self._limits.connections
        self._connections[task] = connection
        try:
            await (connection.refuse() if refused else connection.serve())
        except OSError:  # the other side is gone, or takes nothing
            writer.transport.abort()
        except asyncio.CancelledError:
            pass  # this daemon is about to be
        finally:
            del self._connections[task]
            writer.close()


class _Connection:
    """One connection: requests one after another, each answered before the next is read."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handler: Handler,
        limits: Limits,
    ) -> None:
        self.busy = False
        self.ending = False
        self._reader = reader
        self._writer = writer
        self._handler = handler
        self._limits = limits
        self._http = h11.Connection(h11.SERVER, limits.header_limit_bytes)

    async def serve(self) -> None:
        """Answer requests until the other side closes or breaks the protocol, or until the reply
        that is under way when `ending` is set."""
        while await self._exchange():
            self._http.start_next_cycle()
            self.busy = False

    async def refuse(self) -> None:
        """Answer that there are too many connections, and end."""
        error = ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"more than {self._limits.connections} connections: close some, or raise [api] "
            "connections in the configuration",
        )
        self.ending = True
        await self._send(_error_reply(error))

    async def _exchange(self) -> bool:
        """One request and its reply; whether another may follow."""
        if not self._http.trailing_data[0]:
            self._http.receive_data(await self._reader.read(_READ_BYTES))
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                request = await self._request()
            if request is None:
                return False
        except h11.RemoteProtocolError as error:
            return await self._refuse(HTTPStatus(error.error_status_hint), str(error))
        except TimeoutError:
            what = f"a request that was not all here after {REQUEST_LIMIT_S:g} s"
            return await self._refuse(HTTPStatus.REQUEST_TIMEOUT, what)
        except ApiError as error:
            self.ending = True
            await self._send(_error_reply(error))
            return False
        reply = await self._answer(request)
        what = " ".join((request.method, request.path, *request.query.values()))
        log.debug("asked", extra={"request": what, "status": int(reply.code)})
        await self._send(reply, head_only=request.method == "HEAD")
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _request(self) -> Request | None:
        """The next one; None when the other side has closed."""
        head = await self._event()
        if isinstance(head, h11.ConnectionClosed):
            return None
        assert isinstance(head, h11.Request)
        self.busy = True
        return _request(head, await self._body())

    async def _refuse(self, status: HTTPStatus, why: str) -> bool:
        self.ending = True
        await self._send(_error_reply(ApiError(status, f"BadRequest: {why}")))
        return False

    async def _event(self) -> h11.Event:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                await self._more()
            else:
                assert not isinstance(event, type)
                return event

    async def _more(self) -> None:
        if self._http.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            self._writer.write(self._http.send(go_on) or b"")
        self._http.receive_data(await self._reader.read(_READ_BYTES))

    async def _body(self) -> bytes:
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > self._limits.body_limit_bytes:
                raise ApiError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"BadRequest: a body of more than {self._limits.body_limit_bytes} bytes",
                )
        return bytes(body)

    async def _answer(self, request: Request) -> Reply:
        try:
            return await self._handler(request)
        except ApiError as error:
            return _error_reply(error)
        except Exception:
            log.exception("a bug of ours: %s %s", request.method, request.path)
            message = f"a bug in {request.method} {request.path}: the daemon's log has the trace"
            return _error_reply(ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message))

    async def _send(self, reply: Reply, *, head_only: bool = False) -> None:
        has_body = bool(reply.body)
        headers = [
            (b"Server", SERVER),
            (b"Connection", b"close" if self.ending else b"keep-alive"),
            (b"Content-Type", reply.content_type.encode("ascii")),
        ]
        if has_body:
            headers.append((b"Content-Length", str(len(reply.body)).encode("ascii")))
        reason = reply.code.phrase.encode("ascii")
        events: list[h11.Event] = [
            h11.Response(status_code=reply.code, headers=headers, reason=reason),
            h11.EndOfMessage(),
        ]
        if has_body and not head_only:
            events.insert(1, h11.Data(data=reply.body))
        self._writer.write(b"".join(self._http.send(event) or b"" for event in events))
        async with asyncio.timeout(REQUEST_LIMIT_S):
            await self._writer.drain()


def _error_reply(error: ApiError) -> Reply:
    body = msgspec.json.encode(ErrorBody(error.code, str(error)))
    return Reply(body, status=error.status)


def _request(head: h11.Request, body: bytes) -> Request:
    target = head.target.decode("ascii")
    path, _, query = target.partition("?")
    try:
        fields = parse_qsl(query, keep_blank_values=True, max_num_fields=QUERY_FIELDS_LIMIT)
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"QueryString: {error}") from None
    return Request(head.method.decode("ascii"), unquote(path), dict(fields), body)

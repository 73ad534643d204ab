"""A stand-in for Dragonfly's dfdaemon and scheduler, since neither can be installed here.

It imitates what is documented of the Rust client (v1.5.1 unless a switch says otherwise) and of the
Go daemon (v2.0.9): their listeners, headers, statuses, pieces and quirks. Two things are simpler
than the real ones: pieces go from peer to peer by HTTP, and the scheduler decides for each piece
what the real one decides for each task: who asks first for a piece that nobody has or fetches is
sent to the origin, and all others get up to three parents. Nothing else keeps a byte from being
fetched twice. Pieces are kept in memory.

The standard library alone is used; `python dfdaemon.py --help` says how to run one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import ssl
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

PIECE_BYTES = 4 << 20
PIECE_LIMIT_BYTES = 64 << 20
PARENTS_LIMIT = 3
CHILDREN = 4
BUFFER_BYTES = 1 << 20
HEAD_LIMIT_BYTES = 64 << 10

# Query keys that the Rust client leaves out of a task's identity: the signatures of stores.
FILTERED = frozenset(
    {
        *(
            f"X-{store}-{what}"
            for store in ("Amz", "Goog")
            for what in ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature")
        ),
        *("X-Amz-Security-Token", "X-Amz-User-Agent", "X-Obs-Date", "X-Obs-Security-Token"),
        *("OSSAccessKeyId", "AccessKeyId", "Expires", "Signature", "SecurityToken", "ns"),
        *(f"q-{what}" for what in ("sign-algorithm", "ak", "sign-time", "key-time", "header-list")),
        *("q-url-param-list", "q-signature", "x-cos-security-token"),
    }
)
# What belongs to one connection, or to the body as it was sent on it.
HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"}
    | {"content-length", "content-range", "transfer-encoding"}
)


@dataclass(frozen=True)
class Behaviour:
    """What a site configures, and what differs between versions."""

    dialect: str = "rust"
    rules: tuple[str, ...] = (r"blobs/sha256.*",)
    """proxy.rules: without one that matches, only X-Dragonfly-Use-P2P makes a request P2P's."""
    use_tls: bool = False
    """Of the rules: origins are spoken to by https, whatever the request's scheme is."""
    registry: str = "https://index.docker.io"
    prefetch: bool = False
    """proxy.prefetch (Rust), download.prefetch (Go)."""
    disable_back_to_source: bool = False
    small_to_origin: bool = True
    """Since v1.4.1: ranges, or blobs, of up to 4 MiB go to the origin without a question."""
    scheduling_policy: bool = False
    """Since v1.5.3: X-Dragonfly-Scheduling-Policy: always has small ranges scheduled too."""
    partial_status: int = 206
    """200 before v1.3.11, with a Content-Range all the same."""
    aborts: bool = True
    """Since v1.4.6 what fails within a body resets the connection; before, the body was short."""
    checks_whole_answers: bool = True
    """Since v1.4.7 a 200 to a ranged request is an error, but for the first piece."""
    rate_limit: int = 4000
    """Requests per second; more get 429."""
    blocked: tuple[str, ...] = ()
    basic_auth: str = ""
    """`Basic ...` that has to be in Authorization (Rust) or Proxy-Authorization (Go)."""
    whitelist: tuple[str, ...] = ()
    """Go: hosts that may be asked through the proxy; empty: all."""
    concurrent_pieces: int = 8
    prefetch_wait_s: float = 1.0
    redirect_ttl_s: float = 600.0
    piece_timeout_s: float = 360.0
    seed: bool = False
    address: str = "127.0.0.1"
    hostname: str = "dfdaemon"


@dataclass
class Faults:
    """What goes wrong on demand."""

    breaks_after_pieces: int | None = None
    """The body ends after so many pieces."""
    hangs_after_pieces: int | None = None
    lie: Callable[[int, bytes], bytes] | None = None
    """Makes other bytes of those at an offset."""
    answers: deque[tuple[int, dict[str, str], bytes]] = field(default_factory=deque)
    """Given to the next requests instead of what they ask for."""


class Seen(NamedTuple):
    """A request as it came; header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]


class Trouble(Exception):
    """An answer that is no blob. `kind` is whose fault it is, as X-Dragonfly-Error-Type says."""

    def __init__(
        self, status: int, kind: str, text: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text or f"{status} {kind}")
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})


# HTTP, as much as is needed of it.


class Head(NamedTuple):
    """First line, split in three, and headers; names in lower case."""

    first: list[str]
    headers: dict[str, str]

    @property
    def status(self) -> int:
        return int(self.first[1])


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return None
    first, *lines = text.rstrip("\r\n").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        key, value = name.strip().lower(), value.strip()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return Head(first.split(" ", 2), headers)


def head_bytes(first: str, headers: Mapping[str, str]) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def read_body(reader: asyncio.StreamReader, head: Head) -> bytes:
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        body = bytearray()
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return bytes(body)
    if "content-length" in head.headers:
        return await reader.readexactly(int(head.headers["content-length"]))
    return await reader.read()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Http:
    """A client that keeps connections; TLS of origins is not verified, as the daemons do by
    default."""

    def __init__(self) -> None:
        self._idle: dict[
            tuple[str, int, bool], list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        ] = {}
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Answer:
        """Raises OSError or EOFError when the connection breaks."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if tls else 80)
        path = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        kept = {name: value for name, value in headers.items() if name.lower() not in HOP}
        kept |= {"host": parts.netloc} | ({"content-length": str(len(body))} if body else {})
        request = head_bytes(f"{method} {path} HTTP/1.1", kept) + body
        idle = self._idle.setdefault((host, port, tls), [])
        while True:
            again = bool(idle)
            reader, writer = (
                idle.pop()
                if idle
                else await asyncio.open_connection(
                    host, port, ssl=self._tls if tls else None, limit=BUFFER_BYTES
                )
            )
            whole = False
            try:
                writer.write(request)
                await writer.drain()
                head = await read_head(reader)
                if head is None:
                    if again:
                        continue  # a kept connection that the server had closed
                    raise EOFError(f"{host}:{port} closed the connection")
                bodiless = method == "HEAD" or head.status in (204, 304)
                answer = Answer(
                    head.status, head.headers, b"" if bodiless else await read_body(reader, head)
                )
                whole = bodiless or bool({"content-length", "transfer-encoding"} & {*head.headers})
                whole = whole and head.headers.get("connection", "").lower() != "close"
                return answer
            finally:
                if whole:
                    idle.append((reader, writer))
                else:
                    writer.close()

    def close(self) -> None:
        for connections in self._idle.values():
            for _, writer in connections:
                writer.close()
        self._idle.clear()


# Who has which piece.


class Schedule(NamedTuple):
    """For each wanted piece its parents' upload addresses; none: the origin."""

    parents: dict[int, list[str]]


class Scheduling(Protocol):
    async def register(
        self, task: str, host: str, pieces: list[int], blocked: list[str], seeded: bool
    ) -> Schedule: ...
    async def has(self, task: str, host: str, piece: int) -> None: ...
    async def lost(self, task: str, host: str, piece: int) -> None: ...


@dataclass
class Holder:
    """A peer that has a piece, or fetches it, and how often it was made a parent."""

    children: int = 0
    has: bool = False


class Scheduler:
    """Knows who has or fetches which piece of a task. Hosts are upload addresses."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], dict[str, Holder]] = {}
        """By task and piece, in the order in which they asked."""
        self._seeds: list[str] = []
        self.to_source: Counter[str] = Counter()
        """Pieces, by task, that somebody was sent to the origin for."""

    def seed(self, host: str) -> None:
        """A seed peer announces itself."""
        if host not in self._seeds:
            self._seeds.append(host)

    async def register(
        self, task: str, host: str, pieces: list[int], blocked: list[str], seeded: bool
    ) -> Schedule:
        """A peer wants pieces. `blocked` parents have failed it; with `seeded` a piece nobody has
        is fetched by a seed peer, if there is one."""
        return Schedule(
            {piece: self._parents(task, piece, host, blocked, seeded) for piece in pieces}
        )

    async def has(self, task: str, host: str, piece: int) -> None:
        """A peer has a piece now."""
        self._held.setdefault((task, piece), {}).setdefault(host, Holder()).has = True

    async def lost(self, task: str, host: str, piece: int) -> None:
        """A peer could not get a piece, or has it no longer."""
        self._held.get((task, piece), {}).pop(host, None)

    def _parents(
        self, task: str, piece: int, host: str, blocked: list[str], seeded: bool
    ) -> list[str]:
        holders = self._held.setdefault((task, piece), {})
        if not holders and seeded:
            holders |= {seed: Holder() for seed in self._seeds[:1] if seed not in (host, *blocked)}
        holders.setdefault(host, Holder())
        # Nobody waits for somebody who came later: they could wait for each other.
        names = list(holders)
        earlier = set(names[: names.index(host)])
        known = [name for name in names if name in earlier or holders[name].has]
        known = [name for name in known if name not in (host, *blocked)]
        # Seeds first; then who asked first, up to so many children each: a tree, and a flat one.
        known.sort(key=lambda name: (name not in self._seeds, holders[name].children // CHILDREN))
        if known:
            holders[known[0]].children += 1
        else:
            self.to_source[task] += 1
        return known[:PARENTS_LIMIT]


class RemoteScheduler:
    """A `Scheduler` in another process: one line of JSON for each question and answer."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def seed(self, host: str) -> None:
        await self._ask("seed", host)

    async def register(
        self, task: str, host: str, pieces: list[int], blocked: list[str], seeded: bool
    ) -> Schedule:
        parents = await self._ask("register", task, host, pieces, blocked, seeded)
        return Schedule({int(piece): hosts for piece, hosts in parents.items()})

    async def has(self, task: str, host: str, piece: int) -> None:
        await self._ask("has", task, host, piece)

    async def lost(self, task: str, host: str, piece: int) -> None:
        await self._ask("lost", task, host, piece)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()

    async def _ask(self, *question: object) -> Any:
        async with self._turn:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._host, self._port)
            reader, writer = self._streams
            writer.write(json.dumps(question).encode() + b"\n")
            line = await reader.readline()
            if not line:
                self._streams = None
                raise EOFError("the scheduler is gone")
            return json.loads(line)


@asynccontextmanager
async def serve_scheduler(
    host: str, port: int, scheduler: Scheduler | None = None
) -> AsyncIterator[str]:
    """Serve a scheduler to `RemoteScheduler`s; gives its address."""
    scheduler = scheduler or Scheduler()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            what, *arguments = json.loads(line)
            answer = getattr(scheduler, what)(*arguments)
            if asyncio.iscoroutine(answer):
                answer = await answer
            reply = answer.parents if isinstance(answer, Schedule) else answer
            writer.write(json.dumps(reply).encode() + b"\n")
        writer.close()

    async with listening(serve, host, port) as address:
        yield address


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """A listener whose connections end with it; gives `host:port`."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(run(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, host, port, ssl=tls, limit=HEAD_LIMIT_BYTES)
    try:
        yield f"{host}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# One task: a blob (Rust), or one range of it (Go).


@dataclass
class Task:
    """`base` is where it begins in the blob. `origin_headers` are of the first answer, and are
    repeated for every reader, dates and all."""

    id: str
    url: str
    base: int
    total: int
    blob_bytes: int | None
    piece_bytes: int
    origin_headers: dict[str, str]
    pieces: dict[int, bytes] = field(default_factory=dict)
    owners: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    """Of pieces that are under way; whoever else wants one waits for its owner."""
    failed: bool = False
    prefetching: asyncio.Task[None] | None = None

    @property
    def finished(self) -> bool:
        return len(self.pieces) == self.count

    @property
    def count(self) -> int:
        return -(-self.total // self.piece_bytes)

    def touched(self, start: int, end: int) -> range:
        """The pieces that hold [start, end), counted from `base`."""
        return range(start // self.piece_bytes, -(-end // self.piece_bytes))

    def extent(self, piece: int) -> tuple[int, int]:
        """[start, end) of a piece, counted from `base`."""
        start = piece * self.piece_bytes
        return start, min(start + self.piece_bytes, self.total)


class Wish(NamedTuple):
    """A reader's request that P2P takes care of."""

    url: str
    headers: dict[str, str]
    range: tuple[int, int] | None

    @property
    def always_scheduled(self) -> bool:
        return self.headers.get("x-dragonfly-scheduling-policy", "").lower() == "always"

    @property
    def seeded(self) -> bool:
        """Priorities 4 to 6 have a seed peer fetch first; a bad value is 6."""
        level = self.headers.get("x-dragonfly-priority", "6")
        return not level.isdecimal() or int(level) >= 4


def piece_bytes_of(total: int) -> int:
    """A power of two near a five-hundredth, within 4 to 64 MiB."""
    piece = PIECE_BYTES
    while piece < PIECE_LIMIT_BYTES and piece * 500 < total:
        piece *= 2
    return piece


class Dfdaemon:
    """One daemon. `certificate` gives what CONNECT opens TLS with, by host; without one the Rust
    client makes a certificate of its own, which nobody trusts: here the connection is closed."""

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        scheduler: Scheduling | None = None,
        certificate: Callable[[str], ssl.SSLContext] | None = None,
    ) -> None:
        self.behaviour = behaviour or Behaviour()
        self.faults = Faults()
        self.seen: list[Seen] = []
        """Requests to the proxy's listener."""
        self.pings: list[str] = []
        self.healthy = True
        self.traffic: Counter[str] = Counter()
        """Bytes by type, as `dragonfly_client_download_traffic` has them."""
        self.stats = 0
        """How often the origin was asked for a size."""
        self.upload = ""
        """Where other peers ask, once it listens."""
        self.tasks: dict[str, Task] = {}
        self._scheduler = scheduler
        self._certificate = certificate
        self._http = Http()
        self._redirects: dict[str, tuple[str, float]] = {}
        self._moments: deque[float] = deque()
        self._stating: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def running(
        self,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        health: tuple[str, int] = ("127.0.0.1", 0),
        upload: tuple[str, int] = ("127.0.0.1", 0),
    ) -> AsyncIterator[Dfdaemon]:
        """Listen. `proxy`, `health` and `upload` are `host:port` then."""
        async with AsyncExitStack() as stack:
            stack.callback(self._http.close)
            self.proxy = await stack.enter_async_context(listening(self._serve, *listen))
            self.health = await stack.enter_async_context(listening(self._healthy, *health))
            self.upload = await stack.enter_async_context(listening(self._give, *upload))
            if self.behaviour.seed and self._scheduler is not None:
                seeded = self._scheduler.seed(self.upload)  # type: ignore[attr-defined]
                if seeded is not None:
                    await seeded
            yield self
            await self._end_prefetches()

    async def forget(self) -> None:
        """As after a restart with `storage.keep: false`."""
        await self._end_prefetches()
        for task in self.tasks.values():
            for piece in task.pieces:
                await self._tell("lost", task, piece)
        self.tasks.clear()

    async def _end_prefetches(self) -> None:
        under_way = [task.prefetching for task in self.tasks.values() if task.prefetching]
        for each in under_way:
            each.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    # Health and metrics.

    async def _healthy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        good = "/healthy" if self.behaviour.dialect == "rust" else "/server/ping"
        while (head := await read_head(reader)) is not None:
            target, body = head.first[1], b""
            self.pings.append(target)
            status = (200 if self.healthy else 503) if target == good else 404
            if target == "/metrics" and head.first[0] == "DELETE":
                self.traffic.clear()
                status = 200
            elif target == "/metrics":
                status, body = 200, self._metrics()
            writer.write(
                head_bytes(f"HTTP/1.1 {status} -", {"content-length": str(len(body))}) + body
            )

    def _metrics(self) -> bytes:
        lines = [
            f'dragonfly_client_download_traffic{{type="{kind}"}} {count}'
            for kind, count in sorted(self.traffic.items())
        ]
        return "\n".join([*lines, f"dragonfly_client_stat_task_total {self.stats}", ""]).encode()

    # Other peers.

    async def _give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """POST /TASK/PIECE: its bytes, once they are here; 404 when nobody brings them."""
        while (head := await read_head(reader)) is not None:
            if head.first[1] == "/healthy":
                writer.write(head_bytes("HTTP/1.1 200 OK", {"content-length": "0"}))
                continue
            wanted = json.loads(await read_body(reader, head))
            _, task_id, number = head.first[1].split("/")
            data = b""
            with suppress(Trouble, OSError, EOFError):
                data = await self._given(task_id, int(number), wanted)
            status = 200 if data else 404
            writer.write(head_bytes(f"HTTP/1.1 {status} -", {"content-length": str(len(data))}))
            writer.write(data)
            await writer.drain()

    async def _given(self, task_id: str, piece: int, wanted: dict[str, Any]) -> bytes:
        task = self.tasks.get(task_id)
        if task is None and self.behaviour.seed:
            task = self.tasks[task_id] = Task(**wanted["task"])
        if task is None:
            return b""
        if piece not in task.pieces and piece in task.owners:
            await asyncio.shield(task.owners[piece])
        elif piece not in task.pieces and self.behaviour.seed:
            wish = Wish(task.url, wanted["headers"], None)
            await self._own(task, piece, wish, scheduled=False)
        return task.pieces.get(piece, b"")

    # The proxy's listener.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        base = ""
        while (head := await read_head(reader)) is not None:
            method, target, _ = head.first
            self.seen.append(Seen(method, target, head.headers))
            if method == "CONNECT":
                if self.behaviour.dialect == "go":
                    return await self._tunnel(target, reader, writer)
                if self._certificate is None:
                    return
                host = target.rpartition(":")[0]
                writer.write(head_bytes("HTTP/1.1 200 Connection established", {}))
                await writer.drain()
                await writer.start_tls(self._certificate(host))
                base = f"https://{target.removesuffix(':443')}"
                continue
            body = b""
            if "content-length" in head.headers:
                body = await read_body(reader, head)
            try:
                done = await self._answer(base, head, body, writer)
            except Trouble as trouble:
                self._refuse(trouble, writer, proxied=bool(base) or "://" in target)
                done = True
            await writer.drain()
            if not done:
                return

    async def _answer(
        self, base: str, head: Head, body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection can be used again."""
        if self.faults.answers:
            status, headers, text = self.faults.answers.popleft()
            headers = {"content-length": str(len(text))} | headers
            writer.write(head_bytes(f"HTTP/1.1 {status} -", headers) + text)
            return True
        method, target, _ = head.first
        mirrored = not base and "://" not in target
        url = self._url(base, target, head.headers)
        self._admit(url, head.headers, mirrored)
        if method != "GET" or not self._is_p2p(url, head.headers):
            await self._pass(method, url, head.headers, body, writer)
            return True
        wish = Wish(url, head.headers, self._range(head.headers))
        go = self.behaviour.dialect == "go"
        return await (self._go(wish, writer) if go else self._rust(wish, writer))

    def _url(self, base: str, target: str, headers: Mapping[str, str]) -> str:
        """Text is joined to text, as the Rust client does."""
        behaviour = self.behaviour
        if "://" in target:
            url = target
        elif base:
            url = base + target
        elif registry := headers.get("x-dragonfly-registry"):
            url = registry + target
        elif name := dict(parse_qsl(urlsplit(target).query)).get("ns"):
            url = (name if "://" in name else f"https://{name}") + target
        else:
            url = behaviour.registry + target
        if urlsplit(url).scheme not in ("http", "https"):
            raise Trouble(500, "proxy", "bad URL")
        return re.sub("^http:", "https:", url) if behaviour.use_tls else url

    def _admit(self, url: str, headers: Mapping[str, str], mirrored: bool) -> None:
        behaviour, now = self.behaviour, time.monotonic()
        while self._moments and self._moments[0] < now - 1:
            self._moments.popleft()
        if len(self._moments) >= behaviour.rate_limit:
            raise Trouble(429, "proxy", "rate limit exceeded")
        self._moments.append(now)
        if any(re.search(pattern, url) for pattern in behaviour.blocked):
            raise Trouble(403, "proxy", "blocked")
        if behaviour.dialect == "go":
            if behaviour.basic_auth and not mirrored:
                given = headers.get("proxy-authorization")
                if given != behaviour.basic_auth:
                    raise Trouble(401 if given else 407, "proxy", "who are you?")
            if behaviour.whitelist and urlsplit(url).hostname not in behaviour.whitelist:
                raise Trouble(401, "proxy", "not on the list")
        elif behaviour.basic_auth and headers.get("authorization") != behaviour.basic_auth:
            given = headers.get("authorization", "")
            raise Trouble(400 if given and not given.startswith("Basic ") else 401, "proxy")

    def _is_p2p(self, url: str, headers: Mapping[str, str]) -> bool:
        forced = headers.get("x-dragonfly-use-p2p", "").lower() == "true"
        plain = url.partition("?")[0]
        return (forced and self.behaviour.dialect == "rust") or any(
            re.search(rule, plain) for rule in self.behaviour.rules
        )

    def _range(self, headers: Mapping[str, str]) -> tuple[int, int] | None:
        """[start, end); end may be past the blob's. The Rust client takes the first of several."""
        text = headers.get("range")
        if text is None:
            return None
        go = self.behaviour.dialect == "go"
        if go and "," in text:
            raise Trouble(501, "dfdaemon", "multiple ranges are not supported")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)(,.*)?", text)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise Trouble(400 if go else 500, "dfdaemon", "invalid range")
        return int(match[1]), int(match[2]) + 1 if match[2] else 1 << 62

    def _refuse(self, trouble: Trouble, writer: asyncio.StreamWriter, proxied: bool) -> None:
        headers = {name: value for name, value in trouble.headers.items() if name not in HOP}
        body, status = b"", trouble.status
        if self.behaviour.dialect == "rust":
            headers["x-dragonfly-error-type"] = trouble.kind
        elif trouble.kind != "backend":
            if status == 500:
                status = 503 if proxied else 500
            body = f"{trouble}, task and peer are {self.behaviour.hostname}'s".encode()
        headers["content-length"] = str(len(body))
        writer.write(head_bytes(f"HTTP/1.1 {status} -", headers) + body)

    async def _pass(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            answer = await self._http.send(method, url, headers, body)
        except (OSError, EOFError) as error:
            raise Trouble(502, "proxy", str(error)) from None
        kept = {name: value for name, value in answer.headers.items() if name not in HOP}
        for name in ("content-range", *(["content-length"] if method == "HEAD" else [])):
            if name in answer.headers:
                kept[name] = answer.headers[name]
        kept.setdefault("content-length", str(len(answer.body)))
        writer.write(head_bytes(f"HTTP/1.1 {answer.status} -", kept) + answer.body)

    async def _tunnel(
        self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The Go daemon's CONNECT sees nothing and keeps nothing."""
        host, _, port = target.rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        writer.write(head_bytes("HTTP/1.1 200 Connection established", {}))

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(BUFFER_BYTES):
                sink.write(data)
                await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)

    # The Rust client.

    async def _rust(self, wish: Wish, writer: asyncio.StreamWriter) -> bool:
        task = await self._task(self._rust_id(wish), wish, None)
        start, end = wish.range or (0, task.total)
        end = min(end, task.total)
        if start >= end:
            task.failed = True  # the parse error is not mapped to 416, and the task pays for it
            raise Trouble(500, "dfdaemon", "invalid range")
        finished = task.finished
        prefetch = wish.headers.get("x-dragonfly-prefetch")
        wanted = self.behaviour.prefetch if prefetch is None else prefetch.lower() == "true"
        if wish.range is not None and wanted:
            self._prefetch(task, wish)
        headers = self._kept(task) | {
            "x-dragonfly-task-id": task.id,
            "x-dragonfly-server-ip": self.behaviour.address,
        }
        if finished:
            headers["x-dragonfly-task-download-finished"] = "true"
        status = 200
        if wish.range is not None:
            status = self.behaviour.partial_status
            headers["content-range"] = f"bytes {start}-{end - 1}/{task.total}"
        return await self._stream(task, wish, start, end, status, headers, writer)

    def _rust_id(self, wish: Wish) -> str:
        headers = wish.headers
        if content := headers.get("x-dragonfly-content-for-calculating-task-id"):
            return hashlib.sha256(content.encode()).hexdigest()
        blob = re.search(r"/blobs/sha256:([0-9a-f]{64})", wish.url)
        by_digest = headers.get("x-dragonfly-enable-task-id-based-blob-digest", "").lower()
        if blob is not None and by_digest == "true":
            return blob[1]
        named = headers.get("x-dragonfly-filtered-query-params")
        filtered = FILTERED if named is None else {key.strip() for key in named.split(",")}
        names = ("x-dragonfly-tag", "x-dragonfly-application", "x-dragonfly-piece-length")
        parts = [_filtered(wish.url, filtered), *(headers.get(name, "") for name in names)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _prefetch(self, task: Task, wish: Wish) -> None:
        """Once; one that failed may begin again."""
        before = task.prefetching
        if before is None or (before.done() and not task.finished):
            whole = Wish(wish.url, wish.headers, None)
            task.prefetching = asyncio.create_task(self._bring_all(task, whole))

    async def _bring_all(self, task: Task, whole: Wish) -> None:
        scheduled = self._scheduled(task, whole, task.total)
        with suppress(Trouble, OSError, EOFError):
            await asyncio.gather(*self._bringing(task, range(task.count), whole, scheduled))

    def _scheduled(self, task: Task, wish: Wish, length: int) -> bool:
        """Whether other peers are asked for what is missing."""
        behaviour = self.behaviour
        if behaviour.dialect == "go" or behaviour.disable_back_to_source:
            return True
        if behaviour.scheduling_policy and wish.always_scheduled:
            return True
        return not behaviour.small_to_origin or min(length, task.total) > PIECE_BYTES

    # The Go daemon.

    async def _go(self, wish: Wish, writer: asyncio.StreamWriter) -> bool:
        """Each range is a task; with prefetch the whole blob becomes another, whose pieces serve
        later ranges."""
        url = _filtered(wish.url, set(wish.headers.get("x-dragonfly-filter", "").split("&")))
        tags = [wish.headers.get(f"x-dragonfly-{name}", "") for name in ("tag", "application")]

        def task_id(part: str) -> str:
            return hashlib.sha256("\n".join([url, part, *tags]).encode()).hexdigest()

        whole = self.tasks.get(task_id(""))
        if wish.range is None:
            task = await self._task(task_id(""), wish, None)
            start, end, headers = 0, task.total, dict[str, str]()
        elif whole is not None and all(
            piece in whole.pieces for piece in whole.touched(*_within(wish.range, whole.total))
        ):
            task, (start, end) = whole, _within(wish.range, whole.total)
            headers = {"content-range": f"bytes {start}-{end - 1}/{task.total}"}
        else:
            task = await self._task(task_id(wish.headers["range"]), wish, wish.range)
            start, end = 0, task.total
            # When the total is not known it is invented.
            total = task.blob_bytes or task.base + task.total
            last = task.base + task.total - 1
            headers = {"content-range": f"bytes {task.base}-{last}/{total}"}
            if self.behaviour.prefetch:
                rangeless = Wish(wish.url, wish.headers, None)
                parent = await self._task(task_id(""), rangeless, None)
                self._prefetch(parent, rangeless)
        headers = (
            self._kept(task)
            | headers
            | {"x-dragonfly-task": task.id, "x-dragonfly-peer": self.behaviour.hostname}
        )
        status = 200 if wish.range is None else 206
        return await self._stream(task, wish, start, end, status, headers, writer)

    # Both.

    async def _task(self, task_id: str, wish: Wish, part: tuple[int, int] | None) -> Task:
        """A known one that did not fail is used without a question to the origin."""
        async with self._stating.setdefault(task_id, asyncio.Lock()):
            task = self.tasks.get(task_id)
            if task is None or task.failed:
                fresh = await self._stat(task_id, wish, part)
                if task is None:
                    task = self.tasks[task_id] = fresh
                else:
                    task.origin_headers, task.failed = fresh.origin_headers, False
            return task

    async def _stat(self, task_id: str, wish: Wish, part: tuple[int, int] | None) -> Task:
        self.stats += 1
        answer = await self._ask_origin(wish, (0, 1))
        if answer.status == 416:
            answer = await self._ask_origin(wish, None)
        if answer.status not in (200, 206):
            raise Trouble(answer.status, "backend", "", answer.headers)
        match = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("content-range", ""))
        length = match[1] if match else answer.headers.get("content-length")
        if length is None or (answer.status == 206 and match is None):
            raise Trouble(500, "dfdaemon", "invalid content length")
        total = int(length)
        start, end = _within(part, total) if part is not None else (0, total)
        if part is not None and start >= end:
            raise Trouble(416, "backend", "", {"content-range": f"bytes */{total}"})
        wanted = wish.headers.get("x-dragonfly-piece-length", "")
        size = _size(wanted) if wanted else piece_bytes_of(total)
        if size < PIECE_BYTES:
            raise Trouble(500, "proxy", "the piece length is too small")
        return Task(task_id, wish.url, start, end - start, total, size, answer.headers)

    def _kept(self, task: Task) -> dict[str, str]:
        return {name: value for name, value in task.origin_headers.items() if name not in HOP}

    async def _stream(
        self,
        task: Task,
        wish: Wish,
        start: int,
        end: int,
        status: int,
        headers: dict[str, str],
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Pieces in order, each when it is whole. Until the first is here there is a status to
        change. Returns whether the connection can be used again."""
        touched = task.touched(start, end)
        if local_bytes := sum(len(task.pieces.get(piece, b"")) for piece in touched):
            self.traffic["LOCAL_PEER"] += local_bytes
        await self._wait_for_prefetch(task, touched)
        scheduled = self._scheduled(task, wish, end - start)
        bringing = self._bringing(task, touched, wish, scheduled)
        headers["content-length"] = str(end - start)
        try:
            await self._first(task, touched, bringing[0])
            writer.write(head_bytes(f"HTTP/1.1 {status} -", headers))
            for count, (piece, brought) in enumerate(zip(touched, bringing, strict=True)):
                if count == self.faults.hangs_after_pieces:
                    await writer.drain()
                    await asyncio.Event().wait()
                if count == self.faults.breaks_after_pieces:
                    return await self._break(writer)
                if piece not in task.pieces:
                    try:
                        await brought
                    except (Trouble, OSError, EOFError):
                        return await self._break(writer)
                first, last = task.extent(piece)
                at, until = max(first, start), min(last, end)
                data = task.pieces[piece][at - first : until - first]
                if self.faults.lie is not None:
                    data = self.faults.lie(task.base + at, data)
                writer.write(data)
                await writer.drain()
            return True
        finally:
            for brought in bringing:
                brought.cancel()
            await asyncio.gather(*bringing, return_exceptions=True)

    async def _first(self, task: Task, touched: range, brought: asyncio.Task[None]) -> None:
        try:
            if touched[0] not in task.pieces:
                await brought
        except (OSError, EOFError, TimeoutError) as error:
            task.failed = True
            raise Trouble(500, "dfdaemon", str(error) or "unknown") from None

    async def _break(self, writer: asyncio.StreamWriter) -> bool:
        await writer.drain()
        if self.behaviour.aborts and self.behaviour.dialect == "rust":
            writer.transport.abort()
        return False

    async def _wait_for_prefetch(self, task: Task, touched: range) -> None:
        """Of a task that is being prefetched, pieces under way are waited for, a while."""
        if task.prefetching is None or task.prefetching.done():
            return
        owners = [task.owners[piece] for piece in touched if piece in task.owners]
        if owners:
            await asyncio.wait(owners, timeout=self.behaviour.prefetch_wait_s)

    def _bringing(
        self, task: Task, pieces: range, wish: Wish, scheduled: bool
    ) -> list[asyncio.Task[None]]:
        turns = asyncio.Semaphore(self.behaviour.concurrent_pieces)

        async def bring(piece: int) -> None:
            async with turns:
                await self._own(task, piece, wish, scheduled)

        return [asyncio.create_task(bring(piece)) for piece in pieces]

    async def _own(self, task: Task, piece: int, wish: Wish, scheduled: bool) -> None:
        """Have a piece here. One fetches it, others wait for that one."""
        while piece not in task.pieces:
            if (owner := task.owners.get(piece)) is not None:
                await asyncio.wait([owner])
                continue
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            task.owners[piece] = mine
            # A reader that goes away does not end what others may wait for.
            fetch = asyncio.ensure_future(self._fetch(task, piece, wish, scheduled, mine))
            await asyncio.shield(fetch)

    async def _fetch(
        self, task: Task, piece: int, wish: Wish, scheduled: bool, owner: asyncio.Future[None]
    ) -> None:
        try:
            async with asyncio.timeout(self.behaviour.piece_timeout_s):
                task.pieces[piece] = await self._get(task, piece, wish, scheduled)
        except BaseException:
            await self._tell("lost", task, piece)
            raise
        else:
            await self._tell("has", task, piece)
        finally:
            del task.owners[piece]
            owner.set_result(None)

    async def _tell(self, what: str, task: Task, piece: int) -> None:
        if self._scheduler is not None:
            with suppress(OSError, EOFError):
                await getattr(self._scheduler, what)(task.id, self.upload, piece)

    async def _get(self, task: Task, piece: int, wish: Wish, scheduled: bool) -> bytes:
        blocked: list[str] = []
        while scheduled and self._scheduler is not None:
            try:
                schedule = await self._scheduler.register(
                    task.id, self.upload, [piece], blocked, wish.seeded
                )
            except (OSError, EOFError):
                break
            parents = schedule.parents[piece]
            for parent in parents:
                if data := await self._from_peer(parent, task, piece, wish):
                    self.traffic["REMOTE_PEER"] += len(data)
                    return data
            blocked += parents
            if not parents:
                break
        if self.behaviour.disable_back_to_source:
            raise Trouble(500, "dfdaemon", "download failed")
        return await self._from_origin(task, piece, wish)

    async def _from_peer(self, parent: str, task: Task, piece: int, wish: Wish) -> bytes:
        known = {
            "id": task.id,
            "url": task.url,
            "base": task.base,
            "total": task.total,
            "blob_bytes": task.blob_bytes,
            "piece_bytes": task.piece_bytes,
            "origin_headers": task.origin_headers,
        }
        question = json.dumps({"task": known, "headers": wish.headers}).encode()
        url = f"http://{parent}/{task.id}/{piece}"
        try:
            answer = await self._http.send("POST", url, {}, question)
        except (OSError, EOFError):
            return b""
        start, end = task.extent(piece)
        return answer.body if len(answer.body) == end - start else b""

    async def _from_origin(self, task: Task, piece: int, wish: Wish) -> bytes:
        start, end = task.extent(piece)
        start, end = task.base + start, task.base + end
        answer = await self._ask_origin(wish, (start, end))
        self.traffic["BACK_TO_SOURCE"] += len(answer.body)
        if answer.status not in (200, 206):
            raise Trouble(answer.status, "backend", "", answer.headers)
        if answer.status == 200 and start > 0 and self.behaviour.checks_whole_answers:
            raise Trouble(500, "dfdaemon", "the origin ignored Range")
        data = answer.body[: end - start]
        if len(data) < end - start:
            raise Trouble(500, "dfdaemon", "a short piece")
        return data

    async def _ask_origin(self, wish: Wish, part: tuple[int, int] | None) -> Answer:
        """The reader's headers, its own range; once more when the connection breaks."""
        headers = {name: value for name, value in wish.headers.items() if name != "range"}
        if part is not None:
            headers["range"] = f"bytes={part[0]}-{part[1] - 1}"
        url, hops = wish.url, 0
        kept, until = self._redirects.get(url, ("", 0.0))
        if time.monotonic() < until:
            url, headers = self._hop(url, kept, headers)
        while True:
            answer = await self._ask_twice(url, headers)
            location = answer.headers.get("location")
            if answer.status not in (301, 302, 303, 307, 308) or location is None or hops == 5:
                return answer
            if answer.status == 307 and "://" in location:
                # However long its signature lasts; and a 403 does not end it.
                self._redirects[wish.url] = (
                    location,
                    time.monotonic() + self.behaviour.redirect_ttl_s,
                )
            url, headers = self._hop(url, urljoin(url, location), headers)
            hops += 1

    @staticmethod
    def _hop(url: str, target: str, headers: dict[str, str]) -> tuple[str, dict[str, str]]:
        secrets = {"authorization", "cookie", "proxy-authorization"}
        if urlsplit(url).netloc == urlsplit(target).netloc:
            secrets = set()
        return target, {name: value for name, value in headers.items() if name not in secrets}

    async def _ask_twice(self, url: str, headers: Mapping[str, str]) -> Answer:
        try:
            return await self._http.send("GET", url, headers)
        except (OSError, EOFError):
            try:
                return await self._http.send("GET", url, headers)
            except (OSError, EOFError) as error:
                raise Trouble(500, "dfdaemon", str(error)) from None


def _filtered(url: str, keys: set[str] | frozenset[str]) -> str:
    parts = urlsplit(url)
    query = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if pair[0] not in keys]
    return urlunsplit(parts._replace(query=urlencode(query)))


def _within(part: tuple[int, int], total: int) -> tuple[int, int]:
    return part[0], min(part[1], total)


def _size(text: str) -> int:
    """`4mib` in bytes."""
    match = re.fullmatch(r"(\d+)\s*([kmg]?)(i?b)?", text.lower())
    if match is None:
        raise Trouble(500, "proxy", "a piece length that is none")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2]]


# To run one by itself.


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dfdaemon.py",
        description="A stand-in for Dragonfly's dfdaemon: registry mirror and HTTP proxy on"
        " --listen. Prints one line of JSON with its addresses when it is ready, and serves until"
        " it is ended.",
    )
    parser.add_argument("--only-scheduler", action="store_true", help="on --listen, and no daemon")
    parser.add_argument("--listen", default="127.0.0.1:4001", help="default: %(default)s")
    parser.add_argument(
        "--health", default="127.0.0.1:4003", help="/healthy and /metrics; default: %(default)s"
    )
    parser.add_argument("--upload", default="127.0.0.1:4005", help="for peers; %(default)s")
    parser.add_argument("--scheduler", default="", help="host:port of --only-scheduler; none")
    parser.add_argument("--dialect", choices=("rust", "go"), default="rust")
    parser.add_argument("--registry", default=Behaviour.registry, help="when no header names one")
    parser.add_argument("--prefetch", action="store_true", help="proxy.prefetch")
    parser.add_argument("--seed", action="store_true", help="a seed peer")
    parser.add_argument(
        "--version",
        default="1.5.1",
        help="of the Rust client, for what differs between them; default: %(default)s",
    )
    parser.add_argument("--disable-back-to-source", action="store_true")
    return parser


def behaviour_of(version: str) -> Behaviour:
    """What a version of the Rust client does."""
    numbers = tuple(int(part) for part in version.split("."))
    return Behaviour(
        small_to_origin=numbers >= (1, 4, 1),
        scheduling_policy=numbers >= (1, 5, 3),
        partial_status=206 if numbers >= (1, 3, 11) else 200,
        aborts=numbers >= (1, 4, 6),
        checks_whole_answers=numbers >= (1, 4, 7),
    )


async def _run(arguments: argparse.Namespace) -> None:
    if arguments.only_scheduler:
        async with serve_scheduler(*_address(arguments.listen)) as address:
            print(json.dumps({"scheduler": address}), flush=True)
            await asyncio.Event().wait()
    behaviour = replace(
        behaviour_of(arguments.version),
        dialect=arguments.dialect,
        registry=arguments.registry,
        prefetch=arguments.prefetch,
        seed=arguments.seed,
        disable_back_to_source=arguments.disable_back_to_source,
        address=_address(arguments.listen)[0],
        hostname=arguments.listen,
    )
    scheduler = RemoteScheduler(arguments.scheduler) if arguments.scheduler else None
    daemon = Dfdaemon(behaviour, scheduler)
    listeners = (arguments.listen, arguments.health, arguments.upload)
    async with daemon.running(*map(_address, listeners)):
        addresses = {"proxy": daemon.proxy, "health": daemon.health, "upload": daemon.upload}
        print(json.dumps(addresses), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_run(_arguments().parse_args()))

"""A stand-in for a registry, a store or a token server: raw HTTP whose answers a test writes."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Seen(NamedTuple):
    """A request as it came; header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def range(self) -> tuple[int, int]:
        """[start, end) it asks for."""
        match = _RANGE.fullmatch(self.headers["range"])
        assert match is not None
        return int(match[1]), int(match[2]) + 1


Answer = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


class FaultyServer:
    """Takes its answers from `answers`, one per request, and then from `default`. `left` is set
    when a client has closed its connection."""

    def __init__(self, host: str, default: Answer) -> None:
        self.host = host
        self.default = default
        self.answers: list[Answer] = []
        self.seen: list[Seen] = []
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await _request(reader)) is not None:
                self.seen.append(request)
                answer = self.answers.pop(0) if self.answers else self.default
                await answer(request, writer)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.left.set()
            writer.close()


@asynccontextmanager
async def faulty_server(
    blob: bytes, tls: ssl.SSLContext | None = None
) -> AsyncIterator[FaultyServer]:
    """One that serves ranges of `blob` at every path, unless told otherwise."""
    server = FaultyServer("", part_of(blob))
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(server.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    server.host = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} Whatever",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def answer(status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
    """A whole answer with the right Content-Length."""

    async def write(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(head(status, {"Content-Length": str(len(body))} | (headers or {})) + body)

    return write


def raw(data: bytes, *, close: bool = False) -> Answer:
    """These bytes and nothing else."""

    async def write(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            await writer.drain()
            writer.close()

    return write


def part_of(blob: bytes) -> Answer:
    """What a good server answers."""

    async def write(seen: Seen, writer: asyncio.StreamWriter) -> None:
        start, end = seen.range
        writer.write(part_head(start, min(end, len(blob)), len(blob)) + blob[start:end])

    return write


def late_part(blob: bytes, go: asyncio.Event) -> Answer:
    """A good answer, but not before it may go."""

    async def write(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await part_of(blob)(seen, writer)

    return write


def slow_part(blob: bytes, piece_bytes: int, pause_s: float) -> Answer:
    """A good answer in pieces, each after a pause."""

    async def write(seen: Seen, writer: asyncio.StreamWriter) -> None:
        start, end = seen.range
        writer.write(part_head(start, end, len(blob)))
        for at in range(start, end, piece_bytes):
            await asyncio.sleep(pause_s)
            writer.write(blob[at : min(end, at + piece_bytes)])

    return write


def part_head(start: int, end: int, total: int) -> bytes:
    content_range = f"bytes {start}-{end - 1}/{total}"
    return head(206, {"Content-Range": content_range, "Content-Length": str(end - start)})


def broken_part(blob: bytes, length: int, *, reset: bool = False) -> Answer:
    """A good answer whose connection ends after `length` bytes of body."""

    async def write(seen: Seen, writer: asyncio.StreamWriter) -> None:
        start, end = seen.range
        writer.write(part_head(start, end, len(blob)) + blob[start : start + length])
        await writer.drain()
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    return write


def silence(after: bytes = b"") -> Answer:
    """These bytes, and then nothing until the client goes."""

    async def write(_: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(after)
        await writer.drain()
        await asyncio.Event().wait()

    return write


async def _request(reader: asyncio.StreamReader) -> Seen | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = text.rstrip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(method, target, headers, body)

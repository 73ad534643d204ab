"""A daemon's half over the real transports, whose kernel's end is one of `tests/transport`."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path
from typing import Protocol

import pytest

from cdefs import fanotify as abi
from fscached.fill.blob import Limits, Origin
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.fill.objects import Objects
from fscached.transport import ObjectId, ObjectKey, Opened, Transport
from fscached.transport import cachefiles as module
from tests.fill.conftest import MIB, MemorySource, Remote, until
from tests.transport.device import Kernel, read_message
from tests.transport.group import Group, event


class End(Protocol):
    """The kernel's end of a transport with one blob."""

    transport: Transport
    path: Path
    key: ObjectKey

    def begin(self, size_bytes: int) -> Opened:
        """The blob is mounted."""
        ...

    async def ask(self, start: int) -> bool:
        """A reader asks for 4 KiB; whether it was told that they are there."""
        ...


class Device:
    """cachefiles: an answer only says "look again", and a hole is EIO then."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kernel = Kernel(directory)
        self.transport = self._kernel.transport
        self.path, self.key = self._kernel.path, ObjectKey("dom", "blob")
        self._tickets = itertools.count(10)
        self._answered: list[int] = []
        monkeypatch.setattr(module, "read_complete", lambda _, id: self._answered.append(id))

    def begin(self, size_bytes: int) -> Opened:
        fd = self._kernel.open()
        os.ftruncate(fd, size_bytes)
        return Opened(ObjectId(5), self.key)

    async def ask(self, start: int) -> bool:
        ticket = next(self._tickets)
        self._kernel.send(read_message(start, 4096, ticket))
        await until(lambda: ticket in self._answered)
        with self.path.open("rb") as file:
            try:
                return os.lseek(file.fileno(), start, os.SEEK_DATA) == start
            except OSError:
                return False


class Files:
    """fanotify: an answer allows or denies."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._group = Group(directory, monkeypatch)
        for call in ("mark", "unmark"):
            monkeypatch.setattr(abi, call, lambda *_: None)
        self.transport = self._group.transport
        self.key = ObjectKey("dom", "blob")
        self.path = directory / "dom" / "blob"

    def begin(self, size_bytes: int) -> Opened:
        [opened] = self.transport.offer(self.key, size_bytes)
        assert isinstance(opened, Opened)
        return opened

    async def ask(self, start: int) -> bool:
        answers = self._group.answers
        count = len(answers)
        event(self._group, self.path, start)
        await until(lambda: len(answers) > count)
        return answers[-1][1] == 0


ENDS = pytest.mark.parametrize("kind", [Device, Files], ids=["cachefiles", "fanotify"])


class Node:
    """A daemon's half over one of them."""

    def __init__(self, end: End, remote: Remote, **limits: float) -> None:
        self.end, self.remote = end, remote
        self.source = MemorySource(remote.file)
        self.crew = Crew(2, Pool(64 * MIB))
        times = {"deadline_s": 30.0, "refusal_s": 0.0} | limits
        known = Limits(MIB, 8 * MIB, verify=True, **times)  # type: ignore[arg-type]
        self.objects = Objects(end.transport, self._lookup, known, self.crew)
        self.objects.handle(end.begin(len(remote.content)))
        asyncio.get_running_loop().add_reader(end.transport.fileno(), self._drain)

    @property
    def held_bytes(self) -> int:
        """What the file takes on disk."""
        return self.end.path.stat().st_blocks * 512

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.end.transport.fileno())
        self.objects.close()
        self.end.transport.close()
        self.crew.close()

    def _drain(self) -> None:
        self.objects.heed(self.end.transport.drain())

    def _lookup(self, key: ObjectKey) -> Origin:
        async def chunks():
            return self.remote.chunks

        return Origin(key.cookie, len(self.remote.content), self.source, chunks)

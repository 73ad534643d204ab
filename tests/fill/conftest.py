"""A daemon's half of the data path on a stand-in kernel and a source in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from fscached.fill.blob import Limits, OpenBlob, Origin
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.fill.objects import Objects
from fscached.source import Answer, Fault, Priority, SourceError
from fscached.transport import ObjectKey
from rafs_v6 import codec
from rafs_v6.blob import ChunkMap
from rafs_v6.layout import BlobEntry, BlobFeatures, ChunkInfo, Compressor, Digest, align_up
from tests.fake_kernel import FakeKernel

MIB = 1024 * 1024
KEY = ObjectKey("domain", "a" * 64)


class Remote:
    """A blob at its origin: what its chunks are, and its file."""

    def __init__(
        self,
        sizes: list[int],
        compressor: Compressor = Compressor.ZSTD,
        unknown: frozenset[int] = frozenset(),
    ) -> None:
        """`unknown`: chunks that are in the blob and not in the map; only other images use them."""
        rng = random.Random(len(sizes))
        self.content = bytearray()
        self.file = bytearray()
        infos, digests = [], b""
        for number, size in enumerate(sizes):
            chunk = rng.randbytes(size // 2) + bytes(size - size // 2)
            packed = codec.compress(compressor, chunk) or chunk
            if number not in unknown:
                flags = int(packed is not chunk)
                info = ChunkInfo(len(self.content), size, len(self.file), len(packed), flags)
                infos.append(info)
                digests += codec.digest(Digest.BLAKE3, chunk)
            self.content += chunk + bytes(align_up(size) - size)
            self.file += packed
        self.entry = self._entry(len(infos), compressor)
        self.chunks = ChunkMap(self.entry, infos, digests)

    def _entry(self, count: int, compressor: Compressor) -> BlobEntry:
        return BlobEntry(
            KEY.cookie, 0, 16 * MIB, count, compressor, Digest.BLAKE3, BlobFeatures.ALIGNED,
            len(self.file), len(self.content), 0, Compressor.NONE, len(self.file), 0, 0,
        )  # fmt: skip


class MemorySource:
    """A source that a test can hold up, break or poison."""

    name = "memory"

    def __init__(self, file: bytearray, piece_bytes: int = 64 * 1024) -> None:
        self.file = file
        self.piece_bytes = piece_bytes
        self.asked: list[tuple[int, int, Priority]] = []
        self.given_bytes = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.break_after_bytes: int | None = None
        self.error: SourceError | None = None
        """What every read fails with."""
        self.flip_once: int | None = None
        """Position of a bit that is wrong in the next answer that holds it, and in no other."""

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        self.asked.append((start, end, priority))
        if self.error is not None:
            raise self.error
        file = self.file[start:end]
        if self.flip_once is not None and start <= self.flip_once < end:
            file[self.flip_once - start] ^= 1
            self.flip_once = None
        try:
            async with asyncio.timeout(deadline_s):
                for at in range(0, len(file), self.piece_bytes):
                    await self.gate.wait()
                    if self.break_after_bytes is not None and at >= self.break_after_bytes:
                        raise SourceError("memory: broken off", Fault.NETWORK)
                    piece = memoryview(file)[at : at + self.piece_bytes]
                    feed(piece)
                    self.given_bytes += len(piece)
                    await asyncio.sleep(0)
        except TimeoutError:
            raise SourceError("memory: no bytes in time", Fault.DEADLINE) from None
        return Answer("memory", 1, len(file), 0.0)

    def distrust(self, blob_id: str, start: int, end: int) -> bool:
        return False

    async def close(self) -> None:
        pass


class Scene:
    """Kernel, source and open objects, wired as the daemon wires them."""

    def __init__(self, remote: Remote, **limits: float) -> None:
        self.remote = remote
        self.kernel = FakeKernel()
        self.source = MemorySource(remote.file)
        self.chunks_error: Exception | None = None
        self.crew = Crew(2, Pool(64 * MIB))
        defaults = {"window_bytes": MIB, "window_limit_bytes": 8 * MIB}
        times = {"deadline_s": 30.0, "refusal_s": 1.0, "verify": True}
        self.objects = Objects(
            self.kernel,
            self.lookup,
            Limits(**{**defaults, **times, **limits}),  # type: ignore[arg-type]
            self.crew,
        )
        asyncio.get_running_loop().add_reader(self.kernel.fileno(), self.drain)

    def lookup(self, key: ObjectKey) -> Origin | None:
        if key != KEY:
            return None
        return Origin(key.cookie, len(self.remote.content), self.source, self.chunks)

    async def chunks(self) -> ChunkMap:
        await asyncio.sleep(0)
        if self.chunks_error is not None:
            raise self.chunks_error
        return self.remote.chunks

    def drain(self) -> None:
        for event in self.kernel.drain():
            self.objects.handle(event)

    def replace_daemon(self) -> None:
        """`kill -9` and a successor: everything in memory is gone."""
        self.objects.close()
        self.objects = Objects(self.kernel, self.lookup, self.objects._limits, self.objects._crew)
        self.kernel.restart()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.kernel.fileno())
        self.objects.close()
        self.kernel.close()
        self.crew.close()


async def until(happened: Callable[[], object]) -> None:
    """Let the loop turn until something has happened; the test's own time limit bounds it."""
    while not happened():  # noqa: ASYNC110 - there is no event to wait for in the kernel
        await asyncio.sleep(0)


async def settled(objects: Objects) -> None:
    """Nothing is under way for any blob: every fetch has ended, every chunk has landed or not."""
    for opened in objects._open.values():
        if isinstance(opened, OpenBlob):
            await until(
                lambda it=opened: not it._tasks and (it.blob is None or not it.blob._owners)
            )


@pytest.fixture
def scene():
    """Make scenes that are closed with the test; call it inside the running loop."""
    scenes: list[Scene] = []

    def make(
        sizes: list[int],
        compressor: Compressor = Compressor.ZSTD,
        unknown: frozenset[int] = frozenset(),
        **limits: float,
    ) -> Scene:
        scenes.append(Scene(Remote(sizes, compressor, unknown), **limits))
        return scenes[-1]

    yield make

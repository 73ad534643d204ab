"""One node of a swarm, as a process: a stand-in for dfdaemon, and our sources before it.

An image is read as the daemon reads it: READs of a stand-in kernel become windows, windows become
ranges that are asked of the peer, and every chunk is verified before it is written. First what a
program reads when it starts, then everything. With `plain_headers` its peer is asked as any client
would ask it, in ranges of 1 MiB.

Arguments: its address, and the task as JSON. It says when it is ready and waits for a line, does
what it has to, says what came of it, and serves its peers until the next line.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Final

from fscached import config
from fscached.config import Config, Mirror
from fscached.fill.blob import Limits, Origin
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.fill.objects import Objects
from fscached.source import Source
from fscached.source.registries import Registries
from fscached.transport import ObjectKey
from rafs_v6.blob import ChunkMap
from rafs_v6.layout import BlobEntry, BlobFeatures, ChunkInfo, Compressor, Digest
from tests.fake_kernel import FakeKernel
from tests.source.dfdaemon import Dfdaemon, Http, RemoteScheduler, behaviour_of

MIB: Final = 1 << 20
REPOSITORY: Final = "library/image"
READ_BYTES: Final = 128 << 10


@dataclass(frozen=True, slots=True)
class Task:
    """What to do. `image` has size_bytes and digests of each blob's chunks of a MiB."""

    registry: str
    scheduler: str
    image: dict[str, dict[str, Any]]
    version: str = "1.5.1"
    small_ranges: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    plain_headers: dict[str, str] | None = None
    starts_with: list[tuple[str, int, int]] = field(default_factory=list)


def chunk_map(blob_id: str, size_bytes: int, digests: list[str]) -> ChunkMap:
    """Of a blob that is not compressed."""
    starts = range(0, size_bytes, MIB)
    infos = [
        ChunkInfo(at, min(MIB, size_bytes - at), at, min(MIB, size_bytes - at), 0) for at in starts
    ]
    padded = -(-size_bytes // 4096) * 4096
    entry = BlobEntry(
        blob_id, 0, MIB, len(infos), Compressor.NONE, Digest.BLAKE3, BlobFeatures.ALIGNED,
        size_bytes, padded, 0, Compressor.NONE, size_bytes, 0, 0,
    )  # fmt: skip
    return ChunkMap(entry, infos, bytes.fromhex("".join(digests)))


class Reader:
    """A kernel with the image mounted, and the half of a daemon that brings its blobs."""

    def __init__(self, task: Task, source: Source) -> None:
        self._task = task
        self._source = source
        self.kernel = FakeKernel()
        limits = Limits(MIB, 8 * MIB, deadline_s=60, refusal_s=1, verify=True)
        self._crew = Crew(2, Pool(64 * MIB))
        self.objects = Objects(self.kernel, self._lookup, limits, self._crew)
        asyncio.get_running_loop().add_reader(self.kernel.fileno(), self._drain)

    async def open(self) -> None:
        for blob_id in self._task.image:
            await self.kernel.open(_key(blob_id))

    async def read(self, blob_id: str, start: int, end: int) -> None:
        for at in range(start, end, READ_BYTES):
            await self.kernel.read(_key(blob_id), at, min(at + READ_BYTES, end))

    def digest(self, blob_id: str) -> str:
        size_bytes = self._task.image[blob_id]["size_bytes"]
        return hashlib.sha256(self.kernel.content(_key(blob_id))[:size_bytes]).hexdigest()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.kernel.fileno())
        self.objects.close()
        self.kernel.close()
        self._crew.close()

    def _lookup(self, key: ObjectKey) -> Origin:
        size_bytes = self._task.image[key.cookie]["size_bytes"]
        padded = -(-size_bytes // 4096) * 4096

        async def chunks() -> ChunkMap:
            return chunk_map(key.cookie, size_bytes, self._task.image[key.cookie]["digests"])

        return Origin(key.cookie, padded, self._source, chunks)

    def _drain(self) -> None:
        for event in self.kernel.drain():
            self.objects.handle(event)


def _key(blob_id: str) -> ObjectKey:
    return ObjectKey("swarm", blob_id)


async def read_by_us(task: Task, peer: Dfdaemon) -> dict[str, Any]:
    """The image through our sources."""
    mirror = Mirror(
        host=f"http://{peer.proxy}",
        headers=task.headers,
        small_ranges=task.small_ranges,
        timeout_s=60,
    )
    registries = Registries(Config(source=config.Source(mirrors=(mirror,), stall_timeout_s=60)))
    sizes = {blob_id: blob["size_bytes"] for blob_id, blob in task.image.items()}
    source = registries.source(task.registry, REPOSITORY, None, "http", sizes=sizes)
    reader = Reader(task, source)
    await reader.open()
    began_s = time.monotonic()
    for blob_id, start, end in task.starts_with:
        await reader.read(blob_id, start, end)
    started_s = time.monotonic() - began_s
    for blob_id, size_bytes in sizes.items():
        await reader.read(blob_id, 0, size_bytes)
    tallies = reader.objects.tallies.values()
    said = {
        "started_s": started_s,
        "whole_s": time.monotonic() - began_s,
        "right": all(reader.digest(blob_id) == blob_id for blob_id in sizes),
        "bad_chunks": sum(tally.bad_chunks for tally in tallies),
        "reads_failed": sum(tally.reads_failed for tally in tallies),
        "given": {str(giver): count for giver, count in registries.traffic.given.items()},
    }
    reader.close()
    await registries.close()
    return said


async def read_by_others(task: Task, peer: Dfdaemon) -> dict[str, Any]:
    """The image in ranges of 1 MiB, in an order as random as programs'."""
    assert task.plain_headers is not None
    http, began_s = Http(), time.monotonic()
    said = {"x-dragonfly-registry": f"http://{task.registry}"} | task.plain_headers
    bodies = {blob_id: bytearray(blob["size_bytes"]) for blob_id, blob in task.image.items()}
    parts = [(blob_id, at) for blob_id, body in bodies.items() for at in range(0, len(body), MIB)]
    random.Random(5).shuffle(parts)
    for blob_id, at in parts:
        end = min(at + MIB, len(bodies[blob_id]))
        url = f"http://{peer.proxy}/v2/{REPOSITORY}/blobs/sha256:{blob_id}"
        answer = await http.send("GET", url, said | {"range": f"bytes={at}-{end - 1}"})
        bodies[blob_id][at:end] = answer.body
    http.close()
    right = all(hashlib.sha256(body).hexdigest() == name for name, body in bodies.items())
    return {"started_s": time.monotonic() - began_s, "right": right}


async def main(address: str, task: Task) -> None:
    """Be a node."""
    loop = asyncio.get_running_loop()
    scheduler = RemoteScheduler(task.scheduler)
    peer = Dfdaemon(behaviour_of(task.version), scheduler)
    async with peer.running(upload=(address, 0)):
        _say({"ready": True})
        await loop.run_in_executor(None, sys.stdin.readline)
        work = read_by_us if task.plain_headers is None else read_by_others
        _say(await work(task, peer) | {"traffic": dict(peer.traffic)})
        await loop.run_in_executor(None, sys.stdin.readline)
    scheduler.close()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Task(**json.loads(sys.argv[2]))))

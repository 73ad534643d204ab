"""A service that stands in for the daemon, and an API server over it on a real unix socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from fscached import config
from fscached.control import api, http, messages
from fscached.control.entry import BlobEntry
from fscached.control.state import State
from fscached.control.succession import Succession
from fscached.prefetch.phase import Phase
from fscached.prefetch.trace import Access, Trace, TraceError, decode, encode
from tests.control.custodian import Custodian

BLOB = messages.ObjectStatus("b" * 64, 8192, 4096, reads=3, requests=2, received_bytes=4000)
_COUNTS = messages.LatencyCounts((1, 2, 0, 0, 0, 0, 0, 1), 3.5)
_NONE = messages.LatencyCounts()
DEMAND = messages.DemandStatus(
    hits=1,
    joined=0,
    misses=3,
    failed=1,
    latencies=_COUNTS,
    sources={
        'registry.test/"app"': messages.SourceStatus(
            requests=5,
            received_bytes=4000,
            failures=2,
            by_size=(
                *[messages.LatencyCounts()] * 7,
                messages.LatencyCounts((0, 2) + (0,) * 6, 0.04),
            ),
        ),
        "peer": messages.SourceStatus(1, 50, 0, (_COUNTS, *[_NONE] * 7)),
    },
)
IMAGE = messages.ImageStatus(
    reference="registry.test/app:1",
    fsid="f" * 64,
    domain_id="fscached",
    manifest_digest="sha256:" + "a" * 64,
    settled=False,
    bootstrap=messages.ObjectStatus("f" * 64, 4096, 4096, reads=1),
    blobs=[BLOB],
    prefetch=messages.PrefetchStatus(Phase.RUNNING, "", 3, 8192, 4096, 2048.0, 2.0),
    demand=DEMAND,
)


TRACE = Trace("f" * 64, "registry.test/app:1", 1, (Access("b" * 64, 0, 4096, 0.5),))


class StandInTraces:
    """Stands in for the daemon's traces: some by name, and what was asked."""

    def __init__(self, bootstrap: str = "/state/image.boot") -> None:
        self.bootstrap = bootstrap
        self.traces: dict[str, Trace] = {}
        self.asked: list[Any] = []
        self.resident_bytes = 0

    async def known(self, image: str, *, run: bool) -> messages.KnownTrace:
        self.asked.append((image, run))
        trace = self.traces.get(image)
        if trace is None:
            raise http.ApiError(HTTPStatus.NOT_FOUND, f"NotFound: {image}: no run of it is known")
        raw = msgspec.Raw(encode(trace))
        return messages.KnownTrace(trace.fsid, trace.reference, self.bootstrap, raw)

    async def adopt(self, body: bytes) -> None:
        try:
            self.traces["adopted"] = decode(body)
        except TraceError as error:
            raise http.ApiError(HTTPStatus.BAD_REQUEST, f"ParseBody({error})") from None

    async def record(self, wanted: messages.RecordTrace) -> messages.Recorded:
        self.asked.append(wanted)
        if wanted.image not in self.traces:
            raise http.ApiError(HTTPStatus.CONFLICT, f"Conflict: {wanted.image} is not mounted")
        return messages.Recorded("f" * 64, wanted.image, self.resident_bytes)

    async def forget(self, image: str) -> None:
        if self.traces.pop(image, None) is None:
            raise http.ApiError(HTTPStatus.NOT_FOUND, f"NotFound: {image}")


class StandInReign:
    """Stands in for a daemon that has the kernel's end: remembers what it was told."""

    def __init__(self) -> None:
        self.holdings = {"state": 0}
        self.told: list[str] = []
        self.begun = asyncio.Event()

    def begin(self, takeover: bool) -> None:
        self.told.append("take over" if takeover else "begin")
        self.begun.set()

    async def end(self) -> None:
        self.told.append("end")


CACHE_FILE = messages.CacheFileInfo(
    volume="fscached",
    cookie="b" * 64,
    kind="blob",
    state="bound",
    open=True,
    size_bytes=8192,
    allocated_bytes=4096,
    used_s=1.7e9,
    path="/var/cache/b",
    images=["registry.test/app:1"],
)


class StandInService:
    """Stands in for the daemon, which needs a kernel: remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.image_status = [IMAGE]
        self.found = True
        self.traces = StandInTraces()
        self.cache = self
        self.pull: Callable[[], Coroutine[Any, Any, None]] | None = None

    def status(self) -> messages.Status:
        return messages.Status(
            version="0.1.0",
            git_commit="c" * 40,
            pid=812,
            state=State.RUNNING,
            transport="cachefiles",
            cache_directory="/var/cache",
            uptime_s=3661.5,
            rss_bytes=40 << 20,
            totals=messages.Totals(reads=4, requests=2, received_bytes=4000),
            images=self.image_status,
            demand=DEMAND,
        )

    async def bind_blob_entry(self, entry: BlobEntry) -> None:
        self.asked.append(entry)

    async def update_auth(self, name: str, auth: str) -> bool:
        self.asked.append(("auth", name, auth))
        return self.found

    async def unbind(self, domain_id: str, blob_id: str) -> bool:
        self.asked.append(("unbind", domain_id, blob_id))
        return self.found

    def cull(self, blob_id: str) -> None:
        self.asked.append(("cull", blob_id))

    async def listing(self) -> messages.CacheListing:
        return messages.CacheListing("/var/cache", 8192, 0, [CACHE_FILE])

    async def collect(self, wanted: messages.CollectGarbage) -> messages.Collected:
        self.asked.append(wanted)
        gone = messages.CulledFile("fscached", "b" * 64, 4096, "orphan")
        return messages.Collected([gone], [], 4096, 0)

    async def add_image(
        self, reference: str, credentials: messages.Credentials | None
    ) -> messages.ImageInfo:
        self.asked.append((reference, credentials))
        if self.pull:
            await self.pull()
        return self.images()[0]

    def prefetch(self, fsid: str) -> messages.PrefetchStatus:
        self.asked.append(("prefetch", fsid))
        return self.prefetch_status(fsid)

    def prefetch_status(self, fsid: str) -> messages.PrefetchStatus:
        return self.image_status[0].prefetch

    async def repair(self, spoiled: messages.RepairFile) -> messages.Repaired:
        self.asked.append(spoiled)
        return messages.Repaired(0, culled=True)

    def images(self) -> list[messages.ImageInfo]:
        return [
            messages.ImageInfo(
                image.reference,
                image.fsid,
                image.domain_id,
                image.manifest_digest,
                [blob.id for blob in image.blobs],
                image.settled,
            )
            for image in self.image_status
        ]

    async def remove_image(self, fsid: str) -> bool:
        self.asked.append(("remove", fsid))
        return self.found


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's socket, on a path as systemd's is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        yield receiver


@pytest.fixture
def custodian(tmp_path: Path) -> Iterator[Custodian]:
    custodian = Custodian(tmp_path)
    yield custodian
    custodian.close()


@pytest.fixture
def service() -> StandInService:
    """The daemon's stand-in."""
    return StandInService()


@pytest_asyncio.fixture
async def life() -> Succession:
    """One that runs, and would end nothing."""
    life = Succession(lambda: None)
    life.accede(StandInReign(), takeover=False)
    return life


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    """Where the API listens."""
    return str(tmp_path / "api.sock")


@pytest_asyncio.fixture
async def server(
    life: Succession, service: StandInService, socket_path: str
) -> AsyncIterator[http.Server]:
    """The API, listening."""
    limits = config.Api(header_limit_bytes=2048, body_limit_bytes=8192, connections=4)
    server = http.Server(socket_path, api.routes(life, lambda: service), limits)
    await server.start()
    yield server
    await server.close()


@pytest.fixture
def exchange(socket_path: str) -> Callable[..., Coroutine[Any, Any, bytes]]:
    """Sends raw bytes on a fresh connection, half-closes it, and returns all that comes back."""

    async def exchange(raw: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(socket_path)
        writer.write(raw)
        writer.write_eof()
        reply = await reader.read()
        writer.close()
        return reply

    return exchange

"""Images bound through the control service, read through a stand-in kernel."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from http import HTTPStatus
from pathlib import Path

import msgspec
import pytest

from fscached.config import Cache, Config, Source
from fscached.control import entry
from fscached.control.cache import looker
from fscached.control.http import ApiError
from fscached.control.messages import Credentials
from fscached.control.service import ControlService
from fscached.control.state import State
from fscached.culling.service import Culling
from fscached.fill.blob import Limits, OpenBlob
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.fill.objects import Objects
from fscached.handover import Handover
from fscached.images import Images
from fscached.prefetch.clock import LoopClock
from fscached.prefetch.job import Phase
from fscached.prefetch.service import Means
from fscached.prefetch.service import Service as Prefetcher
from fscached.prefetch.traces import Traces
from fscached.source import SourceError
from fscached.source.registries import Registries
from fscached.store import Image, Store
from fscached.transport import ObjectKey
from tests.fake_kernel import FakeKernel
from tests.fill.conftest import settled, until
from tests.rafs_v6.trees import Built, build, directory, regular
from tests.source.faulty import Seen, answer, faulty_server, head, silence

pytestmark = pytest.mark.asyncio

MIB = 1 << 20


@pytest.fixture(scope="module")
def built() -> Built:
    return build(directory({b"a": regular(b"a" * 5000), b"b": regular(bytes(range(256)) * 9000)}))


class Node:
    """One daemon, without its device and its socket."""

    def __init__(
        self,
        directory: Path,
        handover: Handover,
        images: int = 2048,
        source: Source = Source(),  # noqa: B008 - frozen
    ) -> None:
        cache = Cache(directory=str(directory / "cache"), images=images)
        config = Config(cache=cache, source=source)
        self.kernel = FakeKernel()
        self.store = Store(directory / "state")
        self.images = Images(
            lambda known, blob: self.store.chunks(known.image, blob, known.source, True, 10.0)
        )
        limits = Limits(MIB, 8 * MIB, 10.0, 1.0, True)
        self.crew = Crew(2, Pool(64 * MIB))
        self.objects = Objects(self.kernel, self.images.lookup, limits, self.crew)
        self.registries = Registries(config)
        traces = Traces(directory / "state" / "traces")
        self.prefetch = Prefetcher(Means(60.0, 2, 0), traces, LoopClock())
        self.objects.on_blob = self.opened
        self.culling = Culling(
            cache, self.kernel, self.store, self.crew, looker(self.images, self.objects)
        )
        self.service = ControlService(
            config,
            self.store,
            self.images,
            self.objects,
            self.prefetch,
            self.kernel,
            self.registries,
            handover,
            self.culling,
            lambda: State.RUNNING,
        )
        asyncio.get_running_loop().add_reader(self.kernel.fileno(), self.drain)

    def opened(self, key: ObjectKey, blob: OpenBlob) -> None:
        for known in self.images.having(key):
            self.prefetch.begin(known.key, known.image, known.prefetch, key.cookie, blob)

    def drain(self) -> None:
        for event in self.kernel.drain():
            self.objects.handle(event)

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.kernel.fileno())
        await self.prefetch.close()
        self.objects.close()
        self.kernel.close()
        await self.registries.close()
        self.crew.close()


def entry_of(built: Built, directory: Path, fsid: str = "image-1") -> entry.BlobEntry:
    """The image on the local disk, as a snapshotter hands it over."""
    directory.mkdir(exist_ok=True)
    for blob_id, data in built.blobs.items():
        (directory / blob_id).write_bytes(data)
    (directory / "image.boot").write_bytes(built.image.bootstrap)
    body = {
        "type": "bootstrap",
        "id": fsid,
        "domain_id": "shared",
        "config": {
            "id": fsid,
            "backend_type": "localfs",
            "backend_config": {"dir": str(directory)},
            "cache_type": "fscache",
            "cache_config": {"work_dir": str(directory)},
            "metadata_path": str(directory / "image.boot"),
        },
    }
    return entry.parse(json.dumps(body).encode())


def stored(entry_: entry.BlobEntry, host: str) -> entry.BlobEntry:
    """The same image, its blobs on a web server."""
    backend = entry.HttpServer(addr=f"http://{host}", path="blobs")
    return msgspec.structs.replace(entry_, backend=backend)


def overwrite(path: str, data: bytes) -> None:
    """Leave a damaged file where a good one was."""
    Path(path).write_bytes(data)


async def read_all(node: Node, built: Built) -> None:
    """Bootstrap and blob, through the kernel, are what was built."""
    boot = ObjectKey("shared", "image-1")
    size = await node.kernel.open(boot)
    assert await node.kernel.read(boot, 0, size) == built.image.bootstrap
    (blob_id,) = built.blobs
    blob = ObjectKey("shared", blob_id)
    size = await node.kernel.open(blob)
    assert await node.kernel.read(blob, 0, size) == built.cache_file(blob_id)


async def test_a_bound_entry_is_served(tmp_path, built):
    """What a snapshotter binds can be mounted and read."""
    node = Node(tmp_path, Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    await read_all(node, built)
    await settled(node.objects)
    status = node.service.status()
    assert status.totals.opens == 2 and status.totals.reads_failed == 0
    (image,) = status.images
    assert image.blobs[0].resident_bytes == image.blobs[0].size_bytes
    await node.close()


async def test_prefetch_is_ordered_and_traces_come_and_go(tmp_path, built):
    """Of an image that is open; what was read is a trace under the bootstrap's own digest, since a
    snapshotter's fsid is another one for each snapshot."""
    node = Node(tmp_path, Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    with pytest.raises(ApiError, match="mount it first"):
        node.service.prefetch("image-1")
    with pytest.raises(ApiError, match="no image with fsid"):
        node.service.prefetch("image-2")
    assert node.service.prefetch_status("image-1").phase is Phase.OFF
    blob = ObjectKey("shared", next(iter(built.blobs)))
    await node.kernel.open(blob)
    await node.kernel.read(blob, 0, 4096)
    node.service.prefetch("image-1")
    await until(lambda: node.service.prefetch_status("image-1").phase is Phase.DONE)
    assert node.kernel.resident_bytes(blob) == node.service.status().images[0].blobs[0].size_bytes
    run = await node.prefetch.trace(*_subject(node), run=True)
    assert run is not None
    assert run.fsid == hashlib.sha256(built.image.bootstrap).hexdigest()
    node.kernel.umount(blob)
    await until(lambda: node.prefetch._traces.load(run.fsid))
    await node.close()


def _subject(node: Node) -> tuple[ObjectKey, Image]:
    (known,) = node.images
    return known.key, known.image


async def test_readers_and_sources_are_counted(tmp_path, built):
    """READs by what became of them and how long they took; ranges by who was asked."""
    (blob,) = built.blobs.values()
    async with faulty_server(blob) as server:
        node = Node(tmp_path, Handover(), source=Source(retries=0))
        await node.service.bind_blob_entry(stored(entry_of(built, tmp_path / "blobs"), server.host))
        await read_all(node, built)
        await settled(node.objects)
        status = node.service.status()
        reads = status.demand
        assert reads.hits + reads.joined + reads.misses == status.totals.reads
        assert sum(reads.latencies.counts) == status.totals.reads and reads.failed == 0
        assert reads.misses >= 1 and reads.latencies.seconds > 0
        ((name, source),) = reads.sources.items()
        assert server.host in name and source.failures == 0
        assert source.requests > 0 and source.received_bytes > 0
        assert sum(map(sum, (row.counts for row in source.by_size))) >= 1
        assert status.images[0].demand == reads
        await node.close()


async def test_a_bound_entry_of_an_object_store_is_served(tmp_path, built):
    """Blobs come from where the entry says, verified as any, and a successor finds them too."""
    handover = Handover()
    (blob,) = built.blobs.values()
    async with faulty_server(blob) as server:
        first = Node(tmp_path, handover)
        bound = stored(entry_of(built, tmp_path / "blobs"), server.host)
        await first.service.bind_blob_entry(bound)
        await first.close()
        second = Node(tmp_path, Handover(handover.fd))
        second.service.restore()
        await read_all(second, built)
        (blob_id,) = built.blobs
        assert {seen.target for seen in server.seen} == {f"/blobs/{blob_id}"}
        await second.close()


async def test_a_successor_serves_what_its_predecessor_bound(tmp_path, built):
    """Registrations come back from the handover, in a process that knows nothing else."""
    handover = Handover()
    first = Node(tmp_path, handover)
    await first.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    await first.close()
    second = Node(tmp_path, Handover(handover.fd))
    second.service.restore()
    await read_all(second, built)
    await second.close()


def kept(directory: Path) -> list[str]:
    """The bootstraps that the store keeps for snapshotters' images."""
    return sorted(path.name for path in (directory / "state" / "bound").iterdir())


async def test_a_lost_bootstrap_costs_its_image_only(tmp_path, built, caplog):
    """The successor serves the others and says which one is gone."""
    other = build(directory({b"c": regular(b"c" * 5000)}))
    handover = Handover()
    first = Node(tmp_path, handover)
    await first.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    await first.service.bind_blob_entry(entry_of(other, tmp_path / "other", "image-2"))
    await first.close()
    digest = hashlib.sha256(other.image.bootstrap).hexdigest()
    overwrite(str(tmp_path / "state" / "bound" / digest), b"damaged")
    second = Node(tmp_path, Handover(handover.fd))
    second.service.restore()
    assert [known.image.fsid for known in second.images] == ["image-1"]
    assert "image-2" in caplog.text
    await second.close()


async def test_a_snapshot_that_is_removed_under_its_mount(tmp_path, built):
    """The snapshotter does that when umount is refused: the image is served on, by a successor
    too, and what was kept for it goes with it."""
    handover = Handover()
    first = Node(tmp_path, handover)
    await first.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    (tmp_path / "blobs" / "image.boot").unlink()
    await first.close()
    second = Node(tmp_path, Handover(handover.fd))
    second.service.begin()
    await read_all(second, built)
    assert kept(tmp_path) == [hashlib.sha256(built.image.bootstrap).hexdigest()]
    await second.service.unbind("shared", "")
    for key in list(second.objects.keys):
        second.kernel.umount(key)
    second.drain()
    await until(lambda: kept(tmp_path) == [])
    await second.close()


async def test_what_a_crash_left_beside_the_bindings_goes(tmp_path, built):
    """Nobody would ever remove it."""
    node = Node(tmp_path, Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    (tmp_path / "state" / "bound" / ".image-7-1234").write_bytes(b"half")
    node.service.begin()
    assert kept(tmp_path) == [hashlib.sha256(built.image.bootstrap).hexdigest()]
    await node.close()


async def test_another_bootstrap_under_a_mount(tmp_path, built):
    """Its size would change under the kernel, which would drop the file; nothing stays of it."""
    other = build(directory({b"c": regular(b"c" * 5000)}))
    node = Node(tmp_path, Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    await node.kernel.open(ObjectKey("shared", "image-1"))
    with pytest.raises(ApiError, match="another bootstrap is mounted as image-1: unmount"):
        await node.service.bind_blob_entry(entry_of(other, tmp_path / "other"))
    assert kept(tmp_path) == [hashlib.sha256(built.image.bootstrap).hexdigest()]
    await node.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [(os.mkfifo, "not a regular file"), (os.mkdir, "not a regular file"), (id, "No such file")],
)
async def test_what_is_no_file_is_no_bootstrap(tmp_path, built, make, says):
    """A pipe would be read for ever."""
    node = Node(tmp_path, Handover())
    bad = entry_of(built, tmp_path / "blobs")
    os.unlink(bad.metadata_path)
    make(bad.metadata_path)
    with pytest.raises(ApiError, match=says):
        await node.service.bind_blob_entry(bad)
    assert len(node.images) == 0 and kept(tmp_path) == []
    await node.close()


async def test_an_image_in_use_is_forgotten_at_its_close(tmp_path, built):
    """Unbind comes before umount: what is open keeps working, and a successor still knows it."""
    node = Node(tmp_path, handover := Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    boot = ObjectKey("shared", "image-1")
    await node.kernel.open(boot)
    assert await node.service.unbind("shared", "image-1")
    assert not await node.service.unbind("shared", "image-1")
    assert node.service.images() == [] and handover.load() != []
    assert await node.kernel.read(boot, 0, 4096) == built.image.bootstrap[:4096]
    node.kernel.umount(boot)
    node.drain()
    await until(lambda: handover.load() == [] and len(node.images) == 0)
    await node.close()


async def test_binding_again_is_no_error(tmp_path, built):
    """A client that was not sure asks twice; once forgotten it is gone."""
    node = Node(tmp_path, Handover())
    for _ in range(2):
        await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    assert len(node.images) == 1
    assert await node.service.unbind("shared", "") and len(node.images) == 0
    await node.close()


async def test_a_data_blob_goes_with_its_image(tmp_path, built):
    """nydusd counts its users; to forget one that is bound is no error, one that is not is."""
    node = Node(tmp_path, Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    (blob_id,) = built.blobs
    assert await node.service.unbind("shared", blob_id) and len(node.images) == 1
    assert not await node.service.unbind("elsewhere", blob_id)
    await node.close()


async def test_the_number_of_images_has_a_limit(tmp_path, built):
    """One more is refused and says what to do."""
    node = Node(tmp_path, Handover(), images=1)
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    with pytest.raises(ApiError, match="unmount some") as error:
        await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs", "image-2"))
    assert error.value.status == HTTPStatus.INSUFFICIENT_STORAGE
    await node.close()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-4096], "chunk table"),
        (lambda data: data[:5000], "truncated"),
        (lambda data: b"\x89PNG" * 1024, "superblock"),
        (lambda data: data[:1036] + b"\x0d" + data[1037:], "page"),
    ],
    ids=["short", "torn", "foreign", "another page size"],
)
async def test_a_bad_bootstrap_is_one_clear_error(tmp_path, built, damage, says):
    """The client is told what is wrong; nothing is bound."""
    node = Node(tmp_path, Handover())
    bad = entry_of(built, tmp_path / "blobs")
    overwrite(bad.metadata_path, damage(built.image.bootstrap))
    with pytest.raises(ApiError, match=says):
        await node.service.bind_blob_entry(bad)
    assert len(node.images) == 0
    await node.close()


async def test_no_reference_no_image(tmp_path):
    """A name that is none is the client's fault."""
    node = Node(tmp_path, Handover())
    with pytest.raises(ApiError) as error:
        await node.service.add_image("127.0.0.1:1/UPPER", None)
    assert error.value.status == HTTPStatus.BAD_REQUEST
    await node.close()


async def trickle(_: Seen, writer: asyncio.StreamWriter) -> None:
    """A byte now and then, so that no timeout for silence ends it."""
    writer.write(head(200, {"Content-Length": "1000"}))
    while True:
        writer.write(b"{")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (None, "127.0.0.1:.*ConnectError"),
        (silence(), "within 0.3 s.*mount_deadline_s"),
        (trickle, "within 0.3 s.*mount_deadline_s"),
        (answer(503), "answered 503"),
        (answer(429, {"Retry-After": "60"}), "within 0.3 s"),
    ],
    ids=["away", "silent", "a trickle", "in trouble", "busy"],
)
async def test_a_source_out_of_reach(tmp_path, trouble, says):
    """A mount fails within its deadline, says why, and leaves nothing registered."""
    limit_s = 0.3 if "0.3 s" in says else 20
    source = Source(mount_deadline_s=limit_s, retries=2, retry_pause_s=0.01)
    node = Node(tmp_path, handover := Handover(), source=source)
    async with faulty_server(b"") as server:
        server.default = trouble or answer(200)
        host = server.host if trouble else "127.0.0.1:1"
        with pytest.raises(SourceError, match=says):
            await node.service.add_image(f"{host}/app:1", None)
    assert node.service.images() == [] and len(node.images) == 0
    assert not handover.load()
    await node.close()


async def test_credentials_stay_out_of_answers_and_errors(tmp_path):
    """Not even when the registry cannot be reached."""
    node = Node(tmp_path, Handover())
    with pytest.raises(Exception, match=r"127\.0\.0\.1:1") as error:
        await node.service.add_image("127.0.0.1:1/app:1", Credentials("ann", "s3cret-word"))
    assert "s3cret-word" not in str(error.value) and "ann" not in str(error.value)
    await node.close()

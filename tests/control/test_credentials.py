"""Credentials belong to one image: a real registry that wants them says what they are good for."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fscached.config import Source
from fscached.control import entry
from fscached.control.binding import OFFLINE, Binding
from fscached.control.completeness import missing
from fscached.control.http import ApiError
from fscached.control.messages import Credentials
from fscached.handover import Handover
from fscached.source import Fault, SourceError
from fscached.transport import CacheFile, ObjectKey
from rafs_v6.oci import BLOB_ANNOTATION, BOOTSTRAP_ANNOTATION
from tests.control.test_service import Node, entry_of, read_all
from tests.fill.conftest import settled
from tests.rafs_v6.trees import Built, build, directory, regular
from tests.source.conftest import basic_registry
from tests.source.docker_registry import DockerRegistry

__all__ = ["basic_registry"]

pytestmark = pytest.mark.asyncio

ALICE = Credentials("alice", "open sesame")
MALLORY = Credentials("mallory", "open says me")
TO_ANY = Source(insecure_registries=("*",), retries=1, retry_pause_s=0.01)


@pytest.fixture(scope="module")
def built() -> Built:
    return build(directory({b"a": regular(b"a" * 5000), b"b": regular(bytes(range(256)) * 900)}))


def basic(credentials: Credentials) -> str:
    return base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()


def layer(data: bytes, annotation: str) -> dict[str, Any]:
    return {
        "mediaType": "application/octet-stream",
        "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "size": len(data),
        "annotations": {annotation: "true"},
    }


def push(registry: DockerRegistry, built: Built, repository: str, *, blobs: bool = True) -> str:
    """An image in the registry, or one whose blobs its repository has not; its reference."""
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w") as tar:
        member = tarfile.TarInfo("image/image.boot")
        member.size = len(built.image.bootstrap)
        tar.addfile(member, io.BytesIO(built.image.bootstrap))
    layers = [layer(data, BLOB_ANNOTATION) for data in built.blobs.values()]
    layers.append(layer(archive.getvalue(), BOOTSTRAP_ANNOTATION))
    for data in (archive.getvalue(), b"{}", *(built.blobs.values() if blobs else ())):
        registry.put_blob(repository, data)
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": layer(b"{}", "none")}
    registry.put_manifest(repository, "1", json.dumps(manifest | {"layers": layers}).encode())
    return f"{registry.host}/{repository}:1"


async def read_image(node: Node, built: Built, fsid: str, volume: str) -> None:
    """All of it, as a mount would."""
    boot = ObjectKey(volume, fsid)
    size = await node.kernel.open(boot)
    assert await node.kernel.read(boot, 0, size) == built.image.bootstrap
    (blob_id,) = built.blobs
    blob = ObjectKey(volume, blob_id)
    size = await node.kernel.open(blob)
    assert await node.kernel.read(blob, 0, size) == built.cache_file(blob_id)
    await settled(node.objects)


async def test_what_is_cached_is_not_everybodys(
    tmp_path: Path, built: Built, basic_registry: DockerRegistry
) -> None:
    """Whoever the registry refuses gets nothing that was brought for others, mounted or not."""
    node = Node(tmp_path, Handover(), source=TO_ANY)
    image = push(basic_registry, built, "private/app")
    info = await node.service.add_image(image, ALICE)
    await read_image(node, built, info.fsid, info.domain_id)
    for credentials in (MALLORY, None):
        with pytest.raises(SourceError) as error:
            await node.service.add_image(image, credentials)
        assert error.value.fault is Fault.AUTH and "open" not in str(error.value)
    assert [image.fsid for image in node.service.images()] == [info.fsid]
    await node.close()


async def test_a_blob_of_another_repository_is_not_had_by_its_name(
    tmp_path: Path, built: Built, basic_registry: DockerRegistry
) -> None:
    """An image that names a cached blob must be able to bring it itself."""
    node = Node(tmp_path, Handover(), source=TO_ANY)
    image = push(basic_registry, built, "private/app")
    thief = push(basic_registry, built, "thief/app", blobs=False)
    await node.service.add_image(image, ALICE)
    with pytest.raises(SourceError, match=r"thief/app:1: blob sha256:.*answered 404"):
        await node.service.add_image(thief, ALICE)
    await node.service.add_image(push(basic_registry, built, "friend/app"), ALICE)
    await node.close()


def in_registry(
    built: Built, directory: Path, host: str, auth: Credentials | None, fsid: str = "image-1"
) -> entry.BlobEntry:
    """As a snapshotter binds it, in its directory."""
    bound = entry_of(built, directory, fsid)
    backend = entry.Registry(host=host, repo="private/app", scheme="http")
    if auth is not None:
        backend = msgspec.structs.replace(backend, auth=basic(auth))
    return msgspec.structs.replace(bound, backend=backend)


@pytest.mark.parametrize("wrong_first", [True, False])
async def test_two_images_share_a_blob(
    tmp_path: Path, built: Built, basic_registry: DockerRegistry, wrong_first: bool
) -> None:
    """Later credentials replace earlier ones; where they are refused the earlier ones still do."""
    node = Node(tmp_path, Handover(), source=TO_ANY)
    push(basic_registry, built, "private/app")
    order = [MALLORY, ALICE] if wrong_first else [ALICE, MALLORY]
    for number, credentials in enumerate(order, 1):
        fsid = f"image-{number}"
        bound = in_registry(built, tmp_path / fsid, basic_registry.host, credentials, fsid)
        await node.service.bind_blob_entry(bound)
    await read_all(node, built)
    await settled(node.objects)
    assert node.service.status().totals.reads_failed == 0
    await node.close()


@pytest.mark.parametrize("name", ["image-1", "7", "hashed"])
async def test_credentials_are_renewed_while_it_is_mounted(
    tmp_path: Path, built: Built, basic_registry: DockerRegistry, name: str
) -> None:
    """By fsid or by the snapshotter's number; a successor has the new ones too."""
    fsid = hashlib.sha256(b"nydus-snapshot-hashed").hexdigest() if name == "hashed" else "image-1"
    node = Node(tmp_path, handover := Handover(), source=TO_ANY)
    push(basic_registry, built, "private/app")
    bound = in_registry(built, tmp_path / "blobs", basic_registry.host, MALLORY, fsid)
    bound = msgspec.structs.replace(bound, work_dir="/r/snapshots/7/fs")
    await node.service.bind_blob_entry(bound)
    assert not await node.service.update_auth("8", basic(ALICE))
    assert await node.service.update_auth(name, basic(ALICE))
    await read_image(node, built, fsid, "shared")
    ((left,),) = ([msgspec.convert(raw, Binding) for raw in handover.load()],)
    assert left.entry is not None and isinstance(left.entry.backend, entry.Registry)
    assert left.entry.backend.auth == basic(ALICE)
    with pytest.raises(ApiError, match="auth is not base64 of user:password") as error:
        await node.service.update_auth(name, "b3BlbiBzYXlzIG1l")
    assert error.value.status == 400
    await node.close()


async def test_only_a_registry_has_credentials(tmp_path: Path, built: Built) -> None:
    """A directory is told so."""
    node = Node(tmp_path, Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    with pytest.raises(ApiError, match="not in a registry"):
        await node.service.update_auth("image-1", basic(ALICE))
    await node.close()


async def test_offline_mounts_what_is_here_and_nothing_else(
    tmp_path: Path, built: Built, basic_registry: DockerRegistry
) -> None:
    """By whoever asks, with the registry away; what is not all here is refused at the mount."""
    online = Node(tmp_path, handover := Handover(), source=TO_ANY)
    image = push(basic_registry, built, "private/app")
    info = await online.service.add_image(image, ALICE)
    offline = msgspec.structs.replace(TO_ANY, offline=True)
    node = Node(tmp_path, Handover(), source=offline)
    with pytest.raises(SourceError, match=f"all of it: {OFFLINE[:20]}"):
        await node.service.add_image(image, None)
    with pytest.raises(SourceError, match=r"never/seen:1.*offline is set"):
        await node.service.add_image(f"{basic_registry.host}/never/seen:1", None)
    assert node.service.images() == []
    await read_image(online, built, info.fsid, info.domain_id)
    node.objects.blobs = online.objects.blobs  # type: ignore[method-assign]
    assert (await node.service.add_image(image, None)).fsid == info.fsid
    (key,) = node.service.images()[0].blobs
    origin = node.images.lookup(ObjectKey(info.domain_id, key))
    with pytest.raises(SourceError, match="nobody is asked"):
        await origin.source.read(key, 0, 1, 0, lambda _: None, 1.0)  # type: ignore[union-attr,arg-type]
    assert handover.load() is not None
    await node.close()
    await online.close()


class Disk:
    """Cache files of an image, as they lie in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, key: ObjectKey) -> str:
        return str(self._directory / key.cookie)

    def found(self, cookie: str) -> list[CacheFile]:
        return []


async def test_what_is_missing_is_counted_on_the_disk(tmp_path: Path, built: Built) -> None:
    """Every chunk has to be data; what was never read is missing altogether."""
    node = Node(tmp_path, Handover())
    bound = entry_of(built, tmp_path / "blobs")
    await node.service.bind_blob_entry(bound)
    ((image,),) = ([known.image for known in node.images],)
    (blob_id,) = built.blobs
    path, disk = tmp_path / blob_id, Disk(tmp_path)

    async def lack() -> str:
        return await missing("shared", image, node.objects, disk, node.store)  # type: ignore[arg-type]

    assert await lack() == f"blob {blob_id[:12]}, all of it"
    await read_all(node, built)
    assert await lack() == ""  # as it is open, and complete
    for key in list(node.objects.keys):
        node.kernel.umount(key)
    node.drain()
    data = built.cache_file(blob_id)
    path.write_bytes(data)
    os.truncate(path, -(-len(data) // 4096) * 4096)
    assert await lack() == ""
    path.unlink()
    path.touch()
    os.truncate(path, -(-len(data) // 4096) * 4096)
    assert await lack() == f"2 of 2 chunks of blob {blob_id[:12]}"
    await node.close()

"""What the daemon says of its cache files, and does with them, over a stand-in kernel."""

from __future__ import annotations

import hashlib
from http import HTTPStatus

import pytest

from fscached.control.http import ApiError
from fscached.control.messages import CollectGarbage, RepairFile
from fscached.handover import Handover
from fscached.transport import ObjectKey
from tests.control.test_service import Node, entry_of, read_all
from tests.fill.conftest import settled, until
from tests.rafs_v6.trees import Built, build, directory, regular

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def built() -> Built:
    return build(directory({b"a": regular(b"a" * 5000), b"b": regular(bytes(range(256)) * 9000)}))


async def bound(tmp_path, built: Built) -> tuple[Node, ObjectKey, ObjectKey]:
    """A node that serves the image, read; its bootstrap's key and its blob's."""
    (tmp_path / "cache").mkdir()
    node = Node(tmp_path, Handover())
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    await read_all(node, built)
    await settled(node.objects)
    (blob_id,) = built.blobs
    return node, ObjectKey("shared", "image-1"), ObjectKey("shared", blob_id)


async def unmount(node: Node, *keys: ObjectKey) -> None:
    for key in keys:
        node.kernel.umount(key)
    node.drain()


async def test_files_are_listed_with_their_images(tmp_path, built):
    """Nameless while new, bound while an image is, an orphan after that."""
    node, boot, blob = await bound(tmp_path, built)
    files = {file.kind: file for file in (await node.service.cache.listing()).files}
    assert set(files) == {"bootstrap", "blob"}
    assert all(file.path == "" and file.open and file.state == "bound" for file in files.values())
    assert files["blob"].images == ["image-1"] and files["blob"].cookie == blob.cookie
    digest = hashlib.sha256(built.image.bootstrap).hexdigest()
    assert files["blob"].bootstrap == str(tmp_path / "state" / "bound" / digest)
    await unmount(node, boot, blob)
    files = {file.kind: file for file in (await node.service.cache.listing()).files}
    assert all(file.path and not file.open for file in files.values())
    assert await node.service.unbind("shared", "image-1")
    files_left = (await node.service.cache.listing()).files
    assert [(file.state, file.kind, file.images) for file in files_left] == [("orphan", "", [])] * 2
    await node.close()


async def test_a_snapshotters_removal_empties_the_cache(tmp_path, built):
    """Its order of things: unbind, umount, and the bootstrap's and the layer's culls around it."""
    node, boot, blob = await bound(tmp_path, built)
    node.service.cache.cull(blob.cookie)
    await node.culling.settle()
    assert await node.service.unbind("shared", "")
    await unmount(node, boot, blob)
    node.service.cache.cull(boot.cookie)
    await until(lambda: len(node.images) == 0)
    await node.culling.settle()
    assert (await node.service.cache.listing()).files == [] and node.culling.waiting == 0
    assert node.service.status().cache.culled_files == 2
    await node.close()


async def test_garbage_is_collected(tmp_path, built):
    """What is bound stays; once nothing is, all of it may go."""
    node, boot, blob = await bound(tmp_path, built)
    await unmount(node, boot, blob)
    assert (await node.service.cache.collect(CollectGarbage(all_idle=True))).culled == []
    await node.service.unbind("shared", "image-1")
    dry = await node.service.cache.collect(CollectGarbage(all_idle=True, dry_run=True))
    done = await node.service.cache.collect(CollectGarbage(all_idle=True))
    assert dry == done and {file.cookie for file in done.culled} == {boot.cookie, blob.cookie}
    assert done.used_bytes == 0 and (await node.service.cache.listing()).files == []
    await node.close()


async def test_a_spoiled_file_is_repaired_where_it_is_open_else_it_goes(
    tmp_path, built, monkeypatch
):
    """A bootstrap that is in use can do neither."""
    dropped = []
    monkeypatch.setattr("fscached.control.cache.forget_pages", lambda: dropped.append(True))
    node, boot, blob = await bound(tmp_path, built)
    done = await node.service.cache.repair(RepairFile(*blob, [0]))
    assert (done.chunks, done.culled) == (1, False) and dropped == [True]
    assert node.kernel.content(blob) == built.cache_file(blob.cookie)
    with pytest.raises(ApiError, match="unmount its images") as error:
        await node.service.cache.repair(RepairFile(*boot, [0]))
    assert error.value.status == HTTPStatus.CONFLICT
    await unmount(node, boot, blob)
    done = await node.service.cache.repair(RepairFile(*blob, [0]))
    assert (done.chunks, done.culled) == (0, True)
    await node.close()


@pytest.mark.parametrize("name", ["../state", "", "a\nbind", "x" * 300])
async def test_no_name_leads_out_of_the_cache(tmp_path, name):
    """What no file can be called is refused before anybody looks for it."""
    node = Node(tmp_path, Handover())
    with pytest.raises(ApiError) as error:
        node.service.cache.cull(name)
    assert error.value.status == HTTPStatus.BAD_REQUEST
    await node.close()

"""What people ask of traces, of images on a stand-in kernel."""

from __future__ import annotations

import hashlib
from http import HTTPStatus

import msgspec
import pytest

from fscached.control.http import ApiError
from fscached.control.messages import RecordTrace
from fscached.handover import Handover
from fscached.prefetch.trace import Access, Trace, decode, encode
from fscached.prefetch.traces import Traces
from fscached.transport import ObjectKey
from tests.control.test_service import Node, built, entry_of  # noqa: F401
from tests.fill.conftest import settled, until
from tests.rafs_v6.trees import Built

pytestmark = pytest.mark.asyncio

REFERENCE = "host/app:1"


async def traced(node: Node, image: str, *, run: bool = False) -> Trace:
    return decode(bytes((await node.service.traces.known(image, run=run)).trace))


async def refused(what) -> HTTPStatus:
    with pytest.raises(ApiError) as caught:
        await what
    return caught.value.status


async def test_a_new_run_begins_while_the_image_is_mounted(tmp_path, built: Built):  # noqa: F811
    """The one that went on is kept; each has what was read in it, and together they are known."""
    node = Node(tmp_path, Handover())
    traces, kept = node.service.traces, Traces(tmp_path / "state" / "traces")
    await node.service.bind_blob_entry(entry_of(built, tmp_path / "blobs"))
    (blob,) = built.image.blobs
    key = ObjectKey("shared", blob.blob_id)
    assert await refused(traces.record(RecordTrace("image-1"))) == 409
    size = await node.kernel.open(key)
    assert await refused(traces.known("image-1", run=True)) == 404
    await node.kernel.read(key, 0, 4096)
    # The reader is awake before the loop has heard of what has come.
    await settled(node.objects)
    first = await traced(node, "image-1", run=True)
    begun = await traces.record(RecordTrace("image-1"))
    assert (begun.fsid, begun.resident_bytes > 0) == ("image-1", True)
    assert await refused(traces.known("image-1", run=True)) == 404
    await node.kernel.read(key, size - 4096, size)
    second = await traced(node, "image-1", run=True)
    assert (first.runs, second.runs) == (1, 0)
    assert {each.start for each in first.accesses} == {0}
    assert {each.start for each in second.accesses}.isdisjoint({0})
    assert set((await traced(node, "image-1")).accesses) >= {*first.accesses, *second.accesses}
    known = await traces.known("image-1", run=False)
    digest = hashlib.sha256(built.image.bootstrap).hexdigest()
    assert known.bootstrap == str(tmp_path / "state" / "bound" / digest)
    node.kernel.umount(key)
    node.drain()
    await until(lambda: len(kept.load(first.fsid).accesses) == 2)
    await node.close()


async def test_a_run_is_recorded_without_prefetch(tmp_path, built: Built):  # noqa: F811
    """What would have been brought is left for readers to ask for, unless it is wanted."""
    node = Node(tmp_path, Handover())
    entry = entry_of(built, tmp_path / "blobs")
    prefetch = msgspec.structs.replace(entry.prefetch, enable=True, threads=1)
    await node.service.bind_blob_entry(msgspec.structs.replace(entry, prefetch=prefetch))
    (blob,) = built.image.blobs
    await node.kernel.open(ObjectKey("shared", blob.blob_id))
    await node.service.traces.record(RecordTrace("image-1", prefetch=True))
    assert node.service.prefetch_status("image-1").phase != "off"
    await node.service.traces.record(RecordTrace("image-1"))
    assert node.service.prefetch_status("image-1").phase == "off"
    await node.close()


async def test_an_image_is_known_before_and_after_its_mounts(tmp_path, built: Built):  # noqa: F811
    """By reference or fsid, as long as its bootstrap is kept; a trace may be there before it."""
    node = Node(tmp_path, Handover())
    traces = node.service.traces
    image = node.store.adopt(REFERENCE, "sha256:0", built.image.bootstrap, None)
    assert await refused(traces.known(REFERENCE, run=False)) == 404
    trace = Trace(image.fsid, REFERENCE, 1, (Access(image.blobs[0].blob_id, 0, 4096, 0.0),))
    await traces.adopt(encode(trace))
    assert await traced(node, REFERENCE) == await traced(node, image.fsid) == trace
    await traces.forget(image.fsid)
    assert await refused(traces.forget(REFERENCE)) == 404
    await node.close()


@pytest.mark.parametrize("name", ["host/none:1", "0" * 64, "../images", "\0", "x" * 4096])
async def test_an_unknown_image_is_404_whatever_its_name(tmp_path, built: Built, name):  # noqa: F811
    """No name leads out of the store."""
    node = Node(tmp_path, Handover())
    traces = node.service.traces
    for what in (traces.known(name, run=False), traces.record(RecordTrace(name))):
        assert await refused(what) == 404
    assert await refused(traces.forget(name)) == 404
    await node.close()


async def test_what_is_no_trace_is_400_and_what_cannot_be_kept_500(tmp_path):
    """One clear error each; the daemon goes on."""
    node = Node(tmp_path, Handover())
    assert await refused(node.service.traces.adopt(b'{"trace": 7}')) == 400
    (tmp_path / "state" / "traces").write_text("in the way")
    assert await refused(node.service.traces.adopt(encode(Trace("f" * 64, "", 1, ())))) == 500
    await node.close()

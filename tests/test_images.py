"""What a key of the kernel stands for."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from fscached.fill.objects import LocalBootstrap
from fscached.images import Images, Registration
from fscached.source import Fault, Priority, Refusal, SourceError
from fscached.store import Image, Store
from fscached.transport import ObjectKey
from rafs_v6 import ImageError
from tests.rafs_v6.trees import build, directory, regular
from tests.test_store import BlobFile


@pytest.fixture
def image(tmp_path) -> Image:
    built = build(directory({b"a": regular(b"a" * 5000)}))
    return Store(tmp_path).adopt("host/app:1", "sha256:0", built.image.bootstrap, None)


def registration(image: Image, volume: str = "domain") -> Registration:
    return Registration(image, volume, BlobFile(b""), prefetch=True)


def images(*registrations: Registration) -> Images:
    made = Images(lambda registration, entry: asyncio.sleep(0, result=None))  # type: ignore[arg-type]
    for one in registrations:
        made.bind(one)
    return made


def test_a_bound_image_answers_for_bootstrap_and_blobs(image):
    """By volume and fsid, by volume and blob id, and by nothing else."""
    bound = images(registration(image))
    assert bound.lookup(ObjectKey("domain", image.fsid)) == LocalBootstrap(
        image.path, image.size_bytes
    )
    origin = bound.lookup(ObjectKey("domain", image.blobs[0].blob_id))
    assert origin is not None and origin.size_bytes == image.blobs[0].uncompressed_size
    assert bound.lookup(ObjectKey("other", image.fsid)) is None
    assert bound.lookup(ObjectKey("domain", "f" * 64)) is None


def test_an_unbound_image_is_unknown(image):
    """A mount of it fails from then on."""
    bound = images(registration(image))
    assert bound.unbind("domain", image.fsid) is not None
    assert bound.unbind("domain", image.fsid) is None
    assert bound.lookup(ObjectKey("domain", image.fsid)) is None


def test_a_blob_lives_as_long_as_one_image_has_it(image):
    """Two images of a domain share a blob; the second serves it when the first is gone."""
    second = dataclasses.replace(image, fsid="2" * 64)
    bound = images(registration(image), registration(second))
    bound.unbind("domain", image.fsid)
    assert bound.lookup(ObjectKey("domain", image.blobs[0].blob_id)) is not None


def test_an_open_blob_is_read_from_who_serves_it_now(image):
    """Its image may be bound again with other credentials, or leave it to another image."""

    async def read(source) -> None:
        await source.read(image.blobs[0].blob_id, 0, 1, Priority.DEMAND, lambda _: None, 1.0)

    async def scene() -> None:
        second = dataclasses.replace(image, fsid="2" * 64)
        first, renewed, shared = (BlobFile(b"a") for _ in range(3))
        bound = images(Registration(image, "domain", first, prefetch=False))
        origin = bound.lookup(ObjectKey("domain", image.blobs[0].blob_id))
        bound.bind(Registration(image, "domain", renewed, prefetch=False))
        await read(origin.source)
        assert (first.reads, renewed.reads) == (0, 1)
        bound.bind(Registration(second, "domain", shared, prefetch=False))
        bound.unbind("domain", image.fsid)
        await read(origin.source)
        assert (first.reads, renewed.reads, shared.reads) == (0, 1, 1)
        bound.unbind("domain", second.fsid)
        await read(origin.source)
        assert shared.reads == 2

    asyncio.run(scene())


class Shut(BlobFile):
    """Refuses, after some bytes, as who looks at a token anew for every request."""

    def __init__(self, error: SourceError, brings: bytes = b"") -> None:
        super().__init__(b"")
        self.error = error
        self.brings = brings

    async def read(self, blob_id, start, end, priority, feed, deadline_s):
        self.reads += 1
        feed(memoryview(self.brings))
        raise self.error


@pytest.mark.parametrize(
    "error", [SourceError("no", Fault.AUTH), Refusal("404", Fault.ORIGIN)], ids=["auth", "gone"]
)
def test_who_is_refused_leaves_it_to_another_image(image, error):
    """From where it stopped, and is asked last from then on; a newer one is asked first again."""

    async def scene() -> None:
        images_of = [dataclasses.replace(image, fsid=str(number) * 64) for number in range(3)]
        first, shut, newest = BlobFile(b"abcdef"), Shut(error, b"ab"), BlobFile(b"abcdef")
        bound = images(Registration(images_of[0], "domain", first, prefetch=False))
        origin = bound.lookup(ObjectKey("domain", image.blobs[0].blob_id))
        bound.bind(Registration(images_of[1], "domain", shut, prefetch=False))
        for reads in (1, 2):
            came = bytearray()
            await origin.source.read("id", 0, 6, Priority.DEMAND, came.extend, 1.0)
            assert (came, shut.reads, first.reads) == (b"abcdef", 1, reads)
        bound.bind(Registration(images_of[2], "domain", newest, prefetch=False))
        await origin.source.read("id", 0, 6, Priority.DEMAND, came.extend, 1.0)
        assert (newest.reads, first.reads, shut.reads) == (1, 2, 1)

    asyncio.run(scene())


@pytest.mark.parametrize("fault", [Fault.NETWORK, Fault.DEADLINE, Fault.ORIGIN])
def test_who_is_away_is_not_refused(image, fault):
    """Whoever reads waits for it, or fails: it is no matter of rights."""

    async def scene() -> None:
        shut = Shut(SourceError("away", fault))
        second = dataclasses.replace(image, fsid="2" * 64)
        bound = images(registration(image), Registration(second, "domain", shut, prefetch=False))
        origin = bound.lookup(ObjectKey("domain", image.blobs[0].blob_id))
        with pytest.raises(SourceError, match="away"):
            await origin.source.read("id", 0, 6, Priority.DEMAND, lambda _: None, 1.0)

    asyncio.run(scene())


def test_one_id_for_two_blobs_is_refused(image):
    """An image cannot say what another image's blob is made of; in its own domain it may."""
    lie = image.blobs[0]._replace(toc_digest=b"\1" * 32)
    liar = dataclasses.replace(image, fsid="2" * 64, blobs=(lie,))
    bound = images(registration(image))
    with pytest.raises(ImageError, match="domain of its own"):
        bound.bind(registration(liar))
    bound.bind(registration(liar, "elsewhere"))


def test_a_failed_load_is_tried_anew(image):
    """One load for all who ask; none of them keeps the failure."""
    loads = []

    async def load(registration, entry):
        loads.append(entry)
        await asyncio.sleep(0)
        if len(loads) == 1:
            raise ImageError("a bit flipped")
        return "chunks"

    async def scene() -> None:
        bound = Images(load)
        bound.bind(registration(image))
        origin = bound.lookup(ObjectKey("domain", image.blobs[0].blob_id))
        results = await asyncio.gather(origin.chunks(), origin.chunks(), return_exceptions=True)
        assert [str(result) for result in results] == ["a bit flipped"] * 2
        assert await asyncio.gather(origin.chunks(), origin.chunks()) == ["chunks"] * 2
        assert len(loads) == 2

    asyncio.run(scene())

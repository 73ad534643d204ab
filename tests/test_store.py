"""The chain of trust on this node: every link verified, one flipped bit each."""

from __future__ import annotations

import asyncio
import gzip
import io
import tarfile
from collections.abc import Callable

import pytest

from fscached.source import Answer, Priority
from fscached.store import Image, Store, bootstrap_layer, unpack_bootstrap
from rafs_v6 import ImageError
from rafs_v6.blob import (
    DIGESTS_NAME,
    META_HEADER_NAME,
    META_NAME,
    TOC_NAME,
    ChunkMap,
    tail_entries,
)
from rafs_v6.oci import bootstrap_layer as pack_bootstrap
from tests.rafs_v6.trees import Built, build, directory, regular

REFERENCE = "registry.example/app:1"


class BlobFile:
    """A source that is one blob file."""

    name = "file"

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.reads = 0

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        self.reads += 1
        feed(memoryview(self.data)[start:end])
        return Answer(self.name, 1, end - start, 0.0)

    def distrust(self, blob_id: str, start: int, end: int) -> bool:
        return False

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def built() -> Built:
    return build(directory({b"a": regular(b"a" * 5000), b"b": regular(bytes(range(256)) * 40)}))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def adopt(store: Store, built: Built) -> Image:
    return store.adopt(REFERENCE, "sha256:" + "0" * 64, built.image.bootstrap, {*built.blobs})


def chunks(store: Store, image: Image, source: BlobFile) -> ChunkMap:
    return asyncio.run(store.chunks(image, image.blobs[0], source, True, 10.0))


def test_an_image_is_known_again(store, built):
    """What was adopted is found by its reference and by its fsid."""
    image = adopt(store, built)
    assert store.find(REFERENCE) == store.load(image.fsid) == image
    assert store.find("registry.example/other:1") is None


def test_a_damaged_bootstrap_is_refused(store, built):
    """The fsid is the bootstrap's sha256."""
    image = adopt(store, built)
    data = bytearray(image.path.read_bytes())
    data[5000] ^= 1
    image.path.write_bytes(data)
    with pytest.raises(ImageError, match=r"damaged; mount the image again"):
        store.load(image.fsid)


def test_a_blob_the_manifest_does_not_name_is_refused(store, built):
    """Manifest → blob table: a bootstrap may use the image's own layers only."""
    with pytest.raises(ImageError, match="no layer of the manifest"):
        store.adopt(REFERENCE, "sha256:0", built.image.bootstrap, frozenset({"f" * 64}))


def test_chunks_come_with_one_request_and_are_kept(store, built):
    """The second time the registry is not asked: it may be down."""
    image, (blob,) = adopt(store, built), built.blobs.values()
    source = BlobFile(blob)
    first, second = chunks(store, image, source), chunks(store, image, source)
    assert source.reads == 1
    assert [first.digest(i) for i in range(first.count)] == [
        second.digest(i) for i in range(second.count)
    ]


@pytest.mark.parametrize("part", [TOC_NAME, META_NAME, META_HEADER_NAME, DIGESTS_NAME])
def test_a_flipped_bit_in_the_tail_is_refused(store, built, part):
    """Blob table → ToC → blob meta, its header and the chunks' digests."""
    image, (blob,) = adopt(store, built), built.blobs.values()
    source = BlobFile(blob)
    entries = {entry.name: entry for entry in tail_entries(blob)}
    if part == META_HEADER_NAME:
        position = entries[META_NAME].start + entries[META_NAME].size - 2000
    else:
        position = entries[part].start + 20
    source.data[position] ^= 1
    with pytest.raises(ImageError):
        chunks(store, image, source)
    source.data[position] ^= 1
    assert chunks(store, image, source).count == 2


def test_a_kept_tail_that_was_damaged_is_fetched_again(store, built, tmp_path, caplog):
    """What lies on the disk is verified as if it came from the network."""
    image, (blob,) = adopt(store, built), built.blobs.values()
    source = BlobFile(blob)
    chunks(store, image, source)
    (kept,) = (tmp_path / "blobs").iterdir()
    data = bytearray(kept.read_bytes())
    data[-30] ^= 1
    kept.write_bytes(data)
    assert chunks(store, image, source).count == 2
    assert source.reads == 2 and "fetched again" in caplog.text


def test_the_bootstrap_layer_is_found_by_its_annotation(built):
    """The last layer of a RAFS image, and the ids of the others."""
    manifest = {
        "layers": [
            {
                "digest": "sha256:" + "a" * 64,
                "size": 1,
                "annotations": {"containerd.io/snapshot/nydus-blob": "true"},
            },
            {
                "digest": "sha256:" + "b" * 64,
                "size": 2,
                "annotations": {"containerd.io/snapshot/nydus-bootstrap": "true"},
            },
        ]
    }
    assert bootstrap_layer(manifest) == ("sha256:" + "b" * 64, 2, frozenset({"a" * 64}))


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ({}, "no layers"),
        ({"layers": [7]}, "not an object"),
        ({"layers": [{"digest": 1, "size": 2}]}, "no proper digest"),
        ({"layers": [{"digest": "sha256:0", "size": 2}]}, "fscached image convert"),
    ],
)
def test_a_manifest_of_something_else_is_refused(manifest, says):
    """One clear error each."""
    with pytest.raises(ImageError, match=says):
        bootstrap_layer(manifest)


def test_a_bootstrap_layer_is_unpacked(built):
    """What our own builder packs, and only that file of it."""
    layer, _ = pack_bootstrap(built.image.bootstrap)
    assert unpack_bootstrap(layer) == built.image.bootstrap


def test_a_bootstrap_layer_without_bootstrap_is_refused():
    """A tar of other files, a directory of that name, no tar at all, half a tar."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as archive:
        folder = tarfile.TarInfo("image/image.boot")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("etc/passwd"))
    for layer in (output.getvalue(), b"no tar", b"", gzip.compress(b"no tar either")):
        with pytest.raises(ImageError):
            unpack_bootstrap(layer)


def test_half_a_bootstrap_layer_is_refused(built):
    """A layer that ends early is no shorter bootstrap."""
    layer, _ = pack_bootstrap(built.image.bootstrap)
    with pytest.raises(ImageError):
        unpack_bootstrap(gzip.compress(gzip.decompress(layer)[:4096]))


def test_nothing_of_the_store_is_readable_by_others(store, built, tmp_path):
    """Directories are 0700, files 0600."""
    adopt(store, built)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path

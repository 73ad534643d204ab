"""Image layouts are read with distrust and written the same every time."""

import gzip
import hashlib
import io
import json
import tarfile

import msgspec
import pytest

from rafs_v6 import ImageError
from rafs_v6.oci import (
    CONFIG,
    INDEX,
    MANIFEST,
    MAX_DOCUMENT_BYTES,
    TAR_GZIP,
    Descriptor,
    Index,
    Layout,
    Manifest,
    Platform,
    bootstrap_layer,
)

AMD64 = Platform("amd64", "linux")
ARM64 = Platform("arm64", "linux", "v8")


def stored_image(
    layout: Layout, platform: Platform = AMD64, content: bytes = b"layer"
) -> Descriptor:
    """An image of one layer; its manifest, not in the index."""
    config = {"architecture": platform.architecture, "os": platform.os}
    manifest = Manifest(
        layout.add(json.dumps(config).encode(), CONFIG),
        (layout.add(content, TAR_GZIP),),
        schema_version=2,
        media_type=MANIFEST,
    )
    stored = layout.add(msgspec.json.encode(manifest), MANIFEST)
    return msgspec.structs.replace(stored, platform=platform)


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "layout", create=True)


def test_named_image_is_found_again(layout, tmp_path):
    """A name leads to the image it was given last; other names stay."""
    layout.name(stored_image(layout, content=b"1"), "a")
    layout.name(stored_image(layout, content=b"2"), "b")
    layout.name(stored_image(layout, content=b"3"), "a")
    again = Layout(tmp_path / "layout")
    assert sorted(again.tags()) == ["a", "b"]
    (layer,) = again.image("a", AMD64).manifest.layers
    with again.open(layer) as file:
        assert file.read() == b"3"
    assert again.image("a", AMD64).config["architecture"] == "amd64"


def test_the_only_image_needs_no_tag(layout):
    """Without a tag the choice must be clear; the error lists the tags there are."""
    layout.name(stored_image(layout, content=b"1"), "a")
    assert layout.image(None, AMD64)
    layout.name(stored_image(layout, content=b"2"), "b")
    with pytest.raises(ImageError, match="a, b"):
        layout.image(None, AMD64)
    with pytest.raises(ImageError, match="'c'"):
        layout.image("c", AMD64)


def test_index_is_searched_for_the_platform(layout):
    """Of an image for several platforms the right one is taken, attestations never."""
    entries = (
        stored_image(layout, AMD64, b"for amd64"),
        stored_image(layout, ARM64, b"for arm64"),
        stored_image(layout, Platform("unknown", "unknown"), b"attestation"),
    )
    layout.name(layout.add(msgspec.json.encode(Index(entries)), INDEX), "multi")
    for platform, size in ((AMD64, 9), (Platform("arm64", "linux"), 9), (ARM64, 9)):
        image = layout.image("multi", platform)
        assert image.config["architecture"] == platform.architecture
        assert image.manifest.layers[0].size == size
    with pytest.raises(ImageError, match=r"riscv64.*linux/amd64, linux/arm64/v8"):
        layout.image("multi", Platform("riscv64", "linux"))


def test_indexes_in_a_circle_end(layout, tmp_path):
    """A layout cannot nest indexes without end: blobs are named by digest, but depth is cheap."""
    inner = layout.add(msgspec.json.encode(Index(())), INDEX)
    for _ in range(10):
        inner = layout.add(msgspec.json.encode(Index((inner,))), INDEX)
    layout.name(inner, "deep")
    with pytest.raises(ImageError, match="not for"):
        layout.image("deep", AMD64)


@pytest.mark.parametrize("damage", [lambda data: data + b"x", lambda data: b"X" + data[1:]])
def test_damaged_blobs_are_refused(layout, damage):
    """Neither another size nor other bytes of the same size pass."""
    blob = layout.add(b"content", TAR_GZIP)
    path = layout.path(blob)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageError, match="damaged"), layout.open(blob):
        pass


def test_missing_blobs_and_layouts_are_refused(layout, tmp_path):
    """The error names the file that is not there."""
    blob = layout.add(b"content", TAR_GZIP)
    layout.path(blob).unlink()
    with pytest.raises(ImageError, match=blob.digest[7:]), layout.open(blob):
        pass
    with pytest.raises(ImageError, match="oci-layout"):
        Layout(tmp_path)
    with pytest.raises(ImageError, match=r"index\.json"):
        layout.tags()


@pytest.mark.parametrize(
    "manifests",
    [
        [{"mediaType": MANIFEST, "digest": "sha256:../../../etc/passwd", "size": 1}],
        [{"mediaType": MANIFEST, "digest": "sha256:" + "A" * 64, "size": 1}],
        [{"mediaType": MANIFEST, "digest": "sha256:" + "a" * 64, "size": -1}],
        [{"mediaType": MANIFEST, "size": 1}],
        "none",
    ],
)
def test_hostile_indexes_are_refused(layout, tmp_path, manifests):
    """A digest is sixty-four small hex digits, so it is never a path."""
    (tmp_path / "layout" / "index.json").write_text(json.dumps({"manifests": manifests}))
    with pytest.raises(ImageError, match=r"index\.json"):
        layout.image(None, AMD64)


def test_large_documents_are_refused(layout, tmp_path):
    """No more than the limit is read."""
    with (tmp_path / "layout" / "index.json").open("wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(ImageError, match="larger"):
        layout.tags()


def test_what_is_staged_and_not_kept_vanishes(layout, tmp_path):
    """A conversion that fails leaves nothing behind."""
    before = sorted((tmp_path / "layout").rglob("*"))
    with pytest.raises(RuntimeError), layout.stage() as file:
        file.write(b"half")
        raise RuntimeError
    assert sorted((tmp_path / "layout").rglob("*")) == before


def test_bootstrap_layer_is_what_the_field_expects():
    """A gzip tar of image/ and image/image.boot, mode 0444, without times, the same every time."""
    layer, diff_id = bootstrap_layer(b"boot" * 1024)
    assert (layer, diff_id) == bootstrap_layer(b"boot" * 1024)
    plain = gzip.decompress(layer)
    assert diff_id == f"sha256:{hashlib.sha256(plain).hexdigest()}"
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert [(m.name, m.mode, m.type, m.mtime, m.uid) for m in tar] == [
            ("image", 0o755, tarfile.DIRTYPE, 0, 0),
            ("image/image.boot", 0o444, tarfile.REGTYPE, 0, 0),
        ]

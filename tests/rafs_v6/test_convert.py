"""OCI images become RAFS images in OCI layouts."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import msgspec
import pytest

from rafs_v6 import ImageError
from rafs_v6.build import Image
from rafs_v6.convert import archive_layer, convert, directory_layer
from rafs_v6.layout import BlobEntry
from rafs_v6.oci import (
    BLOB_ANNOTATION,
    BOOTSTRAP_ANNOTATION,
    RAFS_BLOB,
    TAR_GZIP,
    VERSION_ANNOTATION,
    Descriptor,
    Layout,
    Platform,
)
from rafs_v6.pack import Format
from tests.rafs_v6.test_archive import entry, tar
from tests.rafs_v6.trees import Built, told_by_bootstrap

AMD64 = Platform("amd64", "linux")
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "created": "2024-05-06T07:08:09Z",
    "config": {"Entrypoint": ["/bin/sh"]},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:1", "sha256:2", "sha256:3"]},
    "history": [
        {"created_by": "base"},
        {"created_by": "ENV", "empty_layer": True},
        {"created_by": "only links"},
        {"created_by": "top"},
    ],
}
LAYERS = [
    tar((entry("etc/a"), b"a" * 9000), (entry("etc/gone"), b"gone")),
    gzip.compress(tar(entry("etc/link", tarfile.LNKTYPE, linkname="etc/a"), entry("etc/.wh.gone"))),
    tar((entry("etc/b"), b"b" * 9000), (entry("etc/same"), b"a" * 9000)),
]


class Silent:
    """Watches nothing but what there was to watch."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def layer(self, name: str, data_bytes: int) -> None:
        self.seen.append(data_bytes)

    def packed(self, data_bytes: int) -> None:
        self.seen.append(data_bytes)

    def blob(self, blob: BlobEntry | None) -> None:
        self.seen.append(blob and blob.chunk_count)


def converted(where: Path, config: dict[str, object] = CONFIG):
    source = Layout(where / "source", create=True)
    layers = [archive_layer(source, source.add(data, TAR_GZIP)) for data in LAYERS]
    target = Layout(where / "target", create=True)
    return convert(layers, config, target, Format(), watcher := Silent()), target, watcher


def read(layout: Layout, descriptor: Descriptor) -> bytes:
    with layout.open(descriptor) as file:
        return file.read()


def test_image_reads_back_from_the_layout(tmp_path):
    """What the layers say together is what the image in the layout says."""
    result, target, watcher = converted(tmp_path)
    *data, boot = result.manifest.layers
    with tarfile.open(fileobj=io.BytesIO(read(target, boot))) as archive:
        bootstrap = archive.extractfile("image/image.boot").read()
    blobs = {layer.digest[7:]: read(target, layer) for layer in data}
    told = told_by_bootstrap(Built(Image(bootstrap, result.blobs), blobs))
    assert told.keys() == {b"", b"etc", b"etc/a", b"etc/b", b"etc/link", b"etc/same"}
    assert told[b"etc/a"] == told[b"etc/link"]
    assert told[b"etc/a"].content == told[b"etc/same"].content
    assert watcher.seen == [9004, 9000, 4, 2, 9000, None, 18000, 9000, 9000, 1]


def test_manifest_is_what_the_field_expects(tmp_path):
    """Media types, annotations, order, digests equal to blob ids, and the platform's feature."""
    result, target, _ = converted(tmp_path)
    document = json.loads(read(target, result.descriptor))
    *data, boot = document["layers"]
    assert [layer["mediaType"] for layer in data] == [RAFS_BLOB, RAFS_BLOB]
    assert [layer["annotations"] for layer in data] == [{BLOB_ANNOTATION: "true"}] * 2
    assert [layer["digest"] for layer in data] == [f"sha256:{b.blob_id}" for b in result.blobs]
    assert boot["mediaType"] == TAR_GZIP
    assert boot["annotations"] == {BOOTSTRAP_ANNOTATION: "true", VERSION_ANNOTATION: "6"}
    assert document["schemaVersion"] == 2
    listed = json.loads(msgspec.json.encode(result.descriptor))
    assert listed["platform"]["os.features"] == ["nydus.remoteimage.v1"]
    assert listed["artifactType"] == "application/vnd.nydus.image.manifest.v1+json"


def test_config_is_kept_but_for_its_layers(tmp_path):
    """One diff id per layer; a source layer without a blob of its own becomes empty history."""
    result, target, _ = converted(tmp_path)
    config = json.loads(read(target, result.manifest.config))
    assert {key: config[key] for key in ("created", "config", "os")} == {
        key: CONFIG[key] for key in ("created", "config", "os")
    }
    diff_ids = config["rootfs"]["diff_ids"]
    assert diff_ids[:-1] == [layer.digest for layer in result.manifest.layers[:-1]]
    assert len(diff_ids) == len(result.manifest.layers)
    empty = [step.get("empty_layer", False) for step in config["history"]]
    assert empty == [False, True, True, False, False]


def test_conversion_is_reproducible(tmp_path):
    """The same layers give the same manifest, in another directory too."""
    (tmp_path / "again").mkdir()
    assert converted(tmp_path)[0] == converted(tmp_path / "again")[0]


def test_config_needs_a_platform(tmp_path):
    """A configuration that does not say what the image runs on is no image's."""
    with pytest.raises(ImageError, match="architecture"):
        converted(tmp_path, {"os": "linux"})


def test_converted_images_are_not_converted_again(tmp_path):
    """Layers of a RAFS image are no archives."""
    layout = Layout(tmp_path, create=True)
    with pytest.raises(ImageError, match="only images of tar layers"):
        archive_layer(layout, layout.add(b"blob", RAFS_BLOB))


def test_directories_are_layers_too(tmp_path):
    """A directory of overlayfs or with `.wh.` names stands on another one."""
    for name, content in (("low/a", b"a"), ("low/b", b"b"), ("up/.wh.a", b""), ("up/c", b"c")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    target = Layout(tmp_path / "target", create=True)
    layers = [directory_layer(tmp_path / name) for name in ("low", "up")]
    config = {"architecture": "amd64", "os": "linux"}
    result = convert(layers, config, target, Format(), Silent())
    assert [blob.chunk_count for blob in result.blobs] == [2, 1]


def test_a_failed_conversion_leaves_no_blobs(tmp_path):
    """Blobs appear in the layout when all of them are there."""
    source = Layout(tmp_path / "source", create=True)
    layers = [
        archive_layer(source, source.add(data, TAR_GZIP)) for data in (LAYERS[0], b"damaged" * 99)
    ]
    target = Layout(tmp_path / "target", create=True)
    with pytest.raises(ImageError):
        convert(layers, CONFIG, target, Format(), Silent())
    assert not list((tmp_path / "target" / "blobs" / "sha256").iterdir())

"""Images in an origin's storage, as the project's own tools make and push them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from harness import command, disk, project, registry, store
from harness.content import content

NAME = "debian:latest"
ADDRESS = "127.0.0.1:5000"


class Layer(TypedDict):
    """A file of an image at its registry."""

    digest: str
    size_bytes: int


class Blob(TypedDict):
    """The data of a layer, as it is stored and as it is read."""

    id: str
    compressed_bytes: int
    uncompressed_bytes: int


class Summary(TypedDict):
    """Of what `fscached image convert -o json` prints."""

    layers: list[Layer]
    blobs: list[Blob]


@dataclass(frozen=True)
class Origin:
    """A disk for a guest's docker-registry. `images` has the summary of each image by its name."""

    disk: disk.Disk
    images: dict[str, Summary]

    def blob_bytes(self, name: str) -> int:
        """What the data blobs of an image take at the origin."""
        return sum(blob["compressed_bytes"] for blob in self.images[name]["blobs"])

    def layer_bytes(self, name: str) -> dict[str, int]:
        """The sizes of an image's blob files at the origin, by blob id."""
        layers = self.images[name]["layers"]
        sizes = {layer["digest"].partition(":")[2]: layer["size_bytes"] for layer in layers}
        return {blob_id: sizes[blob_id] for blob_id in self.blob_ids(name)}

    def blob_ids(self, name: str) -> list[str]:
        """The ids of an image's data blobs, lowest layer first."""
        return [blob["id"] for blob in self.images[name]["blobs"]]


def reference(name: str) -> str:
    """An image's name in the guest, whose registry is on its loopback."""
    return f"{ADDRESS}/{name}"


def debian(*options: str) -> Origin:
    """The Debian content as an image of three layers, kept. `options` go to the conversion."""
    made = content()
    layers = [word for layer in made.layers for word in ("--layer", str(layer))]
    return kept({NAME: (*layers, *options)}, made.tree.parent.name)


def kept(images: Mapping[str, Sequence[str]], content_key: str) -> Origin:
    """Images by name and arguments of their conversion, kept until content or converter change."""
    name = store.key(content_key, sorted(images.items()), converter())

    def build(directory: Path) -> None:
        _build(directory, images)

    return _origin(store.kept("origins", name, build, keep=6))


def of_directory(source: Path, directory: Path) -> Origin:
    """Any tree as an image, made anew in `directory`."""
    _build(directory, {NAME: [str(source)]})
    return _origin(directory)


def _origin(directory: Path) -> Origin:
    summary = json.loads((directory / "images.json").read_text())
    return Origin(disk.Disk(directory / "registry.ext4", "origin", registry.STORAGE), summary)


def _build(directory: Path, images: Mapping[str, Sequence[str]]) -> None:
    summaries = {}
    with tempfile.TemporaryDirectory(dir=directory) as storage:
        with registry.on_host(Path(storage)) as address:
            for name, arguments in images.items():
                target = f"{address}/{name}"
                summaries[name] = json.loads(_convert([*arguments, target]))
        disk.from_tree(directory / "registry.ext4", Path(storage))
    (directory / "images.json").write_text(json.dumps(summaries))


def _convert(arguments: Sequence[str]) -> str:
    convert = ["-m", "fscached", "image", "convert", "-o", "json", *arguments]
    return command.run([sys.executable, *convert], cwd=project.ROOT)


def converter() -> list[bytes]:
    """What decides an image's bytes."""
    return [path.read_bytes() for path in sorted((project.ROOT / "rafs_v6").glob("*.py"))]

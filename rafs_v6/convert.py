"""An image of another kind becomes a RAFS v6 image in an OCI layout.

What goes in, per layer: a directory, or an archive of an OCI layout. What comes out: the blobs,
the bootstrap's layer, a configuration and a manifest, the same bytes every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeAlias

import msgspec

from rafs_v6 import ImageError
from rafs_v6.archive import Archive
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.build import ImageBuilder
from rafs_v6.layout import BlobEntry
from rafs_v6.oci import (
    BLOB_ANNOTATION,
    BOOTSTRAP_ANNOTATION,
    CONFIG,
    MANIFEST,
    RAFS_BLOB,
    RAFS_IMAGE,
    RAFS_OS_FEATURE,
    TAR_GZIP,
    VERSION_ANNOTATION,
    Descriptor,
    Layout,
    Manifest,
    bootstrap_layer,
    platform_of,
)
from rafs_v6.pack import Format
from rafs_v6.tree import Node, groups, read_directory

MAX_LAYERS = 512
"""Four times what container engines stack; each is an open file for a while."""


_ARCHIVES = (".tar", ".gzip", "+gzip", "+zstd")


class Layer(NamedTuple):
    """One layer to convert. `open` gives its tree, readable inside its `with`, and is told the
    merged tree of the layers below."""

    name: str
    open: Callable[[Node | None], AbstractContextManager[Node]]


Config: TypeAlias = dict[str, Any]
"""An image's configuration as it is in JSON."""


class Watcher(Protocol):
    """Somebody who wants to see a conversion go on."""

    def layer(self, name: str, data_bytes: int) -> None:
        """A layer begins, with that much file data."""

    def packed(self, data_bytes: int) -> None:
        """More of its data is done."""

    def blob(self, blob: BlobEntry | None) -> None:
        """The layer is done; no blob when others have all of its data."""


class Converted(NamedTuple):
    """A RAFS image: its manifest's descriptor, the manifest, and what it holds.

    `prefetch_entries` is how many files and directories its prefetch table names.
    """

    descriptor: Descriptor
    manifest: Manifest
    bootstrap_bytes: int
    blobs: tuple[BlobEntry, ...]
    prefetch_entries: int


def directory_layer(directory: Path) -> Layer:
    """A layer from a directory of this machine."""

    @contextmanager
    def tree(_: Node | None) -> Iterator[Node]:
        yield read_directory(directory)

    return Layer(str(directory), tree)


def archive_layer(layout: Layout, descriptor: Descriptor) -> Layer:
    """A layer from an archive in an OCI layout. Raises ImageError when it is of another kind."""
    if not descriptor.media_type.endswith(_ARCHIVES):
        raise ImageError(
            f"layer {descriptor.digest} is of type {descriptor.media_type}: only images of tar "
            "layers can be converted, and this one may be already"
        )

    @contextmanager
    def tree(below: Node | None) -> Iterator[Node]:
        with layout.open(descriptor) as file, Archive(file) as archive:
            yield archive.tree(below)

    return Layer(descriptor.digest, tree)


def convert(
    layers: Sequence[Layer], config: Config, target: Layout, form: Format, watcher: Watcher
) -> Converted:
    """Convert layers, lowest first, and store all parts of the image in `target`.

    `config` needs `architecture` and `os`; the new one differs in `rootfs` and `history`. The
    image is not yet named in the layout's index. Raises ImageError and OSError.
    """
    platform = msgspec.structs.replace(platform_of(config), os_features=(RAFS_OS_FEATURE,))
    if len(layers) > MAX_LAYERS:
        raise ImageError(f"{len(layers)} layers, {MAX_LAYERS} can be: squash some")
    builder = ImageBuilder(form)
    staged: list[tuple[BlobEntry | None, BinaryIO]] = []
    with ExitStack() as files:
        for layer in layers:
            file = files.enter_context(target.stage())
            with layer.open(builder.tree) as tree:
                watcher.layer(layer.name, _data_bytes(tree))
                blob = builder.add(tree, file, watcher.packed)
            watcher.blob(blob)
            staged.append((blob, file))
        image = builder.finish()
        ids = {blob.blob_id for blob in image.blobs}
        kept = [blob is not None and blob.blob_id in ids for blob, _ in staged]
        descriptors = [blob_descriptor(blob) for blob in image.blobs]
        files_kept = [file for (_, file), keep in zip(staged, kept, strict=True) if keep]
        for file, descriptor in zip(files_kept, descriptors, strict=True):
            target.keep(file, descriptor)
    manifest = _manifest(image.bootstrap, descriptors, kept, config, target)
    stored = target.add(msgspec.json.encode(manifest), MANIFEST)
    listed = msgspec.structs.replace(stored, platform=platform, artifact_type=RAFS_IMAGE)
    entries = len(Bootstrap(image.bootstrap).prefetch_nids())
    return Converted(listed, manifest, len(image.bootstrap), image.blobs, entries)


def _data_bytes(tree: Node) -> int:
    files = {node: node.size for group in groups(tree) for _, node in group.entries}
    return sum(files.values())


def blob_descriptor(blob: BlobEntry) -> Descriptor:
    """A blob of ours as a layer."""
    return Descriptor(
        RAFS_BLOB, f"sha256:{blob.blob_id}", blob.compressed_size, {BLOB_ANNOTATION: "true"}
    )


def _manifest(
    bootstrap: bytes, blobs: list[Descriptor], kept: list[bool], config: Config, target: Layout
) -> Manifest:
    layer, diff_id = bootstrap_layer(bootstrap)
    annotations = {BOOTSTRAP_ANNOTATION: "true", VERSION_ANNOTATION: "6"}
    layers = (*blobs, target.add(layer, TAR_GZIP, annotations))
    diff_ids = [*(blob.digest for blob in blobs), diff_id]
    new_config = {
        **config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": _history(config.get("history"), kept),
    }
    stored = target.add(msgspec.json.encode(new_config, order="sorted"), CONFIG)
    return Manifest(stored, layers, schema_version=2, media_type=MANIFEST)


def _history(history: object, kept: list[bool]) -> list[dict[str, Any]]:
    """The source's history, one entry per layer: what has no blob of its own becomes empty."""
    known = history if isinstance(history, list) else []
    steps = [dict(step) for step in known if isinstance(step, dict)]
    layers = [step for step in steps if not step.get("empty_layer")]
    if len(layers) != len(kept):
        steps = [{"created_by": "unknown"} for keep in kept if keep]
    else:
        for step, keep in zip(layers, kept, strict=True):
            if not keep:
                step["empty_layer"] = True
    return [*steps, {"created_by": "fscached image convert", "comment": "RAFS v6 bootstrap"}]

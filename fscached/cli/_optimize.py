"""`fscached image optimize`: an image that is there, with another prefetch table."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fscached import config
from fscached.cli import Usage, _registry
from fscached.cli._layout import LAYOUT_PREFIX, machine_platform, open_layout
from fscached.cli._recommendation import read_trace, recommended
from fscached.cli.status import size
from fscached.failure import Failure
from fscached.source.reference import Reference, ReferenceError
from fscached.store import unpack_bootstrap
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.convert import Converted
from rafs_v6.layout import FileType
from rafs_v6.oci import Descriptor, Layout, StoredImage
from rafs_v6.prefetch_table import with_prefetch
from rafs_v6.revision import bootstrap_descriptor, revise


def run(arguments: argparse.Namespace) -> int:
    if not arguments.trace and not arguments.prefetch:
        raise Usage("neither --trace nor --prefetch", "say what should come first")
    trace = read_trace(arguments.trace) if arguments.trace else None
    settings = config.load(arguments.config)
    try:
        source = _source(arguments.source, settings)
        bootstrap = unpack_bootstrap(source.layer)
        nids = recommended(Bootstrap(bootstrap), trace, arguments.prefetch)
        if not nids:
            raise ImageError("nothing of the trace is in the image: is it one of this image?")
        bootstrap = with_prefetch(bootstrap, nids)
        converted = _deliver(source, bootstrap, arguments.target, settings)
    except ImageError as error:
        raise Failure(arguments.source, str(error)) from error
    _say(arguments, converted, Bootstrap(bootstrap), nids)
    return 0


class _Source(NamedTuple):
    """The image, the content of its bootstrap's layer, and the layout it is in, if in one."""

    image: StoredImage
    layer: bytes
    layout: Layout | None


def _source(text: str, settings: config.Config) -> _Source:
    if not text.startswith(LAYOUT_PREFIX):
        return _Source(*_registry.pull(_reference(text), settings), None)
    layout, tag = open_layout(text)
    image = layout.image(tag, machine_platform())
    with layout.open(bootstrap_descriptor(image)) as file:
        return _Source(image, file.read(), layout)


def _deliver(source: _Source, bootstrap: bytes, target: str, settings: config.Config) -> Converted:
    if target.startswith(LAYOUT_PREFIX):
        if source.layout is None:
            raise Usage(
                f"{target}: only registries take an image of a registry",
                "name a tag of the same repository, or copy the image first (`skopeo copy`)",
            )
        layout, tag = open_layout(target, create=True)
        converted = revise(source.image, source.layer, bootstrap, layout)
        _copy_blobs(source.layout, layout, converted)
        layout.name(converted.descriptor, tag)
        return converted
    reference = _reference(target)
    with tempfile.TemporaryDirectory(prefix="fscached-image-") as directory:
        layout = Layout(Path(directory), create=True)
        converted = revise(source.image, source.layer, bootstrap, layout)
        _registry.push(converted, _finder(layout, source.layout, target), reference, settings)
    return converted


def _copy_blobs(source: Layout, target: Layout, converted: Converted) -> None:
    for blob in converted.manifest.layers:
        if target.path(blob).exists():
            continue
        with source.open(blob) as file, target.stage() as staged:
            shutil.copyfileobj(file, staged, 1 << 20)
            target.keep(staged, blob)


def _finder(new: Layout, old: Layout | None, target: str) -> Callable[[Descriptor], Path]:
    def path(blob: Descriptor) -> Path:
        for layout in filter(None, (new, old)):
            if layout.path(blob).exists():
                return layout.path(blob)
        raise Failure(
            f"{target}: blob {blob.digest} is not in that repository",
            "name a tag of the source's repository, or copy the image there first (`skopeo copy`)",
        )

    return path


def _reference(text: str) -> Reference:
    try:
        return Reference.parse(text)
    except ReferenceError as error:
        raise Usage(str(error), f"or {LAYOUT_PREFIX}DIR") from None


def _say(
    arguments: argparse.Namespace, converted: Converted, image: Bootstrap, nids: list[int]
) -> None:
    inodes = [image.inode(nid) for nid in nids]
    total = sum(inode.size for inode in inodes if inode.type is FileType.REGULAR)
    if arguments.output == "json":
        summary = {
            "target": arguments.target,
            "digest": converted.descriptor.digest,
            "bootstrap_bytes": converted.bootstrap_bytes,
            "prefetch_entries": converted.prefetch_entries,
            "prefetch_file_bytes": total,
            "blobs": [blob.blob_id for blob in converted.blobs],
        }
        print(json.dumps(summary, indent=2))
        return
    print(
        f"{arguments.target} ({converted.descriptor.digest}): {len(nids)} names of {size(total)} "
        f"come first; its {len(converted.blobs)} blobs are as they were"
    )

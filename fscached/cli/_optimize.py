"""`fscached image optimize`: an image that is there, with another prefetch table."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fscached import config
from fscached.cli import Usage, _registry
from fscached.cli._layout import LAYOUT_PREFIX, machine_platform, open_layout
from fscached.cli._recommendation import hot_places, read_trace, recommended, renumbered
from fscached.cli.status import size
from fscached.failure import Failure
from fscached.source.reference import Reference, ReferenceError
from fscached.store import unpack_bootstrap
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.convert import Converted, blob_descriptor
from rafs_v6.hot import gather
from rafs_v6.layout import BlobEntry, FileType
from rafs_v6.oci import Descriptor, Layout, StoredImage
from rafs_v6.owners import Place
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
        image = Bootstrap(bootstrap)
        nids = recommended(image, trace, arguments.prefetch)
        if not nids:
            raise ImageError("nothing of the trace is in the image: is it one of this image?")
        places = hot_places(image, trace, nids) if arguments.hot_blob else []
        with _target(arguments, source) as target:
            change = _gathered(source, image, places, nids, target) if places else None
            change = change or _Change(with_prefetch(bootstrap, nids), None)
            converted = revise(
                source.image, source.layer, change.bootstrap, target.layout, change.blob
            )
            target.publish(converted, settings)
    except ImageError as error:
        raise Failure(arguments.source, str(error)) from error
    _say(arguments, converted, Bootstrap(change.bootstrap), change.blob)
    return 0


class _Change(NamedTuple):
    """The new bootstrap, and the blob that is new with it."""

    bootstrap: bytes
    blob: Descriptor | None


def _gathered(
    source: _Source, image: Bootstrap, places: list[Place], nids: list[int], target: _Target
) -> _Change:
    """What comes first, in a blob of its own in the target's layout."""
    layout = source.layout
    if layout is None:
        raise Usage("--hot-blob reads the image's data", f"name a layout, {LAYOUT_PREFIX}DIR")
    with contextlib.ExitStack() as open_files, target.layout.stage() as staged:
        opened: dict[str, BinaryIO] = {}

        def read(entry: BlobEntry, start: int, end: int) -> bytes:
            if entry.blob_id not in opened:
                path = layout.path(_named(source.image, entry))
                opened[entry.blob_id] = open_files.enter_context(path.open("rb"))
            opened[entry.blob_id].seek(start)
            return opened[entry.blob_id].read(end - start)

        gathered = gather(image, places, read, staged)
        blob = blob_descriptor(gathered.blobs[-1])
        target.layout.keep(staged, blob)
    after = Bootstrap(gathered.bootstrap)
    return _Change(with_prefetch(gathered.bootstrap, renumbered(image, after, nids)), blob)


def _named(image: StoredImage, entry: BlobEntry) -> Descriptor:
    for layer in image.manifest.layers:
        if layer.digest == f"sha256:{entry.blob_id}":
            return layer
    raise ImageError(f"blob {entry.blob_id} is no layer of the image's manifest")


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


class _Target(NamedTuple):
    """Where new parts of the image go, and what makes it an image with a name."""

    layout: Layout
    publish: Callable[[Converted, config.Config], None]


@contextlib.contextmanager
def _target(arguments: argparse.Namespace, source: _Source) -> Iterator[_Target]:
    text = arguments.target
    if not text.startswith(LAYOUT_PREFIX):
        reference = _reference(text)
        with tempfile.TemporaryDirectory(prefix="fscached-image-") as directory:
            layout = Layout(Path(directory), create=True)
            find = _finder(layout, source.layout, text)
            yield _Target(layout, lambda done, known: _registry.push(done, find, reference, known))
        return
    whole = source.layout
    if whole is None:
        raise Usage(
            "only registries take an image of a registry",
            "name a tag of the same repository, or copy the image first (`skopeo copy`)",
            where=text,
        )
    layout, tag = open_layout(text, create=True)

    def name(done: Converted, _: config.Config) -> None:
        _copy_blobs(whole, layout, done)
        layout.name(done.descriptor, tag)

    yield _Target(layout, name)


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
            f"blob {blob.digest} is not in that repository",
            "name a tag of the source's repository, or copy the image there first (`skopeo copy`)",
            where=target,
        )

    return path


def _reference(text: str) -> Reference:
    try:
        return Reference.parse(text)
    except ReferenceError as error:
        raise Usage(str(error), f"or {LAYOUT_PREFIX}DIR") from None


def _say(
    arguments: argparse.Namespace,
    converted: Converted,
    image: Bootstrap,
    hot: Descriptor | None,
) -> None:
    inodes = [image.inode(nid) for nid in image.prefetch_nids()]
    total = sum(inode.size for inode in inodes if inode.type is FileType.REGULAR)
    if arguments.output == "json":
        summary = {
            "target": arguments.target,
            "digest": converted.descriptor.digest,
            "bootstrap_bytes": converted.bootstrap_bytes,
            "prefetch_entries": converted.prefetch_entries,
            "prefetch_file_bytes": total,
            "hot_blob": hot.digest.removeprefix("sha256:") if hot else None,
            "hot_blob_bytes": hot.size if hot else 0,
            "blobs": [blob.blob_id for blob in converted.blobs],
        }
        print(json.dumps(summary, indent=2))
        return
    blobs = f"its {len(converted.blobs)} blobs are as they were"
    if hot is not None:
        blobs = f"{size(hot.size)} are in a blob of their own"
    print(
        f"{arguments.target} ({converted.descriptor.digest}): {len(inodes)} names of {size(total)} "
        f"come first; {blobs}"
    )

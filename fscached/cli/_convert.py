"""`fscached image convert`: from a source that people name to a target that they name."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fscached import config
from fscached.cli import Usage
from fscached.cli._layout import LAYOUT_PREFIX, machine_platform, open_layout
from fscached.cli._progress import watcher
from fscached.cli._recommendation import names, read_trace, say_missing
from fscached.cli.status import size
from fscached.failure import Failure, Missing
from fscached.source.reference import Reference, ReferenceError
from rafs_v6 import ImageError
from rafs_v6.convert import Config, Converted, Layer, archive_layer, convert, directory_layer
from rafs_v6.layout import Compressor, Digest
from rafs_v6.oci import Layout, Platform
from rafs_v6.pack import Format


def run(arguments: argparse.Namespace) -> int:
    try:
        converted = _convert(arguments)
    except ImageError as error:
        raise Failure("conversion failed", str(error)) from error
    if arguments.output == "json":
        print(json.dumps(_summary(arguments.target, converted), indent=2))
        return 0
    data_bytes = sum(blob.compressed_size for blob in converted.blobs)
    print(
        f"{arguments.target} ({converted.descriptor.digest}): {len(converted.blobs)} blobs of "
        f"{size(data_bytes)}, bootstrap of {size(converted.bootstrap_bytes)}"
    )
    return 0


def _convert(arguments: argparse.Namespace) -> Converted:
    trace = read_trace(arguments.trace) if arguments.trace else None
    form = Format(
        compressor=Compressor[arguments.compressor.upper()],
        digester=Digest[arguments.digester.upper()],
        chunk_bytes=chunk_bytes(arguments.chunk_size),
        prefetch=tuple(os.fsencode(path) for path in arguments.prefetch),
        hints=names(trace) if trace is not None else (),
    )
    layers, config = _source(arguments)
    with _target(arguments.target, arguments.config) as target, watcher(len(layers)) as watch:
        converted = convert(layers, config, target.layout, form, watch)
        target.publish(converted)
    wanted = len(form.prefetch) + len(form.hints)
    if converted.blobs and converted.prefetch_entries < wanted:
        say_missing(wanted - converted.prefetch_entries, wanted)
    return converted


def chunk_bytes(text: str) -> int:
    """A chunk size as people write it: bytes, or with K or M. Raises Usage."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M") else (text, "")
    if not digits.isdecimal() or len(digits) > 9:
        raise Usage(f"--chunk-size {text!r} is no size", "write for example 512K or 1M")
    return int(digits) << {"": 0, "K": 10, "M": 20}[unit]


def _source(arguments: argparse.Namespace) -> tuple[list[Layer], Config]:
    if bool(arguments.source) == bool(arguments.layer):
        raise Usage("either SRC or --layer", "give one of them")
    platform = _platform(arguments.platform)
    if (arguments.source or "").startswith(LAYOUT_PREFIX):
        layout, tag = open_layout(arguments.source)
        image = layout.image(tag, platform)
        return [archive_layer(layout, layer) for layer in image.manifest.layers], image.config
    directories = [Path(name) for name in arguments.layer or [arguments.source]]
    for directory in directories:
        if not directory.is_dir():
            raise Missing(
                "no such directory", f"make it, or write {LAYOUT_PREFIX}DIR", where=str(directory)
            )
    config = {"architecture": platform.architecture, "os": platform.os, "config": {}}
    return [directory_layer(directory) for directory in directories], config


def _platform(text: str | None) -> Platform:
    if text is None:
        return machine_platform()
    words = text.split("/")
    if not 2 <= len(words) <= 3:
        raise Usage(f"--platform {text!r} is no platform", "write for example linux/amd64")
    return Platform(os=words[0], architecture=words[1], variant="".join(words[2:]))


class _Target(NamedTuple):
    layout: Layout
    publish: Callable[[Converted], None]


@contextmanager
def _target(text: str, config_file: str | None) -> Iterator[_Target]:
    """Where the parts of the image go, and what makes it an image with a name."""
    if text.startswith(LAYOUT_PREFIX):
        layout, tag = open_layout(text, create=True)
        yield _Target(layout, lambda converted: layout.name(converted.descriptor, tag))
        return
    try:
        reference = Reference.parse(text)
    except ReferenceError as error:
        raise Usage(str(error), f"or {LAYOUT_PREFIX}DIR") from None
    settings = config.load(config_file)
    from fscached.cli._registry import push

    with tempfile.TemporaryDirectory(prefix="fscached-image-") as directory:
        layout = Layout(Path(directory), create=True)
        yield _Target(layout, lambda converted: push(converted, layout.path, reference, settings))


def _summary(target: str, converted: Converted) -> dict[str, Any]:
    return {
        "target": target,
        "digest": converted.descriptor.digest,
        "bootstrap_bytes": converted.bootstrap_bytes,
        "prefetch_entries": converted.prefetch_entries,
        "layers": [
            {"digest": layer.digest, "size_bytes": layer.size, "media_type": layer.media_type}
            for layer in converted.manifest.layers
        ],
        "blobs": [
            {
                "id": blob.blob_id,
                "compressed_bytes": blob.compressed_size,
                "uncompressed_bytes": blob.uncompressed_size,
                "chunks": blob.chunk_count,
            }
            for blob in converted.blobs
        ],
    }

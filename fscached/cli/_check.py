"""`fscached image check`: every finding in an image, one per line."""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
from pathlib import Path
from typing import BinaryIO

from fscached.cli._layout import LAYOUT_PREFIX, machine_platform, open_layout
from fscached.failure import Failure, Missing
from fscached.store import unpack_bootstrap
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.check import check
from rafs_v6.oci import BOOTSTRAP_ANNOTATION


def run(arguments: argparse.Namespace) -> int:
    with contextlib.ExitStack() as files:
        try:
            bootstrap, blobs = _parts(arguments.image, files)
        except ImageError as error:
            raise Failure(arguments.image, str(error)) from error
        findings = check(bootstrap, blobs)
    if arguments.output == "json":
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.where}: {finding.problem}")
        if not findings:
            print(f"nothing wrong with the bootstrap and {len(blobs)} blobs")
    return 1 if findings else 0


def _parts(image: str, files: contextlib.ExitStack) -> tuple[bytes, dict[str, mmap.mmap]]:
    """The bootstrap, and its blobs by id as far as they are there. Raises ImageError."""
    if not image.startswith(LAYOUT_PREFIX):
        path = Path(image)
        if not path.is_file():
            raise Missing(
                "no such file", f"name a bootstrap, or {LAYOUT_PREFIX}DIR", where=str(path)
            )
        bootstrap = path.read_bytes()
        return bootstrap, _blobs_beside(path.parent, bootstrap, files)
    layout, tag = open_layout(image)
    bootstrap, blobs = b"", {}
    for layer in layout.image(tag, machine_platform()).manifest.layers:
        file = files.enter_context(layout.open(layer))
        if BOOTSTRAP_ANNOTATION in layer.annotations:
            bootstrap = unpack_bootstrap(file.read())
        else:
            blobs[layer.digest.removeprefix("sha256:")] = _mapped(file, files)
    return bootstrap, blobs


def _blobs_beside(
    directory: Path, bootstrap: bytes, files: contextlib.ExitStack
) -> dict[str, mmap.mmap]:
    try:
        names = [blob.blob_id for blob in Bootstrap(bootstrap).blobs]
    except ImageError:
        return {}
    return {
        name: _mapped(files.enter_context((directory / name).open("rb")), files)
        for name in names
        if (directory / name).is_file()
    }


def _mapped(file: BinaryIO, files: contextlib.ExitStack) -> mmap.mmap:
    return files.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

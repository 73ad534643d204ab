"""Images in a directory, as `localfs` serves them, from directories or from trees that never were
on a disk."""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from rafs_v6.build import ImageBuilder
from rafs_v6.pack import Format
from rafs_v6.tree import Node


def write(directory: Path, fsid: str, layers: Iterable[Node], form: Format) -> None:
    """An image: its bootstrap under the name `fsid`, a blob for each layer under its id."""
    directory.mkdir(parents=True, exist_ok=True)
    builder, staged = ImageBuilder(form), directory / "staged"
    for layer in layers:
        with staged.open("wb") as output:
            blob = builder.add(layer, output)
        if blob is None:
            staged.unlink()
        else:
            staged.rename(directory / blob.blob_id)
    (directory / fsid).write_bytes(builder.finish().bootstrap)


def folder(children: Mapping[bytes, Node]) -> Node:
    """A directory."""
    return Node(stat.S_IFDIR | 0o755, children=dict(children))


def small_file(data: bytes) -> Node:
    """A file whose content is at hand."""
    return large_file(len(data), lambda: io.BytesIO(data))


def large_file(size_bytes: int, opened: Callable[[], BinaryIO]) -> Node:
    """A file whose content is made when it is read."""
    return Node(stat.S_IFREG | 0o644, size=size_bytes, data=opened)

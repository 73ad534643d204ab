"""How a conversion goes on, on standard error: a bar on a terminal, else a line per layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fscached.cli.status import size
from rafs_v6.convert import Watcher
from rafs_v6.layout import BlobEntry

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def watcher(layer_count: int) -> Iterator[Watcher]:
    """A watcher for standard error as it is."""
    if not sys.stderr.isatty():
        yield Lines(layer_count)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
    except ImportError:
        yield Lines(layer_count)
        return
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bars(layer_count, progress)


class Lines:
    """A line when a layer begins and one when it is done."""

    def __init__(self, layer_count: int) -> None:
        self._count = layer_count
        self._number = 0

    def layer(self, name: str, data_bytes: int) -> None:
        self._number += 1
        print(
            f"layer {self._number}/{self._count} {name}: {size(data_bytes)} of files",
            file=sys.stderr,
        )

    def packed(self, data_bytes: int) -> None:
        """Lines do not move."""

    def blob(self, blob: BlobEntry | None) -> None:
        print(f"layer {self._number}/{self._count}: {_outcome(blob)}", file=sys.stderr)


class Bars:
    """A bar per layer."""

    def __init__(self, layer_count: int, progress: Progress) -> None:
        self._count = layer_count
        self._progress = progress

    def layer(self, name: str, data_bytes: int) -> None:
        number = len(self._progress.tasks) + 1
        self._progress.add_task(f"layer {number}/{self._count} {name[-24:]}", total=data_bytes)

    def packed(self, data_bytes: int) -> None:
        self._progress.advance(self._progress.tasks[-1].id, data_bytes)

    def blob(self, blob: BlobEntry | None) -> None:
        task = self._progress.tasks[-1]
        self._progress.update(
            task.id, completed=task.total, description=f"{task.description}: {_outcome(blob)}"
        )


def _outcome(blob: BlobEntry | None) -> str:
    if blob is None:
        return "no data of its own"
    return f"blob {blob.blob_id[:12]}, {size(blob.compressed_size)}, {blob.chunk_count} chunks"

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
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bars(layer_count, progress)


class Lines:
    """A line when a layer begins and one when it is done."""

    def __init__(self, layer_count: int) -> None:
        self._count = layer_count
        self._number = 0

    def layer(self, name: str, data_bytes: int) -> None:
        self._number += 1
        self._say(f"{name}: {size(data_bytes)} of files")

    def packed(self, data_bytes: int) -> None:
        """Lines do not move."""

    def blob(self, blob: BlobEntry | None) -> None:
        if blob is None:
            self._say("no data that the layers below do not have")
        else:
            compressed = size(blob.compressed_size)
            self._say(f"blob {blob.blob_id[:12]}, {compressed}, {blob.chunk_count} chunks")

    def _say(self, what: str) -> None:
        print(f"layer {self._number}/{self._count}: {what}", file=sys.stderr)


class Bars(Lines):
    """The lines, and below them a bar for the layer under way."""

    def __init__(self, layer_count: int, progress: Progress) -> None:
        super().__init__(layer_count)
        self._progress = progress

    def layer(self, name: str, data_bytes: int) -> None:
        super().layer(name, data_bytes)
        self._bar = self._progress.add_task("", total=data_bytes)

    def packed(self, data_bytes: int) -> None:
        self._progress.advance(self._bar, data_bytes)

    def blob(self, blob: BlobEntry | None) -> None:
        self._progress.remove_task(self._bar)
        super().blob(blob)

    def _say(self, what: str) -> None:
        line = f"layer {self._number}/{self._count}: {what}"
        self._progress.console.print(line, markup=False, highlight=False)

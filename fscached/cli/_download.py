"""How an image comes in, on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fscached.cli.status import prefetch, size

if TYPE_CHECKING:
    from rich.progress import Progress

Show = Callable[[dict[str, Any]], None]
"""Shows a `PrefetchStatus`."""

STEPS = 10
"""Lines for one image: one for each tenth of what is left."""


@contextmanager
def shown(name: str) -> Iterator[Show]:
    """What shows an image's prefetch, on standard error as it is."""
    if not sys.stderr.isatty():
        yield Lines(name).show
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        yield Lines(name).show
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(name, progress).show


class Lines:
    """A line when the phase changes, and for each tenth."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._total_bytes = 0
        self._said: tuple[str, str, int] | None = None

    def show(self, report: dict[str, Any]) -> None:
        self._total_bytes = max(self._total_bytes, report["left_bytes"])
        step = report["left_bytes"] * STEPS // (self._total_bytes or 1)
        saying = report["phase"], report["why"], step
        if saying != self._said:
            self._said = saying
            print(f"{self._name}: {prefetch(report)}", file=sys.stderr)


class Bar:
    """One bar, and what holds it up beside it."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name = name
        self._progress = progress
        self._task = progress.add_task(name, total=None)
        self._total_bytes = 0

    def show(self, report: dict[str, Any]) -> None:
        self._total_bytes = max(self._total_bytes, report["left_bytes"])
        words = [self._name]
        if report["phase"] != "running":
            words.append(report["phase"])
        if report["why"]:
            words.append(f"({report['why'][:60]})")
        self._progress.update(
            self._task,
            description=" ".join(words),
            total=self._total_bytes,
            completed=self._total_bytes - report["left_bytes"],
        )


def summary(name: str, report: dict[str, Any], seconds: float) -> str:
    """What came of it."""
    brought = f"{size(report['brought_bytes'])} brought in {seconds:.1f} s"
    return f"{name}: {prefetch(report)}; {brought}"

"""Forms of a tree take turns, and a complete image that is asked for ends the bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from contest import Measurement, Place, Taken, held
from environments import Options


class Form:
    """A tree that somebody may have been asked for."""

    def __init__(self, name: str, events: int | None = None) -> None:
        self.name = name
        self.path = f"/{name}"
        self.asked = events

    def events(self) -> int | None:
        return self.asked


class Fake:
    """A place where nothing happens."""

    data, data_bytes, sources, sources_bytes = "data", 1 << 30, "linux", 1 << 20
    scratch, cpus, build, built = "/scratch", 2, ("true", "true"), "nothing"

    def __init__(self, trees: list[Form]) -> None:
        self.trees = trees
        self.order: list[str] = []

    def run(self, argv: Sequence[str], *, limited: bool = False) -> str:
        return ""

    def seconds(self, argv: Sequence[str]) -> float:
        return 1.0

    def drop_caches(self) -> None:
        self.order.append("drop")

    def described(self) -> dict[str, Any]:
        return {}


def _held(place: Fake, take: Any, repetitions: int = 1) -> Any:
    @contextmanager
    def there(_: Options) -> Iterator[Place]:
        yield place

    measurement = Measurement("read", "MB/s", "higher", take, cold=True)
    options = Options("hit", "6.12", repetitions, Path("/"))
    return held(options, there, lambda _: [measurement], over_fuse=["read"])


def test_forms_take_turns_and_the_last_is_the_first() -> None:
    """Every one after the caches were dropped, as a ratio to ext4 and the complete one to FUSE."""
    place = Fake([Form("ext4"), Form("complete"), Form("fuse")])
    speeds = {"/ext4": 100.0, "/complete": 90.0, "/fuse": 30.0}

    def take(tree: str) -> Taken:
        place.order.append(tree)
        return Taken(speeds[tree])

    report = _held(place, take, repetitions=2)
    turns = ["/ext4", "/complete", "/fuse", "/fuse", "/complete", "/ext4"]
    assert place.order == [word for turn in turns for word in ("drop", turn)]
    ratios = {found.name: found.ratio for found in report.results}
    assert ratios == {
        "read_ext4": None,
        "read_complete": 0.9,
        "read_fuse": 0.3,
        "read_over_fuse_complete": 3.0,
    }


def test_a_complete_image_is_never_asked_for() -> None:
    """Else it is not one."""
    complete = Form("complete", 0)
    place = Fake([Form("ext4"), complete, Form("fuse")])

    def take(tree: str) -> Taken:
        complete.asked = (complete.asked or 0) + 1
        return Taken(1.0, 1000)

    with pytest.raises(SystemExit, match="complete image"):
        _held(place, take)


def test_events_are_counted_per_gigabyte() -> None:
    """Of those who may be asked."""
    marks = Form("marks", 5)
    place = Fake([Form("ext4"), Form("complete", 0), marks, Form("fuse")])

    def take(tree: str) -> Taken:
        marks.asked = 5 + 2 * (tree == "/marks")
        return Taken(1.0, 500_000_000)

    events = {r.name: r.median for r in _held(place, take).results if r.unit == "1/GB"}
    assert events == {"events_read_complete": 0, "events_read_marks": 4}

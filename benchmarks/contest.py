"""The same tree held in different ways, measured in turns, as ratios to ext4.

A workload says what is measured, by commands; where they run and what holds the tree is a `Place`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

from environments import Options
from report import Report, Result, result

BASELINE = "ext4"
GB = 1e9


class Held(Protocol):
    """A tree in one of its forms, readable now."""

    name: str

    @property
    def path(self) -> str:
        """Where it is."""
        ...

    def events(self) -> int | None:
        """How often the kernel has asked for its bytes; None: there is nobody to ask."""
        ...


class Place(Protocol):
    """A machine with trees. `data` is a large file in each, twice the memory of whoever reads it
    `limited`; `sources` are a directory of programs' sources; `scratch` can be written to."""

    data: str
    data_bytes: int
    sources: str
    sources_bytes: int
    scratch: str
    cpus: int
    build: tuple[str, str]
    """Scripts: the first prepares an empty directory ($1) for a build of the sources ($0)."""
    built: str
    """What the second builds, for people."""

    @property
    def trees(self) -> Sequence[Held]: ...

    def run(self, argv: Sequence[str], *, limited: bool = False) -> str: ...

    def seconds(self, argv: Sequence[str]) -> float:
        """How long a command runs."""
        ...

    def drop_caches(self) -> None: ...

    def described(self) -> dict[str, object]: ...


class Taken(NamedTuple):
    """A figure, and how many bytes were read for it where that is known."""

    value: float
    read_bytes: int = 0


class Measurement(NamedTuple):
    """`take` is called with the path of a tree; `cold`: nothing of it is in memory then."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    take: Callable[[str], Taken]
    cold: bool


Figures = dict[tuple[str, str], list[float]]
"""By measurement and tree, one for every repetition."""

Measurements = Callable[[Place], Iterable[Measurement]]


def held(
    options: Options,
    there: Callable[[Options], AbstractContextManager[Place]],
    measurements: Measurements,
    over_fuse: Sequence[str] = (),
) -> Report:
    """Trees take turns; in every other repetition the last is the first. Measurements named in
    `over_fuse` are reported beside FUSE too."""
    figures: Figures = defaultdict(list)
    with there(options) as place:
        wanted, trees = list(measurements(place)), list(place.trees)
        for _ in range(options.repetitions):
            for tree in trees:
                for measurement in wanted:
                    _measure(place, measurement, tree, figures)
            trees.reverse()
        environment = place.described()
    return Report(options.bench, environment, list(_results(wanted, figures, over_fuse)))


def _measure(place: Place, measurement: Measurement, tree: Held, figures: Figures) -> None:
    if measurement.cold:
        place.drop_caches()
    before = tree.events()
    taken = measurement.take(tree.path)
    figures[measurement.name, tree.name].append(taken.value)
    if before is not None and taken.read_bytes:
        asked = (tree.events() or 0) - before
        if tree.name == "complete" and asked:
            raise SystemExit("the kernel asks for a complete image: see its log")
        events = asked / (taken.read_bytes / GB)
        figures[f"events_{measurement.name}", tree.name].append(events)


def _results(
    measurements: Sequence[Measurement], figures: Figures, over_fuse: Sequence[str]
) -> Iterator[Result]:
    names = dict.fromkeys(tree for _, tree in figures)
    for name, unit, better, *_ in measurements:
        baseline = figures[name, BASELINE]
        yield result(f"{name}_{BASELINE}", unit, better, baseline)
        for tree in names:
            if tree != BASELINE:
                yield result(f"{name}_{tree}", unit, better, figures[name, tree], baseline)
    for name, unit, better, *_ in measurements:
        if name in over_fuse:
            ours, fuse = figures[name, "complete"], figures[name, "fuse"]
            yield result(f"{name}_over_fuse_complete", unit, better, ours, fuse)
    for (name, tree), events in figures.items():
        if name.startswith("events_"):
            yield result(f"{name}_{tree}", "1/GB", "lower", events)

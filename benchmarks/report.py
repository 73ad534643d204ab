"""What a bench says: named figures of ours beside another program's from the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec


@dataclass(frozen=True)
class Result:
    """One figure over all repetitions.

    `median` and `spread` (highest minus lowest) are ours, in `unit`; `baseline` is the other
    program's median and `ratio` ours / baseline, both None where there is nothing to compare with.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"]
    median: float
    spread: float
    baseline: float | None
    ratio: float | None


@dataclass(frozen=True)
class Report:
    """The results of one bench and where they were found."""

    bench: str
    environment: dict[str, object]
    results: list[Result]


def result(
    name: str,
    unit: str,
    better: Literal["lower", "higher"],
    ours: Sequence[float],
    baseline: Sequence[float] = (),
) -> Result:
    """A figure from its value in each repetition."""
    median = statistics.median(ours)
    other = statistics.median(baseline) if baseline else None
    return Result(
        name,
        unit,
        better,
        _rounded(median),
        _rounded(max(ours) - min(ours)),
        None if other is None else _rounded(other),
        None if other is None else _rounded(median / other),
    )


def read(said: str) -> Report:
    """What a bench's last line says."""
    return msgspec.json.decode(said, type=Report)


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that is not below `percent` % of all (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def table(report: Report) -> str:
    """The results for people."""
    names = [f"{found.name} ({found.unit})" for found in report.results]
    width = max(map(len, names)) + 1
    lines = [f"{'':<{width}}{'ours':>10}{'spread':>10}{'baseline':>10}{'ratio':>8}"]
    for named, found in zip(names, report.results, strict=True):
        baseline = "" if found.baseline is None else f"{found.baseline:g}"
        ratio = "" if found.ratio is None else f"{found.ratio:g}"
        lines.append(
            f"{named:<{width}}{found.median:>10g}{found.spread:>10g}{baseline:>10}{ratio:>8}"
        )
    return "\n".join(lines)


def _rounded(value: float) -> float:
    """Four significant digits: more would claim more than a bench knows."""
    return float(f"{value:.4g}")

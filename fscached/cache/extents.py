"""Byte ranges that hold data, as SEEK_DATA and SEEK_HOLE tell them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator


class Extents:
    """Disjoint ascending ranges [start, end) in bytes; ranges that touch are one."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Raises ValueError for a range that ends before it starts."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if end < start or start < 0:
                raise ValueError(f"extent [{start}, {end}) ends before it starts")
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif end > start:
                self._starts.append(start)
                self._ends.append(end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of [start, end) holds data."""
        if start >= end:
            return True
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and end <= self._ends[index]

    @property
    def total_bytes(self) -> int:
        return sum(self._ends) - sum(self._starts)

"""Who gave which bytes: remembered for a while, since what they are worth is known only later."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

TRAILS_LIMIT: Final = 1024
"""Reads remembered. What they brought waits for a worker meanwhile, and workers are few."""

_Giver = TypeVar("_Giver")


@dataclass(slots=True)
class Trail(Generic[_Giver]):
    """How one read got its bytes: `steps` are where a giver began; `position` is how far it got."""

    blob_id: str
    position: int
    steps: list[tuple[int, _Giver]] = field(default_factory=list)

    def step(self, giver: _Giver) -> None:
        """From here on, somebody else gives."""
        if self.steps and self.steps[-1][0] == self.position:
            self.steps.pop()
        self.steps.append((self.position, giver))

    def givers(self, blob_id: str, start: int, end: int) -> list[_Giver]:
        """Who gave bytes [start, end) of a blob; nobody if this read did not bring them all."""
        if blob_id != self.blob_id or not self.steps or self.steps[0][0] > start:
            return []
        if end > self.position:
            return []
        ends = [began for began, _ in self.steps[1:]] + [self.position]
        return [
            giver
            for (began, giver), ended in zip(self.steps, ends, strict=True)
            if began < end and start < ended
        ]


class Trails(Generic[_Giver]):
    """The reads of one source, the newest of which had the last word."""

    def __init__(self) -> None:
        self._trails: deque[Trail[_Giver]] = deque(maxlen=TRAILS_LIMIT)

    def begin(self, blob_id: str, start: int) -> Trail[_Giver]:
        """A read sets out from byte `start`."""
        trail: Trail[_Giver] = Trail(blob_id, start)
        self._trails.append(trail)
        return trail

    def givers(self, blob_id: str, start: int, end: int) -> list[_Giver]:
        """Who gave bytes [start, end) of a blob last."""
        for trail in reversed(self._trails):
            if givers := trail.givers(blob_id, start, end):
                return givers
        return []

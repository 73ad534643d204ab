"""One bootstrap: written whole at its first READ, so it is either resident or it is not."""

from __future__ import annotations

import enum


class State(enum.Enum):
    """Where the bootstrap's bytes are."""

    ABSENT = "absent"
    WRITING = "writing"
    RESIDENT = "resident"


class Bootstrap:
    """The metadata of one image as a cache object, and the readers waiting for it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.state = State.ABSENT
        self._tickets: list[int] = []

    def want(self, ticket: int) -> bool:
        """A reader asks; True when it can be completed now, else it waits."""
        if self.state is State.RESIDENT:
            return True
        self._tickets.append(ticket)
        return False

    def write(self) -> bool:
        """Whether to begin writing now; True once until `landed` or `lost`."""
        if self.state is not State.ABSENT:
            return False
        self.state = State.WRITING
        return True

    def landed(self) -> list[int]:
        """It is in the cache file: the tickets that are complete now."""
        self.state = State.RESIDENT
        return self._drain()

    def lost(self) -> list[int]:
        """It could not be written: the tickets that fail now."""
        self.state = State.ABSENT
        return self._drain()

    @property
    def waiting(self) -> int:
        """How many readers wait."""
        return len(self._tickets)

    def _drain(self) -> list[int]:
        tickets, self._tickets = self._tickets, []
        return tickets

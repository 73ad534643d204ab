"""A source that has nothing, for when only what is here already counts."""

from __future__ import annotations

from collections.abc import Callable

from fscached.source import Answer, Fault, Priority, SourceError


class Nobody:
    """Refuses every read at once; `why` is what the error says."""

    name = "nobody"

    def __init__(self, why: str) -> None:
        self._why = why

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        """See Source."""
        raise SourceError(f"blob {blob_id[:12]}, bytes {start}-{end}: {self._why}", Fault.LOCAL)

    def distrust(self, blob_id: str, start: int, end: int) -> bool:
        """See Source."""
        return False

    async def close(self) -> None:
        """Nothing is open."""

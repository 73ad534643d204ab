"""Origins that asked to be left alone for a while (Retry-After), by everybody here."""

from __future__ import annotations

import asyncio

from fscached.source.origin import origin_of


class Respites:
    """Shared by both planes: a registry that pauses one of them would only be asked by the other.
    Moments are of the running event loop's clock."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def grant(self, origin: str, pause_s: float) -> None:
        """Send nothing to an origin for `pause_s` seconds."""
        if pause_s > 0:
            now = asyncio.get_running_loop().time()
            self._until = {known: end for known, end in self._until.items() if end > now}
            self._until[origin] = max(now + pause_s, self._until.get(origin, 0.0))

    async def over(self, url: str) -> None:
        """Return when the origin of `url` may be asked."""
        if not self._until:
            return
        origin = origin_of(url)
        loop = asyncio.get_running_loop()
        while True:
            left_s = self._until.get(origin, 0.0) - loop.time()
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)

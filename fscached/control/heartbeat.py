"""A daemon's signs of life, sent by its event loop: they stop when that stands still.

And only then. A worker that is stuck in a write (a frozen file system) holds up its own readers,
whose deadlines fire in the loop; another daemon would get stuck in the same write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fscached.control.notify import alive, heartbeat_s


def begin(environment: Mapping[str, str]) -> None:
    """From now on and from the running loop, if anybody waits for them."""
    if (pause_s := heartbeat_s(environment)) is None:
        return
    loop = asyncio.get_running_loop()

    def beat() -> None:
        alive(environment)
        loop.call_later(pause_s, beat)

    beat()

"""A daemon's signs of life, from its event loop."""

from __future__ import annotations

import asyncio
import socket

import pytest

from fscached.control import heartbeat


@pytest.mark.asyncio
async def test_it_beats_while_the_loop_turns(manager: socket.socket) -> None:
    """At once, and again and again."""
    heartbeat.begin({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "2000"})
    for _ in range(3):
        async with asyncio.timeout(20):
            said = await asyncio.get_running_loop().sock_recv(manager, 99)
        assert said == b"WATCHDOG=1"


@pytest.mark.asyncio
async def test_nothing_is_sent_to_whom_nobody_waits_for(manager: socket.socket) -> None:
    """A manager without a watchdog."""
    heartbeat.begin({"NOTIFY_SOCKET": manager.getsockname()})
    with pytest.raises(BlockingIOError):
        manager.recv(99)

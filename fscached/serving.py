"""A daemon's API, from before it has anything to serve: nothing slow is imported for that.

A successor that the snapshotter starts has 2 s to listen (docs/decisions/nydusd.md), on a machine
that may be busy; what it serves with is imported while it waits to be told to take over.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NamedTuple

from fscached import log_writer
from fscached.config import Config
from fscached.control.api import Service, routes
from fscached.control.http import Server
from fscached.control.state import State
from fscached.control.succession import Succession
from fscached.failure import Missing

if TYPE_CHECKING:
    from fscached.control.entry import BlobEntry
    from fscached.daemon import Daemon
    from fscached.handover import Handover
    from fscached.transport import Transport


log = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """The kernel's end in hand, a predecessor's or a new one; `entries` are images to bind."""

    transport: Transport
    handover: Handover
    takeover: bool
    entries: Sequence[BlobEntry] = ()


async def serve(
    config: Config,
    beginning: Beginning | None,
    *,
    ready: Callable[[str], None] = lambda status: None,
    stopped: Callable[[], None] = lambda: None,
    identity: str | None = None,
    supervisor: str | None = None,
    listener: socket.socket | None = None,
    lent: bool = False,
    predecessor_lives: bool = False,
) -> None:
    """Serve until SIGTERM, SIGINT or the API's `exit`. `beginning`: None to take over when the API
    says so, or by itself after a while unless the predecessor lives. `ready` is told when the API
    listens (on `listener`, where there is one already; one that is `lent` stays at the end),
    `stopped` when the end has begun.

    Raises Failure when the daemon cannot begin.
    """
    stopping = asyncio.Event()
    daemon: Daemon | None = None
    async with AsyncExitStack() as stack:

        def heir(holdings: dict[str, int]) -> Daemon:
            from fscached import daemon as wiring

            return reigning(wiring.heir(config, holdings, lambda: succession.state))

        def reigning(found: Daemon) -> Daemon:
            nonlocal daemon
            daemon = found
            stack.push_async_callback(daemon.close)
            return daemon

        def service() -> Service | None:
            running = succession.state is State.RUNNING
            return daemon.service if daemon is not None and running else None

        async def answer_at(path: str) -> None:
            await server.answer_at(path)

        place = config.api_socket
        succession = Succession(stopping.set, heir, identity, supervisor, place, answer_at)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        server = Server(place, routes(succession, service), config.api)
        if beginning is not None:
            from fscached.daemon import Daemon

            transport, handover, takeover, entries = beginning
            first = Daemon(config, transport, handover, lambda: succession.state)
            succession.accede(reigning(first), takeover)
            for entry in entries:
                await first.service.bind_blob_entry(entry)
        await server.start(listener, lent)
        stack.push_async_callback(server.close)
        if beginning is None:
            succession.await_takeover(predecessor_lives)
            await asyncio.to_thread(importlib.import_module, "fscached.daemon")
        ready(f"serves {len(daemon.images) if daemon is not None else 0} images")
        await stopping.wait()
        stopped()


def begin_log(config: Config) -> None:
    """Log as configured, and first what of the configuration is nothing here."""
    write_log(config)
    if config.ignored:
        log.info("keys of nydusd's do not apply here", extra={"keys": " ".join(config.ignored)})


def write_log(config: Config) -> None:
    """Log as configured. Raises Missing."""
    log_ = config.log
    try:
        log_writer.begin(log_.level, log_.file, log_.rotate_bytes, log_.rotated_files)
    except OSError as error:
        raise Missing(
            f"{log_.file}: {error.strerror}", "name a file that can be written: file in [log]"
        ) from None


def make_directories(config: Config) -> None:
    """All that a daemon writes to. Raises Missing."""
    for path in (config.paths.runtime_directory, config.paths.state_directory):
        _make(path, 0o700)
    _make(config.cache.directory, 0o700)


def _make(path: str, mode: int) -> None:
    try:
        os.makedirs(path, mode, exist_ok=True)
    except OSError as error:
        raise Missing(
            f"directory {path} cannot be made: {error.strerror}",
            "run as root, on a file system that can be written",
        ) from None

"""`fscached run`: a daemon whose descriptors a service manager keeps, ours or systemd."""

from __future__ import annotations

import faulthandler
import os
from functools import partial
from typing import Final

import uvloop

from fscached import serving
from fscached.config import Config
from fscached.control import heartbeat, listener
from fscached.control.notify import API, FdStore
from fscached.failure import Missing
from fscached.handover import NAME as HANDOVER_NAME
from fscached.handover import Handover
from fscached.transport import descriptors, opening

STANDARD_ERROR: Final = 2


def main(config: Config, unsafe: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. `unsafe`: also where readers get wrong bytes
    when the daemon dies, because nobody holds the kernel's end of the transport for it.

    Raises Failure when the daemon cannot begin.
    """
    faulthandler.enable(STANDARD_ERROR)  # whom a watchdog ends with SIGABRT says where it stood
    store = FdStore()
    inherited = store.take()
    transport = opening.inherited(config, inherited)
    takeover = transport is not None
    serving.begin_log(config)
    lent = listener.lent(inherited[API], config.api_socket) if API in inherited else None
    descriptors.allow(descriptors.needed(config.cache, config.kernel))
    serving.make_directories(config)
    if transport is None:
        transport = opening.anew(config)
    handover = Handover(inherited.get(HANDOVER_NAME))
    # The transport last: a successor that finds it finds the rest.
    holdings = {HANDOVER_NAME: handover.fd, **transport.holdings}
    held = [
        (takeover and name in inherited) or store.put(name, fd) for name, fd in holdings.items()
    ]
    if transport.needs_holder and not (all(held) or unsafe):
        raise Missing(
            f"nobody would hold {transport.name} if this daemon died: readers would get zeros",
            "start `fscached supervise`, or a systemd unit with a file descriptor store "
            "(docs/fscached.service); --unsafe-no-supervisor to do without",
        )
    beginning = serving.Beginning(transport, handover, takeover)
    uvloop.run(
        serving.serve(
            config,
            beginning,
            ready=partial(_ready, store),
            listener=lent,
            lent=lent is not None,
        )
    )
    if not all(held):
        opening.leave(transport, config)
    return 0


def _ready(store: FdStore, status: str) -> None:
    store.ready(status)
    heartbeat.begin(os.environ)


def leave(config: Config) -> int:
    """What comes after the last daemon, once nobody will hold the transport; the exit code."""
    transport = opening.inherited(config, FdStore().take())
    serving.write_log(config)
    if transport is not None:
        opening.leave(transport, config)
    return 0

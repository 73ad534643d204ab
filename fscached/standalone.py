"""`fscached run`: a daemon whose descriptors a service manager keeps, ours or systemd."""

from __future__ import annotations

import uvloop

from fscached import serving
from fscached.config import Config
from fscached.control.notify import FdStore
from fscached.failure import Missing
from fscached.handover import NAME as HANDOVER_NAME
from fscached.handover import Handover
from fscached.transport import descriptors, opening


def main(config: Config, unsafe: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. `unsafe`: also where readers get wrong bytes
    when the daemon dies, because nobody holds the kernel's end of the transport for it.

    Raises Failure when the daemon cannot begin.
    """
    store = FdStore()
    inherited = store.take()
    transport = opening.inherited(config, inherited)
    takeover = transport is not None
    serving.begin_log(config)
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
    uvloop.run(serving.serve(config, beginning, ready=store.ready))
    if not all(held):
        opening.leave(transport, config)
    return 0


def leave(config: Config) -> int:
    """What comes after the last daemon, once nobody will hold the transport; the exit code."""
    transport = opening.inherited(config, FdStore().take())
    serving.write_log(config)
    if transport is not None:
        opening.leave(transport, config)
    return 0

"""`fscached run`: a daemon whose descriptors a service manager keeps, ours or systemd."""

from __future__ import annotations

import logging
import os

import uvloop

from fscached import daemon, log_writer
from fscached.config import Config
from fscached.control.notify import FdStore
from fscached.failure import Missing
from fscached.handover import Handover
from fscached.transport import opening, probe
from fscached.transport.cachefiles import allow_descriptors

log = logging.getLogger(__name__)


def main(config: Config, unsafe: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. `unsafe`: also where readers get wrong bytes
    when the daemon dies, because nobody holds the kernel's end of the transport for it.

    Raises Failure when the daemon cannot begin.
    """
    store = FdStore()
    inherited = store.take()
    transport = opening.inherited(config, inherited)
    takeover = transport is not None
    begin_log(config)
    allow_descriptors(probe.descriptors(config.cache, config.kernel))
    make_directories(config)
    if transport is None:
        transport = opening.anew(config)
    handover = Handover(inherited.get(daemon.STATE_NAME))
    # The transport last: a successor that finds it finds the rest.
    holdings = {daemon.STATE_NAME: handover.fd, **transport.holdings}
    held = [
        (takeover and name in inherited) or store.put(name, fd) for name, fd in holdings.items()
    ]
    if transport.needs_holder and not (all(held) or unsafe):
        raise Missing(
            f"nobody would hold {transport.name} if this daemon died: readers would get zeros",
            "start `fscached supervise`, or a systemd unit with a file descriptor store "
            "(docs/fscached.service); --unsafe-no-supervisor to do without",
        )
    beginning = daemon.Beginning(transport, handover, takeover)
    uvloop.run(daemon.serve(config, beginning, ready=store.ready))
    if not all(held):
        opening.leave(transport, config)
    return 0


def leave(config: Config) -> int:
    """What comes after the last daemon, once nobody will hold the transport; the exit code."""
    transport = opening.inherited(config, FdStore().take())
    _write_log(config)
    if transport is not None:
        opening.leave(transport, config)
    return 0


def begin_log(config: Config) -> None:
    """Log as configured, and first what of the configuration is nothing here."""
    _write_log(config)
    if config.ignored:
        log.info("keys of nydusd's do not apply here", extra={"keys": " ".join(config.ignored)})


def _write_log(config: Config) -> None:
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

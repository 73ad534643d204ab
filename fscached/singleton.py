"""`fscached singleton`: a daemon in nydusd's place, begun and ended by nydus-snapshotter.

Who keeps the kernel's device is the snapshotter, where it was given a supervisor; a service
manager is not asked, since the one there may be is the snapshotter's own.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import uvloop

from fscached import config as settings
from fscached import config_text, serving
from fscached.config import Config
from fscached.config_text import ConfigError
from fscached.control import entry
from fscached.control.entry import BlobEntry
from fscached.failure import Failure, Missing
from fscached.malformed import MALFORMED
from fscached.transport import descriptors

log = logging.getLogger(__name__)

ENDING_LIMIT_S: Final = 5.0
"""From the signal to the end, whatever hangs: the snapshotter waits for it without a limit."""


class Order(NamedTuple):
    """What nydusd's command line says, as far as it means something here."""

    fscache: str
    apisock: str
    config: str | None = None
    tag: str | None = None
    identity: str | None = None
    supervisor: str | None = None
    upgrade: bool = False
    log_level: str | None = None
    log_file: str | None = None
    log_rotation_mb: int | None = None
    descriptors: int | None = None
    """None: as many as are needed; 0: as they are."""


def main(order: Order, inherited: socket.socket | None = None) -> int:
    """Serve until SIGTERM, SIGINT or the API's `exit`; the exit code. `inherited` listens already,
    where a predecessor did that has died.

    Raises Failure when the daemon cannot begin.
    """
    config, entries = configured(order)
    serving.begin_log(config)
    try:
        return _run(config, entries, order, inherited)
    except Failure as failure:
        log.error("cannot begin: %s", failure)
        raise


def _run(
    config: Config, entries: list[BlobEntry], order: Order, inherited: socket.socket | None
) -> int:
    if not Path(order.fscache).is_dir():
        raise Missing(f"--fscache {order.fscache}: no such directory", "make it, or name another")
    if order.descriptors != 0:
        needed = descriptors.needed(config.cache, config.kernel)
        descriptors.allow(order.descriptors or needed)
    serving.make_directories(config)
    kept = inherited is not None and order.supervisor is not None and _is_kept(config)
    follows = order.upgrade or kept
    if follows:
        log.info("to take over", extra={"supervisor": order.supervisor or "none"})
    uvloop.run(
        serving.serve(
            config,
            None if follows else _beginning(config, entries),
            stopped=_end_soon,
            identity=order.identity,
            supervisor=order.supervisor,
            listener=inherited,
            predecessor_lives=order.upgrade,
        )
    )
    return 0


def _is_kept(config: Config) -> bool:
    """Whether somebody keeps the device of a predecessor that has died: nydusd too tells that from
    one that lives by its socket, which nobody listened on."""
    from fscached.transport.cachefiles import Cachefiles

    try:
        Cachefiles.open(config.cache.directory, config.kernel.device).close()
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _beginning(config: Config, entries: list[BlobEntry]) -> serving.Beginning:
    from fscached.handover import Handover
    from fscached.transport import opening

    return serving.Beginning(opening.anew(config), Handover(), takeover=False, entries=entries)


def configured(order: Order) -> tuple[Config, list[BlobEntry]]:
    """The configuration of this machine, where the command line says nothing else. Raises
    ConfigError."""
    given, entries = order.config, list[BlobEntry]()
    if given is not None and (listed := _entries(given)) is not None:
        given, entries = None, listed
    config = settings.load(given)
    replace = msgspec.structs.replace
    changed = replace(
        config,
        cache=replace(
            config.cache,
            directory=os.path.abspath(order.fscache),
            tag=order.tag or config.cache.tag,
        ),
        kernel=replace(config.kernel, transport="cachefiles"),
        api=replace(config.api, socket=os.path.abspath(order.apisock)),
        log=replace(
            config.log,
            level=order.log_level or config.log.level,
            file=os.path.abspath(order.log_file) if order.log_file else config.log.file,
            rotate_bytes=(
                config.log.rotate_bytes
                if order.log_rotation_mb is None
                else order.log_rotation_mb << 20
            ),
        ),
    )
    return changed, entries


class _Entries(msgspec.Struct, frozen=True):
    blobs: list[msgspec.Raw] | None = None


def _entries(path: str) -> list[BlobEntry] | None:
    """The images of a file `{"blobs": [...]}`; None for a file that is a configuration."""
    text = config_text.read(path)
    if not config_text.is_json(text):
        return None
    try:
        listed = msgspec.json.decode(text, type=_Entries).blobs
        return None if listed is None else [entry.parse(bytes(raw)) for raw in listed]
    except (*MALFORMED, entry.InvalidEntry) as error:
        raise ConfigError(str(error), "give blobs as in nydusd's API", where=str(path)) from None


def _end_soon() -> None:
    timer = threading.Timer(ENDING_LIMIT_S, os._exit, [0])
    timer.daemon = True
    timer.start()

"""Which transport a daemon runs on, and how it comes to have it."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path

from fscached.config import Cache, Config
from fscached.failure import Failure, Missing
from fscached.transport import Transport, cachefiles, descriptors, fanotify, mount, probe
from fscached.transport.cache_file import forget_pages
from fscached.transport.cachefiles import Cachefiles, Culling
from fscached.transport.fanotify import Fanotify
from fscached.transport.floor import Floor
from fscached.transport.host import this_host
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap

log = logging.getLogger(__name__)


def inherited(config: Config, holdings: dict[str, int]) -> Transport | None:
    """The predecessor's transport, whatever the configuration says now: its mounts are there. None
    without a predecessor. To be called before anything is opened (`Fanotify.adopt`).

    Raises Failure.
    """
    try:
        if cachefiles.DEVICE_NAME in holdings:
            device_fd = holdings[cachefiles.DEVICE_NAME]
            return Cachefiles.adopt(device_fd, config.cache.directory)
        if {fanotify.GROUP_NAME, fanotify.SLOTS_NAME} <= holdings.keys():
            limit = descriptors.allow(descriptors.needed(config.cache, config.kernel))
            return Fanotify.adopt(holdings, config.cache.directory, _floor(config.cache), limit)
    except OSError as error:
        raise Failure(
            f"the predecessor's mounts cannot be taken over: {error}",
            "unmount the images and start anew",
        ) from None
    return None


def anew(config: Config) -> Transport:
    """A transport without a past. Raises Missing."""
    name: str = config.kernel.transport
    if name == "auto":
        name, reason = probe.choice(this_host(config.kernel.device))
        log.info("transport %s: %s", name, reason)
    return _cachefiles(config) if name == "cachefiles" else _fanotify(config)


def leave(transport: Transport, config: Config) -> None:
    """For good: nobody will hold the transport any more. Images that are complete stay mounted.
    Blocks for as long as somebody uses one that is not."""
    if isinstance(transport, Fanotify):
        transport.leave(partial(take_down, config.paths.state_directory))


def _cachefiles(config: Config) -> Cachefiles:
    cache = config.cache
    try:
        transport = Cachefiles.open(cache.directory, config.kernel.device)
        transport.bind(
            cache.tag,
            Culling(cache.block_run_percent, cache.block_cull_percent, cache.block_stop_percent),
            Culling(cache.file_run_percent, cache.file_cull_percent, cache.file_stop_percent),
        )
    except OSError as error:
        raise Missing(
            f"{config.kernel.device} cannot be used", probe.explain_open_failure(error)
        ) from None
    if not transport.supports_restore:
        log.warning("this kernel has no `restore`: if the daemon dies, its mounts die with it")
    return transport


def _fanotify(config: Config) -> Fanotify:
    if mount.is_apart():
        raise Missing(
            "fanotify cannot be used in a mount namespace of its own: mounts that would read zeros "
            "could not be taken down for everybody",
            "start fscached.service instead of fscached-cachefiles.service, or leave "
            "ProtectSystem=, PrivateTmp= and the like out of the unit",
        )
    try:
        transport = Fanotify.open(
            config.cache.directory, _floor(config.cache), config.kernel.unanswered_reads
        )
        if condemned := transport.condemn():
            log.error(
                "%d cache files have holes, and mounts whose holders have all ended read them as "
                "zeros; such reads fail from now on",
                len(condemned),
            )
            take_down(config.paths.state_directory, condemned)
    except BlockingIOError:
        raise Failure(
            f"another daemon uses {config.cache.directory}",
            "end that one, or name another directory in [cache]",
        ) from None
    except OSError as error:
        raise Missing(
            "fanotify before content is read cannot be used",
            f"{error}; `fscached doctor` says what is missing",
        ) from None
    return transport


def take_down(state_directory: str, files: list[Path]) -> None:
    """Unmount all images of this daemon, whose bootstraps it keeps, that need one of these files,
    and drop what the kernel has of them."""
    if not files:
        return
    names = {path.name for path in files}
    for point in reversed(mount.mounted()):
        ours = point.bootstrap and Path(point.bootstrap).is_relative_to(state_directory)
        if ours and not names.isdisjoint(_blobs(point.bootstrap, names)):
            log.error("taken down, mount it again: %s", point.target, extra={"fsid": point.fsid})
            with suppress(mount.MountError):
                mount.unmount(point.target, lazy=True)
    with suppress(OSError):
        forget_pages()


def _blobs(bootstrap: str, unknown: set[str]) -> set[str]:
    """The blobs of a mounted image; one that cannot be read may have any."""
    try:
        return {entry.blob_id for entry in Bootstrap(Path(bootstrap).read_bytes()).blobs}
    except (OSError, ImageError):
        return unknown


def _floor(cache: Cache) -> Floor:
    return Floor(cache.directory, cache.block_stop_percent, cache.file_stop_percent)

"""The daemon: everything wired together, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import uvloop

from fscached import log as logs
from fscached.config import Config
from fscached.control.api import routes
from fscached.control.http import Server
from fscached.control.notify import FdStore
from fscached.control.service import ControlService
from fscached.control.state import Trigger
from fscached.failure import Failure, Missing
from fscached.fill.blob import Limits, OpenBlob
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.fill.objects import Objects
from fscached.handover import Handover
from fscached.images import Images, Registration
from fscached.prefetch.clock import LoopClock
from fscached.prefetch.service import Means, Service
from fscached.prefetch.traces import Traces
from fscached.source.registries import Registries
from fscached.store import Store
from fscached.transport import ObjectKey, Transport, opening, probe
from fscached.transport.cachefiles import allow_descriptors
from fscached.transport.floor import Floor
from rafs_v6.blob import ChunkMap
from rafs_v6.layout import BlobEntry

log = logging.getLogger(__name__)

STATE_NAME = "state"

PREFETCH_DEADLINE_S = 600.0
"""For one range; generous, since prefetch stands still while readers are served."""


def main(config: Config, unsafe: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. `unsafe`: also where readers get wrong bytes
    when the daemon dies, because nobody holds the kernel's end of the transport for it.

    Raises Failure when the daemon cannot begin.
    """
    store = FdStore()
    inherited = store.take()
    transport = opening.inherited(config, inherited)
    takeover = transport is not None
    logs.configure(config.log.level, config.log.file)
    if config.ignored:
        log.info("keys of nydusd's do not apply here", extra={"keys": " ".join(config.ignored)})
    allow_descriptors(probe.descriptors(config.cache, config.kernel))
    _make_directories(config)
    if transport is None:
        transport = opening.anew(config)
    handover = Handover(inherited.get(STATE_NAME))
    # The transport last: a successor that finds it finds the rest.
    holdings = {STATE_NAME: handover.fd, **transport.holdings}
    held = [
        (takeover and name in inherited) or store.put(name, fd) for name, fd in holdings.items()
    ]
    if transport.needs_holder and not (all(held) or unsafe):
        raise Missing(
            f"nobody would hold {transport.name} if this daemon died: readers would get zeros",
            "start `fscached supervise`, or a systemd unit with a file descriptor store "
            "(docs/fscached.service); --unsafe-no-supervisor to do without",
        )
    uvloop.run(_serve(config, transport, handover, store, takeover))
    if not all(held):
        opening.leave(transport, config)
    return 0


def leave(config: Config) -> int:
    """What comes after the last daemon, once nobody will hold the transport; the exit code."""
    transport = opening.inherited(config, FdStore().take())
    logs.configure(config.log.level, config.log.file)
    if transport is not None:
        opening.leave(transport, config)
    return 0


async def _serve(
    config: Config, transport: Transport, handover: Handover, store: FdStore, takeover: bool
) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    async with AsyncExitStack() as stack:
        crew = Crew(config.fetch_workers, Pool(config.fetch.buffer_pool_bytes))
        stack.callback(crew.close)
        registries = Registries(config)
        stack.push_async_callback(registries.close)
        state = Store(Path(config.paths.state_directory))
        images = Images(_chunk_loader(config, state))
        objects = Objects(transport, images.lookup, _limits(config), crew)
        stack.callback(objects.close)
        traces = Traces(Path(config.paths.state_directory, "traces"))
        prefetch = Service(_means(config, registries), traces, LoopClock())
        stack.push_async_callback(prefetch.close)
        objects.on_blob = _prefetcher(images, prefetch)
        service = ControlService(
            config,
            state,
            images,
            objects,
            prefetch,
            transport,
            registries,
            handover,
            stopping.set,
        )
        service.restore()
        server = Server(config.api_socket, routes(service), config.api)
        service.lifecycle.fire(Trigger.TAKEOVER if takeover else Trigger.MOUNT)
        if takeover:
            _take_over(transport)
        _drain(transport, objects)
        loop.add_reader(transport.fileno(), _drain, transport, objects)
        stack.callback(loop.remove_reader, transport.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        service.lifecycle.fire(Trigger.START)
        await server.start()
        stack.push_async_callback(server.close)
        store.ready(f"serves {len(images)} images")
        # What start-up made stays: looking through it again and again would make readers wait.
        gc.freeze()
        log.info("running", extra={"images": len(images), "takeover": takeover})
        await stopping.wait()
        log.info("ending", extra={"reads_waiting": objects.waiting})


def _drain(transport: Transport, objects: Objects) -> None:
    objects.heed(transport.drain())


def _make_directories(config: Config) -> None:
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


def _take_over(transport: Transport) -> None:
    """What the predecessor left unanswered is asked again. Its descriptors are gone: whoever starts
    a successor has waited for its end."""
    try:
        transport.take_over()
    except OSError as error:
        raise Failure(
            f"the predecessor's mounts cannot be taken over: {error}",
            "unmount the images and start anew; for cachefiles kernel 6.8 has `restore`",
        ) from None


def _limits(config: Config) -> Limits:
    fetch = config.fetch
    return Limits(
        fetch.window_bytes,
        fetch.window_limit_bytes,
        fetch.deadline_s,
        fetch.refusal_s,
        fetch.verify,
        fetch.outage_limit_s if fetch.on_source_outage == "wait" else None,
    )


def _means(config: Config, registries: Registries) -> Means:
    cache, prefetch = config.cache, config.prefetch
    block_percent = min(cache.block_stop_percent + prefetch.disk_margin_percent, 99)
    floor = Floor(cache.directory, block_percent, cache.file_stop_percent)
    return Means(
        PREFETCH_DEADLINE_S,
        config.source.prefetch_connections,
        prefetch.bandwidth_bytes_per_s,
        partial(floor.require, prefetch.range_bytes),
        lambda: registries.readers_alone,
    )


def _prefetcher(images: Images, prefetch: Service) -> Callable[[ObjectKey, OpenBlob], None]:
    def begin(key: ObjectKey, blob: OpenBlob) -> None:
        for known in images.having(key):
            prefetch.begin(known.key, known.image, known.prefetch, key.cookie, blob)

    return begin


def _chunk_loader(
    config: Config, state: Store
) -> Callable[[Registration, BlobEntry], Coroutine[None, None, ChunkMap]]:
    def load(registration: Registration, entry: BlobEntry) -> Coroutine[None, None, ChunkMap]:
        return state.chunks(
            registration.image,
            entry,
            registration.source,
            config.fetch.verify,
            config.fetch.deadline_s,
        )

    return load

"""The daemon: everything wired together, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path

from fscached.config import Config
from fscached.control.cache import looker
from fscached.control.service import ControlService
from fscached.control.state import State
from fscached.culling.service import Culling
from fscached.failure import Failure
from fscached.fill.blob import Limits, OpenBlob
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.fill.objects import Objects
from fscached.fill.reception import Reception
from fscached.handover import NAME as HANDOVER_NAME
from fscached.handover import Handover
from fscached.images import Images, Registration
from fscached.prefetch.clock import LoopClock
from fscached.prefetch.service import Means, Service
from fscached.prefetch.traces import Traces
from fscached.source.registries import Registries
from fscached.store import Store
from fscached.transport import ObjectKey, Transport, opening
from fscached.transport.floor import Floor
from rafs_v6.blob import ChunkMap
from rafs_v6.layout import BlobEntry

log = logging.getLogger(__name__)

PREFETCH_DEADLINE_S = 600.0
"""For one range; generous, since prefetch stands still while readers are served."""

ENDING_LIMIT_S = 5.0
"""For workers to leave the kernel's descriptors; one that is stuck in a write never does."""
ENDING_PAUSE_S = 0.005


def heir(config: Config, holdings: dict[str, int], state: Callable[[], State]) -> Daemon:
    """A daemon of what its predecessor held. Raises Failure, ValueError."""
    transport = opening.inherited(config, holdings)
    if transport is None or HANDOVER_NAME not in holdings:
        raise ValueError("what the supervisor keeps is not the kernel's device and a state")
    return Daemon(config, transport, Handover(holdings[HANDOVER_NAME]), state)


class Daemon:
    """Everything over one transport: a `Reign`. Make it in the running loop."""

    def __init__(
        self,
        config: Config,
        transport: Transport,
        handover: Handover,
        state: Callable[[], State],
    ) -> None:
        """What the predecessor bound is bound again; nothing is answered yet."""
        self.holdings: Mapping[str, int] = {HANDOVER_NAME: handover.fd, **transport.holdings}
        self._transport = transport
        self._crew = Crew(config.fetch_workers, Pool(config.fetch.buffer_pool_bytes))
        self._registries = Registries(config)
        store = Store(Path(config.paths.state_directory))
        self.images = Images(_chunk_loader(config, store))
        self.objects = Objects(transport, self.images.lookup, _limits(config), self._crew)
        self._reception = Reception(transport, self.objects)
        traces = Traces(Path(config.paths.state_directory, "traces"))
        self._prefetch = Service(_means(config, self._registries), traces, LoopClock())
        self.objects.on_blob = _prefetcher(self.images, self._prefetch)
        self._housekeeper = Crew(1, self._crew.pool)
        look = looker(self.images, self.objects)
        self._culling = Culling(config.cache, transport, store, self._housekeeper, look)
        self.service = ControlService(
            config,
            store,
            self.images,
            self.objects,
            self._prefetch,
            transport,
            self._registries,
            handover,
            self._culling,
            state,
        )
        self.service.restore()

    def begin(self, takeover: bool) -> None:
        """See Reign."""
        self.service.begin()
        if takeover:
            _take_over(self._transport)
        self._reception.open()
        self._culling.begin()
        # What start-up made stays: looking through it again and again would make readers wait.
        gc.freeze()
        log.info("running", extra={"images": len(self.images), "takeover": takeover})

    async def end(self) -> None:
        """See Reign."""
        loop = asyncio.get_running_loop()
        self._reception.close()
        self._culling.end()
        self.objects.close()
        limit_s = loop.time() + ENDING_LIMIT_S
        while not self._transport.relinquish():
            if loop.time() > limit_s:
                log.error("a worker is stuck: what it holds is a successor's when this has ended")
                break
            await asyncio.sleep(ENDING_PAUSE_S)

    async def close(self) -> None:
        """Let go of everything but the kernel's descriptors, which end with the process."""
        log.info("ending", extra={"reads_waiting": self.objects.waiting})
        self._reception.close()
        await self._prefetch.close()
        self._culling.end()
        self.objects.close()
        await self._registries.close()
        self._housekeeper.close()
        self._crew.close()


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
        config.log.slow_read_s,
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

"""All registries of one daemon: one set of connections, tokens and limits, many repositories."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from fscached import config
from fscached.config import Config, Mirror, Proxy
from fscached.source import SourceError
from fscached.source.auth import Credential, FixedCredential, Keychain, Tokens
from fscached.source.distribution import Distribution
from fscached.source.docker_config import DockerConfig
from fscached.source.dragonfly import Peer, Way
from fscached.source.endpoint import Endpoint
from fscached.source.exchange import Exchange
from fscached.source.health import Health, Watch
from fscached.source.origin import Traffic, Trust, scheme_of
from fscached.source.patience import Patience
from fscached.source.registry import Registry
from fscached.source.remote import Remote
from fscached.source.transfer import Transfers

PING_LIMIT_BYTES: Final = 64 << 10


class Registries:
    """Makes sources and distributions that share connections. Make it in the running loop."""

    def __init__(self, settings: Config) -> None:
        source = settings.source
        self._config = source
        self._trust = Trust(ca_file=source.ca_file)
        self._exchange = Exchange(
            self._trust,
            connect_timeout_s=source.connect_timeout_s,
            stall_timeout_s=source.stall_timeout_s,
        )
        self._tokens = Tokens(self._exchange)
        self._transfers = Transfers(
            demand_connections=source.demand_connections,
            prefetch_connections=source.prefetch_connections,
            connect_timeout_s=source.connect_timeout_s,
            stall_timeout_s=source.stall_timeout_s,
            prefetch_quiet_s=settings.prefetch.quiet_s,
        )
        self._watches: WeakValueDictionary[str, Watch] = WeakValueDictionary()
        """One for each peer that a source or a read knows of."""
        self._pings = Traffic()
        self.traffic = Traffic()
        """What was spent on all of them; requests for tokens go elsewhere and are not counted."""

    def source(
        self,
        host: str,
        repository: str,
        credential: Credential | None,
        scheme: str = "",
        mirrors: tuple[Mirror, ...] = (),
        proxy: Proxy | None = None,
    ) -> Remote:
        """A repository to read ranges from, asked of mirrors and proxy first: those given, or those
        of the configuration. Its tries end with the deadline of each read.

        Raises SourceError for names that are none.
        """
        registry = Registry(
            host,
            repository,
            scheme=scheme or scheme_of(host, host in self._config.insecure_registries),
            tokens=self._tokens,
            keychain=self._keychain(credential),
            trust=self._trust,
        )
        peers = [self._mirror(registry, mirror) for mirror in mirrors or self._config.mirrors]
        proxy = proxy if proxy is not None else self._config.proxy
        if not proxy.url:
            return self._remote(registry, peers)
        proxied = self._proxy(registry, proxy)
        if not proxy.fallback:
            return self._remote(proxied, peers)
        return self._remote(registry, [*peers, proxied])

    def distribution(self, credential: Credential | None) -> Distribution:
        """For manifests and bootstraps, with a few tries each."""
        return Distribution(
            exchange=self._exchange,
            tokens=self._tokens,
            keychain=self._keychain(credential),
            insecure=self._config.insecure_registries,
            patience=self._patience(self._config.retries),
            manifest_limit_bytes=self._config.manifest_limit_bytes,
            traffic=self.traffic,
        )

    async def close(self) -> None:
        """End what is under way and close all connections."""
        for watch in list(self._watches.values()):
            await watch.close()
        await self._transfers.close()
        await self._exchange.close()

    def _mirror(self, registry: Registry, mirror: Mirror) -> Peer:
        way = Way(
            name=mirror.host,
            base=mirror.host,
            proxy="",
            headers=mirror.headers,
            authorised=mirror.authorization,
            timeout_s=mirror.timeout_s,
            lie_pause_s=self._config.distrust_s,
        )
        return Peer(registry, way, self._watch(mirror.host, mirror), self._trust)

    def _proxy(self, registry: Registry, proxy: Proxy) -> Peer:
        """Requests through a proxy are for the registry, so they are authorised as its own."""
        plain = registry.base.replace("https://", "http://", 1)
        way = Way(
            name=proxy.url,
            base=plain if proxy.use_http else registry.base,
            proxy=proxy.url,
            headers={},
            authorised=True,
            timeout_s=proxy.timeout_s,
            lie_pause_s=self._config.distrust_s,
        )
        trust = Trust(ca_file=proxy.ca_file) if proxy.ca_file else self._trust
        return Peer(registry, way, self._watch(proxy.url, proxy), trust)

    def _watch(self, name: str, settings: config.Peer) -> Watch:
        """The one watch over a peer, whatever images are read there."""
        watch = self._watches.get(name)
        if watch is None:
            health = Health(
                failure_limit=settings.failure_limit,
                pause_s=settings.ping_interval_s,
                lie_pause_s=self._config.distrust_s,
            )
            watch = self._watches[name] = Watch(
                name,
                health,
                ping=partial(self._ping, settings.ping_url) if settings.ping_url else None,
                interval_s=settings.ping_interval_s,
                idle_s=self._config.ping_pause_s,
            )
        return watch

    async def _ping(self, url: str) -> bool:
        """Whether somebody is at home: nydusd too takes anything below 500, a 401 among it. A
        wrong path does no harm: reads have the last word."""
        try:
            answer = await self._exchange.send(
                "GET", url, {}, self._pings, limit_bytes=PING_LIMIT_BYTES
            )
        except SourceError:
            return False
        return answer.status < 500

    def _remote(self, origin: Endpoint, peers: Sequence[Peer]) -> Remote:
        return Remote(
            origin,
            peers,
            transfers=self._transfers,
            patience=self._patience(sys.maxsize),
            traffic=self.traffic,
        )

    def _keychain(self, credential: Credential | None) -> Keychain:
        if credential is None and self._config.docker_config:
            return DockerConfig(Path(self._config.docker_config))
        return FixedCredential(credential)

    def _patience(self, retries: int) -> Patience:
        return Patience(retries, self._config.retry_pause_s, self._config.retry_pause_limit_s)

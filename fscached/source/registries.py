"""All registries of one daemon: one set of connections, tokens and limits, many repositories."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from fscached import config
from fscached.config import Config, Mirror, Proxy
from fscached.source import Fault, SourceError
from fscached.source.auth import Credential, FixedCredential, Keychain, Tokens
from fscached.source.distribution import Distribution
from fscached.source.dragonfly import Peer, Way
from fscached.source.endpoint import Endpoint
from fscached.source.exchange import Exchange
from fscached.source.health import Health, Watch
from fscached.source.keyring import Keyring
from fscached.source.objectstore import ObjectStore
from fscached.source.origin import Traffic, Trust, scheme_of
from fscached.source.outlet import Outlet
from fscached.source.patience import Patience
from fscached.source.reference import HOST
from fscached.source.registry import Registry
from fscached.source.remote import Remote
from fscached.source.respite import Respites
from fscached.source.transfer import Transfers

PING_LIMIT_BYTES: Final = 64 << 10


class _Access(NamedTuple):
    """The control plane of those who trust the same authorities; a token is never shared with
    others."""

    exchange: Exchange
    tokens: Tokens


class Registries:
    """Makes sources and distributions that share connections. Make it in the running loop."""

    def __init__(self, settings: Config) -> None:
        source = settings.source
        self._config = source
        self._trust = Trust(source.verify_tls, source.ca_files)
        self._outlet = Outlet(source.http_proxy, source.no_proxy)
        self._respites = Respites(source.host_retries_s)
        self._access: dict[Trust, _Access] = {}
        self._keyring = Keyring.configured(source)
        self._transfers = Transfers(
            demand_connections=source.demand_connections,
            prefetch_connections=source.prefetch_connections,
            connect_timeout_s=source.connect_timeout_s,
            stall_timeout_s=source.stall_timeout_s,
            prefetch_quiet_s=settings.prefetch.quiet_s,
            outlet=self._outlet,
            respites=self._respites,
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
        *,
        sizes: Mapping[str, int] = MappingProxyType({}),
        verify: bool = True,
        ca_files: Sequence[str] = (),
    ) -> Remote:
        """A repository to read ranges from, asked of mirrors and proxy first: those given, or those
        of the configuration. Its tries end with the deadline of each read.

        `sizes` of blobs in bytes are what is known of them. `verify` off and `ca_files` are this
        image's own, beside what is configured. Raises SourceError for names that are none, and for
        files of authorities that are none.
        """
        trust = trust_in(host, self._config, verify=verify, ca_files=ca_files)
        registry = Registry(
            host,
            repository,
            scheme=scheme or scheme_of(host, is_insecure(host, self._config)),
            tokens=self._entrance(trust).tokens,
            keychain=self._keychain(credential),
            trust=trust,
        )
        peers = [self._mirror(registry, mirror) for mirror in mirrors or self._config.mirrors]
        proxy = proxy if proxy is not None else self._config.proxy
        if not proxy.url:
            return self._remote(registry, peers, sizes)
        proxied = self._proxy(registry, proxy)
        if not proxy.fallback:
            return self._remote(proxied, peers, sizes)
        return self._remote(registry, [*peers, proxied], sizes)

    @property
    def readers_alone(self) -> bool:
        """Whether prefetch stands still because of readers."""
        return self._transfers.readers_alone

    def store(
        self,
        host: str,
        make: Callable[[Trust], ObjectStore],
        *,
        verify: bool = True,
        ca_files: Sequence[str] = (),
    ) -> Remote:
        """An object store at `host[:port]`, to read ranges from. Raises SourceError as `source`."""
        trust = trust_in(host, self._config, verify=verify, ca_files=ca_files)
        return self._remote(make(trust), (), {})

    def distribution(self, host: str, credential: Credential | None) -> Distribution:
        """For manifests and bootstraps of one registry, with a few tries each.

        Raises SourceError as `source` does.
        """
        access = self._entrance(trust_in(host, self._config))
        return Distribution(
            exchange=access.exchange,
            tokens=access.tokens,
            keychain=self._keychain(credential),
            insecure=(host,) if is_insecure(host, self._config) else (),
            patience=self._patience(self._config.retries),
            manifest_limit_bytes=self._config.manifest_limit_bytes,
            traffic=self.traffic,
        )

    async def close(self) -> None:
        """End what is under way and close all connections."""
        for watch in list(self._watches.values()):
            await watch.close()
        await self._transfers.close()
        for access in self._access.values():
            await access.exchange.close()

    def _entrance(self, trust: Trust) -> _Access:
        if trust not in self._access:
            exchange = Exchange(
                trust,
                connect_timeout_s=self._config.connect_timeout_s,
                stall_timeout_s=self._config.stall_timeout_s,
                outlet=self._outlet,
                respites=self._respites,
            )
            self._access[trust] = _Access(exchange, Tokens(exchange))
        return self._access[trust]

    def _mirror(self, registry: Registry, mirror: Mirror) -> Peer:
        way = Way(
            name=mirror.host,
            base=mirror.host,
            proxy="",
            headers=mirror.headers,
            authorised=mirror.authorization,
            small_ranges=mirror.small_ranges,
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
            small_ranges=proxy.small_ranges,
            timeout_s=proxy.timeout_s,
            lie_pause_s=self._config.distrust_s,
        )
        own = (proxy.ca_file,) if proxy.ca_file else ()
        trust = Trust(self._trust.verify, (*self._trust.ca_files, *own))
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
            answer = await self._entrance(self._trust).exchange.send(
                "GET", url, {}, self._pings, limit_bytes=PING_LIMIT_BYTES
            )
        except SourceError:
            return False
        return answer.status < 500

    def _remote(self, origin: Endpoint, peers: Sequence[Peer], sizes: Mapping[str, int]) -> Remote:
        return Remote(
            origin,
            peers,
            transfers=self._transfers,
            patience=self._patience(sys.maxsize),
            traffic=self.traffic,
            sizes=sizes,
        )

    def _keychain(self, credential: Credential | None) -> Keychain:
        return self._keyring if credential is None else FixedCredential(credential)

    def _patience(self, retries: int) -> Patience:
        return Patience(retries, self._config.retry_pause_s, self._config.retry_pause_limit_s)


def trust_in(
    host: str, source: config.Source, *, verify: bool = True, ca_files: Sequence[str] = ()
) -> Trust:
    """Whom to believe as the registry `host[:port]`: the system's authorities, the configured
    ones, those of its own directory as docker has them (`HOST/*.crt`), and those given.

    Raises SourceError (LOCAL).
    """
    if not HOST.fullmatch(host):
        raise SourceError(f"{host[:255]!r} is no name of a registry", Fault.LOCAL)
    own: list[str] = []
    if source.certs_directory:
        own = sorted(map(str, Path(source.certs_directory, host).glob("*.crt")))
    trust = Trust(verify and source.verify_tls, (*source.ca_files, *own, *ca_files))
    _ = trust.bundle  # a file that is none is an error now, not at the first read
    return trust


def is_insecure(host: str, source: config.Source) -> bool:
    """Whether `host[:port]` is configured to be spoken to without TLS."""
    return not {host, "*"}.isdisjoint(source.insecure_registries)

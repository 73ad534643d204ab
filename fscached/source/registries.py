"""All registries of one daemon: one set of connections, tokens and limits, many repositories."""

from __future__ import annotations

import sys
from pathlib import Path

from fscached.config import Config
from fscached.source.auth import Credential, FixedCredential, Keychain, Tokens
from fscached.source.distribution import Distribution
from fscached.source.docker_config import DockerConfig
from fscached.source.endpoint import Endpoint
from fscached.source.exchange import Exchange
from fscached.source.origin import Traffic, Trust, scheme_of
from fscached.source.patience import Patience
from fscached.source.registry import Registry
from fscached.source.remote import Remote
from fscached.source.transfer import Transfers


class Registries:
    """Makes sources and distributions that share connections. Make it in the running loop."""

    def __init__(self, config: Config) -> None:
        source = config.source
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
            prefetch_quiet_s=config.prefetch.quiet_s,
        )
        self.traffic = Traffic()
        """What was spent on all of them; requests for tokens go elsewhere and are not counted."""

    def source(
        self, host: str, repository: str, credential: Credential | None, scheme: str = ""
    ) -> Remote:
        """A repository to read ranges from. Its tries end with the deadline of each read.

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
        return self._remote(registry)

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
        await self._transfers.close()
        await self._exchange.close()

    def _remote(self, endpoint: Endpoint) -> Remote:
        return Remote(
            endpoint,
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

"""Where this node's credentials come from when an image brings none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fscached.config import Source
from fscached.source.auth import Credential, Keychain
from fscached.source.credential_provider import CredentialProviders
from fscached.source.docker_config import DockerConfig


class Keyring:
    """Keychains asked one after the other."""

    def __init__(self, keychains: Sequence[Keychain]) -> None:
        self._keychains = keychains

    @classmethod
    def configured(cls, source: Source, docker_config: str = "") -> Keyring:
        """docker's configuration, or else the one given here, then kubelet's providers."""
        keychains: list[Keychain] = []
        if path := source.docker_config or docker_config:
            keychains.append(DockerConfig(Path(path)))
        if source.credential_provider_config:
            file = Path(source.credential_provider_config)
            keychains.append(CredentialProviders(file, Path(source.credential_provider_directory)))
        return cls(keychains)

    async def find(self, image: str) -> Credential | None:
        """See Keychain."""
        for keychain in self._keychains:
            if credential := await keychain.find(image):
                return credential
        return None

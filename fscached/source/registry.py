"""A repository of an OCI registry (distribution spec, pulling blobs)."""

from __future__ import annotations

import re
from typing import Final

from fscached.source import Fault, Priority, SourceError
from fscached.source.auth import Authorization, Keychain, Secret, Tokens
from fscached.source.endpoint import refusal
from fscached.source.origin import Trust, origin_of
from fscached.source.redirect import Route
from fscached.source.reference import REPOSITORY
from fscached.source.request import Reply, Request

_BLOB_ID: Final = re.compile(r"[0-9a-f]{64}")
_AUTHORIZATION: Final = "Authorization: "


class Registry:
    """One repository, an `Endpoint`. `host` is `host[:port]`, `scheme` https or http; blob ids are
    the sha256 of the blob, 64 hex digits."""

    def __init__(
        self,
        host: str,
        repository: str,
        *,
        scheme: str,
        tokens: Tokens,
        keychain: Keychain,
        trust: Trust,
    ) -> None:
        """Raises SourceError (LOCAL) for names that are none."""
        if not REPOSITORY.fullmatch(repository):
            raise SourceError(f"{repository[:255]!r} is no name of a repository", Fault.LOCAL)
        self.name = f"{host}/{repository}"
        self.origin = origin_of(f"{scheme}://{host}")
        self.base = f"{scheme}://{host}"
        """Scheme and host as they were given: Dragonfly tells tasks apart by the URL's text."""
        self._blobs = f"/v2/{repository}/blobs/sha256:"
        self._trust = trust
        self._authorization = Authorization(
            self.origin, self.name, f"repository:{repository}:pull", keychain, tokens
        )

    def path(self, blob_id: str) -> str:
        """Of a blob, at the registry and its mirrors. Raises SourceError for an id that is none."""
        if not _BLOB_ID.fullmatch(blob_id):
            raise SourceError(f"{blob_id[:64]!r} is no sha256 of a blob", Fault.PROTOCOL)
        return self._blobs + blob_id

    def url(self, blob_id: str) -> str:
        """See Endpoint."""
        return self.base + self.path(blob_id)

    async def authorization(self) -> tuple[str, ...]:
        """The header lines that let us in, as far as is known. Raises SourceError."""
        secret = await self._authorization.header()
        return () if secret is None else (_AUTHORIZATION + secret.reveal(),)

    async def request(self, route: Route, start: int, end: int, priority: Priority) -> Request:
        """See Endpoint."""
        headers = await self.authorization() if route.origin == self.origin else ()
        return Request(route.url, headers, start, end, priority, self._trust)

    async def refused(self, request: Request, reply: Reply) -> None:
        """See Endpoint."""
        if reply.status not in (401, 403):
            raise refusal(self.origin, reply)
        challenge = reply.headers.get("www-authenticate", "")
        await self._authorization.refused(challenge, _secret(request))


def _secret(request: Request) -> Secret | None:
    """What the request was authorised with."""
    for header in request.headers:
        if header.startswith(_AUTHORIZATION):
            return Secret(header.removeprefix(_AUTHORIZATION))
    return None

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
from fscached.source.transfer import Reply, Request

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
        self._blobs = f"{scheme}://{host}/v2/{repository}/blobs/sha256:"
        self._trust = trust
        self._authorization = Authorization(
            self.origin, host, f"repository:{repository}:pull", keychain, tokens
        )

    def url(self, blob_id: str) -> str:
        """See Endpoint."""
        if not _BLOB_ID.fullmatch(blob_id):
            raise SourceError(f"{blob_id[:64]!r} is no sha256 of a blob", Fault.PROTOCOL)
        return self._blobs + blob_id

    async def request(self, route: Route, start: int, end: int, priority: Priority) -> Request:
        """See Endpoint."""
        headers: tuple[str, ...] = ()
        if route.origin == self.origin:
            secret = await self._authorization.header()
            if secret is not None:
                headers = (_AUTHORIZATION + secret.reveal(),)
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

"""One kind of server, for whoever reads its blobs persistently (`fscached.source.remote`)."""

from __future__ import annotations

from typing import Final, Protocol

from fscached.source import Fault, Priority, Refusal, SourceError
from fscached.source.patience import RETRIED_STATUSES, Busy, retry_after_s
from fscached.source.redirect import Route
from fscached.source.request import Reply, Request

UNAUTHORISED_STATUSES: Final = frozenset({400, 401, 403})
"""What servers answer to an authorisation that is none, or no longer (S3: 400 ExpiredToken)."""


class Endpoint(Protocol):
    """How a server is asked for bytes of a blob, and what its refusals mean."""

    name: str
    origin: str
    """`scheme://host:port`: what it is sent that no other server may see."""

    def url(self, blob_id: str) -> str:
        """Where a blob is. Raises SourceError (PROTOCOL) for an id that must not go into a URL."""
        ...

    async def request(self, route: Route, start: int, end: int, priority: Priority) -> Request:
        """The request for bytes [start, end) there, authorised if `route` is at `origin`: where
        redirects lead nothing secret goes. Raises SourceError when it cannot be authorised."""
        ...

    async def refused(self, request: Request, reply: Reply) -> None:
        """The endpoint itself answered neither bytes nor a redirect. Returns, for
        one of UNAUTHORISED_STATUSES only, when it should be asked again at once, since the next
        request will be authorised differently; raises SourceError (AUTH, Refusal, Busy)
        otherwise."""
        ...


def refusal(origin: str, reply: Reply) -> SourceError:
    """What an answer of 4xx or 5xx means where nothing more is known."""
    what = f"{origin} answered {reply.status}"
    if reply.status in RETRIED_STATUSES:
        return Busy(what, retry_after_s(reply.headers), origin)
    return Refusal(what, Fault.ORIGIN)

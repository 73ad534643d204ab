"""Where blobs are read: at the registry, or where it sends us, for as long as that may last."""

from __future__ import annotations

import asyncio
import calendar
import time
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urljoin, urlsplit

from fscached.source import Fault, SourceError
from fscached.source.origin import origin_of

REDIRECT_STATUSES: Final = frozenset({301, 302, 303, 307, 308})
# What stores answer when a signed address is no longer good.
STALE_STATUSES: Final = frozenset({400, 401, 403, 404, 410})
HOPS_LIMIT: Final = 5
EXPIRY_MARGIN_S: Final = 5.0
_FOREVER: Final = float("inf")
# (moment of signing, life in seconds) of a signature, and (end) of one; "" is ISO 8601 basic.
_SIGNED: Final = (("x-amz-date", "x-amz-expires"), ("x-goog-date", "x-goog-expires"))


class Route(NamedTuple):
    """Where one blob's bytes are. `expires_at` is of the event loop's clock."""

    url: str
    origin: str
    hops: int
    expires_at: float


def follow(route: Route, location: str, lifetime_limit_s: float, now: float) -> Route:
    """The route a redirect leads to. A relative location is the old route's.

    Raises SourceError (PROTOCOL) for one that must not be followed.
    """
    if route.hops == HOPS_LIMIT:
        raise SourceError(f"{route.origin}: redirected over {HOPS_LIMIT} times", Fault.PROTOCOL)
    try:
        url = urljoin(route.url, location)
    except ValueError:
        url = ""
    origin = origin_of(url)
    if route.origin.startswith("https:") and origin.startswith("http:"):
        raise SourceError(
            f"{route.origin} redirects from https to {origin}: not followed; let the registry "
            "serve its blobs itself or by https",
            Fault.PROTOCOL,
        )
    life_s = min(signed_life_s(url, time.time()) - EXPIRY_MARGIN_S, lifetime_limit_s)
    return Route(url, origin, route.hops + 1, min(route.expires_at, now + life_s))


def signed_life_s(url: str, wall_s: float) -> float:
    """How long a signed URL is still good at `wall_s` (Unix time), infinite when it does not say.

    Names of parameters: AWS Signature V4 and its Google copy; `Expires` of OSS, CloudFront and
    S3's first signatures; `se` of Azure's shared access signatures.
    """
    query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    ends = [_end(query, *names) for names in _SIGNED if names[0] in query]
    ends.append(float(query["expires"]) if query.get("expires", "").isdecimal() else _FOREVER)
    ends.append(_moment(query["se"], "%Y-%m-%dT%H:%M:%SZ") if "se" in query else _FOREVER)
    return min(ends) - wall_s


def _end(query: dict[str, str], date: str, life: str) -> float:
    seconds = query.get(life, "")
    return _moment(query[date], "%Y%m%dT%H%M%SZ") + float(seconds if seconds.isdecimal() else 0)


def _moment(text: str, form: str) -> float:
    try:
        return calendar.timegm(time.strptime(text, form))
    except ValueError:
        return _FOREVER


class Routes:
    """The routes of a repository's blobs. For an unknown one the first reader goes ahead, and the
    others wait for what it finds: an expiry makes one request to the registry, not a stampede."""

    def __init__(self) -> None:
        self._known: dict[str, Route] = {}
        self._scouts: dict[str, asyncio.Event] = {}

    def get(self, blob_id: str, now: float) -> Route | None:
        """The route, if one is known that is still good."""
        route = self._known.get(blob_id)
        return route if route is not None and now < route.expires_at else None

    async def lead(self, blob_id: str) -> bool:
        """Whether the caller is the one to go ahead, and has to `settle`; else wait for it."""
        scout = self._scouts.get(blob_id)
        if scout is None:
            self._scouts[blob_id] = asyncio.Event()
            return True
        await scout.wait()
        return False

    def learn(self, blob_id: str, route: Route) -> None:
        self._known[blob_id] = route

    def forget(self, blob_id: str, route: Route) -> None:
        """This route did not work; a newer one stays."""
        if self._known.get(blob_id) is route:
            del self._known[blob_id]

    def settle(self, blob_id: str) -> None:
        """The scout is back, with a route or without."""
        if scout := self._scouts.pop(blob_id, None):
            scout.set()

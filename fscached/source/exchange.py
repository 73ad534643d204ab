"""Small HTTP exchanges of the control plane: tokens, manifests, uploads. Bodies are bounded."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from fscached.source import Fault, SourceError
from fscached.source.origin import USER_AGENT, Traffic, Trust, origin_of
from fscached.source.outlet import Outlet
from fscached.source.patience import RETRIED_STATUSES, retry_after_s
from fscached.source.respite import Respites

if TYPE_CHECKING:
    import httpx


class Response(NamedTuple):
    """`headers` has lower-case names, repeated ones joined by a comma."""

    status: int
    headers: dict[str, str]
    body: bytes


class Exchange:
    """One request, one bounded response; no redirects, no cookies, no proxies of the environment.

    An origin that answers with Retry-After is left alone by all who share `respites`. httpx is
    imported with the first request: it costs 70 ms and a daemon of local images needs none.
    """

    def __init__(
        self,
        trust: Trust,
        *,
        connect_timeout_s: float,
        stall_timeout_s: float,
        outlet: Outlet | None = None,
        respites: Respites | None = None,
    ) -> None:
        self._trust = trust
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._outlet = outlet or Outlet()
        self.respites = respites or Respites()
        self._clients: dict[str, httpx.AsyncClient] = {}
        """By the proxy they go through."""

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        traffic: Traffic,
        *,
        limit_bytes: int,
        content: bytes | AsyncIterable[bytes] | None = None,
    ) -> Response:
        """Send one request. What was spent is added to `traffic`.

        Raises SourceError: NETWORK when it broke, PROTOCOL when the body is over `limit_bytes`.
        """
        origin = origin_of(url)
        await self.respites.over(url)
        proxy = self._outlet.of(url)
        client = self._clients.get(proxy) or await self._connect(proxy)
        import httpx

        try:
            async with client.stream(
                method, url, headers=dict(headers), content=content
            ) as response:
                traffic.requests += 1
                body = await self._body(response, origin, traffic, limit_bytes)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            through = f" through proxy {proxy}" if proxy else ""
            raise SourceError(f"{origin}{through}: {_explain(error)}", Fault.NETWORK) from None
        if response.status_code in RETRIED_STATUSES:
            self.respites.grant(origin, retry_after_s(response.headers))
        else:
            self.respites.answered(origin)
        return Response(response.status_code, dict(response.headers), body)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()

    async def _connect(self, proxy: str) -> httpx.AsyncClient:
        tls = await asyncio.to_thread(self._tls)
        if proxy not in self._clients:
            import httpx

            self._clients[proxy] = httpx.AsyncClient(
                verify=tls,
                proxy=proxy or None,
                trust_env=False,
                follow_redirects=False,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(self._stall_timeout_s, connect=self._connect_timeout_s),
            )
        return self._clients[proxy]

    def _tls(self) -> ssl.SSLContext:
        """Reading the authorities and httpx itself takes long: not on the event loop."""
        import httpx  # noqa: F401

        context = ssl.create_default_context(cafile=self._trust.bundle)
        if not self._trust.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    @staticmethod
    async def _body(
        response: httpx.Response, origin: str, traffic: Traffic, limit_bytes: int
    ) -> bytes:
        body = bytearray()
        async for piece in response.aiter_raw():
            traffic.received_bytes += len(piece)
            body += piece
            if len(body) > limit_bytes:
                raise SourceError(
                    f"{origin}: an answer of more than {limit_bytes} bytes was refused",
                    Fault.PROTOCOL,
                )
        return bytes(body)


def _explain(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()

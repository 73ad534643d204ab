"""Small HTTP exchanges of the control plane: tokens, manifests, uploads. Bodies are bounded."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from fscached.source import Fault, SourceError
from fscached.source.origin import USER_AGENT, Traffic, Trust, origin_of

if TYPE_CHECKING:
    import httpx


class Response(NamedTuple):
    """`headers` has lower-case names, repeated ones joined by a comma."""

    status: int
    headers: dict[str, str]
    body: bytes


class Exchange:
    """One request, one bounded response; no redirects, no cookies, no proxies of the environment.

    httpx is imported with the first request: it costs 70 ms and a daemon of local images needs
    none.
    """

    def __init__(self, trust: Trust, *, connect_timeout_s: float, stall_timeout_s: float) -> None:
        self._trust = trust
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._client: httpx.AsyncClient | None = None

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
        client = self._client or await self._connect()
        import httpx

        try:
            async with client.stream(
                method, url, headers=dict(headers), content=content
            ) as response:
                traffic.requests += 1
                body = await self._body(response, origin, traffic, limit_bytes)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise SourceError(f"{origin}: {_explain(error)}", Fault.NETWORK) from None
        return Response(response.status_code, dict(response.headers), body)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _connect(self) -> httpx.AsyncClient:
        tls = await asyncio.to_thread(self._tls)
        if self._client is None:
            import httpx

            self._client = httpx.AsyncClient(
                verify=tls,
                trust_env=False,
                follow_redirects=False,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(self._stall_timeout_s, connect=self._connect_timeout_s),
            )
        return self._client

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

"""Which requests leave through the network's proxy, and what it gets to see of them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from fscached.source import Fault, Priority, SourceError
from fscached.source.exchange import Exchange
from fscached.source.origin import Traffic, Trust
from fscached.source.outlet import Outlet
from fscached.source.request import Request
from fscached.source.transfer import Transfers
from tests.source.conftest import BLOB
from tests.source.faulty import FaultyServer, answer, faulty_server

PROXY = "http://proxy.example.org:3128"


@pytest.mark.parametrize(
    ("exception", "url", "direct"),
    [
        ("r.org", "https://r.org/v2/", True),
        ("r.org", "https://eu.r.org/v2/", True),
        ("r.org", "https://xr.org/v2/", False),
        (".r.org", "https://eu.r.org/v2/", True),
        (".r.org", "https://r.org/v2/", False),
        ("R.org", "https://r.ORG/v2/", True),
        ("r.org:5000", "https://r.org:5000/v2/", True),
        ("r.org:5000", "https://r.org/v2/", False),
        ("r.org:443", "https://r.org/v2/", True),
        ("10.0.0.0/8", "http://10.9.8.7:5000/v2/", True),
        ("10.0.0.0/8", "http://11.9.8.7/v2/", False),
        ("10.0.0.0/8", "http://10.example.org/v2/", False),
        ("fd00::/8", "http://[fd12::1]:5000/v2/", True),
        ("[fd12::1]:5000", "http://[fd12::1]:5000/v2/", True),
        ("[fd12::1]:5000", "http://[fd12::1]/v2/", False),
        ("*", "https://r.org/v2/", True),
        ("x.org", "http://127.0.0.1:5000/v2/", True),
        ("x.org", "http://localhost/v2/", True),
        ("x.org", "http://[::1]:5000/v2/", True),
    ],
)
def test_exceptions(exception: str, url: str, direct: bool) -> None:
    """Domains, addresses and networks, with or without a port; this machine always."""
    assert Outlet(PROXY, (exception,)).of(url) == ("" if direct else PROXY)


def test_no_proxy() -> None:
    """Without one every request is direct."""
    assert Outlet().of("https://r.org/") == ""


class Proxy:
    """A stand-in for the network's proxy: leads everything to one server."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.partition(":")
        self._port = int(port)
        self.heads: list[str] = []
        self.outlet = Outlet()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head.decode())
        there, back = await asyncio.open_connection(self._host, self._port)
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 Connected\r\nX-Of-The-Proxy: 1\r\n\r\n")
        else:
            back.write(head)
        await asyncio.gather(_pipe(reader, back), _pipe(there, writer))


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def a_proxy(target: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.outlet = Outlet(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    yield proxy
    server.close()


async def read_both_ways(outlet: Outlet, url: str, trust: Trust) -> bytearray:
    """Nine bytes by the data plane, after an exchange of the control plane; both with a secret."""
    exchange = Exchange(trust, connect_timeout_s=5, stall_timeout_s=5, outlet=outlet)
    transfers = Transfers(outlet=outlet)
    secret = {"Authorization": "Basic c2VjcmV0"}
    try:
        asked = await exchange.send("GET", f"{url}/token", secret, Traffic(), limit_bytes=99)
        assert asked.body == b"{}"
        got = bytearray()
        lines = tuple(f"{name}: {value}" for name, value in secret.items())
        request = Request(f"{url}/blob", lines, 3, 12, Priority.DEMAND, trust)
        reply = await transfers.get(request, got.extend, Traffic())
        assert reply.fault is None and "x-of-the-proxy" not in reply.headers
        return got
    finally:
        await transfers.close()
        await exchange.close()


@pytest.mark.asyncio
async def test_plain_http_goes_through(server: FaultyServer) -> None:
    """In absolute form, for both planes."""
    server.answers = [answer(200, body=b"{}")]
    async with a_proxy(server.host) as proxy:
        url = "http://registry.example.org:5000"
        assert await read_both_ways(proxy.outlet, url, Trust()) == BLOB[3:12]
        lines = [head.splitlines()[0] for head in proxy.heads]
        assert lines == [f"GET {url}/token HTTP/1.1", f"GET {url}/blob HTTP/1.1"]


@pytest.mark.asyncio
async def test_https_goes_through_a_tunnel(tmp_path: Path) -> None:
    """The proxy sees a host and no secret, and certificates are checked behind it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("registry.example.org").configure_cert(context)
    trust = Trust(ca_files=(str(tmp_path / "ca.pem"),))
    async with faulty_server(BLOB, context) as server, a_proxy(server.host) as proxy:
        server.answers = [answer(200, body=b"{}")]
        url = "https://registry.example.org:5000"
        assert await read_both_ways(proxy.outlet, url, trust) == BLOB[3:12]
        for head in proxy.heads:
            assert head.startswith("CONNECT registry.example.org:5000 HTTP/1.1")
            assert "uthorization" not in head
        assert len(proxy.heads) == 2


@pytest.mark.asyncio
async def test_a_proxy_of_the_requests_own(server: FaultyServer, unused_tcp_port: int) -> None:
    """A peer that is one is asked itself, not through the network's."""
    transfers = Transfers(outlet=Outlet(f"http://127.0.0.1:{unused_tcp_port}"))
    got = bytearray()
    async with a_proxy(server.host) as proxy:
        url = "http://registry.example.org/blob"
        request = Request(url, (), 3, 12, Priority.DEMAND, Trust(), proxy.outlet.proxy)
        reply = await transfers.get(request, got.extend, Traffic())
    assert reply.fault is None and got == BLOB[3:12]
    await transfers.close()


@pytest.mark.asyncio
async def test_a_proxy_that_is_away(unused_tcp_port: int) -> None:
    """The error says that it was the proxy."""
    outlet = Outlet(f"http://127.0.0.1:{unused_tcp_port}")
    exchange = Exchange(Trust(), connect_timeout_s=5, stall_timeout_s=5, outlet=outlet)
    with pytest.raises(SourceError, match=f"through proxy {outlet.proxy}") as caught:
        await exchange.send("GET", "http://r.example.org/", {}, Traffic(), limit_bytes=99)
    assert caught.value.fault is Fault.NETWORK
    await exchange.close()

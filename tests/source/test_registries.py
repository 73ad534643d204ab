"""All registries of a daemon, and what they have cost."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from fscached import config
from fscached.config import Config
from fscached.source import Fault, Priority, SourceError
from fscached.source.origin import Traffic
from fscached.source.reference import Reference
from fscached.source.registries import Registries
from tests.source.conftest import BLOB, BLOB_ID, REPOSITORY
from tests.source.faulty import FaultyServer, Seen, answer, faulty_server, part_of

pytestmark = pytest.mark.asyncio


async def test_what_a_replaced_source_costs_is_counted(server: FaultyServer) -> None:
    """An image bound again gets a new source; blobs that are open may still read from the old."""
    registries = Registries(Config())
    old = registries.source(server.host, REPOSITORY, None, "http")
    new = registries.source(server.host, REPOSITORY, None, "http")
    for source in (new, old):
        got = bytearray()
        await source.read(BLOB_ID, 5, 105, Priority.DEMAND, got.extend, 20)
        assert got == BLOB[5:105]
    assert (registries.traffic.requests, registries.traffic.received_bytes) == (2, 200)
    await registries.close()


async def ping_or_part(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """200 for a ping, a part of BLOB for a range."""
    await (part_of(BLOB) if "range" in seen.headers else answer(200))(seen, writer)


async def read(registries: Registries, host: str, *, ca_files: tuple[str, ...] = ()) -> bytes:
    """Nine bytes, by https."""
    source = registries.source(host, REPOSITORY, None, "https", ca_files=ca_files)
    got = bytearray()
    await source.read(BLOB_ID, 0, 9, Priority.DEMAND, got.extend, 20)
    return bytes(got)


@pytest.mark.parametrize("way", ["directory", "configured", "of the image"])
async def test_a_registry_with_its_own_authority(tmp_path: Path, way: str) -> None:
    """Data and control plane believe it where it is configured, and nowhere else."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with faulty_server(BLOB, context) as server:
        server.default = ping_or_part
        (tmp_path / server.host).mkdir()
        certificate = str(tmp_path / server.host / "ca.crt")
        authority.cert_pem.write_to_path(certificate)
        settings = {
            "directory": config.Source(certs_directory=str(tmp_path)),
            "configured": config.Source(ca_files=(certificate,)),
            "of the image": config.Source(),
        }
        registries = Registries(Config(source=settings[way]))
        own = (certificate,) if way == "of the image" else ()
        assert await read(registries, server.host, ca_files=own) == BLOB[:9]
        if not own:
            exchange = registries.distribution(server.host, None)._exchange
            url = f"https://{server.host}/v2/"
            assert (await exchange.send("GET", url, {}, Traffic(), limit_bytes=9)).status == 200
        if way == "of the image":
            with pytest.raises(SourceError, match="certificate") as caught:
                await read(registries, server.host)
            assert caught.value.fault is Fault.PROTOCOL
        await registries.close()


@pytest.mark.parametrize("trouble", ["another name", "expired", "unknown", "no TLS"])
async def test_tls_that_fails(tmp_path: Path, trouble: str) -> None:
    """Nothing is sent to a server that is not who it should be, and the error says so."""
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    name = "other.test" if trouble == "another name" else "127.0.0.1"
    signer = stranger if trouble == "unknown" else authority
    end = datetime.now(UTC) - timedelta(days=1) if trouble == "expired" else None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    signer.issue_cert(name, not_after=end).configure_cert(context)
    async with faulty_server(BLOB, None if trouble == "no TLS" else context) as server:
        settings = config.Source(
            ca_files=(str(tmp_path / "ca.pem"),), retry_pause_s=0.01, retry_pause_limit_s=0.01
        )
        registries = Registries(Config(source=settings))
        source = registries.source(server.host, REPOSITORY, None, "https")
        with pytest.raises(SourceError, match=server.host) as caught:
            await source.read(BLOB_ID, 0, 9, Priority.DEMAND, lambda _: None, 0.5)
        lasting = trouble in ("another name", "expired", "unknown")
        assert (caught.value.fault is Fault.PROTOCOL) is lasting
        assert server.seen == [] and registries.traffic.requests == 0
        await registries.close()


@pytest.mark.parametrize("host", ["../x", "a/b", "", ".", "r.org:5000/x", "user@r.org"])
async def test_a_host_is_a_host(host: str) -> None:
    """It becomes part of a path and of URLs."""
    registries = Registries(Config())
    with pytest.raises(SourceError, match="no name of a registry"):
        registries.source(host, REPOSITORY, None)
    await registries.close()


async def test_insecure_by_configuration_only() -> None:
    """http for those that are named, or for all when all are."""
    reference = Reference.parse("r.example.org/app")
    for names, url in (
        ((), "https://"),
        (("other.org",), "https://"),
        (("r.example.org",), "http://"),
        (("*",), "http://"),
    ):
        registries = Registries(Config(source=config.Source(insecure_registries=names)))
        there = registries.distribution(reference.registry, None)
        assert there._registry(reference) == f"{url}r.example.org"
        assert registries.source(reference.registry, "app", None)._origin.origin.startswith(url)
        await registries.close()


async def test_two_hundred_reads_fail_at_once(server: FaultyServer) -> None:
    """Together they try no more often than one host's budget, and when it is back all of them get
    their bytes at once, not one after the other."""
    server.default = answer(503)
    settings = config.Source(retry_pause_s=0.01, retry_pause_limit_s=0.05, host_retries_s=20)
    registries = Registries(Config(source=settings))
    source = registries.source(server.host, REPOSITORY, None, "http")
    began_s = asyncio.get_running_loop().time()

    async def one(start: int) -> bytes:
        got, blob_id = bytearray(), f"{start:064x}"
        await source.read(blob_id, start, start + 9, Priority.DEMAND, got.extend, 9)
        return bytes(got)

    reads = [asyncio.create_task(one(start)) for start in range(200)]
    for enough in (201, 225):  # some of the first burst, and some beyond it
        while len(server.seen) < enough:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)
        passed_s = asyncio.get_running_loop().time() - began_s
        assert len(server.seen) <= 200 + 20 + 20 * passed_s + 1
    server.default = part_of(BLOB)
    # 180 further tries would take 9 s by the budget alone.
    assert await asyncio.gather(*reads) == [BLOB[start : start + 9] for start in range(200)]
    await registries.close()


async def test_an_outage(server: FaultyServer, unused_tcp_port: int) -> None:
    """While the registry is gone reads fail in time; when it is back they succeed, and nothing had
    to be begun anew. What waits at that moment gets its bytes."""
    settings = config.Source(retry_pause_s=0.01, retry_pause_limit_s=0.05)
    registries = Registries(Config(source=settings))
    source = registries.source(f"127.0.0.1:{unused_tcp_port}", REPOSITORY, None, "http")
    for _ in range(3):
        with pytest.raises(SourceError, match="can be reached") as caught:
            await source.read(BLOB_ID, 0, 9, Priority.DEMAND, lambda _: None, 0.2)
        assert caught.value.fault is Fault.NETWORK
    assert (registries.traffic.requests, registries.traffic.received_bytes) == (0, 0)
    got = bytearray()
    waiting = asyncio.create_task(
        source.read(BLOB_ID, 0, len(BLOB), Priority.DEMAND, got.extend, 20)
    )
    await asyncio.sleep(0)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", unused_tcp_port)
    await waiting
    assert got == BLOB
    assert (registries.traffic.requests, registries.traffic.received_bytes) == (1, len(BLOB))
    await registries.close()
    listener.close()

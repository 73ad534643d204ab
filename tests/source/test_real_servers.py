"""Real servers in the roles they have at sites: nginx before a registry and behind redirects."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import pytest_asyncio
import trustme

from fscached import config
from fscached.config import Config
from fscached.source import Answer, Fault, Priority, Source, SourceError
from fscached.source.auth import Credential, Secret
from fscached.source.registries import Registries
from tests.source import docker_registry as registry_program
from tests.source import nginx as nginx_program
from tests.source.conftest import BLOB, BLOB_ID, REPOSITORY, Client
from tests.source.docker_registry import DockerRegistry, docker_registry
from tests.source.faulty import FaultyServer, Seen, answer
from tests.source.nginx import nginx
from tests.source.token_server import TokenServer

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(nginx_program.PROGRAM is None, reason="nginx is not installed"),
    pytest.mark.skipif(registry_program.PROGRAM is None, reason="docker-registry is not installed"),
]
MIB = 1 << 20
ALICE = Credential("alice", Secret("open sesame"))
# `secure_link` checks what `signed` makes. Only nginx knows what `until` means.
SECURED = """
location / {
    secure_link $arg_md5,$arg_until;
    secure_link_md5 "$secure_link_expires$uri hush";
    if ($secure_link = "") { return 403; }
    if ($secure_link = "0") { return 410; }
}
"""


def signed(host: str, path: str, until: int) -> str:
    """A link as a registry's storage signs it, with an md5 as nginx wants it."""
    digest = hashlib.md5(f"{until}{path} hush".encode()).digest()
    text = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return f"http://{host}{path}?md5={text}&until={until}"


async def read(
    source: Source, blob_id: str, start: int, end: int, *, deadline_s: float = 20
) -> tuple[bytes, Answer]:
    got = bytearray()
    spent = await source.read(blob_id, start, end, Priority.DEMAND, got.extend, deadline_s)
    return bytes(got), spent


@pytest_asyncio.fixture
async def registries(tmp_path: Path) -> AsyncIterator[Callable[[config.Source], Registries]]:
    """Makes the registries of a daemon with these settings, and closes them."""
    made: list[Registries] = []

    def make(source: config.Source) -> Registries:
        made.append(Registries(Config(source=source)))
        return made[-1]

    yield make
    for registries in made:
        await registries.close()


async def test_tls_ends_before_the_registry(
    tmp_path: Path,
    basic_registry: DockerRegistry,
    registries: Callable[[config.Source], Registries],
) -> None:
    """As companies have it: an authority of their own, a login of docker's, nginx in front."""
    blob_id = basic_registry.put_blob(REPOSITORY, BLOB)
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        tmp_path / "server.pem"
    )
    forward = f"location / {{ proxy_pass http://{basic_registry.host}; }}"
    with nginx(tmp_path / "nginx", forward, certificate=tmp_path / "server.pem") as front:
        (tmp_path / front.host).mkdir()
        authority.cert_pem.write_to_path(tmp_path / front.host / "company.crt")
        login = base64.b64encode(b"alice:open sesame").decode()
        auths = {front.host: {"auth": login}}
        (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
        settings = config.Source(
            certs_directory=str(tmp_path), docker_config=str(tmp_path / "config.json")
        )
        source = registries(settings).source(front.host, REPOSITORY, None, "https")
        for start, end in ((0, MIB), (MIB, 3 * MIB)):
            got, _ = await read(source, blob_id, start, end)
            assert got == BLOB[start:end]
        log = front.accesses(3)
        assert [line.status for line in log] == [401, 206, 206]
        assert sum(line.body_bytes for line in log[1:]) == 3 * MIB


async def test_a_redirect_that_expires(
    tmp_path: Path, client: Client, server: FaultyServer
) -> None:
    """The registry, a stand-in, signs links that nginx checks: one that has expired is replaced."""
    with nginx(tmp_path / "nginx", SECURED) as store:
        (store.files / "blob").write_bytes(BLOB)
        until = 0

        async def redirect(seen: Seen, writer: asyncio.StreamWriter) -> None:
            await answer(307, {"Location": signed(store.host, "/blob", until)})(seen, writer)

        server.default = redirect
        registry = client.registry(server.host)
        until = int(time.time()) + 1
        assert await client.collect(registry, 0, 9) == BLOB[:9]
        await asyncio.sleep(until + 1 - time.time())
        until += 3600
        assert await client.collect(registry, 9, MIB) == BLOB[9:MIB]
        assert await client.collect(registry, MIB, 2 * MIB) == BLOB[MIB : 2 * MIB]
        assert [line.status for line in store.accesses(4)] == [206, 410, 206, 206]
        assert len(server.seen) == 2
        until = int(time.time()) - 10
        with pytest.raises(SourceError, match="410") as caught:
            await client.collect(client.registry(server.host), 0, 9)
        assert "md5" not in str(caught.value)


async def test_a_server_that_ignores_range(tmp_path: Path, client: Client) -> None:
    """Nothing of its 200 is taken, and the error says what is missing."""
    with nginx(tmp_path / "nginx", "max_ranges 0;") as store:
        store.put_blob(REPOSITORY, BLOB_ID, BLOB)
        registry = client.registry(store.host)
        with pytest.raises(SourceError, match="ignored Range") as caught:
            await client.collect(registry, MIB, 2 * MIB)
        assert caught.value.fault is Fault.PROTOCOL
        assert registry.traffic.requests == len(store.accesses(1)) == 1
        assert await client.collect(registry, 0, len(BLOB)) == BLOB


async def test_a_slow_drip(tmp_path: Path, client: Client) -> None:
    """A limited server is slow, not broken: one request, every byte, nothing twice."""
    with nginx(tmp_path / "nginx", "limit_rate 2m;") as store:
        store.put_blob(REPOSITORY, BLOB_ID, BLOB)
        registry = client.registry(store.host)
        assert await client.collect(registry, 0, len(BLOB), deadline_s=2) == BLOB
        (line,) = store.accesses(1)
        assert (line.status, line.body_bytes) == (206, len(BLOB))
        assert registry.traffic.received_bytes == len(BLOB)


async def test_too_many_requests(tmp_path: Path, client: Client) -> None:
    """Over a rate limit reads come later, all of them right, and every refusal is counted."""
    limits = "limit_req_zone $server_port zone=all:64k rate=50r/s; limit_req_status 429;"
    with nginx(tmp_path / "nginx", "limit_req zone=all burst=1 nodelay;", before=limits) as store:
        store.put_blob(REPOSITORY, BLOB_ID, BLOB)
        from fscached.source.patience import Patience

        patience = Patience(retries=100, pause_s=0.02, pause_limit_s=0.1)
        registry = client.registry(store.host, patience=patience)
        ranges = [(start, start + 1000) for start in range(0, 8000, 1000)]
        got = await asyncio.gather(*(client.collect(registry, *piece) for piece in ranges))
        assert b"".join(got) == BLOB[:8000]
        log = store.accesses(registry.traffic.requests)
        assert len(log) == registry.traffic.requests
        assert {line.status for line in log} == {206, 429}
        assert sum(line.body_bytes for line in log) == registry.traffic.received_bytes


@pytest.mark.timeout(900)
async def test_tokens_that_expire_while_a_blob_is_read(
    client: Client, server: FaultyServer, tmp_path: Path, long: bool
) -> None:
    """docker-registry refuses tokens that have ended; no read notices, and there is one token
    request for each life of one. With --long: lives of 60 s, for 10 minutes."""
    life_s, duration_s, pause_s = (60, 600, 0.5) if long else (2, 5, 0.02)
    issuer = TokenServer(tmp_path)
    issuer.authorization = ALICE.basic
    issuer.life_s = life_s
    issuer.expires = True
    server.default = issuer.serve
    auth = issuer.auth(f"http://{server.host}/token")
    with docker_registry(tmp_path / "registry", auth) as real:
        blob_id = real.put_blob(REPOSITORY, BLOB)
        registry = client.registry(real.host, credential=ALICE)
        reads, end = 0, time.monotonic() + duration_s
        while time.monotonic() < end:
            start = reads * 65_536 % len(BLOB)
            stop = min(start + 65_536, len(BLOB))
            assert await client.collect(registry, start, stop, blob_id=blob_id) == BLOB[start:stop]
            reads += 1
            await asyncio.sleep(pause_s)
        log = real.accesses(reads + 1, "/blobs/")
    refused = [line for line in log if line.status == 401]
    assert registry.traffic.requests == len(log) == reads + len(refused)
    tokens = [seen for seen in server.seen if "/token" in seen.target]
    # A life is used up to its last quarter or tenth at the least; a second more is rounding.
    assert duration_s / life_s <= len(tokens) <= 1 + duration_s / (life_s * 0.65 - 1 / life_s)
    assert len(refused) <= len(tokens)
    scopes = {parse_qs(urlsplit(seen.target).query)["scope"][0] for seen in tokens}
    assert scopes == {f"repository:{REPOSITORY}:pull"}

"""Manifests and whole blobs, pushed to and pulled from docker-registry and worse."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path

import pytest

from fscached.source import Fault, SourceError
from fscached.source.auth import Credential, FixedCredential, Secret
from fscached.source.distribution import (
    DOCKER_MANIFEST,
    NYDUS_FEATURE,
    OCI_INDEX,
    OCI_MANIFEST,
    Distribution,
)
from fscached.source.reference import Reference
from tests.source.conftest import BLOB, BRIEF, Client
from tests.source.docker_registry import PROGRAM, DockerRegistry, docker_registry
from tests.source.faulty import FaultyServer, answer, raw
from tests.source.token_server import TokenServer

pytestmark = pytest.mark.asyncio
ALICE = Credential("alice", Secret("open sesame"))
MIB = 1 << 20


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def distribution(client: Client, credential: Credential | None = None) -> Distribution:
    return Distribution(
        exchange=client.exchange,
        tokens=client.tokens,
        keychain=FixedCredential(credential),
        patience=BRIEF,
        manifest_limit_bytes=MIB,
    )


def reference(host: str, rest: str = "thing:v1") -> Reference:
    return Reference.parse(f"{host}/{rest}")


def manifest(**more: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": []} | more).encode()


def index(*entries: tuple[str, str, list[str]]) -> bytes:
    manifests = [
        {
            "mediaType": OCI_MANIFEST,
            "digest": digest,
            "size": 9,
            "platform": {"os": "linux", "architecture": architecture, "os.features": features},
        }
        for digest, architecture, features in entries
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


async def push_image(there: Distribution, image: Reference) -> bytes:
    """A manifest with BLOB as its only layer."""
    for body in (BLOB, b"{}"):
        await there.push_blob(image, digest_of(body), len(body), lambda body=body: io.BytesIO(body))  # type: ignore[misc]
    config = {"mediaType": "a/b", "digest": digest_of(b"{}"), "size": 2}
    layer = {"mediaType": "a/c", "digest": digest_of(BLOB), "size": len(BLOB)}
    body = manifest(config=config, layers=[layer])
    assert await there.push_manifest(image, OCI_MANIFEST, body) == digest_of(body)
    return body


async def test_push_and_pull(client: Client, open_registry: DockerRegistry) -> None:
    """What was pushed comes back, by tag and by digest; a blob that is there is not sent again."""
    there, image = distribution(client), reference(open_registry.host, "pushed:v1")
    await there.ping(image)
    body = await push_image(there, image)
    assert await there.pull_manifest(image) == (OCI_MANIFEST, digest_of(body), body)
    by_digest = reference(open_registry.host, f"pushed@{digest_of(body)}")
    assert (await there.pull_manifest(by_digest)).body == body
    assert await there.pull_blob(image, digest_of(BLOB), len(BLOB)) == BLOB

    def unopened() -> io.BytesIO:
        raise AssertionError("opened a blob that is there")

    await there.push_blob(image, digest_of(BLOB), len(BLOB), unopened)


async def test_traffic_is_counted(client: Client, open_registry: DockerRegistry) -> None:
    """The registry's access log agrees."""
    there = distribution(client)
    open_registry.put_blob("counted/too", BLOB)
    image = reference(open_registry.host, "counted/too")
    await there.pull_blob(image, digest_of(BLOB), len(BLOB))
    with pytest.raises(SourceError):
        await there.pull_manifest(image)
    log = open_registry.accesses(2, "counted/too")
    assert there.traffic.requests == len(log) == 2
    assert there.traffic.received_bytes == sum(line.body_bytes for line in log)


async def test_an_index(client: Client, open_registry: DockerRegistry) -> None:
    """The entry of the machine's architecture is taken, the one in RAFS before the others."""
    there = distribution(client)
    body = await push_image(there, reference(open_registry.host, "many:plain"))
    rafs = json.dumps(json.loads(body) | {"annotations": {"a": "b"}}).encode()
    await there.push_manifest(reference(open_registry.host, "many:rafs"), OCI_MANIFEST, rafs)
    image = reference(open_registry.host, "many:all")
    entries = (
        (digest_of(body), "amd64", []),
        (digest_of(rafs), "amd64", [NYDUS_FEATURE]),
        (digest_of(body), "arm64", []),
    )
    await there.push_manifest(image, OCI_INDEX, index(*entries))
    assert (await there.pull_manifest(image, "amd64")).body == rafs
    assert (await there.pull_manifest(image, "arm64")).body == body
    with pytest.raises(SourceError, match="linux/s390x"):
        await there.pull_manifest(image, "s390x")


async def test_a_login(client: Client, basic_registry: DockerRegistry) -> None:
    """Pulling and pushing ask for a login when the registry does."""
    image = reference(basic_registry.host)
    body = await push_image(distribution(client, ALICE), image)
    assert (await distribution(client, ALICE).pull_manifest(image)).body == body
    with pytest.raises(SourceError, match="docker login") as caught:
        await distribution(client).pull_manifest(image)
    assert caught.value.fault is Fault.AUTH


async def test_tokens(
    client: Client, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pushing asks for a token that allows it, and no token is logged."""
    if PROGRAM is None:
        pytest.skip("docker-registry is not installed")
    caplog.set_level(logging.INFO)
    issuer = TokenServer(tmp_path)
    server.default = issuer.serve
    with docker_registry(tmp_path / "registry", issuer.auth(f"http://{server.host}/token")) as real:
        image = reference(real.host)
        there = distribution(client)
        body = await push_image(there, image)
        assert (await there.pull_manifest(image)).body == body
    asked = [seen.target for seen in server.seen]
    # docker-registry names the rights in no certain order.
    assert any("pull%2Cpush" in target or "push%2Cpull" in target for target in asked)


async def test_other_bytes_than_the_digest(client: Client, server: FaultyServer) -> None:
    """Neither a manifest nor a blob is taken that is not what its digest says."""
    there, body = distribution(client), manifest()
    wrong = "sha256:" + "0" * 64
    headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": wrong}
    server.default = answer(200, headers, body)
    for rest in ("thing:v1", f"thing@{wrong}"):
        with pytest.raises(SourceError, match=f"{wrong} came as") as caught:
            await there.pull_manifest(reference(server.host, rest))
        assert caught.value.fault is Fault.PROTOCOL
    with pytest.raises(SourceError, match="came as"):
        await there.pull_blob(reference(server.host), wrong, MIB)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (OCI_MANIFEST, b"<html>"),
        (OCI_MANIFEST, b"[]"),
        (OCI_MANIFEST, b'{"mediaType": "\xff"}'),
        (DOCKER_MANIFEST, manifest()),
        (OCI_MANIFEST, manifest(manifests=[])),
        ("text/html", b"{}"),
        ("application/vnd.docker.distribution.manifest.v1+json", b'{"schemaVersion": 1}'),
        (OCI_INDEX, index(("sha256:../../x", "amd64", []))),
        (OCI_MANIFEST, b" " * (MIB + 1)),
        (OCI_MANIFEST, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ],
)
async def test_bad_manifests(
    client: Client, server: FaultyServer, content_type: str, body: bytes
) -> None:
    """What is no manifest, or could be read as two things, or is too long, is refused once."""
    server.default = answer(200, {"Content-Type": content_type}, body)
    with pytest.raises(SourceError, match=server.host) as caught:
        await distribution(client).pull_manifest(reference(server.host), "amd64")
    assert caught.value.fault is Fault.PROTOCOL and len(server.seen) == 1


async def test_an_index_in_an_index(client: Client, server: FaultyServer) -> None:
    """One step is enough."""
    inner = index()
    outer = index((digest_of(inner), "amd64", []))
    server.answers = [answer(200, {"Content-Type": OCI_INDEX}, body) for body in (outer, inner)]
    with pytest.raises(SourceError, match="index within"):
        await distribution(client).pull_manifest(reference(server.host), "amd64")


async def test_troubles_pass(client: Client, server: FaultyServer) -> None:
    """Busy registries and broken connections are tried again; other refusals are not."""
    there, body = distribution(client), manifest()

    server.answers = [
        answer(503),
        raw(b"", close=True),
        answer(429, {"Retry-After": "0"}),
        answer(200, {"Content-Type": OCI_MANIFEST}, body),
    ]
    assert (await there.pull_manifest(reference(server.host))).body == body
    server.default = answer(404)
    before = len(server.seen)
    with pytest.raises(SourceError, match="404"):
        await there.pull_manifest(reference(server.host))
    assert len(server.seen) == before + 1


async def test_a_redirected_blob(
    client: Client, server: FaultyServer, other_server: FaultyServer
) -> None:
    """The login stays with the registry, and the target's query out of errors."""
    target = f"http://{other_server.host}/store?sig=hush"
    server.answers = [answer(401, {"WWW-Authenticate": 'Basic realm="x"'})]
    server.default = answer(307, {"Location": target})
    other_server.answers = [answer(200, body=BLOB), answer(404)]
    there = distribution(client, ALICE)
    assert await there.pull_blob(reference(server.host), digest_of(BLOB), len(BLOB)) == BLOB
    assert "authorization" in server.seen[1].headers
    assert "authorization" not in other_server.seen[0].headers
    with pytest.raises(SourceError) as caught:
        await there.pull_blob(reference(server.host), digest_of(BLOB), len(BLOB))
    assert "hush" not in str(caught.value)


async def test_a_blob_that_is_too_long(client: Client, server: FaultyServer) -> None:
    """No more is read than may be."""
    server.default = answer(200, body=BLOB)
    with pytest.raises(SourceError, match="more than 1000 bytes"):
        await distribution(client).pull_blob(reference(server.host), digest_of(BLOB), 1000)


async def test_a_file_that_changed(client: Client, open_registry: DockerRegistry) -> None:
    """A blob that is not as long as was said is not uploaded, and the fault is ours."""
    there = distribution(client)
    for size in (9, 11):
        with pytest.raises(SourceError, match=f"not of {size} bytes") as caught:
            await there.push_blob(
                reference(open_registry.host), digest_of(b"x"), size, lambda: io.BytesIO(bytes(10))
            )
        assert caught.value.fault is Fault.LOCAL


async def test_no_registry(client: Client, server: FaultyServer) -> None:
    """A web server that is none is told from a registry that wants a login."""
    server.answers = [answer(401), answer(404)]
    await distribution(client).ping(reference(server.host))
    with pytest.raises(SourceError, match="no registry there"):
        await distribution(client).ping(reference(server.host))


async def test_a_broken_pull_begins_anew(client: Client, server: FaultyServer) -> None:
    """A body that breaks off is fetched again, whole."""
    cut = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nabc", close=True)
    server.answers = [cut, answer(200, body=BLOB)]
    there = distribution(client)
    assert await there.pull_blob(reference(server.host), digest_of(BLOB), len(BLOB)) == BLOB
    assert len(server.seen) == 2

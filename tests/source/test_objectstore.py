"""Object stores: real signatures, checked by somebody else, and what goes into URLs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from asyncio import StreamWriter
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from fscached.source import Fault, Priority, SourceError
from fscached.source.auth import Secret
from fscached.source.objectstore import ObjectStore
from fscached.source.origin import Trust
from fscached.source.remote import Remote
from fscached.source.signature import Key, S3Signer, host_header
from tests.source import nginx as nginx_program
from tests.source.conftest import BLOB, BLOB_ID, BRIEF, Client
from tests.source.faulty import FaultyServer, Seen, answer, part_of
from tests.source.nginx import nginx

MIB = 1 << 20
PREFIX = "a b/ü+/"
OSS_KEY = Key("LTAI5t", Secret("open sesame"))


class S3(NamedTuple):
    """A server, and a key that may read its bucket `blobs`."""

    host: str
    key: Key


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """moto: it calculates every signature anew, by botocore, and compares."""
    import boto3
    from moto.core.authorization import enable_iam_authentication
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    name, port = server.get_host_and_port()
    options = {
        "endpoint_url": f"http://{name}:{port}",
        "region_name": "us-east-1",
        "aws_access_key_id": "x",
        "aws_secret_access_key": "x",
    }
    iam = boto3.client("iam", **options)
    iam.create_user(UserName="alice")
    allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    iam.put_user_policy(UserName="alice", PolicyName="all", PolicyDocument=policy)
    key = iam.create_access_key(UserName="alice")["AccessKey"]
    store = boto3.client("s3", **options)
    store.create_bucket(Bucket="blobs")
    store.put_object(Bucket="blobs", Key=f"{PREFIX}{BLOB_ID}", Body=BLOB)
    with enable_iam_authentication():
        yield S3(f"{name}:{port}", Key(key["AccessKeyId"], Secret(key["SecretAccessKey"])))
    server.stop()


class Oss:
    """A stand-in for OSS that checks the header signature by the documented rule."""

    def __init__(self) -> None:
        self.refuse_with = {"Date": formatdate(usegmt=True)}

    async def serve(self, seen: Seen, writer: StreamWriter) -> None:
        bucket = seen.headers["host"].partition(".")[0]
        resource = f"/{bucket}/a b/ü+/{BLOB_ID}"
        text = "\n".join(["GET", "", "", seen.headers["date"], resource])
        digest = hmac.new(b"open sesame", text.encode(), hashlib.sha1).digest()
        expected = f"OSS LTAI5t:{base64.b64encode(digest).decode()}"
        good = seen.headers.get("authorization") == expected
        await (part_of(BLOB) if good else answer(403, self.refuse_with))(seen, writer)


@pytest_asyncio.fixture
async def oss(server: FaultyServer) -> AsyncIterator[Oss]:
    """It answers as `server`."""
    stand_in = Oss()
    server.default = stand_in.serve
    yield stand_in


def source(client: Client, store: ObjectStore) -> Remote:
    return Remote(store, transfers=client.transfers, patience=BRIEF)


def a_bucket(s3: S3, **changes: object) -> ObjectStore:
    options: dict[str, object] = {
        "scheme": "http",
        "host": s3.host,
        "region": "us-east-1",
        "bucket": "blobs",
        "prefix": PREFIX,
        "key": s3.key,
        "trust": Trust(),
    }
    return ObjectStore.s3(**options | changes)  # type: ignore[arg-type]


async def collect(remote: Remote, start: int, end: int) -> bytes:
    got = bytearray()
    await remote.read(BLOB_ID, start, end, Priority.DEMAND, got.extend, 20)
    return bytes(got)


@pytest.mark.asyncio
async def test_s3(client: Client, s3: S3) -> None:
    """Ranges of an object whose name must be encoded, on a port that is signed."""
    remote = source(client, a_bucket(s3))
    for start, end in ((0, MIB), (MIB, len(BLOB)), (5, 6)):
        assert await collect(remote, start, end) == BLOB[start:end]
    assert remote.traffic.requests == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": Key("AKIAIOSFODNN7EXAMPLE", Secret("open sesame"))},
        {"region": "eu-north-1", "key": Key("AKIA", Secret("x"))},
    ],
)
@pytest.mark.asyncio
async def test_s3_refuses(client: Client, s3: S3, wrong: dict[str, object]) -> None:
    """A wrong key is a fault of AUTH after one request, and no secret is in the error."""
    remote = source(client, a_bucket(s3, **wrong))
    with pytest.raises(SourceError, match="access key") as caught:
        await collect(remote, 0, 9)
    assert caught.value.fault is Fault.AUTH and remote.traffic.requests == 1
    assert "sesame" not in str(caught.value)


@pytest.mark.asyncio
async def test_s3_has_no_such_blob(client: Client, s3: S3) -> None:
    """Another prefix is another object, and that is not tried again."""
    remote = source(client, a_bucket(s3, prefix="other/"))
    with pytest.raises(SourceError, match="404"):
        await collect(remote, 0, 9)
    assert remote.traffic.requests == 1


def test_range_is_not_signed_and_the_port_is() -> None:
    """A peer in between may ask for other ranges; a store behind a port sees it in Host."""
    signer = S3Signer(Key("AKIA", Secret("x")), "us-east-1")
    headers = signer.sign("http://s3.test:9000/b/k", 1_700_000_000)
    assert "SignedHeaders=host;x-amz-content-sha256;x-amz-date," in headers["Authorization"]
    assert headers["x-amz-date"] == "20231114T221320Z"
    other = signer.sign("http://s3.test:9001/b/k", 1_700_000_000)
    assert headers["Authorization"] != other["Authorization"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://S3.test:80/x", "s3.test"),
        ("https://s3.test:443/x", "s3.test"),
        ("https://s3.test:80/x", "s3.test:80"),
        ("http://[::1]:9000/x", "[::1]:9000"),
        ("http://s3.test/x", "s3.test"),
    ],
)
def test_host_is_what_curl_sends(url: str, host: str) -> None:
    """The scheme's own port is left out."""
    assert host_header(url) == host


@pytest.mark.asyncio
async def test_oss(client: Client, server: FaultyServer, oss: Oss) -> None:
    """The bucket is in the host's name, and the signature is of the name as it is."""
    host = f"localhost:{server.host.partition(':')[2]}"
    store = ObjectStore.oss("http", host, "blobs", PREFIX, OSS_KEY, Trust())
    assert await collect(source(client, store), 3, MIB) == BLOB[3:MIB]
    assert server.seen[0].headers["host"] == f"blobs.{host}"
    assert server.seen[0].target == f"/a%20b/%C3%BC%2B/{BLOB_ID}"


@pytest.mark.parametrize(
    ("ahead_s", "says"), [(0, "access key"), (7200, r"clock is 720\d s ahead")]
)
@pytest.mark.asyncio
async def test_oss_refuses(
    client: Client, server: FaultyServer, oss: Oss, ahead_s: int, says: str
) -> None:
    """A clock that is off is told from a key that is wrong."""
    oss.refuse_with = {"Date": formatdate(time.time() - ahead_s, usegmt=True)}
    host = f"localhost:{server.host.partition(':')[2]}"
    key = Key("LTAI5t", Secret("wrong"))
    remote = source(client, ObjectStore.oss("http", host, "blobs", PREFIX, key, Trust()))
    with pytest.raises(SourceError, match=says) as caught:
        await collect(remote, 0, 9)
    assert caught.value.fault is Fault.AUTH and len(server.seen) == 1


@pytest.mark.skipif(nginx_program.PROGRAM is None, reason="nginx is not installed")
@pytest.mark.parametrize("path", ["", "blobs", "/deep/er/"])
@pytest.mark.asyncio
async def test_a_web_server(client: Client, tmp_path: Path, path: str) -> None:
    """Files of nginx, asked without any login."""
    with nginx(tmp_path / "nginx") as server:
        place = server.files / path.strip("/")
        place.mkdir(parents=True, exist_ok=True)
        (place / BLOB_ID).write_bytes(BLOB)
        remote = source(client, ObjectStore.files(f"http://{server.host}/", path, Trust()))
        assert await collect(remote, 7, MIB) == BLOB[7:MIB]
        (line,) = server.accesses(1)
        assert (line.range, line.body_bytes) == (f"bytes=7-{MIB - 1}", MIB - 7)


@pytest.mark.asyncio
async def test_a_signature_stays_at_its_store(
    client: Client, server: FaultyServer, other_server: FaultyServer
) -> None:
    """Where a store redirects, nothing of the key's goes."""
    server.answers = [answer(307, {"Location": f"http://{other_server.host}/there"})]
    remote = source(client, a_bucket(S3(server.host, OSS_KEY)))
    assert await collect(remote, 0, 9) == BLOB[:9]
    assert "authorization" in server.seen[0].headers
    assert not {"authorization", "x-amz-date"} & set(other_server.seen[0].headers)


@pytest.mark.asyncio
async def test_without_a_key(client: Client, server: FaultyServer) -> None:
    """Public buckets are read unsigned; one that is not public says so."""
    remote = source(client, a_bucket(S3(server.host, Key("", Secret("")))))
    assert await collect(remote, 0, 9) == BLOB[:9]
    assert "authorization" not in server.seen[0].headers
    server.default = answer(403)
    with pytest.raises(SourceError, match="without an access key"):
        await collect(remote, 0, 9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bucket": "a/b"},
        {"bucket": ""},
        {"host": "h/../x"},
        {"host": "h@x"},
        {"region": "us\r\nX: y"},
        {"key": Key("A\r\nX: y", Secret("x"))},
    ],
)
def test_what_is_no_bucket(wrong: dict[str, object]) -> None:
    """Nothing hostile gets into a URL or a header."""
    with pytest.raises(SourceError, match="object store") as caught:
        a_bucket(S3("s3.test", OSS_KEY), **wrong)
    assert caught.value.fault is Fault.LOCAL


@pytest.mark.parametrize("blob_id", ["../x", "a/b", "", "a b", "?x", "x" * 200])
def test_what_is_no_blob(blob_id: str) -> None:
    """Nor does an id that is none."""
    with pytest.raises(SourceError, match="no id"):
        a_bucket(S3("s3.test", OSS_KEY)).url(blob_id)

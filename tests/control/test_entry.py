"""nydusd's BlobCacheEntry in both forms."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached import config
from fscached.control import entry
from fscached.control.entry import (
    S3,
    Backend,
    HttpServer,
    InvalidEntry,
    Localfs,
    Oss,
    Prefetch,
    Registry,
)

FSID = "8edc32a6" * 8

# As nydus-snapshotter 0.13.4 sends it (field order and zero values too).
LEGACY: dict[str, Any] = {
    "type": "bootstrap",
    "id": FSID,
    "domain_id": FSID,
    "config": {
        "id": FSID,
        "backend_type": "registry",
        "backend_config": {
            "readahead": False,
            "host": "127.0.0.1:5000",
            "repo": "lib/app",
            "scheme": "http",
            "auth": "dXNlcjpodW50ZXIy",
            "proxy": {"fallback": False},
            "timeout": 5,
            "retry_limit": 2,
        },
        "cache_type": "fscache",
        "cache_config": {"work_dir": "/root/snapshots/2/fs"},
        "prefetch_config": {
            "enable": True,
            "threads_count": 8,
            "merging_size": 1048576,
            "bandwidth_rate": 0,
        },
        "metadata_path": "/root/snapshots/2/fs/image/image.boot",
    },
}

V2: dict[str, Any] = {
    "type": "bootstrap",
    "id": FSID,
    "domain_id": "",
    "config_v2": {
        "version": 2,
        "id": FSID,
        "metadata_path": "/b",
        "backend": {"type": "localfs", "localfs": {"dir": "/blobs"}},
        "external_backends": [],
        "cache": {
            "type": "fscache",
            "prefetch": {"enable": True, "threads": 4, "batch_size": 4096, "prefetch_all": True},
            "fscache": {"work_dir": "."},
        },
    },
}


def changed(body: dict[str, Any], path: str, value: Any) -> bytes:
    """The body with one key replaced, or removed for `...`."""
    body = copy.deepcopy(body)
    *parents, last = path.split(".")
    place = body
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(body).encode()


def test_the_legacy_form() -> None:
    """What a snapshotter sends."""
    found = entry.parse(json.dumps(LEGACY).encode())
    assert (found.id, found.domain_id) == (FSID, FSID)
    assert found.metadata_path == "/root/snapshots/2/fs/image/image.boot"
    assert isinstance(found.backend, Registry)
    assert (found.backend.host, found.backend.repo) == ("127.0.0.1:5000", "lib/app")
    assert (found.backend.scheme, found.backend.retry_limit) == ("http", 2)
    assert found.backend.proxy.fallback is False
    assert found.prefetch == Prefetch(True, 8, 1 << 20, 0)


def test_the_second_form_wins() -> None:
    """`config_v2` before `config`; an empty domain is the fsid."""
    found = entry.parse(json.dumps(LEGACY | V2).encode())
    assert found.backend == Localfs(dir="/blobs")
    assert (found.domain_id, found.work_dir) == (FSID, ".")
    assert found.prefetch == Prefetch(True, 4, 4096, 0)


BUCKET = {
    "scheme": "http",
    "endpoint": "s3.test:9000",
    "bucket_name": "blobs",
    "object_prefix": "a/",
    "access_key_id": "AKIA",
    "access_key_secret": "hunter2",
}


@pytest.mark.parametrize(
    ("kind", "settings", "backend"),
    [
        ("s3", BUCKET | {"region": "eu"}, S3(**BUCKET, region="eu")),  # type: ignore[arg-type]
        ("oss", BUCKET, Oss(**BUCKET)),  # type: ignore[arg-type]
        (
            "http-proxy",
            {"addr": "https://files.test", "path": "/blobs", "skip_verify": True},
            HttpServer(addr="https://files.test", path="/blobs", skip_verify=True),
        ),
    ],
)
def test_object_stores(kind: str, settings: dict[str, Any], backend: Backend) -> None:
    """As nydusd names them, in both forms, through a handover, and without a secret in the repr."""
    legacy = changed(LEGACY, "config.backend_type", kind)
    legacy = changed(json.loads(legacy), "config.backend_config", settings)
    second = changed(V2, "config_v2.backend", {"type": kind, kind: settings})
    for body in (legacy, second):
        found = entry.parse(body)
        assert found.backend == backend
        assert msgspec.json.decode(msgspec.json.encode(found), type=entry.BlobEntry) == found
        assert "hunter2" not in repr(found)


@pytest.mark.parametrize("body", [LEGACY, V2])
def test_an_entry_survives_a_handover(body: dict[str, Any]) -> None:
    """To JSON for the daemon's successor and back, credentials and all."""
    found = entry.parse(json.dumps(body).encode())
    assert msgspec.json.decode(msgspec.json.encode(found), type=entry.BlobEntry) == found


def test_no_secret_is_in_its_repr() -> None:
    """Entries get into log lines."""
    backend = LEGACY["config"]["backend_config"] | {
        "registry_token": "hunter2",
        "mirrors": [{"host": "http://m", "headers": {"authorization": "hunter2"}}],
    }
    found = entry.parse(changed(LEGACY, "config.backend_config", backend))
    assert isinstance(found.backend, Registry)
    assert found.backend.mirrors[0].headers == {"authorization": "hunter2"}
    for text in (repr(found), repr(found.backend.mirrors)):
        assert "hunter2" not in text
        assert "dXNlcjpodW50ZXIy" not in text


@pytest.mark.parametrize(
    ("body", "path", "value", "what"),
    [
        (LEGACY, "type", "datablob", r"Invalid enum value 'datablob'.*\$\.type"),
        (LEGACY, "id", "a/b", r"\$\.id"),
        (LEGACY, "id", "..", r"\$\.id"),
        (LEGACY, "id", "", r"\$\.id"),
        (LEGACY, "id", "a,device=b", r"\$\.id"),
        (LEGACY, "id", "a" * 300, r"\$\.id"),
        (LEGACY, "domain_id", "a/b", r"\$\.domain_id"),
        (LEGACY, "config", ..., "neither `config` nor `config_v2`"),
        (LEGACY, "config.backend_type", "gcs", "backend 'gcs' is not one of registry, localfs"),
        (LEGACY, "config.backend_type", "s3", "missing required field `bucket_name`"),
        (LEGACY, "config.backend_type", "oss", "missing required field `endpoint`"),
        (LEGACY, "config.backend_type", "http-proxy", "missing required field `addr`"),
        (LEGACY, "config.backend_config.host", "", r"\$\.host"),
        (LEGACY, "config.backend_config.repo", ..., "missing required field `repo`"),
        (LEGACY, "config.backend_config.scheme", "ftp", r"\$\.scheme"),
        (LEGACY, "config.cache_type", "x", "cache type 'x'"),
        (LEGACY, "config.cache_config.work_dir", "", "`work_dir` of the cache is empty"),
        (LEGACY, "config.metadata_path", ..., "`metadata_path` is empty"),
        (LEGACY, "config.prefetch_config.threads_count", 0, "threads must be 1 to 1024"),
        (LEGACY, "config.prefetch_config.merging_size", 1 << 29, "batch must be at most"),
        (LEGACY, "config.prefetch_config.bandwidth_rate", ..., "field `bandwidth_rate`"),
        (V2, "config_v2.version", 3, "Invalid enum value 3"),
        (V2, "config_v2.backend.localfs", {}, "needs `dir` or `blob_file`"),
        (V2, "config_v2.backend.localfs", ..., "backend 'localfs' has no settings"),
        (V2, "config_v2.backend.localfs", None, "Expected `object`, got `null`"),
        (V2, "config_v2.backend.type", "oss", "backend 'oss' has no settings"),
        (V2, "config_v2.backend.type", "type", "backend 'type' is not one of registry, localfs"),
    ],
)
def test_what_is_wrong_is_said(body: dict[str, Any], path: str, value: Any, what: str) -> None:
    """One error each, naming the key."""
    with pytest.raises(InvalidEntry, match=what):
        entry.parse(changed(body, path, value))


@given(st.binary() | st.recursive(st.none() | st.text(), st.lists).map(lambda x: str(x).encode()))
def test_garbage_is_an_invalid_entry(body: bytes) -> None:
    """No other exception, whatever comes."""
    with pytest.raises(InvalidEntry):
        entry.parse(body)


@pytest.mark.parametrize("key", ["id", "config", "config.backend_config", "x"])
def test_nested_without_end(key: str) -> None:
    """More than a decoder descends into, also in what nobody looks at."""
    body = changed(LEGACY, key, "HERE").replace(b'"HERE"', b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(InvalidEntry):
        entry.parse(body)


def test_an_images_prefetch_is_the_daemons_but_for_what_it_says() -> None:
    """0 leaves it to the daemon; lengths are of whole pages and have a least one."""
    ours = config.Prefetch(image_bandwidth_bytes_per_s=7, threads=1)
    assert entry.prefetch(Prefetch(enable=False), ours).enabled is False
    found = entry.prefetch(Prefetch(True, 8, (1 << 20) + 5, 1 << 21), ours)
    assert (found.threads, found.range_bytes) == (8, 1 << 20)
    assert found.image_bandwidth_bytes_per_s == 1 << 21
    assert found.policies == ours.policies
    found = entry.prefetch(Prefetch(True, 8, 1, 0, whole=False), ours)
    assert (found.range_bytes, found.image_bandwidth_bytes_per_s) == (64 << 10, 7)
    assert found.policies == ("trace", "table", "patterns", "sequential")
    assert entry.prefetch(Prefetch(True, 8, 0, 0), ours).range_bytes == ours.range_bytes
    off = config.Prefetch(enabled=False)
    assert entry.prefetch(Prefetch(True, 8), off).enabled is False

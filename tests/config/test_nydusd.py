"""nydusd's configuration files: what they mean here, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached import config
from fscached.config import Config, ConfigError
from fscached.manual import explain
from fscached.nydusd import translate

# The configuration of the Dragonfly + Nydus article, as it is.
ARTICLE = Path(__file__).parents[1] / "data" / "nydusd" / "article.json"

SECOND = """
version = 2
[backend]
type = "registry"
[backend.registry]
host = "r.example.org"
repo = "app"
scheme = "http"
skip_verify = true
timeout = 0
ca_cert_files = ["/ca.pem"]
[cache]
type = "blobcache"
[cache.prefetch]
enable = false
threads = 4
batch_size = 1048576
[cache.filecache]
work_dir = "/cache"
[rafs]
mode = "direct"
"""
TEMPLATE: dict[str, Any] = {
    "type": "bootstrap",
    "domain_id": "shared",
    "config": {
        "backend_type": "registry",
        "backend_config": {"scheme": "https", "timeout": 7, "retry_limit": 2},
        "cache_type": "fscache",
        "cache_config": {"work_dir": "/cache"},
        "prefetch_config": {"enable": True, "threads_count": 0, "merging_size": 0},
    },
}


def parse(document: object) -> Config:
    return config.parse(json.dumps(document), "nydusd.json")


def registry(**settings: object) -> dict[str, Any]:
    """The legacy form with these settings of its backend."""
    return {"device": {"backend": {"type": "registry", "config": settings}}}


@pytest.mark.parametrize(("value", "policies"), [(True, 5), (False, 4)])
def test_what_is_prefetched_is_what_nydusd_would(value, policies):
    """`prefetch_all` off leaves the rest of the image out; files are patterns of ours."""
    article = json.loads(ARTICLE.read_text())
    article["fs_prefetch"] |= {"prefetch_all": value, "prefetch_files": ["/usr/bin", "/app/a"]}
    found = config.parse(json.dumps(article), "article.json").prefetch
    assert found.policies == config.Prefetch().policies[:policies]
    assert found.patterns == ("/usr/bin", "/app/a")


def test_the_article() -> None:
    """Its file is accepted as it is; what applies is applied, the rest is named."""
    found = config.load(ARTICLE)
    assert (found.source.stall_timeout_s, found.source.connect_timeout_s) == (10, 10)
    assert (found.source.retries, found.source.verify_tls) == (2, True)
    assert found.source.insecure_registries == ()
    assert found.cache.directory == "/var/lib/nydus/cache/"
    assert (found.prefetch.enabled, found.prefetch.range_bytes) == (True, 131072)
    assert found.source.prefetch_connections == 10
    assert found.prefetch.bandwidth_bytes_per_s == 1 << 20
    assert found.prefetch.policies == config.Prefetch().policies
    assert found.fetch.verify is True
    (mirror,) = found.source.mirrors
    assert (mirror.host, mirror.authorization) == ("http://127.0.0.1:65001", False)
    assert mirror.headers == {"X-Dragonfly-Registry": "https://index.docker.io"}
    assert mirror.ping_url == "http://127.0.0.1:40901/server/ping"
    assert mirror.timeout_s == 10
    assert set(found.ignored) >= {"mode", "digest_validate", "iostats_files", "enable_xattr"}


def test_the_second_form() -> None:
    """TOML of version 2; a registry without TLS is one that is named."""
    found = config.parse(SECOND, "nydusd.toml")
    assert found.source.insecure_registries == ("r.example.org",)
    assert (found.source.verify_tls, found.source.ca_files) == (False, ("/ca.pem",))
    assert found.source.stall_timeout_s == 300
    assert (found.prefetch.enabled, found.source.prefetch_connections) == (False, 4)
    assert found.cache.directory == "/cache"
    assert found.ignored == ("backend.registry.host", "backend.registry.repo", "rafs.mode")


def test_a_template_of_the_snapshotter() -> None:
    """A BlobCacheEntry without its image; zeros of Go's are defaults."""
    found = parse(TEMPLATE)
    assert (found.cache.domain_id, found.cache.directory) == ("shared", "/cache")
    assert found.source.stall_timeout_s == 7
    assert found.source.prefetch_connections == config.Source().prefetch_connections
    assert found.prefetch.range_bytes == config.Prefetch().range_bytes
    assert found.ignored == ()


def test_a_proxy() -> None:
    """Dragonfly's newer way in, with its own times."""
    proxy = {
        "url": "http://127.0.0.1:4001/",
        "ping_url": "http://127.0.0.1:4003/healthy",
        "fallback": False,
        "check_interval": 9,
        "check_pause_elapsed": 60,
        "use_http": True,
        "dragonfly_scheduler_endpoint": "",
    }
    found = parse(registry(proxy=proxy, timeout=4))
    ours = found.source.proxy
    assert (ours.url, ours.ping_url) == ("http://127.0.0.1:4001", proxy["ping_url"])
    assert (ours.fallback, ours.use_http) == (False, True)
    assert (ours.timeout_s, ours.ping_interval_s, found.source.ping_pause_s) == (4, 9, 60)


@pytest.mark.parametrize(
    ("settings", "insecure"),
    [
        ({"scheme": "http", "host": "r.test:5000"}, ("r.test:5000",)),
        ({"scheme": "http"}, ("*",)),
        ({"scheme": "https"}, ()),
        ({}, ()),
    ],
)
def test_registries_without_tls(settings: dict[str, str], insecure: tuple[str, ...]) -> None:
    """A template for all images has no host: then all are meant."""
    assert parse(registry(**settings)).source.insecure_registries == insecure


def test_what_it_means_can_be_printed() -> None:
    """`fscached config --config nydusd.json` is our own file for it."""
    found = config.load(ARTICLE)
    ours = config.parse(explain(found), "f.toml")
    assert ours.source == found.source and ours.prefetch == found.prefetch and ours.ignored == ()


@pytest.mark.parametrize(
    ("document", "place", "remedy"),
    [
        ({"device": {"backend": {"type": "regsitry"}}}, "device.backend.type", "mean registry?"),
        ({"device": {"backend": {"type": "localdisk"}}}, "not served here", "did you mean"),
        ({"device": {"backend": {"type": 7}}}, "device.backend.type: '7'", "one of registry"),
        ({"device": {}}, "device.backend.type: ''", "one of registry, localfs"),
        ({"fetch": {}}, "neither `device`, `version` nor `config`", "fscached's own keys"),
        (
            {"device": {"backend": {"type": "registry", "config": {"tiemout": 3}}}},
            "device.backend.config.tiemout: unknown key",
            "did you mean timeout?",
        ),
        (
            {"device": {"backend": {"type": "localfs", "config": {"host": "h"}}}},
            "device.backend.config.host: unknown key",
            "nydusd has blob_file, dir",
        ),
        (
            {"device": {"backend": {"type": "s3"}, "cache": {"type": "blobcahce"}}},
            "device.cache.type",
            "did you mean blobcache?",
        ),
        (
            {"device": {"backend": {"type": "s3"}}, "fs_prefecth": {}},
            "fs_prefecth: unknown key",
            "did you mean fs_prefetch?",
        ),
        (
            {"device": {"backend": {"type": "s3", "config": {"retry_limit": "2"}}}},
            "device.backend.config.retry_limit: Expected `int`, got `str`",
            "give a number that is at least 0, at most 100",
        ),
        (
            {"device": {"backend": {"type": "s3", "config": {"ca_cert_files": ["x"]}}}},
            "device.backend.config.ca_cert_files: Expected `str` matching",
            "fscached config",
        ),
        (
            {"device": {"backend": {"type": "registry", "config": {"scheme": "ftp"}}}},
            "scheme: 'ftp'",
            "give https or http",
        ),
        ({"device": {"backend": {"type": "s3", "config": 3}}}, "config: not a table", "nydusd"),
        (
            registry(mirrors=[{"host": "http://m", "auth_thruogh": True}]),
            "mirrors.auth_thruogh: unknown key",
            "did you mean auth_through?",
        ),
        (
            registry(mirrors=[{"host": "m"}]),
            "device.backend.config.mirrors: Expected `str` matching",
            "fscached config",
        ),
        (registry(mirrors=["m"]), "mirrors: not a table", "nydusd"),
        (
            registry(proxy={"url": "http://p", "fallback": 1}),
            "device.backend.config.proxy.fallback: Expected `bool`",
            "fscached config",
        ),
        ({"version": 3}, "version: not one", "give 2"),
        ({"version": 2, "backend": {"type": "os"}}, "backend.type: 'os'", "did you mean oss?"),
    ],
)
def test_what_is_wrong_is_said(document: object, place: str, remedy: str) -> None:
    """One error with the file, nydusd's own name of the key, and the nearest that would do."""
    with pytest.raises(ConfigError) as caught:
        parse(document)
    assert str(caught.value).startswith("nydusd.json: ")
    assert place in str(caught.value) and remedy in str(caught.value)


def test_no_secret_is_repeated() -> None:
    """Neither in an error nor in the configuration."""
    backend = {"type": "registry", "config": {"auth": "aHVzaDpodXNo", "registry_token": "hush"}}
    found = parse({"device": {"backend": backend}})
    assert "device.backend.config.auth" in found.ignored
    assert "hush" not in repr(found) and "aHVzaDpodXNo" not in repr(found)
    backend["config"] |= {"retry_limit": "hush"}  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        parse({"device": {"backend": backend}})
    assert "hush" not in str(caught.value)


def test_text_that_is_no_json() -> None:
    """The error says what was tried."""
    with pytest.raises(ConfigError, match="not JSON"):
        config.parse(' {"device": ', "nydusd.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
PLACES = st.sampled_from(["device", "type", "config", "version", "backend", "fs_prefetch", "cache"])


@given(st.dictionaries(PLACES | st.text(), JSON))
def test_any_document(document: dict[str, Any]) -> None:
    """Whatever is in the file, there is a configuration or one kind of error."""
    try:
        translate(document, "nydusd.json")
    except ConfigError as error:
        assert error.where == "nydusd.json" and error.what and error.remedy

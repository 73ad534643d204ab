"""nydusd's BlobCacheEntry: how a snapshotter hands over an image it has unpacked itself.

Two forms are in use: `config` (what every nydus-snapshotter sends) and `config_v2` (which wins when
both are there). Both become one `BlobEntry`. Unknown keys are ignored, as nydusd ignores them.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from fscached import config
from fscached.malformed import MALFORMED

PREFETCH_THREADS_LIMIT: Final = 1024
PREFETCH_BATCH_LIMIT_BYTES: Final = 0x1000_0000
PEER_TIME_LIMIT_S: Final = 300
CACHE_TYPES: Final = ("blobcache", "filecache", "fscache", "dummycache", "")

# Becomes a directory and file name of the kernel's cache and a mount option's value: no slash, no
# comma, no control character, and with the kernel's own prefix and suffix at most NAME_MAX (255).
_NAME: Final = r"(?!\.{1,2}\Z)[^/,\x00-\x20\x7f]+"
Identifier = Annotated[str, Meta(pattern=rf"^{_NAME}\Z", max_length=200)]
IdentifierOrEmpty = Annotated[str, Meta(pattern=rf"^({_NAME})?\Z", max_length=200)]


class InvalidEntry(ValueError):
    """The entry cannot be used; the text says which key and why, and never holds a credential."""


class Proxy(msgspec.Struct, frozen=True):
    """A peer-to-peer client in front of the registry. Times in seconds."""

    url: str = ""
    ping_url: str = ""
    fallback: bool = True
    check_interval: int = 5
    use_http: bool = False


class Mirror(msgspec.Struct, frozen=True):
    """Another host that has the same blobs. Times in seconds."""

    host: str
    ping_url: str = ""
    headers: dict[str, str] = {}
    health_check_interval: int = 5
    failure_limit: int = 5
    auth_through: bool = False

    def __repr__(self) -> str:
        return f"Mirror(host={self.host!r})"


class Registry(msgspec.Struct, frozen=True, tag_field="backend", tag="registry"):
    """`backend_config` of a registry. `auth` is base64 of user:password; timeouts in seconds."""

    host: Annotated[str, Meta(min_length=1)]
    repo: Annotated[str, Meta(min_length=1)]
    scheme: Literal["https", "http", ""] = "https"
    auth: str = ""
    registry_token: str = ""
    skip_verify: bool = False
    ca_cert_files: list[str] = []
    timeout: int = 5
    connect_timeout: int = 5
    retry_limit: int = 0
    blob_url_scheme: str = ""
    blob_redirected_host: str = ""
    proxy: Proxy = Proxy()
    mirrors: list[Mirror] = []

    def __repr__(self) -> str:
        return f"Registry(host={self.host!r}, repo={self.repo!r})"


class Localfs(msgspec.Struct, frozen=True, tag_field="backend", tag="localfs"):
    """`backend_config` of a directory that holds the blobs as files."""

    blob_file: str = ""
    dir: str = ""
    alt_dirs: list[str] = []


class _Http(msgspec.Struct, frozen=True):
    """What all servers' `backend_config` have. Timeouts in seconds."""

    scheme: Literal["https", "http"] = "https"
    skip_verify: bool = False
    ca_cert_files: list[str] = []
    timeout: int = 5
    connect_timeout: int = 5
    retry_limit: int = 0


class _Bucket(_Http, frozen=True, kw_only=True):
    """Objects of a store; `endpoint` is `host[:port]`."""

    endpoint: Annotated[str, Meta(min_length=1)]
    bucket_name: Annotated[str, Meta(min_length=1)]
    object_prefix: str = ""
    access_key_id: str = ""
    access_key_secret: str = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint!r}, {self.bucket_name!r})"


class Oss(_Bucket, frozen=True, tag_field="backend", tag="oss"):
    """`backend_config` of a bucket of OSS."""


class S3(_Bucket, frozen=True, kw_only=True, tag_field="backend", tag="s3"):
    """`backend_config` of a bucket of S3."""

    region: Annotated[str, Meta(min_length=1)]
    endpoint: Annotated[str, Meta(min_length=1)] = "s3.amazonaws.com"


class HttpServer(_Http, frozen=True, kw_only=True, tag_field="backend", tag="http-proxy"):
    """Blobs as files of a web server: `addr` is `http[s]://host[:port]`, `path` a directory."""

    addr: Annotated[str, Meta(pattern=r"^https?://[^/\s@]+/?\Z")]
    path: str = ""


Backend = Registry | Localfs | Oss | S3 | HttpServer
_BACKENDS: Final[dict[str, type[Backend]]] = {
    "registry": Registry,
    "localfs": Localfs,
    "oss": Oss,
    "s3": S3,
    "http-proxy": HttpServer,
}


class Prefetch(msgspec.Struct, frozen=True):
    """What to bring before anybody asks: `whole` with what nothing recommends; lengths and
    `bandwidth_bytes_per_s` 0: the daemon's own."""

    enable: bool = False
    threads: int = 0
    batch_bytes: int = 0
    bandwidth_bytes_per_s: int = 0
    whole: bool = True


class BlobEntry(msgspec.Struct, frozen=True):
    """A bootstrap on the local disk, the fsid to mount it by, and where its blobs are."""

    id: str
    domain_id: str
    metadata_path: str
    work_dir: str
    backend: Backend
    prefetch: Prefetch


def mirrors(backend: Registry) -> tuple[config.Mirror, ...]:
    """Its mirrors, in our words. Raises InvalidEntry."""
    return tuple(_mirror(mirror, backend.timeout) for mirror in backend.mirrors)


def proxy(backend: Registry) -> config.Proxy | None:
    """Its proxy, in our words; None when it has none. Raises InvalidEntry."""
    given = backend.proxy
    if not given.url:
        return None
    ours = {
        "url": given.url.rstrip("/"),
        "use_http": given.use_http,
        "fallback": given.fallback,
        "ping_url": given.ping_url,
        "ping_interval_s": _seconds(given.check_interval),
        "timeout_s": _seconds(backend.timeout),
    }
    return _converted(ours, config.Proxy, f"proxy {given.url[:255]!r}")


def _mirror(given: Mirror, timeout: int) -> config.Mirror:
    ours = {
        "host": given.host.rstrip("/"),
        "headers": given.headers,
        "authorization": given.auth_through,
        "ping_url": given.ping_url,
        "ping_interval_s": _seconds(given.health_check_interval),
        "failure_limit": given.failure_limit,
        "timeout_s": _seconds(timeout),
    }
    return _converted(ours, config.Mirror, f"mirror {given.host[:255]!r}")


_Settings = TypeVar("_Settings", bound=config.Peer)


def _converted(ours: dict[str, object], kind: type[_Settings], what: str) -> _Settings:
    try:
        return msgspec.convert(ours, kind)
    except msgspec.ValidationError as error:
        raise InvalidEntry(f"{what}: {error}") from None


def _seconds(given: int) -> int:
    """Of nydusd's times 0 is none, here as long as may be."""
    return given or PEER_TIME_LIMIT_S


def prefetch(given: Prefetch, ours: config.Prefetch) -> config.Prefetch:
    """What is asked for an image, in our words; what it leaves open is `ours`."""
    if not given.enable:
        return msgspec.structs.replace(ours, enabled=False)
    range_bytes = max(64 * config.KIB, given.batch_bytes // 4096 * 4096)
    rest = () if given.whole else ("whole",)
    return msgspec.structs.replace(
        ours,
        policies=tuple(policy for policy in ours.policies if policy not in rest),
        threads=given.threads,
        range_bytes=range_bytes if given.batch_bytes else ours.range_bytes,
        image_bandwidth_bytes_per_s=given.bandwidth_bytes_per_s or ours.image_bandwidth_bytes_per_s,
    )


def parse(body: bytes) -> BlobEntry:
    """The entry in a request's JSON body. Raises InvalidEntry. Touches no file."""
    try:
        wire = msgspec.json.decode(body, type=_Wire)
        if wire.config_v2 is not None:
            return _from_v2(wire, wire.config_v2)
        if wire.config is not None:
            return _from_legacy(wire, wire.config)
    except MALFORMED as error:
        raise InvalidEntry(str(error)) from None
    raise InvalidEntry("neither `config` nor `config_v2` is there")


class _LegacyPrefetch(msgspec.Struct, frozen=True):
    enable: bool
    threads_count: int
    merging_size: int
    bandwidth_rate: int
    prefetch_all: bool = True


class _LegacyCache(msgspec.Struct, frozen=True):
    work_dir: str = ""


class _Legacy(msgspec.Struct, frozen=True):
    backend_type: str
    backend_config: msgspec.Raw
    cache_type: str = ""
    cache_config: _LegacyCache = _LegacyCache()
    prefetch_config: _LegacyPrefetch | None = None
    metadata_path: str = ""


class _V2Backend(msgspec.Struct, frozen=True, rename={"http_proxy": "http-proxy"}):
    type: str
    registry: msgspec.Raw = msgspec.Raw()
    localfs: msgspec.Raw = msgspec.Raw()
    oss: msgspec.Raw = msgspec.Raw()
    s3: msgspec.Raw = msgspec.Raw()
    http_proxy: msgspec.Raw = msgspec.Raw()


class _V2Prefetch(msgspec.Struct, frozen=True):
    enable: bool = False
    threads: int = 8
    batch_size: int = 1 << 20
    bandwidth_limit: int = 0
    prefetch_all: bool = True


class _V2Cache(msgspec.Struct, frozen=True):
    type: str = ""
    prefetch: _V2Prefetch = _V2Prefetch()
    fscache: _LegacyCache | None = None
    filecache: _LegacyCache | None = None


class _V2(msgspec.Struct, frozen=True):
    version: Literal[2]
    backend: _V2Backend
    cache: _V2Cache
    metadata_path: str = ""


class _Wire(msgspec.Struct, frozen=True):
    type: Literal["bootstrap"]
    id: Identifier
    domain_id: IdentifierOrEmpty = ""
    config: _Legacy | None = None
    config_v2: _V2 | None = None


def _from_legacy(wire: _Wire, config: _Legacy) -> BlobEntry:
    given = config.prefetch_config
    prefetch = Prefetch()
    if given is not None:
        prefetch = Prefetch(
            given.enable,
            given.threads_count,
            given.merging_size,
            given.bandwidth_rate,
            given.prefetch_all,
        )
    _check_cache_type(config.cache_type)
    return _entry(
        wire,
        config.metadata_path,
        config.cache_config.work_dir,
        _backend(config.backend_type, config.backend_config),
        prefetch,
    )


def _from_v2(wire: _Wire, config: _V2) -> BlobEntry:
    given = config.cache.prefetch
    places = config.cache.fscache or config.cache.filecache or _LegacyCache()
    _check_cache_type(config.cache.type)
    kind = config.backend.type
    settings: msgspec.Raw = getattr(config.backend, kind.replace("-", "_"), msgspec.Raw())
    return _entry(
        wire,
        config.metadata_path,
        places.work_dir,
        _backend(kind, settings),
        Prefetch(
            given.enable,
            given.threads,
            given.batch_size,
            given.bandwidth_limit,
            given.prefetch_all,
        ),
    )


def _entry(
    wire: _Wire, metadata_path: str, work_dir: str, backend: Backend, prefetch: Prefetch
) -> BlobEntry:
    if not metadata_path:
        raise InvalidEntry("`metadata_path` is empty: give the path of the bootstrap")
    if not work_dir:
        raise InvalidEntry("`work_dir` of the cache is empty")
    if prefetch.enable:
        _check_prefetch(prefetch)
    domain_id = wire.domain_id or wire.id
    return BlobEntry(wire.id, domain_id, metadata_path, work_dir, backend, prefetch)


def _backend(kind: str, raw: msgspec.Raw) -> Backend:
    if kind not in _BACKENDS:
        raise InvalidEntry(f"backend {kind!r} is not one of {', '.join(_BACKENDS)}")
    if not bytes(raw):
        raise InvalidEntry(f"backend {kind!r} has no settings")
    backend = msgspec.json.decode(raw, type=_BACKENDS[kind])
    if isinstance(backend, Registry):
        mirrors(backend)
        proxy(backend)
        _check_auth(backend)
    elif isinstance(backend, Localfs) and not backend.blob_file and not backend.dir:
        raise InvalidEntry("backend localfs needs `dir` or `blob_file`")
    return backend


def _check_auth(backend: Registry) -> None:
    from fscached.source.auth import Credential  # not before the API listens

    try:
        if backend.auth:
            Credential.from_basic(backend.auth)
    except ValueError as error:
        raise InvalidEntry(str(error)) from None


def _check_cache_type(kind: str) -> None:
    if kind not in CACHE_TYPES:
        raise InvalidEntry(f"cache type {kind!r} is not one of fscache, filecache, blobcache")


def _check_prefetch(prefetch: Prefetch) -> None:
    if not 1 <= prefetch.threads <= PREFETCH_THREADS_LIMIT:
        raise InvalidEntry(f"prefetch threads must be 1 to {PREFETCH_THREADS_LIMIT}")
    if not 0 <= prefetch.batch_bytes <= PREFETCH_BATCH_LIMIT_BYTES:
        raise InvalidEntry(f"a prefetch batch must be at most {PREFETCH_BATCH_LIMIT_BYTES} bytes")

"""nydusd's configuration files, said in our own keys.

Forms: `device` (nydusd's legacy JSON), `version = 2` (JSON or TOML), and a BlobCacheEntry as
nydus-snapshotter keeps it as a template. The tables below name every key that nydusd 2.1 to 2.4
reads: what it is here, or that it is nothing here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from fscached.config_text import ConfigError

BACKENDS: Final = ("registry", "localfs", "oss", "s3", "http-proxy")
CACHES: Final = ("fscache", "blobcache", "filecache", "dummycache", "")

POLICIES: Final = ("trace", "table", "patterns", "sequential", "whole")
"""Of our own `prefetch.policies`; the last is the rest of the image."""

# Limits of our own keys (fscached.config): nydusd's 0 is "no limit" or "the default".
_TIMEOUT_LIMIT_S: Final = 300.0
_RANGE_LEAST_BYTES: Final = 64 << 10
_PAGE_BYTES: Final = 4 << 10


@dataclass(slots=True)
class Translation:
    """`tables` as our own file would have them; `origins` is nydusd's key behind each of ours
    (`source.retries`), `ignored` the keys that are nothing here."""

    tables: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def put(self, ours: str, value: Any, theirs: str) -> None:
        *tables, key = ours.split(".")
        place = self.tables
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
        self.origins[ours] = theirs


class _Key(NamedTuple):
    """One of ours (`table.key`), and how to say nydusd's value; None is to leave it out. `also`
    is another of ours that has the same value."""

    ours: str
    say: Callable[[Any], Any] = lambda value: value
    also: str = ""


_Form: TypeAlias = "Mapping[str, _Form | _Key | None]"
"""Of each key: its own keys, ours, or None where it is nothing here."""


class _Unusable(Exception):
    """A key and what is wrong with it, and what would do."""


def translate(document: Mapping[str, Any], origin: str) -> Translation:
    """A whole file, decoded; `origin` is its name in errors. Raises ConfigError."""
    translation = Translation()
    try:
        _walk(_form(document), document, "", translation)
    except _Unusable as error:
        what, remedy = error.args
        raise ConfigError(what, remedy, where=origin) from None
    return translation


def _form(document: Mapping[str, Any]) -> _Form:
    if "version" in document:
        if document["version"] != 2:
            raise _Unusable("version: not one nydusd has", "give 2, or the form without it")
        return _second(document)
    if "type" in document or "config" in document:
        return _template(document)
    if "device" not in document:
        raise _Unusable(
            "neither `device`, `version` nor `config` is in it, as in nydusd's files",
            "give one of nydusd's, or TOML with fscached's own keys",
        )
    return _legacy(document)


def _walk(form: _Form, section: Mapping[str, Any], path: str, translation: Translation) -> None:
    for name, value in section.items():
        place = f"{path}{name}"
        if name not in form:
            raise _Unusable(f"{place}: unknown key", _nearest(name, form))
        meaning = form[name]
        if isinstance(meaning, Mapping):
            if value is not None:
                _walk(meaning, _table(place, value), f"{place}.", translation)
        elif meaning is None:
            translation.ignored.append(place)
        elif meaning.ours and (said := meaning.say(value)) is not None:
            for ours in filter(None, (meaning.ours, meaning.also)):
                translation.put(ours, said, place)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"nydusd has {', '.join(known)} there"


def _table(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _Unusable(f"{place}: not a table of keys", "see nydusd's documentation")
    return value


def _choice(section: Mapping[str, Any], name: str, place: str, known: Iterable[str]) -> str:
    """One of the names in `known`."""
    chosen = section.get(name, "")
    if chosen not in known:
        near = difflib.get_close_matches(str(chosen), list(known), n=1)
        remedy = f"did you mean {near[0]}?" if near else f"give one of {', '.join(known)}"
        raise _Unusable(f"{place}: {str(chosen)[:40]!r} is not served here", remedy)
    return str(chosen)


def _inside(section: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A table within tables; empty when it is not there. `_walk` says what is none."""
    for name in path:
        inner = section.get(name)
        section = inner if isinstance(inner, Mapping) else {}
    return section


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _timeout(value: Any) -> Any:
    """0 is no limit; ours have one. What is no number is for the configuration to refuse."""
    return min(float(value) or _TIMEOUT_LIMIT_S, _TIMEOUT_LIMIT_S) if _number(value) else value


def _unless_zero(value: Any) -> Any:
    return None if value == 0 and _number(value) else value


def _range(value: Any) -> Any:
    """0 is the default; a range is of whole pages and has a least length."""
    if not isinstance(value, int) or isinstance(value, bool) or not value:
        return _unless_zero(value)
    return max(_RANGE_LEAST_BYTES, value // _PAGE_BYTES * _PAGE_BYTES)


def _negated(value: Any) -> Any:
    return not value if isinstance(value, bool) else value


def _policies(value: Any) -> Any:
    """`prefetch_all` off is a list without the rest of the image. Without the key nydusd brings
    whole blobs over fscache, as our own list does."""
    return POLICIES[: None if value else -1] if isinstance(value, bool) else value


def _address(value: Any) -> Any:
    return value.rstrip("/") if isinstance(value, str) else value


def _mirrors(timeout: Any, value: Any) -> Any:
    """Each has the backend's time limit. What is no list is for the configuration to refuse."""
    return [_mirror(timeout, given) for given in value] if isinstance(value, list) else value


def _mirror(timeout: Any, given: Any) -> Any:
    mirror = Translation()
    _walk(_MIRROR, _table("mirrors", given), "mirrors.", mirror)
    return mirror.tables | ({} if timeout is None else {"timeout_s": _timeout(timeout)})


def _insecure(host: str, value: Any) -> list[str] | None:
    if value not in ("http", "https", ""):
        raise _Unusable(f"scheme: {str(value)[:20]!r} is none", "give https or http")
    return [host or "*"] if value == "http" else None


def _nothing(*names: str) -> _Form:
    """Keys that are nothing here."""
    return dict.fromkeys(names)


_READ: Final = _Key("")
_PROXY: Final[_Form] = {
    "url": _Key("source.proxy.url", _address),
    "ping_url": _Key("source.proxy.ping_url"),
    "fallback": _Key("source.proxy.fallback"),
    "check_interval": _Key("source.proxy.ping_interval_s", _timeout),
    "check_pause_elapsed": _Key("source.ping_pause_s", _unless_zero),
    "use_http": _Key("source.proxy.use_http"),
    "dragonfly_scheduler_endpoint": None,
}
_MIRROR: Final[_Form] = {
    "host": _Key("host", _address),
    "headers": _Key("headers"),
    "auth_through": _Key("authorization"),
    "ping_url": _Key("ping_url"),
    "health_check_interval": _Key("ping_interval_s", _timeout),
    "failure_limit": _Key("failure_limit", _unless_zero),
    "health_check_pause_elapsed": None,
    "check_pause_elapsed": None,
}
_HTTP: Final[_Form] = {
    "scheme": None,
    "timeout": _Key("source.stall_timeout_s", _timeout, also="source.proxy.timeout_s"),
    "connect_timeout": _Key("source.connect_timeout_s", _timeout),
    "retry_limit": _Key("source.retries"),
    "skip_verify": _Key("source.verify_tls", _negated),
    "ca_cert_files": _Key("source.ca_files"),
    "proxy": _PROXY,
    "mirrors": None,
    "readahead": None,
}
_BUCKET: Final[_Form] = {
    **_HTTP,
    **_nothing("endpoint", "bucket_name", "object_prefix", "access_key_id", "access_key_secret"),
}
_BACKEND_KEYS: Final[Mapping[str, _Form]] = {
    "registry": {
        **_HTTP,
        **_nothing(
            "host", "repo", "auth", "registry_token", "blob_url_scheme", "blob_redirected_host"
        ),
    },
    "oss": _BUCKET,
    "s3": {**_BUCKET, "region": None},
    "http-proxy": {**_HTTP, **_nothing("addr", "path")},
    "localfs": _nothing("blob_file", "dir", "alt_dirs", "readahead", "readahead_sec"),
}
_PREFETCH: Final[_Form] = {
    "enable": _Key("prefetch.enabled"),
    "threads_count": _Key("source.prefetch_connections", _unless_zero),
    "merging_size": _Key("prefetch.range_bytes", _range),
    "bandwidth_rate": _Key("prefetch.bandwidth_bytes_per_s"),
    "prefetch_all": _Key("prefetch.policies", _policies),
    # Of its command line and its API; some keep it here.
    "prefetch_files": _Key("prefetch.patterns"),
}
_PREFETCH_2: Final[_Form] = {
    **_PREFETCH,
    "threads": _PREFETCH["threads_count"],
    "batch_size": _PREFETCH["merging_size"],
    "bandwidth_limit": _PREFETCH["bandwidth_rate"],
    "stream_prefetch": None,
}
_CACHE_PLACE: Final[_Form] = {
    "work_dir": _Key("cache.directory"),
    "disable_indexed_map": None,
    "enable_encryption": None,
    "enable_convergent_encryption": None,
    "encryption_key": None,
}
# Verification is not nydusd's to switch off: its templates all do (docs/decisions/sources.md).
_RAFS: Final = _nothing(
    "mode", "enable_xattr", "iostats_files", "access_pattern", "latest_read_files"
)


def _backend(kind: str, settings: Mapping[str, Any]) -> _Form:
    keys = _BACKEND_KEYS[kind]
    if kind != "registry":
        return keys
    host = str(settings.get("host") or "")
    return {
        **keys,
        "scheme": _Key("source.insecure_registries", partial(_insecure, host)),
        "mirrors": _Key("source.mirrors", partial(_mirrors, settings.get("timeout"))),
    }


def _legacy(document: Mapping[str, Any]) -> _Form:
    device = _inside(document, "device")
    backend = _inside(device, "backend")
    kind = _choice(backend, "type", "device.backend.type", BACKENDS)
    _choice(_inside(device, "cache"), "type", "device.cache.type", CACHES)
    return {
        **_RAFS,
        "id": None,
        "device": {
            "id": None,
            "backend": {"type": _READ, "config": _backend(kind, _inside(backend, "config"))},
            "cache": {
                "type": _READ,
                "compressed": None,
                "validate": None,
                "config": _CACHE_PLACE,
            },
        },
        "digest_validate": None,
        "amplify_io": None,
        "fs_prefetch": _PREFETCH,
    }


def _second(document: Mapping[str, Any]) -> _Form:
    backend = _inside(document, "backend")
    _choice(backend, "type", "backend.type", BACKENDS)
    _choice(_inside(document, "cache"), "type", "cache.type", CACHES)
    return {
        "version": _READ,
        "id": None,
        "metadata_path": None,
        "backend": {
            "type": _READ,
            **{kind: _backend(kind, _inside(backend, kind)) for kind in BACKENDS},
        },
        "external_backends": None,
        "cache": {
            "type": _READ,
            "compressed": None,
            "validate": None,
            "prefetch": _PREFETCH_2,
            "fscache": _CACHE_PLACE,
            "filecache": _CACHE_PLACE,
            "blobcache": _CACHE_PLACE,
        },
        "rafs": {
            **_RAFS,
            "batch_size": None,
            "user_io_batch_size": None,
            "validate": None,
            "prefetch": _PREFETCH_2,
        },
        "overlay": None,
    }


def _template(document: Mapping[str, Any]) -> _Form:
    config = _inside(document, "config")
    kind = _choice(config, "backend_type", "config.backend_type", BACKENDS)
    _choice(config, "cache_type", "config.cache_type", CACHES)
    return {
        "type": _READ,
        "id": None,
        "domain_id": _Key("cache.domain_id", lambda value: value or None),
        "config": {
            "id": None,
            "backend_type": _READ,
            "backend_config": _backend(kind, _inside(config, "backend_config")),
            "cache_type": _READ,
            "cache_config": _CACHE_PLACE,
            "prefetch_config": _PREFETCH,
            "metadata_path": None,
            "external_backends": None,
        },
    }

"""The configuration's tables of where bytes come from."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from fscached.config_table import ABSOLUTE, ABSOLUTE_OR_EMPTY, GIB, KIB, MIB, Table

# No user, no path, no query.
_ADDRESS: Final = r"^https?://[A-Za-z0-9._:\[\]-]+\Z"
_ADDRESS_OR_EMPTY: Final = r"^(https?://[A-Za-z0-9._:\[\]-]+)?\Z"
_URL_OR_EMPTY: Final = r"^(https?://[^\s@\x00-\x20\x7f]+)?\Z"
_HeaderName = Annotated[str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", max_length=256)]
_HeaderValue = Annotated[str, Meta(pattern=r"^[\x20-\x7e]*\Z", max_length=8192)]


class Peer(Table, frozen=True, kw_only=True):
    """What is known of any server that is asked before a registry."""

    ping_url: Annotated[
        str,
        Meta(pattern=_URL_OR_EMPTY, description="Asked while it is down; empty: reads find out."),
    ] = ""
    ping_interval_s: Annotated[
        float, Meta(ge=0.1, le=3600, description="Between pings, and the least pause.")
    ] = 5.0
    failure_limit: Annotated[
        int, Meta(ge=1, le=1000, description="Failures in a row, then it is down.")
    ] = 5
    timeout_s: Annotated[
        float, Meta(ge=1, le=300, description="A MiB slower than this is asked elsewhere.")
    ] = 5.0
    small_ranges: Annotated[
        bool,
        Meta(
            description="It has ranges of up to 4 MiB from other peers too: Dragonfly's Rust client"
            " to v1.4.0 and from v1.5.3 on."
        ),
    ] = False


class Mirror(Peer, frozen=True, kw_only=True):
    """A server with a registry's blobs: a Dragonfly peer, or any registry mirror."""

    host: Annotated[str, Meta(pattern=_ADDRESS, description="http[s]://host[:port].")]
    headers: Annotated[
        dict[_HeaderName, _HeaderValue],
        Meta(max_length=64, description="Sent with each request; ours of the same name are not."),
    ] = msgspec.field(default_factory=dict)
    authorization: Annotated[
        bool, Meta(description="It gets the registry's tokens and passwords too.")
    ] = False

    def __repr__(self) -> str:
        return f"Mirror(host={self.host!r})"


class Proxy(Peer, frozen=True, kw_only=True):
    """A Dragonfly peer that is an HTTP proxy."""

    url: Annotated[
        str, Meta(pattern=_ADDRESS_OR_EMPTY, description="http://host[:port]; empty: none.")
    ] = ""
    use_http: Annotated[
        bool, Meta(description="Registries are asked by http through it: it speaks https.")
    ] = False
    ca_file: Annotated[
        str,
        Meta(pattern=ABSOLUTE_OR_EMPTY, description="PEM file: who signs what it opens TLS with."),
    ] = ""
    fallback: Annotated[bool, Meta(description="When it fails, the registry is asked.")] = True


class Source(Table, frozen=True):
    """Registries, who is asked before them, and how patient to be with all of them."""

    connect_timeout_s: Annotated[
        float, Meta(gt=0, le=300, description="To a connection, TLS included.")
    ] = 5.0
    stall_timeout_s: Annotated[
        float, Meta(gt=0, le=300, description="Without one byte: the transfer is begun elsewhere.")
    ] = 10.0
    demand_connections: Annotated[
        int, Meta(ge=1, le=1024, description="Transfers at once for readers that wait.")
    ] = 16
    prefetch_connections: Annotated[
        int, Meta(ge=1, le=1024, description="Transfers at once for prefetch; as many for a trace.")
    ] = 2
    retries: Annotated[
        int, Meta(ge=0, le=100, description="Further tries of one transfer, within its deadline.")
    ] = 5
    retry_pause_s: Annotated[
        float,
        # Tries go on until a deadline: without a pause they would be a flood.
        Meta(ge=0.01, le=60, description="Before the first further try; doubles, with jitter."),
    ] = 0.1
    retry_pause_limit_s: Annotated[
        float, Meta(ge=0.01, le=600, description="The pause doubles up to this.")
    ] = 5.0
    host_retries_s: Annotated[
        float,
        Meta(
            ge=0.1,
            le=10_000,
            description="Further tries at one host per second, of all reads together; more as it"
            " answers.",
        ),
    ] = 10.0
    manifest_limit_bytes: Annotated[
        int, Meta(ge=4 * KIB, le=64 * MIB, description="A larger manifest or index is refused.")
    ] = 4 * MIB
    bootstrap_limit_bytes: Annotated[
        int, Meta(ge=1 * MIB, le=4 * GIB, description="A larger bootstrap or blob meta is refused.")
    ] = 512 * MIB
    mount_deadline_s: Annotated[
        float,
        # Our own clients wait 300 s for a reply: what they gave up must not be mounted later.
        Meta(gt=0, le=240, description="For manifest and bootstrap of an image, with all tries."),
    ] = 120.0
    offline: Annotated[
        bool,
        Meta(
            description="Nobody is asked for anything: images that were here and are in the cache"
            " with all of their blobs can be mounted, by whoever asks."
        ),
    ] = False
    insecure_registries: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=255)], ...],
        Meta(
            max_length=1024,
            description="host or host:port of registries without TLS (http); `*`: all.",
        ),
    ] = ()
    verify_tls: Annotated[
        bool, Meta(description="Check the certificates of registries. Leave it on.")
    ] = True
    ca_files: Annotated[
        tuple[Annotated[str, Meta(pattern=ABSOLUTE)], ...],
        Meta(max_length=64, description="PEM files of authorities to trust beside the system's."),
    ] = ()
    certs_directory: Annotated[
        str,
        Meta(
            pattern=ABSOLUTE_OR_EMPTY,
            description="As docker's /etc/docker/certs.d: HOST:PORT/*.crt are one registry's"
            " authorities.",
        ),
    ] = ""
    http_proxy: Annotated[
        str,
        Meta(
            pattern=r"^(http://[^/@\s]+)?\Z",
            description="http://host:port of the network's HTTP proxy; empty: none.",
        ),
    ] = ""
    no_proxy: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=255)], ...],
        Meta(
            max_length=1024,
            description="Reached without it: domains, addresses, networks, each with or without"
            " :port.",
        ),
    ] = ()
    docker_config: Annotated[
        str,
        Meta(
            pattern=ABSOLUTE_OR_EMPTY,
            description="docker's config.json with credentials, or the directory of a mounted"
            " kubernetes.io/dockerconfigjson secret; empty: none.",
        ),
    ] = ""
    mirrors: Annotated[
        tuple[Mirror, ...],
        Meta(max_length=16, description="Asked before the registry, in this order."),
    ] = ()
    proxy: Annotated[
        Proxy, Meta(description="A Dragonfly peer as HTTP proxy, asked after the mirrors.")
    ] = Proxy()
    ping_pause_s: Annotated[
        float, Meta(ge=1, le=86_400, description="Nobody reads for this long: pings pause.")
    ] = 300.0
    distrust_s: Annotated[
        float,
        Meta(ge=1, le=86_400, description="Who gave wrong bytes of an image is set aside so long."),
    ] = 600.0
    credential_provider_config: Annotated[
        str,
        Meta(
            pattern=ABSOLUTE_OR_EMPTY,
            description="kubelet's CredentialProviderConfig; empty: none.",
        ),
    ] = ""
    credential_provider_directory: Annotated[
        str,
        Meta(pattern=ABSOLUTE_OR_EMPTY, description="Where the programs of these providers are."),
    ] = ""

    def __post_init__(self) -> None:
        if bool(self.credential_provider_config) != bool(self.credential_provider_directory):
            raise ValueError(
                "Expected credential_provider_config and credential_provider_directory together"
            )

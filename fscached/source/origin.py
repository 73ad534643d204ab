"""Where a URL leads, whom to trust there, and what was spent on it."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fscached import __version__
from fscached.source import Fault, Giver, SourceError

USER_AGENT: Final = f"fscached/{__version__}"
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(slots=True)
class Traffic:
    """What was sent and received: every HTTP request, refused ones and redirects too, every body
    byte, useful or not, and the useful bytes of blobs by who gave them."""

    requests: int = 0
    received_bytes: int = 0
    given: Counter[Giver] = field(default_factory=Counter)

    def add(self, other: Traffic) -> None:
        self.requests += other.requests
        self.received_bytes += other.received_bytes
        self.given.update(other.given)


@dataclass(frozen=True)
class Trust:
    """Which servers to believe: those that the system's authorities or those of `ca_files` (PEM)
    vouch for, or, with `verify` off, any."""

    verify: bool = True
    ca_files: tuple[str, ...] = ()

    @cached_property
    def bundle(self) -> str:
        """Path of one PEM file with all authorities. Raises SourceError (LOCAL)."""
        system = _system_bundle()
        return _joined(system, self.ca_files) if self.ca_files else system


@cache
def _system_bundle() -> str:
    """pycurl's wheels come without any."""
    system = ssl.get_default_verify_paths().cafile
    if system and os.path.isfile(system):
        return system
    import certifi

    return certifi.where()


@cache
def _joined(system: str, ca_files: tuple[str, ...]) -> str:
    """A file in memory. curl remembers authorities by their path: it is never given to others."""
    texts = [Path(system).read_bytes()]
    for path in ca_files:
        try:
            texts.append(Path(path).read_bytes())
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except OSError as error:  # an SSLError is one
            reason = "no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
            raise SourceError(
                f"{path}: {reason}: name a PEM file of authorities", Fault.LOCAL
            ) from None
    fd = os.memfd_create("authorities")
    with open(fd, "wb", closefd=False) as file:
        file.write(b"\n".join(texts))
    return f"/proc/self/fd/{fd}"


def origin_of(url: str) -> str:
    """`scheme://host:port` of a URL: what a credential belongs to, and all that errors may name.

    Raises SourceError for anything but plain http and https.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if (
        not host
        or parts.scheme not in _PORTS
        or parts.username is not None
        or not (url.isascii() and url.isprintable())
        or " " in url
    ):
        raise SourceError("an address that is no plain http or https URL", Fault.PROTOCOL)
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}:{port or _PORTS[parts.scheme]}"


def host_name(host: str) -> str:
    """A `host[:port]` without its port, and an IPv6 address without its brackets; empty if none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine, and so may be spoken to without TLS."""
    name = host_name(host)
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def is_inward(host: str) -> bool:
    """Whether `host[:port]` is an address inside the network, where no stranger may send us."""
    name = host_name(host)
    try:
        return not ipaddress.ip_address(name).is_global
    except ValueError:
        return name == "localhost"


def scheme_of(host: str, insecure: bool) -> str:
    """http for a registry configured so or on this machine, https for every other."""
    return "http" if insecure or is_loopback(host) else "https"

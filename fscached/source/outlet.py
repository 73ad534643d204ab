"""Which HTTP proxy of the network, if any, a request leaves through."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from fscached.source.origin import is_loopback, origin_of


@dataclass(frozen=True, slots=True)
class Outlet:
    """`proxy` is `http://host:port`, empty for none. `exceptions` are reached directly, as is this
    machine: `example.org` (and what is below it), `.example.org` (only that), an address, a network
    (`10.0.0.0/8`), each of them with or without `:port`, or `*`."""

    proxy: str = ""
    exceptions: tuple[str, ...] = ()

    def of(self, url: str) -> str:
        """The proxy for a URL that `origin_of` takes; empty: none."""
        if not self.proxy:
            return ""
        parts = urlsplit(origin_of(url))
        host, port = parts.hostname or "", parts.port or 0
        if is_loopback(parts.netloc):
            return ""
        excepted = any(_covers(exception, host, port) for exception in self.exceptions)
        return "" if excepted else self.proxy


def _covers(exception: str, host: str, port: int) -> bool:
    exception = exception.lower()
    if exception == "*":
        return True
    name, colon, digits = exception.rpartition(":")
    if colon and digits.isdecimal() and not (":" in name and "]" not in name):
        if int(digits) != port:
            return False
        exception = name
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(exception.strip("[]"), False)
    except ValueError:
        return host == exception or host.endswith(f".{exception.lstrip('.')}")

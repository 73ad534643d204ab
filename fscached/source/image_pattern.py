"""Which credential is for which image: kubelet's rule for `matchImages` and keys of `auths`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final

# Docker Hub has three names for its hosts; the images' own is the first.
_HUB_HOSTS: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


def canonical(text: str) -> str:
    """`host[:port][/path]` of an image or a key, without a scheme and the API's version; Docker
    Hub's hosts become docker.io."""
    bare = text.removeprefix("https://").removeprefix("http://").rstrip("/")
    host, slash, path = bare.partition("/")
    if path in ("v1", "v2"):
        slash = path = ""
    return f"{'docker.io' if host in _HUB_HOSTS else host.lower()}{slash}{path}"


def covers(pattern: str, image: str) -> bool:
    """Whether a pattern is meant for an image, both `host[:port]/path`: a `*` stands for one label
    of the host or a part of it, ports are equal, the path begins with the pattern's.

    The rule is that of kubelet's `matchImages` (CredentialProviderConfig).
    """
    pattern_host, _, pattern_path = canonical(pattern).partition("/")
    host, _, path = canonical(image).partition("/")
    pattern_name, pattern_port = _split(pattern_host)
    name, port = _split(host)
    pattern_labels, labels = pattern_name.split("."), name.split(".")
    return (
        pattern_port == port
        and len(pattern_labels) == len(labels)
        and (name == pattern_name or all(map(fnmatchcase, labels, pattern_labels)))
        and path.startswith(pattern_path)
    )


def fitting(patterns: Iterable[str], image: str) -> list[str]:
    """The patterns that cover an image, the most particular first."""
    found = [pattern for pattern in patterns if covers(pattern, image)]
    return sorted(found, key=lambda pattern: ("*" not in pattern, len(canonical(pattern))))[::-1]


def _split(host: str) -> tuple[str, str]:
    """Name and port; an IPv6 address keeps its colons."""
    name, colon, port = host.rpartition(":")
    return (name, port) if colon and not host.endswith("]") else (host, "")

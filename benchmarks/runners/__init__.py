"""Daemons under measurement: each starts on a given cache, serves an image, and stops."""

from __future__ import annotations

from typing import NamedTuple, Protocol

MOUNT = "/mnt/image"


class LocalImage(NamedTuple):
    """An image in a directory of the guest: files named by their cookies, `fsid` the bootstrap.

    Without `shared_domain` it is in a domain of its own name.
    """

    directory: str
    fsid: str
    shared_domain: str = ""

    @property
    def domain_id(self) -> str:
        """Where its cache files are."""
        return self.shared_domain or self.fsid


class Runner(Protocol):
    """One daemon of a guest."""

    name: str

    def start(self, cache: str, window_bytes: int) -> None:
        """Start on an empty cache directory, answering each miss with this window."""
        ...

    def mount(self, image: LocalImage) -> None:
        """Mount at `MOUNT` an image whose bytes are in the guest."""
        ...

    def stop(self) -> None:
        """Unmount and end."""
        ...

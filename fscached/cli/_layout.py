"""Image layouts as people name them: `oci:DIR[:TAG]`, skopeo's way."""

from __future__ import annotations

import os
from pathlib import Path

from rafs_v6.oci import Layout, Platform

LAYOUT_PREFIX = "oci:"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
"""What uname(2) calls a machine and what images call it (Go's GOARCH)."""


def open_layout(text: str, *, create: bool = False) -> tuple[Layout, str | None]:
    """A layout and the tag, if one was named. Raises ImageError."""
    directory, _, tag = text.removeprefix(LAYOUT_PREFIX).partition(":")
    return Layout(Path(directory), create=create), tag or None


def machine_platform() -> Platform:
    """What images for this machine are for."""
    machine = os.uname().machine
    return Platform(os="linux", architecture=_ARCHITECTURES.get(machine, machine))

"""Debian trees: root file systems of chosen packages, made by mmdebstrap."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness import apt, store
from harness.command import CommandFailed

RELEASE = "bookworm"

GUEST_PACKAGES = (
    *("python3", "docker-registry", "ca-certificates", "curl", "attr", "strace"),
    *("e2fsprogs", "erofs-utils", "util-linux", "mount", "procps", "kmod", "iproute2"),
    *("containerd", "runc", "nginx-light", "systemd"),
)
"""What a guest's root has besides apt's essential set."""

# Manuals and translations are a third of the unpacking time, and nobody reads them in a guest.
UNREAD = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")


def make(directory: Path, packages: Sequence[str], exclude: Sequence[str] = ()) -> None:
    """Fill `directory` with the essential set and `packages`, without the paths in `exclude`.

    Raises CommandFailed, apt.NoMirror.
    """
    sources = "".join(f"{entry}\n" for entry in apt.mirror())
    options = ["--variant=minbase", "--quiet", *(f"--include={name}" for name in packages)]
    options += [f"--dpkgopt=path-exclude={pattern}" for pattern in exclude]
    done = subprocess.run(
        ["mmdebstrap", *options, RELEASE, directory, "-"],
        input=sources,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CommandFailed(f"mmdebstrap of {RELEASE} into {directory}:\n{done.stderr[-4000:]}")


def guest_tree() -> Path:
    """The root file system of every guest, kept."""
    name = store.key(RELEASE, GUEST_PACKAGES, UNREAD, 1)
    return store.kept("trees", name, lambda tree: make(tree, GUEST_PACKAGES, UNREAD))

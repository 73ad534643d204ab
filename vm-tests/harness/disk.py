"""Disk images: ext4 file systems made from a directory, or empty ones of any kind."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from harness import command, debian, project, store

MIB = 1 << 20

CACHE_MOUNT = "/var/lib/fscached"
SECOND = "/srv/second"
CACHE_BYTES = 2048 * MIB
ROOT_BYTES = 1600 * MIB

# The file is all zeros: neither mkfs nor the kernel, later, needs to write the inode tables.
LAZY = ("-E", "lazy_itable_init=1,assume_storage_prezeroed=1")
MAKE = {"ext4": ("-F", *LAZY), "xfs": (), "btrfs": ()}
"""Options of mkfs by the file system that an empty disk can have."""


@dataclass(frozen=True)
class Disk:
    """An image attached to a guest and mounted at `mount` before its agent starts.

    `serial` names it in the guest (/sys/block/*/serial, at most 20 bytes). What a guest writes to a
    disk that is not `lasting` goes away with the guest. A lasting one honours flushes as real
    hardware does, and survives QEMU's end by SIGKILL. `own`: no other guest uses the image.
    """

    image: Path
    serial: str
    mount: str
    lasting: bool = False
    options: str = "noatime"
    own: bool = False
    file_system: str = "ext4"


def from_tree(image: Path, tree: Path, size_bytes: int | None = None) -> None:
    """Make `image` (sparse) from `tree`: contents, owners, modes, times, xattrs, hard links.

    Without `size_bytes` it is as big as the tree needs.
    """
    _blank(image, size_bytes or _needed_bytes(tree))
    # No journal: nothing written to it outlives its guest.
    command.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", *LAZY, "-d", tree, image])


def empty(image: Path, size_bytes: int = CACHE_BYTES, file_system: str = "ext4") -> None:
    """Make `image` (sparse) an empty file system, its journal included."""
    _blank(image, size_bytes)
    options = MAKE[file_system]
    command.run([f"mkfs.{file_system}", "-q", *options, image])


def _blank(image: Path, size_bytes: int) -> None:
    with image.open("wb") as file:
        file.truncate(size_bytes)


def _needed_bytes(tree: Path) -> int:
    """Room for every file in whole blocks and its inode, an eighth more, and 16 MiB."""
    sizes = [path.lstat().st_size for path in tree.rglob("*")]
    blocks = sum((size + 4095) // 4096 + 1 for size in sizes)
    return (blocks * 4096 + len(sizes) * 256) * 9 // 8 + 16 * MIB


def root() -> Disk:
    """Every guest's root disk, kept."""
    tree = debian.guest_tree()

    def build(directory: Path) -> None:
        from_tree(directory / "root.ext4", tree, ROOT_BYTES)

    kept = store.kept("disks", f"root-{tree.name}", build)
    return Disk(kept / "root.ext4", "root", "/")


def site() -> Disk:
    """The disk with the project as it is now, and what it depends on. Seconds after a change."""
    version = project.version()

    def build(directory: Path) -> None:
        project.install(directory / "tree")
        from_tree(directory / "site.ext4", directory / "tree")
        shutil.rmtree(directory / "tree")

    kept = store.kept("sites", version, build)
    return Disk(kept / "site.ext4", "site", project.MOUNT, options="ro")


def second(image: Path, file_system: str) -> Disk:
    """An empty disk of its own for a cache, beside the one with the daemon's state."""
    empty(image, file_system=file_system)
    return Disk(image, file_system, f"{SECOND}/{file_system}", own=True, file_system=file_system)


def cache(image: Path, size_bytes: int = CACHE_BYTES, *, lasting: bool = False) -> Disk:
    """A disk for the daemon's cache; a lasting one keeps what an earlier guest left in `image`."""
    if not (lasting and image.exists()):
        empty(image, size_bytes)
    return Disk(image, "cache", CACHE_MOUNT, lasting=lasting, own=True)

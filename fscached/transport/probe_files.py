"""What must be there before the kernel can ask through fanotify; the rest is in `probe`."""

from __future__ import annotations

from collections.abc import Iterator

from fscached.transport.host import (
    Finding,
    Host,
    descriptor_targets,
    judged,
    kernel_symbols,
    processes,
    text_of,
)

FIRST = (6, 14)
"""Linux 6.14 asks before content is read."""

_SLOTS = "/memfd:fscached-slots (deleted)"
_HOLDERS_MIN = 2


def survey(host: Host, directory: str) -> Iterator[Finding]:
    """The kernel, what it says to a group over files in this directory, its erofs, and whether
    anybody would outlive the daemon."""
    yield judged("kernel", host.version >= FIRST, host.release, "boot Linux 6.14 or newer")
    refused = host.group(directory)
    yield judged(
        "fanotify",
        not refused,
        refused or "asks before content is read, its queue unlimited",
        "CONFIG_FANOTIFY_ACCESS_PERMISSIONS, root, and a cache on ext4, xfs or btrfs are needed",
    )
    yield _erofs(host)
    yield _second_holder(host)


def _erofs(host: Host) -> Finding:
    """EROFS mounts plain files since 6.12, if it was configured to."""
    name, option = "erofs-files", "CONFIG_EROFS_FS_BACKED_BY_FILE"
    symbols = kernel_symbols(host)
    if "erofs_register_sysfs" not in symbols:
        return Finding(name, False, "erofs is not loaded", "modprobe erofs, then look again")
    ok = "erofs_fileio_submit_bio" in symbols
    found = "erofs mounts plain files" if ok else f"erofs was built without {option}"
    return judged(name, ok, found, f"boot a kernel with {option}")


def _second_holder(host: Host) -> Finding:
    """The group must outlive the daemon: its last close lets readers have zeros."""
    holders = [
        f"pid {directory.name} ({text_of(directory / 'comm').strip()})"
        for directory in processes(host)
        if _SLOTS in descriptor_targets(directory)
    ]
    return judged(
        "second-holder",
        len(holders) not in range(1, _HOLDERS_MIN),
        f"held by {', '.join(holders[:3])}" if holders else "no daemon runs yet",
        "run the daemon below `fscached supervise` or as docs/fscached.service does: if it alone "
        "holds the group and dies, readers get zeros",
    )

"""`daemon.c`: the floor under every on-demand daemon."""

from __future__ import annotations

from environments.guest import PROGRAMS
from harness.guest import Guest

from runners import MOUNT, LocalImage

END_LIMIT_S = 120
"""Of the guest; a daemon of 1,000 images took more than 20 s on a busy machine."""


class Minimal:
    """The minimal C daemon. It serves one directory, so it is started when the image is known."""

    name = "minimal"

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._cache = ""
        self._window_bytes = 0
        self._pid = ""

    def start(self, cache: str, window_bytes: int) -> None:
        self._cache = cache
        self._window_bytes = window_bytes

    def mount(self, image: LocalImage) -> None:
        serve = [f"{PROGRAMS}/daemon", self._cache, image.directory, str(self._window_bytes)]
        self._pid = self._guest.run(serve).stdout.strip()
        mount_fsid(self._guest, image.fsid)

    def stop(self) -> None:
        umount_and_end(self._guest, self._pid)


def mount_fsid(guest: Guest, fsid: str) -> None:
    """Mount a bound image, in a domain of its own name."""
    options = f"fsid={fsid},domain_id={fsid}"
    guest.run(f"mkdir -p {MOUNT}; mount -t erofs -o {options} none {MOUNT}")


def umount_and_end(guest: Guest, pid: str) -> None:
    """Unmount, send SIGTERM and wait: the device opens again only when it is closed."""
    guest.run(["umount", MOUNT])
    end(guest, pid)


def end(guest: Guest, pid: str) -> None:
    """The same, of a daemon with no mounts; one that had thousands of files open closes them."""
    guest.run(f"kill {pid}; timeout {END_LIMIT_S} tail --pid={pid} -f /dev/null")

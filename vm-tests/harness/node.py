"""A guest that loads images: an origin, the daemon, mounts. Cold when a scenario begins."""

from __future__ import annotations

import json
import time
from typing import Any

from harness import disk
from harness.daemon import Daemon, Settings, drop_caches
from harness.guest import Guest
from harness.registry import Registry

SETTLE_S = 20.0
"""CLOSE messages and lines of the access log come some milliseconds after what they tell of."""

UNMOUNT = "findmnt -rn -t erofs -o TARGET | tac | xargs -r -d '\\n' -n 1 umount"


class Node:
    """What a scenario acts on. `registry` must be running; `begin` and `end` do the rest."""

    def __init__(self, guest: Guest, registry: Registry) -> None:
        self.guest = guest
        self.registry = registry
        self.daemon = Daemon(guest)

    def begin(self, settings: Settings | None = None, *, supervised: bool = True) -> None:
        """Empty the cache, count from zero and start the daemon."""
        self.guest.run(f"rm -rf {disk.CACHE_MOUNT}/*")
        drop_caches(self.guest)
        self.registry.forget()
        self.guest.reset_cachefiles_counts()
        self.daemon.configure(settings or {})
        self.daemon.start(supervised=supervised)

    def end(self) -> None:
        """Unmount everything and stop the daemon, if it runs."""
        self.guest.run(UNMOUNT)
        if self.daemon.running:
            self.daemon.stop()

    def mount(self, name: str, directory: str) -> str:
        """Mount an image of the registry; what the command printed."""
        return self.daemon.mount(f"{self.registry.address}/{name}", directory)

    def read(self, kind: str, *words: object, timeout_s: float = 120.0) -> Any:
        """What a reader of `harness.reader` has to say."""
        command = ["/usr/bin/python3", "-m", "harness.reader", kind, *map(str, words)]
        return json.loads(self.guest.run(command, cwd="/run", timeout_s=timeout_s).stdout)

    def listing(self, directory: str, *, timeout_s: float = 600.0) -> str:
        """What is mounted there, as `harness.listing` tells it. Reads every file."""
        command = ["/usr/bin/python3", "-m", "harness.listing", directory]
        return self.guest.run(command, cwd="/run", timeout_s=timeout_s).stdout

    def sent_bytes(self, blob_id: str) -> int:
        """What the origin has sent of a blob."""
        requests = self.registry.requests()
        return sum(request.sent_bytes for request in requests if blob_id in request.path)

    def blob(self, blob_id: str) -> dict[str, Any]:
        """What the daemon says of a blob of its images."""
        images = self.daemon.status()["images"]
        blobs = (blob for image in images for blob in image["blobs"])
        found: dict[str, Any] = next(blob for blob in blobs if blob["id"] == blob_id)
        return found

    def discrepancies(self) -> dict[str, tuple[int, int]]:
        """Where the daemon's counts and those of kernel and origin differ: (daemon's, theirs)."""
        deadline = time.monotonic() + SETTLE_S
        while (found := self._discrepancies()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _discrepancies(self) -> dict[str, tuple[int, int]]:
        totals = self.daemon.status()["totals"]
        kernel = self.guest.cachefiles_counts()
        requests = self.registry.requests()
        theirs = {
            "opens": kernel["open"],
            "closes": kernel["close"],
            "reads": kernel["read"],
            "requests": len(requests),
            "received_bytes": sum(request.sent_bytes for request in requests),
        }
        pairs = {name: (totals[name], count) for name, count in theirs.items()}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def descriptors(self) -> int:
        """How many objects of the kernel the serving process holds."""
        listed = self.guest.run(["ls", "-l", f"/proc/{self.daemon.pid()}/fd"]).stdout
        return listed.count("anon_inode:[cachefiles]")

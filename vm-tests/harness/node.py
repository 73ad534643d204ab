"""A guest that loads images: an origin, the daemon, mounts. Cold when a scenario begins."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from typing import Any

from harness import disk
from harness.command import CommandFailed
from harness.daemon import Daemon, Settings
from harness.guest import Guest, Process
from harness.registry import Registry

SETTLE_S = 20.0
"""CLOSE messages and lines of the access log come some milliseconds after what they tell of."""

WHOLE_S = 120.0

# findmnt fails when it finds nothing.
UNMOUNT = "(findmnt -rn -t erofs -o TARGET || true) | sort -r | xargs -r -n 1 umount"


class Node:
    """What a scenario acts on. `registry` must be running; `begin` and `end` do the rest."""

    def __init__(self, guest: Guest, registry: Registry) -> None:
        self.guest = guest
        self.registry = registry
        self.daemon = Daemon(guest)

    def begin(self, settings: Settings | None = None, *, supervised: bool = True) -> None:
        """Empty the cache, count from zero and start the daemon."""
        self.guest.run(f"rm -rf {disk.CACHE_MOUNT}/*")
        self.registry.forget()
        self.guest.reset_cachefiles_counts()
        self.daemon.configure(settings or {})
        self.daemon.start(supervised=supervised)

    def end(self) -> None:
        """Unmount everything and stop the daemon, if it runs."""
        self.guest.run(UNMOUNT)
        if self.daemon.running:
            self.daemon.stop()

    def unmount(self) -> None:
        """Unmount everything as a person would, so that the daemon forgets its images."""
        mounted = self.guest.run("findmnt -rn -t erofs -o TARGET || true").stdout
        for directory in reversed(mounted.split()):
            self.daemon.umount(directory)

    def mount(self, name: str, directory: str) -> str:
        """Mount an image of the registry; what the command printed."""
        return self.daemon.mount(f"{self.registry.address}/{name}", directory)

    def await_whole(self) -> None:
        """Wait until prefetch has brought all blobs of all images."""
        deadline = time.monotonic() + WHOLE_S
        while True:
            blobs = [blob for image in self.daemon.status()["images"] for blob in image["blobs"]]
            if all(blob["resident_bytes"] == blob["size_bytes"] for blob in blobs):
                return
            assert time.monotonic() < deadline, blobs
            time.sleep(0.1)

    def fsid(self, directory: str) -> str:
        """Of the image that is mounted there."""
        images = json.loads(self.guest.run(["fscached", "status", "-o", "json"]).stdout)["images"]
        [fsid] = [image["fsid"] for image in images if directory in image["mounts"]]
        return str(fsid)

    def read(self, kind: str, *words: object, timeout_s: float = 120.0) -> Any:
        """What a reader of `harness.reader` has to say."""
        return self.read_by(self.start_reading(kind, *words), timeout_s)

    def start_reading(self, kind: str, *words: object) -> Process:
        """Start such a reader and return while it reads."""
        command = ["/usr/bin/python3", "-m", "harness.reader", kind, *map(str, words)]
        return self.guest.start(command, cwd="/run")

    def read_by(self, reader: Process, timeout_s: float = 120.0) -> Any:
        """What a reader that was started has to say at its end.

        Raises GuestTimeout when it still reads then, CommandFailed when it failed as a program.
        """
        done = reader.wait(timeout_s)
        if done.returncode != 0:
            raise CommandFailed(f"reader {reader.argv[3:]}: {done.stderr}")
        return json.loads(done.stdout)

    def digests(self, directory: str, paths: Collection[str]) -> dict[str, str]:
        """The sha256 of these files as they are mounted there, or the error of reading them."""
        read = self.read("whole", *(f"{directory}/{path}" for path in paths))
        return dict(zip(paths, read, strict=True))

    def listing(self, directory: str, *, timeout_s: float = 600.0) -> str:
        """What is mounted there, as `harness.listing` tells it. Reads every file."""
        command = ["/usr/bin/python3", "-m", "harness.listing", directory]
        return self.guest.run(command, cwd="/run", timeout_s=timeout_s).stdout

    def blob_bytes(self) -> dict[str, int]:
        """What the origin has sent of each blob since its log was forgotten, by ranges."""
        sent: dict[str, int] = {}
        for request in self.registry.requests():
            _, found, blob_id = request.path.partition("/blobs/sha256:")
            if found and request.status == 206:
                sent[blob_id] = sent.get(blob_id, 0) + request.sent_bytes
        return sent

    def discrepancies(self) -> dict[str, tuple[int, int]]:
        """Where the daemon's counts and those of kernel and origin differ: (daemon's, theirs).
        What was on the link to a prefetch that was stopped the origin alone knows of."""
        deadline = time.monotonic() + SETTLE_S
        while (found := self._discrepancies()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _discrepancies(self) -> dict[str, tuple[int, int]]:
        totals = self.daemon.status()["totals"]
        requests = self.registry.requests()
        theirs = {
            "requests": len(requests),
            "received_bytes": sum(request.sent_bytes for request in requests),
        }
        if self.guest.kernel.traced:
            kernel = self.guest.cachefiles_counts()
            theirs |= {f"{name}s": kernel[name] for name in ("open", "close", "read")}
        pairs = {name: (totals[name], count) for name, count in theirs.items()}
        if totals["prefetches_stopped"] and totals["received_bytes"] < theirs["received_bytes"]:
            del pairs["received_bytes"]
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def descriptors(self) -> int:
        """How many objects of the kernel the serving process holds."""
        listed = self.guest.run(["ls", "-l", f"/proc/{self.daemon.pid()}/fd"]).stdout
        return listed.count("anon_inode:[cachefiles]")

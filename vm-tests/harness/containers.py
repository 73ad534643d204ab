"""A node that runs containers: containerd, nydus-snapshotter and fscached in nydusd's place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness import fleet
from harness.containerd import Containerd
from harness.guest import Guest, Process
from harness.ledger import Asked, Ledger
from harness.registry import Registry
from harness.snapshotter import NAME, ROOT, SOCKET, Snapshotter

INSPECTOR = ("/usr/bin/python3", "-m", "harness.inspector")
CACHE = f"{ROOT}/cache/cache"
"""What the kernel keeps, below the directory that it was given."""

DEADLINE_S = 600.0
"""Longer than any pause: here EIO is always wrong."""

WINDOW_BYTES = 1 << 20
"""A reader of one file brings little of the next."""

CONFIGURATION = f"""
[prefetch]
enabled = false
[fetch]
deadline_s = {DEADLINE_S}
window_limit_bytes = {WINDOW_BYTES}
"""

LEFT = """
ps -eo stat=,ppid=,pid=,args= | awk '$1 ~ /^Z/ || /[f]scached|[c]ontainerd|[n]ydus/'
findmnt -rn -t erofs,overlay -o TARGET || true
"""


class Containers:
    """A node in a guest; its origin keeps a ledger."""

    def __init__(self, guest: Guest, memory_bytes: int) -> None:
        self.guest = guest
        self.registry = Registry(guest)
        self.ledger = Ledger(guest, self.registry)
        self.snapshotter = Snapshotter(guest, memory_bytes)
        registries = [self.ledger.address]
        self.containerd = Containerd(guest, registries, (NAME, SOCKET))
        self.bound = 0

    def start(self) -> None:
        """Start everything."""
        self.registry.start()
        self.ledger.start()
        self.guest.put("/etc/fscached/fscached.toml", CONFIGURATION.encode())
        self.snapshotter.start()
        self.containerd.start()

    def pace(self, bytes_per_s: float = math.inf) -> None:
        """How fast the origin is from now on; its ledger begins anew."""
        self.ledger.stop()
        self.ledger.start(bytes_per_s)

    def reference(self, image: str) -> str:
        return f"{self.ledger.address}/{image}"

    def pull(self, image: str) -> None:
        """By a kubelet's request. Raises CommandFailed."""
        self.guest.run(self.containerd.pull(self.reference(image)), timeout_s=120)
        self.containerd.require_pulled()

    def run(self, image: str, name: str, *command: str, tools: bool = False) -> Process:
        """Start a container."""
        return self.containerd.run(self.reference(image), name, command, tools=tools)

    def read(self, image: str, files: Sequence[str], name: str) -> Process:
        """Start a container that reads files of its image and checks each block of them."""
        words = ["stream", "/", *files]
        return self.run(image, name, "/usr/bin/env", "-C", "/run", *INSPECTOR, *words, tools=True)

    def mount(self, image: str) -> str:
        """Pull an image and give it the root file system of a container, without one; where."""
        self.pull(image)
        directory = f"/mnt/{image.partition(':')[0]}"
        self.containerd.prepare(directory)
        return directory

    def bind(self, count: int) -> None:
        """Have so many tiny images bound."""
        for image in fleet.TINY[self.bound : count]:
            self.mount(image)
        self.bound = max(self.bound, count)

    def asked(self, image: str) -> list[Asked]:
        """What the origin was asked for of an image of noise since `pace`."""
        return [one for blob in fleet.origin().blob_ids(image) for one in self.ledger.asked(blob)]

    def descriptors(self) -> list[str]:
        """What the daemon has open."""
        pid = self.snapshotter.running()
        shown = self.guest.run(["find", f"/proc/{pid}/fd", "-type", "l", "-printf", "%l\\n"])
        return sorted(shown.stdout.splitlines())

    def left(self) -> list[str]:
        """Processes of ours, zombies of whomever, and mounts that are there."""
        return self.guest.run(LEFT).stdout.splitlines()

    def cache_files(self) -> list[str]:
        """What lies in the cache."""
        return self.guest.run(["find", CACHE, "-type", "f"]).stdout.splitlines()

"""A node that runs containers: containerd, nydus-snapshotter and fscached in nydusd's place."""

from __future__ import annotations

from harness.containerd import Containerd
from harness.guest import Guest, Process
from harness.ledger import Ledger
from harness.registry import Registry
from harness.snapshotter import NAME, ROOT, SOCKET, Snapshotter

CACHE = f"{ROOT}/cache/cache"
"""What the kernel keeps, below the directory that it was given."""

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

    def start(self) -> None:
        """Start everything."""
        self.registry.start()
        self.ledger.start()
        self.guest.put("/etc/fscached/fscached.toml", b"[prefetch]\nenabled = false\n")
        self.snapshotter.start()
        self.containerd.start()

    def reference(self, image: str) -> str:
        return f"{self.ledger.address}/{image}"

    def pull(self, image: str) -> None:
        """By a kubelet's request. Raises CommandFailed."""
        self.guest.run(self.containerd.pull(self.reference(image)), timeout_s=120)
        self.containerd.require_pulled()

    def run(self, image: str, name: str, *command: str) -> Process:
        """Start a container."""
        return self.containerd.run(self.reference(image), name, command)

    def mount(self, image: str) -> str:
        """Pull an image and give it the root file system of a container, without one; where."""
        self.pull(image)
        directory = f"/mnt/{image.partition(':')[0]}"
        self.containerd.prepare(directory)
        return directory

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

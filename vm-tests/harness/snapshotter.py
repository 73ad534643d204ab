"""Debian's nydus-snapshotter, unmodified: the package, and the program in a guest, with fscached in
nydusd's place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from harness import apt, disk, project, store
from harness.command import CommandFailed
from harness.disk import Disk
from harness.guest import Guest, Process

T = TypeVar("T")

RELEASE, PACKAGE, PROGRAM = "trixie", "nydus-snapshotter", "usr/bin/containerd-nydus-grpc"
MOUNT = "/opt/nydus-snapshotter"

NAME = "nydus"
ROOT = f"{disk.CACHE_MOUNT}/nydus"
RUN = "/run/nydus"
SOCKET = f"{RUN}/grpc.sock"
SYSTEM = f"{RUN}/system.sock"
LOG = "/var/log/snapshotter.log"
NYDUSD = "/usr/local/bin/fscached"
"""A file of its own: an upgrade renames the new one over it."""

CURL_REFUSED = 7

CGROUP = "/sys/fs/cgroup/fscached"
PATIENCE_S = 120.0

CONFIGURATION = f"""\
version = 1
root = "{ROOT}"
address = "{SOCKET}"
daemon_mode = "shared"
[system]
enable = true
address = "{SYSTEM}"
[daemon]
nydusd_path = "{NYDUSD}"
nydusd_config = "{RUN}/nydusd.json"
fs_driver = "fscache"
recover_policy = "failover"
threads_number = 4
[log]
log_to_stdout = true
[metrics]
address = ""
"""

TEMPLATE = {
    "type": "bootstrap",
    "domain_id": "fleet",
    "config": {
        "backend_type": "registry",
        "backend_config": {"scheme": "http", "timeout": 5, "retry_limit": 2},
        "cache_type": "fscache",
    },
}

LAUNCHER = f"""\
#!/bin/sh
echo $$ > {CGROUP}/cgroup.procs
exec {project.MOUNT}/bin/fscached "$@"
"""
"""All of the daemon's memory is charged to its group: the snapshotter's own `[cgroup]` moves the
process once it runs, and what it has by then stays outside."""


def package() -> Path:
    """The unpacked package, kept; nothing is installed. Raises apt.NoMirror, CommandFailed."""

    def fetch(directory: Path) -> None:
        archive = apt.Archive(RELEASE)
        archive.refresh()
        archive.extract([PACKAGE], directory)

    return store.kept("snapshotters", store.key(RELEASE, PACKAGE, 1), fetch, keep=1)


def of_guests() -> Disk:
    """The package on a disk of its own, kept."""
    tree = package()

    def build(directory: Path) -> None:
        disk.from_tree(directory / "snapshotter.ext4", tree)

    kept = store.kept("disks", f"snapshotter-{tree.name}", build)
    return Disk(kept / "snapshotter.ext4", "snapshotter", MOUNT, options="ro")


class Snapshotter:
    """The snapshotter of a guest, and its daemon, which `memory_bytes` limits."""

    def __init__(self, guest: Guest, memory_bytes: int) -> None:
        self._guest = guest
        self._process: Process | None = None
        self._mended = 0
        """How often it gave up before it was begun anew for that."""
        guest.put(f"{RUN}/config.toml", CONFIGURATION.encode())
        guest.put(f"{RUN}/nydusd.json", json.dumps(TEMPLATE).encode())
        guest.put(NYDUSD, LAUNCHER.encode(), mode=0o755)
        guest.run(
            "mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup; "
            "echo '+memory +pids' > /sys/fs/cgroup/cgroup.subtree_control; "
            f"mkdir -p {CGROUP} {ROOT}; echo {memory_bytes} > {CGROUP}/memory.max"
        )

    def start(self) -> None:
        """Start it as its unit would, and wait until its daemon is kept and it serves itself."""
        before = self.kept()
        command = [f"{MOUNT}/{PROGRAM}", "--config", f"{RUN}/config.toml"]
        self._process = self._guest.start([*command, "--log-to-stdout"], log=LOG)
        self.until(lambda: self.kept() > before, "the snapshotter does not keep its daemon's end")
        self.until(self._listens, "the snapshotter does not listen")

    def _listens(self) -> bool:
        done = self._guest.run(["curl", "-s", "--unix-socket", SOCKET, "http://s"], check=False)
        return done.returncode != CURL_REFUSED

    @property
    def pid(self) -> int:
        """The process that was started."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """kill -9 of it alone."""
        assert self._process is not None
        self._process.signal(9)
        self._process.wait()

    def restart_if_given_up(self) -> None:
        """Have a snapshotter begin anew that gave up on its daemon's successor: it would not see
        that one's end."""
        if (given_up := self.given_up()) > self._mended:
            self._mended = given_up
            self.kill()
            self.start()

    def given_up(self) -> int:
        """How often it gave up on a successor."""
        return self.log().count("didn't reach state INIT")

    def stop(self) -> int:
        """SIGTERM; its exit status. Its daemon gets one as well, as from systemd when a unit ends:
        0.13.4 leaves it when it believes an image to be in use, as it may after a failover."""
        assert self._process is not None
        self._process.signal()
        status = self._process.wait().returncode
        if pid := self.status().get("pid"):
            self._guest.run(["kill", str(pid)])
        return status

    def upgrade(self) -> None:
        """Have it put a new program, the same, in the place of its daemon's."""
        fresh = f"{NYDUSD}.new"
        self._guest.put(fresh, LAUNCHER.encode(), mode=0o755)
        body = json.dumps({"nydusd_path": fresh, "version": "2", "policy": "rolling"})
        url = "http://snapshotter/api/v1/daemons/upgrade"
        curl = ["curl", "-sSf", "--unix-socket", SYSTEM, "-X", "PUT", "--data", body, url]
        self._guest.run(curl, timeout_s=PATIENCE_S)

    def kept(self) -> int:
        """How often a daemon has left with it what outlives the daemon."""
        return self.log().count("receives states")

    def log(self) -> str:
        """What it and its daemons have said."""
        try:
            return self._guest.get(LOG).decode()
        except OSError:
            return ""

    def status(self) -> dict[str, Any]:
        """Of the daemon that was started last; empty when it does not answer or does not run."""
        done = self._guest.run(
            f"socket=$(ls -t {ROOT}/socket/*/api*.sock | head -n 1); "
            'curl -sSf --unix-socket "$socket" http://daemon/api/v2/status',
            check=False,
        )
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def running(self, *others: int) -> int:
        """Wait for a daemon that runs and is none of these; its process."""

        def look() -> int:
            pid = int(self.status().get("pid", 0))
            return 0 if pid in others else pid

        return self.until(look, "no daemon runs")

    def memory(self) -> dict[str, int]:
        """Of all its daemons so far: the most at once (`peak`), and how many were ended for taking
        more than they may (`oom_kill`)."""
        peak = self._guest.get(f"{CGROUP}/memory.peak").decode()
        events = self._guest.get(f"{CGROUP}/memory.events").decode()
        counts = dict(line.split() for line in events.splitlines())
        return {"peak": int(peak), "oom_kill": int(counts["oom_kill"])}

    def until(self, look: Callable[[], T], what: str) -> T:
        """Wait until there is something. Raises CommandFailed with the log's end."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := look()):
            if time.monotonic() > deadline:
                raise CommandFailed(f"{what}:\n{self.log()[-4000:]}")
            time.sleep(0.2)
        return found

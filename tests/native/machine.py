"""A machine of its own within this one: real systemd as PID 1 over a copy of this file system.

Everything is namespaces (PID, mount, UTS, IPC, cgroup) and an overlay whose upper half is thrown
away. The network is this machine's. What lies below `data` is on a real disk, as fanotify needs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from fscached.transport.mount import mount_points

BOOT = """
set -eu
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs dev
mkdir dev/pts dev/shm
for name in null zero full random urandom tty; do
    touch dev/$name
    mount --bind /dev/$name dev/$name
done
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666,mode=620
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p var/lib/fscached run/old
mount --bind "$1/data" var/lib/fscached
pivot_root . run/old
umount -l run/old
mount --make-rshared /  # systemd does so itself, but in containers
exec env -i container=fscached-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --log-target=console --log-level=notice --unit=basic.target </dev/null
"""
PATIENCE_S = 30.0


def lacking() -> str:
    """What this machine lacks; empty: nothing."""
    if not Path("/lib/systemd/systemd").exists():
        return "no systemd (apt-get install systemd)"
    if not _cgroup2():
        return "no cgroup2 is mounted"
    return ""


class Machine:
    """One such machine, below `directory` (on ext4, xfs or btrfs)."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self.upper = directory / "upper"
        for path in (self.data, self.upper, directory / "work", directory / "root"):
            path.mkdir(parents=True)
        self._cgroup = Path(_cgroup2(), f"fscached-test-{os.getpid()}")
        self._cgroup.mkdir()
        self._log = directory / "console"
        command = ["unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--cgroup"]
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(
                ["sh", "-c", f"echo $$ >{self._cgroup}/cgroup.procs; exec \"$@\"", "sh",
                 *command, "sh", "-c", BOOT, "sh", str(directory)],
                stdout=log, stderr=log,
            )  # fmt: skip
        self._init = 0
        self._wait_for_init()

    def put(self, path: Path) -> str:
        """Copy a file there; where it is now."""
        shutil.copy(path, f"/proc/{self._init}/root/tmp/{path.name}")
        return f"/tmp/{path.name}"

    def run(
        self, *words: str | Path, check: bool = True, network: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A program there, ended."""
        command = [*self.inside(network), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def inside(self, network: bool = True) -> list[str]:
        """What to put before a command that is to run there."""
        enter = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-p", "-C", "-r", "-w"]
        return [*enter, *([] if network else ["unshare", "-n"])]

    def status(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).stdout.strip()

    def console(self) -> str:
        """What systemd and its units have said."""
        said = self.run("journalctl", "--no-pager", "-n", "100", check=False).stdout
        return self._log.read_text(errors="replace")[-3000:] + said[-6000:]

    def end(self) -> None:
        """All of its processes are killed with its PID 1."""
        if self._init:
            os.kill(self._init, signal.SIGKILL)
        self._outer.wait(PATIENCE_S)
        for path in sorted(self._cgroup.rglob("*/"), reverse=True):
            path.rmdir()
        self._cgroup.rmdir()
        shutil.rmtree(self.upper, ignore_errors=True)

    def _wait_for_init(self) -> None:
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            assert self._outer.poll() is None, self._log.read_text()
            if pids := children.read_text().split():
                self._init = int(pids[0])
                if Path(f"/proc/{pids[0]}/comm").read_text() == "systemd\n":
                    state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
                    if state in {"running", "degraded"}:
                        return
            time.sleep(0.05)
        raise TimeoutError(f"systemd does not come up: {self._log.read_text()[-3000:]}")


def _cgroup2() -> str:
    return next((point.target for point in mount_points() if point.fs_type == "cgroup2"), "")

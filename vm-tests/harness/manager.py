"""Debian's systemd in a guest, for one unit of ours: PID 1 of a pid namespace, over the guest's own
root and mounts."""

from __future__ import annotations

import time
from collections.abc import Mapping

from harness.guest import Guest

BOOT = """
mount --make-rshared /
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec unshare --pid --fork --kill-child --mount --propagation unchanged sh -c '
    mount --make-private /proc
    mount -t proc proc /proc
    exec env -i container=fscached-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
        /lib/systemd/systemd --log-target=console --log-level=notice --unit=basic.target'
"""
UNITS = "/etc/systemd/system"
CONSOLE = "/var/log/systemd.log"
UP = {"running", "degraded"}
PATIENCE_S = 180.0


class Manager:
    """systemd, running. `name` is the service, `units` are files by name."""

    def __init__(self, guest: Guest, name: str, units: Mapping[str, bytes]) -> None:
        self._guest = guest
        self._name = name
        for unit, text in units.items():
            guest.put(f"{UNITS}/{unit}", text)
        self._outer = guest.start(BOOT, log=CONSOLE)
        self._init = self._wait_for_init()
        self._wait_until_up()

    def start(self, unit: str = "") -> None:
        """Start the service, or another unit; it is ready then. Raises CommandFailed."""
        self.run("systemctl", "start", unit or self._name)

    def reload(self) -> None:
        """What is done after an upgrade."""
        self.run("systemctl", "reload", self._name)

    def stop(self) -> None:
        """End the unit in order."""
        self.run("systemctl", "stop", self._name)

    def kill(self, pid: int, signal: str = "KILL") -> None:
        """A signal to a process as it is numbered there, which is how it numbers itself."""
        self.run("kill", "-s", signal, str(pid))

    def property(self, name: str) -> str:
        """One of the unit's."""
        return self.run("systemctl", "show", "-P", name, self._name).strip()

    def successor(self, pid: int) -> int:
        """The main process that follows this one, once it is ready."""
        deadline = time.monotonic() + PATIENCE_S
        while self.property("MainPID") in {str(pid), "0"} or self.property("SubState") != "running":
            assert time.monotonic() < deadline, f"nobody follows {pid}"
            time.sleep(0.2)
        return int(self.property("MainPID"))

    def process(self, pid: int) -> dict[str, str]:
        """/proc/PID/status of such a process."""
        lines = self.run("cat", f"/proc/{pid}/status").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def journal(self) -> str:
        """What was said about the unit and by it."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", self._name)

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a program there."""
        inside = ["nsenter", "-t", str(self._init), "-m", "-p", *command]
        return self._guest.run(inside, timeout_s=PATIENCE_S, check=check).stdout

    def end(self) -> None:
        """All of its processes end with it."""
        self._outer.signal(9)
        self._outer.wait(PATIENCE_S)

    def _wait_for_init(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        look = f"pgrep -x systemd -P {self._outer.pid} || true"
        while not (pids := self._guest.run(look).stdout.split()):
            assert time.monotonic() < deadline, "systemd does not start"
            time.sleep(0.1)
        return int(pids[0])

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (said := self.run("systemctl", "is-system-running", check=False).strip()) not in UP:
            assert time.monotonic() < deadline, f"systemd is {said or 'silent'}"
            time.sleep(0.5)

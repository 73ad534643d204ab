"""fscached in a guest: configured, started, watched, ended."""

from __future__ import annotations

import json
import signal as signals
import time
from collections.abc import Mapping
from typing import Any

from harness.command import CommandFailed
from harness.guest import Guest, Process

CONFIG = "/etc/fscached/fscached.toml"
LOG = "/var/log/fscached.log"
OUTPUT = "/var/log/fscached.out.log"
SOCKET = "/run/fscached/api.sock"
API = "http://daemon"
READY_TIMEOUT_S = 180.0
"""An emulated guest on a machine with ten times more to do than processors takes a minute."""

Settings = Mapping[str, Mapping[str, object]]
"""Tables of a configuration."""

DEFAULTS: Settings = {
    "prefetch": {"enabled": False},
    "fetch": {"deadline_s": 20.0},
    "log": {"file": LOG},
}


class Daemon:
    """The daemon of a guest, below `fscached supervise` unless told otherwise."""

    def __init__(self, guest: Guest, settings: Settings | None = None) -> None:
        self._guest = guest
        self._process: Process | None = None
        self.configure(settings or {})

    def configure(self, settings: Settings) -> None:
        """Write the configuration for the next start: the scenarios' defaults and `settings`."""
        tables = {name: dict(table) for name, table in DEFAULTS.items()}
        for name, table in settings.items():
            tables.setdefault(name, {}).update(table)
        self._guest.put(CONFIG, toml(tables).encode())

    def start(self, *, supervised: bool = True, env: Mapping[str, str] | None = None) -> float:
        """Start it and wait until its API answers; how many seconds that took."""
        command = ["fscached", "supervise" if supervised else "run"]
        began = time.monotonic()
        self._process = self._guest.start(command, env=env, log=OUTPUT)
        self.wait()
        return time.monotonic() - began

    def wait(self) -> None:
        """Wait until the API answers. Raises CommandFailed with the log's end when it does not, at
        once when what was started has ended."""
        assert self._process is not None
        ask = ["--unix-socket", SOCKET, f"{API}/api/v1/daemon"]
        try:
            self._guest.await_answer(self._process, *ask, timeout_s=READY_TIMEOUT_S)
        except CommandFailed as error:
            words = self._guest.run(["tail", "-n", "20", LOG, OUTPUT], check=False).stdout
            raise CommandFailed(f"{error}\n{words}") from None

    def stop(self, *, timeout_s: float = 10.0) -> int:
        """SIGTERM; its exit status. Raises GuestTimeout when it does not end."""
        assert self._process is not None
        self._process.signal()
        done = self._process.wait(timeout_s)
        self._process = None
        return done.returncode

    def replace(self, *, timeout_s: float = 30.0) -> None:
        """Have the supervisor put a new daemon in the place of this one; wait until it serves.

        Raises CommandFailed when it does not.
        """
        assert self._process is not None
        before = self.pid()
        self._process.signal(signals.SIGHUP)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.wait()
            if self.pid() != before:
                return
        raise CommandFailed(f"the daemon is still process {before} after {timeout_s} s")

    @property
    def supervisor(self) -> int:
        """The process that was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    def pid(self) -> int:
        """The serving process."""
        return int(self.status()["pid"])

    def status(self) -> dict[str, Any]:
        """What the API says; asked without the command line, which takes a second to start."""
        asked = self._guest.run(["curl", "-sSf", "--unix-socket", SOCKET, f"{API}/api/v2/status"])
        status: dict[str, Any] = json.loads(asked.stdout)
        return status

    def asked(self) -> int:
        """How many READs the kernel has asked for: its own count from tracepoints, since the last
        reset; fanotify has none, so the daemon's, since it started."""
        if self._guest.kernel.traced:
            return self._guest.cachefiles_counts()["read"]
        return int(self.status()["totals"]["reads"])

    def mount(self, reference: str, directory: str, *, timeout_s: float = 60.0) -> str:
        """Mount an image; makes the directory."""
        self._guest.run(["mkdir", "-p", directory])
        return self._guest.run(
            ["fscached", "mount", reference, directory], timeout_s=timeout_s
        ).stdout

    def umount(self, directory: str) -> None:
        """Unmount it."""
        self._guest.run(["fscached", "umount", directory])

    def log(self) -> str:
        """What it has logged since the guest booted."""
        try:
            return self._guest.get(LOG).decode()
        except OSError:
            return ""


def toml(settings: Settings) -> str:
    """A configuration file."""
    lines = []
    for name, table in settings.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines)


def _toml(value: object) -> str:
    """A value as TOML writes it: JSON but for tables."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_toml(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


def drop_caches(guest: Guest) -> None:
    """Have the kernel forget every page, dentry and inode it can."""
    guest.run("sync; echo 3 > /proc/sys/vm/drop_caches")

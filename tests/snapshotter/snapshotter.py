"""Debian's nydus-snapshotter, unmodified, with fscached in nydusd's place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fscached.control.client import Client, DaemonAway, DaemonError
from tests.snapshotter.snapshots import Snapshots

HOUSE = Path(__file__).parents[2]
PATIENCE_S = 30.0
_T = TypeVar("_T")

LAUNCHER = """#!{python} -P
import sys, time
time.sleep({late_s})
sys.path.insert(0, {house!r})
from fscached.control import listener
inherited = listener.inherited
listener.inherited = lambda path: (inherited(path), time.sleep({slow_s}))[0]
from tests.snapshotter.nydusd import main
sys.exit(main({config!r}, sys.argv[1:]))
"""


def until(found: Callable[[], _T | None], what: str, limit_s: float = PATIENCE_S) -> _T:
    """Wait until something is there."""
    end_s = time.monotonic() + limit_s
    while (thing := found()) is None:
        if time.monotonic() > end_s:
            raise TimeoutError(what)
        time.sleep(0.005)
    return thing


class Snapshotter:
    """One below `root`, whose path is short: sockets are below it."""

    def __init__(self, program: Path, root: Path, device: str, policy: str = "failover") -> None:
        self.root = root
        self.log = root / "snapshotter.log"
        self.nydusd = root / "nydusd"
        self.process: subprocess.Popen[bytes] | None = None
        self._program = program
        self._snapshots: Snapshots | None = None
        self._write(device, policy)

    def start(self) -> None:
        """Start it, and wait for its daemon."""
        root = self.root
        words = ["--config", root / "config.toml", "--root", root / "r", "--log-to-stdout"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", self._program, *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self._running, "the daemon does not run")

    def _running(self) -> dict[str, Any] | None:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(self.log.read_text()[-3000:])
        return self.info() if self.info().get("state") == "RUNNING" else None

    def keeps(self, times: int) -> None:
        """Wait until a daemon has left its descriptors so many times."""
        self.logs("receives states", times)

    def logs(self, text: str, times: int = 1) -> None:
        """Wait for a text in its log."""

        def look() -> bool | None:
            return self.log.read_text().count(text) >= times or None

        until(look, f"no {text!r} in {self.log}")

    def kill(self) -> None:
        """kill -9 of it alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM to it alone; its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """End whatever of it still runs."""
        if self._snapshots is not None:
            self._snapshots.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for pid in self.daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def daemons(self) -> list[int]:
        """Living processes that were started as its nydusd."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (directory / "cmdline").read_bytes().split(b"\0")
                if os.fsencode(self.root / "nydusd") in b"\0".join(words[:4]):
                    found.append(int(directory.name))
        return found

    @property
    def snapshots(self) -> Snapshots:
        """containerd's side."""
        if self._snapshots is None:
            self._snapshots = Snapshots(str(self.root / "grpc.sock"))
        return self._snapshots

    @property
    def system(self) -> Client:
        """Its system controller."""
        return Client(str(self.root / "system.sock"), PATIENCE_S)

    @property
    def socket(self) -> Path | None:
        """The API socket of the daemon that was started last."""
        sockets = list(self.root.glob("r/socket/*/api*.sock"))
        return max(sockets, key=lambda path: path.stat().st_mtime_ns, default=None)

    @property
    def daemon(self) -> Client:
        """The daemon's API."""
        assert self.socket is not None
        return Client(str(self.socket), PATIENCE_S)

    def info(self) -> dict[str, Any]:
        """Of the daemon; empty when it does not answer."""
        try:
            return dict(self.daemon.get("/api/v1/daemon"))
        except (AssertionError, DaemonAway, DaemonError, OSError):
            return {}

    def _write(self, device: str, policy: str) -> None:
        root = self.root
        (root / "r").mkdir()
        (root / "config.toml").write_text(f"""
version = 1
root = "{root}/r"
address = "{root}/grpc.sock"
daemon_mode = "shared"
[system]
enable = true
address = "{root}/system.sock"
[daemon]
nydusd_path = "{self.nydusd}"
nydusd_config = "{root}/nydusd.json"
fs_driver = "fscache"
recover_policy = "{policy}"
threads_number = 4
log_rotation_size = 100
[log]
log_to_stdout = true
[metrics]
address = ""
""")
        template = {
            "type": "bootstrap",
            "config": {
                "backend_type": "registry",
                "backend_config": {"scheme": "http", "timeout": 5, "retry_limit": 2},
                "cache_type": "fscache",
            },
        }
        (root / "nydusd.json").write_text(json.dumps(template))
        (root / "fscached.toml").write_text(f"""
[paths]
runtime_directory = "{root}/run"
state_directory = "{root}/state"
[kernel]
device = "{device}"
[source]
insecure_registries = ["*"]
[prefetch]
enabled = false
""")
        self.install(self.nydusd)

    def install(self, place: Path, late_s: float = 0.0, slow_s: float = 0.0) -> None:
        """Put the daemon's program there; it is late to begin, or slow once it listens in its
        predecessor's place."""
        text = LAUNCHER.format(
            python=sys.executable,
            house=str(HOUSE),
            config=str(self.root / "fscached.toml"),
            late_s=late_s,
            slow_s=slow_s,
        )
        place.write_text(text)
        place.chmod(0o755)

"""fscached on this machine, below its supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from environments import ROOT
from harness.daemon import Settings, toml

from fscached.control.client import Client, DaemonAway
from fscached.control.messages import ImageInfo, ObjectStatus, Status
from fscached.transport import mount
from runners import LocalImage
from runners.fscached import entry
from runners.usage import Usage

PATIENCE_S = 20.0
FILL_PATIENCE_S = 600.0
PROGRAM = (sys.executable, "-m", "fscached")


class Supervised:
    """A daemon with a cache of its own below `scratch`, an image of it at `directory`."""

    def __init__(self, name: str, scratch: Path, tables: Settings) -> None:
        self.name = name
        self.directory = scratch / "image"
        self.cache = scratch / "cache"
        self._scratch = scratch
        self._config = scratch / "fscached.toml"
        self._tables: Settings = {
            "paths": {
                "runtime_directory": str(scratch / "run"),
                "state_directory": str(scratch / "state"),
            },
            "cache": {"directory": str(self.cache)},
            "kernel": {"transport": "fanotify"},
            "log": {"level": "warn"},
            **tables,
        }
        self._client = Client(str(scratch / "run/api.sock"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until the API answers."""
        self.directory.mkdir(parents=True)
        self._config.write_text(toml(self._tables))
        with (self._scratch / "log").open("wb") as log:
            supervise = [*PROGRAM, "supervise", "--config", str(self._config)]
            self._process = subprocess.Popen(supervise, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (self._scratch / "log").read_text(errors="replace")[-4000:]
                raise SystemExit(f"fscached does not start: {said}")
            time.sleep(0.05)

    def pull(self, reference: str) -> None:
        """Mount an image of a registry."""
        self._mount(self.add(reference))

    def add(self, reference: str) -> ImageInfo:
        """Have an image of a registry served: its name, and the files that are to be mounted."""
        image = self._client.put("/api/v2/images", {"reference": reference})
        return msgspec.convert(image, ImageInfo)

    def forget(self, fsid: str) -> None:
        """Serve an image no more, and delete the files that no other needs."""
        if any(known.fsid == fsid for known in self.images()):
            self._client.delete("/api/v2/images", fsid=fsid)
        self._client.put("/api/v2/cache/gc", {"all_idle": True})

    def mount(self, image: LocalImage) -> None:
        """Mount the one image, whose bytes are on this machine."""
        self.offer(image)
        [known] = self.images()
        self._mount(known)

    def offer(self, image: LocalImage) -> None:
        """Have an image served whose bytes are on this machine."""
        self._client.put("/api/v2/blobs", entry(image))

    def images(self) -> list[ImageInfo]:
        """All that are served: names, and the files that are to be mounted."""
        return msgspec.convert(self._client.get("/api/v2/images"), list[ImageInfo])

    def restart(self) -> None:
        """Kill the daemon, and wait until the next one answers: the supervisor starts it."""
        pid = self.status().pid
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + FILL_PATIENCE_S
        while not (self._answers() and self.status().pid != pid):
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: no daemon follows")
            time.sleep(0.005)

    def resident_mib(self) -> float:
        """Memory of the daemon, without the supervisor's."""
        return self.status().rss_bytes / (1 << 20)

    def files(self) -> tuple[Path, list[Path]]:
        """The bootstrap's file and the blobs' of the one image."""
        [known] = self.images()
        return Path(known.bootstrap), [Path(device) for device in known.devices or []]

    def events(self) -> int:
        """How often the kernel has asked."""
        return self.status().totals.reads

    def usage(self) -> Usage:
        """Until now, without the supervisor's."""
        status = self.status()
        return Usage.read(status.totals, Path(f"/proc/{status.pid}/stat").read_text())

    def status(self) -> Status:
        """What `fscached status` shows."""
        return msgspec.convert(self._client.get("/api/v2/status"), Status)

    def record(self) -> None:
        """Begin a new run of the one image."""
        [known] = self.images()
        self._client.put("/api/v2/traces/record", {"image": known.fsid})

    def trace(self) -> bytes:
        """The present run of the one image, as `fscached trace export` writes it."""
        [known] = self.images()
        found = self._client.get("/api/v2/traces", image=known.fsid, run="true")
        return json.dumps(found["trace"]).encode()

    def await_complete(self) -> None:
        """Wait until all blobs are resident. Raises SystemExit when they do not become so."""
        deadline = time.monotonic() + FILL_PATIENCE_S
        while not all(_whole(blob) for blob in self.status().images[0].blobs):
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: not complete after {FILL_PATIENCE_S:.0f} s")
            time.sleep(0.5)

    def stop(self) -> None:
        if self.directory.is_mount():
            mount.unmount(str(self.directory))
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE_S)

    def _mount(self, image: ImageInfo) -> None:
        # Not by `fscached mount`: it would bind what another daemon here has mounted of this image.
        mount.mount_files(str(self.directory), image.bootstrap, image.devices or [])

    def _answers(self) -> bool:
        try:
            self._client.get("/api/v1/daemon")
        except DaemonAway:
            return False
        return True


def _whole(blob: ObjectStatus) -> bool:
    return blob.resident_bytes == blob.size_bytes

"""Ways of having the same tree on this machine, each on a directory of its own."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from environments.native import MemoryGroup
from environments.programs import passthrough
from harness import command

PATIENCE_S = 20.0


class Tree(Protocol):
    """A tree that can be read at `directory` from `start` to `stop`."""

    name: str
    directory: Path

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Native:
    """The file system that everybody else's bytes lie on as well."""

    name = "ext4"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def start(self) -> None:
        """It is there."""

    def stop(self) -> None:
        """It stays."""


class Loop:
    """An image through loop devices with direct I/O, as the kernel mounts it without fscached."""

    name = "loop"

    def __init__(self, directory: Path, bootstrap: Path, blobs: Sequence[Path]) -> None:
        self.directory = directory
        self._bootstrap = bootstrap
        self._blobs = blobs

    def start(self) -> None:
        self.directory.mkdir()
        source, *devices = [_loop_device(file) for file in (self._bootstrap, *self._blobs)]
        options = ",".join(["ro", *(f"device={device}" for device in devices)])
        try:
            command.run(["mount", "-t", "erofs", "-o", options, source, self.directory])
        finally:
            # In use: each goes when the last user does, whatever becomes of us.
            for device in (source, *devices):
                command.run(["losetup", "--detach", device])

    def stop(self) -> None:
        command.run(["umount", self.directory])


class Fuse:
    """libfuse's passthrough_ll as it comes, over a directory."""

    name = "fuse"

    def __init__(self, directory: Path, source: Path, group: MemoryGroup) -> None:
        self.directory = directory
        self._source = source
        self._group = group
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """In the memory group: the pages it reads count where those of other readers do."""
        self.directory.mkdir()
        # It keeps every file that the kernel knows open.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        serve = [str(passthrough()), "-f", "-o", f"source={self._source}", str(self.directory)]
        self._process = subprocess.Popen(self._group.within(serve))
        deadline = time.monotonic() + PATIENCE_S
        while not self.directory.is_mount():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("passthrough_ll does not mount")
            time.sleep(0.02)

    def stop(self) -> None:
        command.run(["umount", self.directory])
        if self._process is not None:
            self._process.wait(PATIENCE_S)


def _loop_device(file: Path) -> str:
    options = ["--find", "--show", "--read-only", "--direct-io=on"]
    return command.run(["losetup", *options, file]).strip()

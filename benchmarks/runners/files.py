"""An image of this machine mounted from plain files, with and without somebody to ask."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from environments.programs import HERE, compiled

from fscached.transport import mount
from runners import LocalImage


class Unasked:
    """Its one blob is a file that never was marked."""

    name = "plain"

    def __init__(self, scratch: Path, image: LocalImage) -> None:
        self.directory = scratch / "image"
        self.cache = scratch / "cache"
        self.bootstrap = Path(image.directory, image.fsid)
        [self.blob] = (file for file in Path(image.directory).iterdir() if file != self.bootstrap)

    def start(self) -> None:
        self.directory.mkdir(parents=True)
        self.fill()
        mount.mount_files(str(self.directory), str(self.bootstrap), [str(self.cache)])

    def stop(self) -> None:
        mount.unmount(str(self.directory))

    def fill(self) -> None:
        """Make the cache file."""
        shutil.copyfile(self.blob, self.cache)


class Asking(Unasked):
    """Its one blob is a hole that the minimal C daemon fills."""

    name = "minimal"

    def __init__(self, scratch: Path, image: LocalImage) -> None:
        super().__init__(scratch, image)
        self._daemon: subprocess.Popen[str] | None = None

    def fill(self) -> None:
        serve = [compiled(HERE / "fanotify.c"), self.cache, self.blob]
        self._daemon = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
        assert self._daemon.stdout
        if self._daemon.stdout.readline() != "marked\n":
            raise SystemExit("the minimal daemon does not start")

    def stop(self) -> None:
        super().stop()
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()

"""The real thing: docker-registry on a port of loopback, its storage in a directory."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PROGRAM = shutil.which("docker-registry")
_LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")
_ACCESS = re.compile(r'^127\.0\.0\.1 - \S+ \[[^]]+\] "(\S+) (\S+) \S+" (\d+) (\d+)')


class Access(NamedTuple):
    """A line of its access log."""

    method: str
    target: str
    status: int
    body_bytes: int


class DockerRegistry:
    """One that runs. What it logged is in `log`."""

    def __init__(self, host: str, root: Path, log: Path) -> None:
        self.host = host
        self._root = root / "docker" / "registry" / "v2"
        self._log = log

    def put_blob(self, repository: str, body: bytes) -> str:
        """Lay a blob into its storage as a push would; returns the hex digits of its sha256."""
        digest = hashlib.sha256(body).hexdigest()
        data = self._root / "blobs" / "sha256" / digest[:2] / digest / "data"
        link = self._root / "repositories" / repository / "_layers" / "sha256" / digest / "link"
        for path, content in ((data, body), (link, f"sha256:{digest}".encode())):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return digest

    def put_manifest(self, repository: str, tag: str, body: bytes) -> None:
        """Lay a manifest into its storage. As a push would, but that nobody looks whether the
        repository has what the manifest names."""
        digest = self.put_blob(repository, body)
        manifests = self._root / "repositories" / repository / "_manifests"
        for link in (
            manifests / "revisions" / "sha256" / digest / "link",
            manifests / "tags" / tag / "current" / "link",
            manifests / "tags" / tag / "index" / "sha256" / digest / "link",
        ):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.write_bytes(f"sha256:{digest}".encode())

    def accesses(self, count: int, containing: str) -> list[Access]:
        """The requests with this in their targets, at least `count`: it logs them a bit later."""
        for _ in _patience():
            found = [match for line in self._lines() if (match := _ACCESS.match(line))]
            accesses = [Access(m[1], m[2], int(m[3]), int(m[4])) for m in found]
            accesses = [access for access in accesses if containing in access.target]
            if len(accesses) >= count:
                return accesses
        raise TimeoutError(f"fewer than {count} requests were logged")

    def _lines(self) -> list[str]:
        return self._log.read_text().splitlines()


@contextmanager
def docker_registry(root: Path, auth: dict[str, object] | None = None) -> Iterator[DockerRegistry]:
    """Run one with its storage below `root`."""
    assert PROGRAM is not None
    root.mkdir(exist_ok=True)
    config, log = root / "config.yml", root / "log"
    settings: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(root)}},
        "http": {"addr": "127.0.0.1:0", "secret": "of the test"},
    }
    if auth is not None:
        settings["auth"] = auth
    config.write_text(json.dumps(settings))  # JSON is YAML
    with log.open("wb") as output:
        process = subprocess.Popen([PROGRAM, "serve", str(config)], stdout=output, stderr=output)
    try:
        yield DockerRegistry(_wait_until_listening(log), root, log)
    finally:
        process.kill()
        process.wait()


def _wait_until_listening(log: Path) -> str:
    for _ in _patience():
        if match := _LISTENING.search(log.read_text()):
            return match[1]
    raise TimeoutError(f"docker-registry does not listen: {log.read_text()}")


def _patience() -> Iterator[None]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        yield
        time.sleep(0.01)

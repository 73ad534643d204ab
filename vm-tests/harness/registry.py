"""Debian's docker-registry: in a guest as the origin, on the host to fill its storage."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harness.command import CommandFailed
from harness.guest import Guest, Process

STORAGE = "/var/lib/registry"
START_TIMEOUT_S = 60.0

# Without health checks and upload purging it never touches a storage it only reads.
CONFIGURATION = """\
version: 0.1
log: {{accesslog: {{disabled: false}}, level: error}}
storage:
  filesystem: {{rootdirectory: {storage}}}
  delete: {{enabled: true}}
  maintenance: {{uploadpurging: {{enabled: false}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""

# Apache's combined log format.
ACCESS = re.compile(r'^\S+ \S+ .*? \[.*?\] "(\S+) (\S+) HTTP/[\d.]+" (\d{3}) (\d+) ', re.MULTILINE)


class Request(NamedTuple):
    """A request the origin answered, from its access log. `sent_bytes` is the body's length."""

    method: str
    path: str
    status: int
    sent_bytes: int


def requests(log: str) -> list[Request]:
    """The requests in an access log, in the order they were finished."""
    rows = ACCESS.findall(log)
    return [Request(method, path, int(status), int(sent)) for method, path, status, sent in rows]


class Registry:
    """docker-registry on the guest's loopback, or on that of the namespace which the command
    `within` enters. Every byte it sends is in its access log."""

    def __init__(
        self,
        guest: Guest,
        *,
        storage: str = STORAGE,
        port: int = 5000,
        within: Sequence[str] = (),
    ) -> None:
        self._within = list(within)
        self.address = f"127.0.0.1:{port}"
        self.storage = storage
        self._guest = guest
        self._files = f"/run/registry-{port}"
        self._log = f"/var/log/registry-{port}.log"
        self._process: Process | None = None
        configuration = CONFIGURATION.format(storage=storage, port=port)
        guest.put(f"{self._files}/config.yml", configuration.encode())

    def start(self) -> None:
        """Start it and wait until it answers /v2/; the log goes on where it ended.

        Raises CommandFailed when it does not answer within `START_TIMEOUT_S`.
        """
        serve = ["/usr/bin/docker-registry", "serve", f"{self._files}/config.yml"]
        self._process = self._guest.start([*self._within, *serve], log=self._log)
        url = f"http://{self.address}/v2/"
        self._guest.await_answer(self._process, url, within=self._within, timeout_s=START_TIMEOUT_S)
        self.forget()

    def stop(self) -> None:
        """End it at once, in the middle of what it sends; no error when it does not run."""
        if self._process is not None:
            self._process.signal(9)
            self._process.wait()
            self._process = None

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    def requests(self) -> list[Request]:
        """What it has answered since it started or was told to forget."""
        return requests(self._guest.get(self._log).decode())

    def forget(self) -> None:
        """Empty the access log."""
        self._guest.run(["truncate", "--size=0", self._log])

    def blob(self, digest: str) -> str:
        """The file in the guest that holds a blob's bytes: where to damage it."""
        algorithm, value = digest.split(":")
        return f"{self.storage}/docker/registry/v2/blobs/{algorithm}/{value[:2]}/{value}/data"


class HostRegistry:
    """docker-registry on the host's loopback over `storage`, at one address from start to start."""

    def __init__(self, storage: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._directory = tempfile.TemporaryDirectory(prefix="fscached-registry-")
        self._file = Path(self._directory.name, "registry.yml")
        self._file.write_text(CONFIGURATION.format(storage=storage, port=port))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers. Raises CommandFailed when it does not."""
        serve = ["docker-registry", "serve", str(self._file)]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(serve, stdout=quiet, stderr=quiet)
        _await_answer(f"http://{self.address}/v2/", self._process)

    def kill(self) -> None:
        """At once. Connections end, new ones are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Connections stay, and nothing comes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """For good."""
        self.kill()
        self._directory.cleanup()


@contextmanager
def on_host_with_faults(storage: Path) -> Iterator[HostRegistry]:
    """Run docker-registry on the host's loopback; it can be killed, started and paused.

    What is pushed to it becomes a guest's origin by `disk.from_tree(image, storage)`.
    """
    registry = HostRegistry(storage)
    try:
        registry.start()
        yield registry
    finally:
        registry.close()


@contextmanager
def on_host(storage: Path) -> Iterator[str]:
    """As much, without the faults; yields its HOST:PORT."""
    with on_host_with_faults(storage) as registry:
        yield registry.address


def _await_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.02)
    raise CommandFailed(f"docker-registry does not answer at {url}")

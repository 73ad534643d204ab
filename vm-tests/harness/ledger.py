"""What was asked of a guest's origin, range by range: `harness.proxy` between it and the daemon."""

from __future__ import annotations

import json
import signal
from typing import NamedTuple

from harness.guest import Guest, Process
from harness.registry import START_TIMEOUT_S, Registry

PORT = 5100


class Asked(NamedTuple):
    """Bytes [start, end) of a blob, asked for at this time of the guest's monotonic clock."""

    at_s: float
    start: int
    end: int


class Ledger:
    """A registry's proxy. `address` is what images are named by to go through it."""

    def __init__(self, guest: Guest, registry: Registry) -> None:
        self.address = f"127.0.0.1:{PORT}"
        self._guest = guest
        self._origin_port = registry.address.rpartition(":")[2]
        self._storage = registry.storage
        self._file = f"/run/ledger-{PORT}"
        self._process: Process | None = None

    def start(self, bytes_per_s: float = float("inf")) -> None:
        """Start it with an empty ledger and wait until it answers."""
        self._guest.run(["rm", "-f", self._file])
        storage = f"{self._storage}/docker/registry/v2/blobs/sha256"
        words = [str(PORT), self._origin_port, storage, self._file, str(bytes_per_s)]
        self._process = self._guest.start(
            ["/usr/bin/python3", "-m", "harness.proxy", *words],
            cwd="/run",
            log="/var/log/proxy.log",
        )
        url = f"http://{self.address}/v2/"
        self._guest.await_answer(self._process, url, timeout_s=START_TIMEOUT_S)

    def hurry(self) -> None:
        """Be slow no longer."""
        assert self._process is not None
        self._process.signal(signal.SIGUSR1)

    def stop(self) -> None:
        """End it at once; no error when it does not run."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def asked(self, blob_id: str) -> list[Asked]:
        """What was asked of a blob since the start, in that order."""
        rows = map(json.loads, self._guest.get(self._file).splitlines())
        return [
            Asked(row["at_s"], row["start"], row["end"]) for row in rows if row["blob"] == blob_id
        ]

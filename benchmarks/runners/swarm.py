"""Two dfdaemons and their scheduler in a guest: one beside the reader, one in the peer's namespace.

They are the stand-in of the tests (`tests/source/dfdaemon.py`): Dragonfly cannot be installed here.
"""

from __future__ import annotations

from collections.abc import Sequence

from environments import ROOT
from environments.network import NODE_ADDRESS, PEER, PEER_ADDRESS, REGISTRY, within
from harness.guest import Guest, Process

PROGRAM = "/run/bench/dfdaemon.py"
STANDIN = ROOT / "tests/source/dfdaemon.py"
PORT = 4001
UPLOAD_PORT = 4005
MIRROR = f"http://127.0.0.1:{PORT}"
SCHEDULER = f"{PEER_ADDRESS}:4100"
PATIENCE_S = 300.0


class Swarm:
    """What the node's reader may ask instead of the origin. Everybody is empty at the start."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._processes: dict[str, Process] = {}

    def start(self) -> None:
        """Start all three and wait until they are ready."""
        self._guest.put(PROGRAM, STANDIN.read_bytes())
        self._serve("scheduler", PEER, "--only-scheduler", "--listen", SCHEDULER)
        for space, address in ((PEER, PEER_ADDRESS), ("", NODE_ADDRESS)):
            upload = f"{address}:{UPLOAD_PORT}"
            words = ["--listen", f"127.0.0.1:{PORT}", "--upload", upload]
            self._serve(f"dfdaemon-{space or 'node'}", space, *words, "--scheduler", SCHEDULER)
        for name in self._processes:
            # Each prints its addresses when it is ready.
            wait = f"for i in $(seq 600); do [ -s {_log(name)} ] && exit; sleep 0.1; done; exit 1"
            self._guest.run(wait, timeout_s=PATIENCE_S)

    def fill(self, space: str, name: str, digests: Sequence[str]) -> None:
        """Have the dfdaemon of a namespace fetch all of an image."""
        for digest in digests:
            said = f"-H 'X-Dragonfly-Registry: http://{REGISTRY}'"
            fetch = f"curl -sSf -o /dev/null {said} {MIRROR}/v2/{name}/blobs/{digest}"
            self._guest.run(f"{within(space)}{fetch}", timeout_s=PATIENCE_S)

    def stop(self) -> None:
        """End all."""
        for process in self._processes.values():
            process.signal(9)
            process.wait()
        self._processes.clear()

    def _serve(self, name: str, space: str, *words: str) -> None:
        argv = [*within(space).split(), "python3", PROGRAM, *words]
        self._guest.run(["rm", "-f", _log(name)])
        self._processes[name] = self._guest.start(argv, log=_log(name))


def _log(name: str) -> str:
    return f"/var/log/{name}.log"

"""fscached as it is installed in the guest, without a supervisor."""

from __future__ import annotations

import json
import shlex

import msgspec
from environments.guest import probe
from harness.daemon import Settings, toml
from harness.guest import Guest

from fscached.control.messages import Status, Totals
from runners import MOUNT, LocalImage
from runners.minimal import end, mount_fsid, umount_and_end
from runners.usage import Usage

CONFIG = "/run/bench/fscached.toml"
LOG = "/var/log/fscached-bench.log"
SOCKET = "/run/fscached/api.sock"
PROGRAM = ("/opt/fscached/bin/fscached", "run", "--config")
STATE = "/run/bench/state"


class Fscached:
    """Our daemon. `start_s` and `resident_idle_mib` have a value from every start,
    `resident_image_mib` one from every stop."""

    name = "fscached"

    def __init__(self, guest: Guest) -> None:
        self.start_s: list[float] = []
        self.resident_idle_mib: list[float] = []
        self.resident_image_mib: list[float] = []
        self._guest = guest
        self._pid = ""

    def start(self, cache: str, window_bytes: int) -> None:
        windows = {"window_bytes": window_bytes, "window_limit_bytes": window_bytes}
        self.run(cache, {"fetch": windows})

    def run(self, cache: str, tables: Settings) -> None:
        """Start with these settings and no prefetch."""
        settings: Settings = {
            "paths": {"state_directory": STATE},
            "cache": {"directory": cache},
            "prefetch": {"enabled": False},
            "log": {"file": LOG, "level": "warn"},
            **tables,
        }
        self._guest.run(["rm", "-rf", STATE])
        self._guest.put(CONFIG, toml(settings).encode())
        seconds, self._pid = probe(self._guest, "start", SOCKET, *PROGRAM, CONFIG).split()
        self.start_s.append(float(seconds))
        self.resident_idle_mib.append(self.resident_mib())

    def mount(self, image: LocalImage) -> None:
        self.offer(image)
        mount_fsid(self._guest, image.fsid)

    def remount(self, image: LocalImage) -> None:
        """One that is served."""
        mount_fsid(self._guest, image.fsid)

    def offer(self, image: LocalImage) -> None:
        """Have it served."""
        self._guest.run(self.offering(image))

    def offering(self, image: LocalImage) -> str:
        """The script that has it served."""
        body = shlex.quote(json.dumps(entry(image)))
        options = f"-sSf --unix-socket {SOCKET} -X PUT --data-binary {body}"
        return f"curl {options} http://d/api/v2/blobs"

    def pull(self, reference: str) -> None:
        """Mount an image of a registry."""
        self._guest.run(["mkdir", "-p", MOUNT])
        self._guest.run(["fscached", "mount", "--config", CONFIG, reference, MOUNT])

    def reads(self) -> int:
        """How often the kernel has asked."""
        return self._totals().reads

    def usage(self) -> Usage:
        """Until now."""
        totals = self._totals()
        return Usage.read(totals, self._guest.run(["cat", f"/proc/{self._pid}/stat"]).stdout)

    def _totals(self) -> Totals:
        ask = ["curl", "-sSf", "--unix-socket", SOCKET, "http://d/api/v2/status"]
        return msgspec.json.decode(self._guest.run(ask).stdout, type=Status).totals

    def stop(self) -> None:
        self.resident_image_mib.append(self.resident_mib())
        umount_and_end(self._guest, self._pid)

    def end(self) -> None:
        """End it; nothing is mounted any more."""
        end(self._guest, self._pid)

    def resident_mib(self) -> float:
        shown = self._guest.run(["grep", "VmRSS", f"/proc/{self._pid}/status"]).stdout
        return int(shown.split()[1]) / 1024


def entry(image: LocalImage, **config: object) -> dict[str, object]:
    """nydusd's BlobCacheEntry, as nydus-snapshotter sends it for a local image, or for another by
    its `config`."""
    return {
        "type": "bootstrap",
        "id": image.fsid,
        "domain_id": image.domain_id,
        "config": {
            "id": image.fsid,
            "backend_type": "localfs",
            "backend_config": {"dir": image.directory},
            "cache_type": "fscache",
            "cache_config": {"work_dir": STATE},
            "metadata_path": f"{image.directory}/{image.fsid}",
            **config,
        },
    }

"""Somebody else's daemon in our place: nydusd's command line and API, a program the user brings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from environments.guest import PROGRAMS, probe
from harness.guest import Guest

from runners import MOUNT, LocalImage
from runners.fscached import entry
from runners.minimal import end, mount_fsid, umount_and_end

SOCKET = "/run/bench/peer.sock"
LOG = "/var/log/bench-peer.log"
IMAGES = "/run/bench/peer"
PROGRAM = f"{PROGRAMS}/peer"

BOOTSTRAP = """
import io, json, os, sys, tarfile, urllib.request
registry, name, tag, target = sys.argv[1:]
base = f"http://{registry}/v2/{name}"
request = urllib.request.Request(f"{base}/manifests/{tag}")
request.add_header("Accept", "application/vnd.oci.image.manifest.v1+json")
manifest = json.load(urllib.request.urlopen(request))
wanted = "containerd.io/snapshot/nydus-bootstrap"
[layer] = [l for l in manifest["layers"] if wanted in l.get("annotations", {})]
archive = urllib.request.urlopen(f"{base}/blobs/{layer['digest']}").read()
with tarfile.open(fileobj=io.BytesIO(archive)) as files, open(target, "wb") as file:
    file.write(files.extractfile("image/image.boot").read())
"""
"""What a snapshotter does before it asks for an image: arguments REGISTRY NAME TAG TARGET."""

NO_PREFETCH = {"enable": False, "threads_count": 4, "merging_size": 1 << 20, "bandwidth_rate": 0}
PREFETCH = {**NO_PREFETCH, "enable": True}


class Peer:
    """A Runner. Its window is its own: nydusd has no setting for that."""

    name = "peer"

    def __init__(self, guest: Guest, command: str) -> None:
        """`command`: its first word is a program of this machine, which is taken along, or one
        that the guest has."""
        program, *words = shlex.split(command)
        if Path(program).is_file():
            guest.put(PROGRAM, Path(program).read_bytes(), mode=0o755)
            program = PROGRAM
        self._words = [program, *words]
        self._guest = guest
        self._pid = ""

    def start(self, cache: str, window_bytes: int = 0) -> None:
        """On a cache directory; nothing is mounted."""
        self._guest.run(f"rm -rf {IMAGES} {SOCKET}; mkdir -p {IMAGES}")
        singleton = ["singleton", "--fscache", cache, "--apisock", SOCKET]
        logged = ["--log-level", "warn", "--log-file", LOG]
        said = probe(self._guest, "start", SOCKET, *self._words, *singleton, *logged)
        self._pid = said.split()[1]

    def mount(self, image: LocalImage) -> None:
        """See Runner."""
        self.offer(image)
        mount_fsid(self._guest, image.fsid)

    def offer(self, image: LocalImage) -> None:
        """Have it served, without prefetch."""
        self._guest.run(self.offering(image))

    def offering(self, image: LocalImage) -> str:
        """The script that has it served, without prefetch."""
        return _put(entry(image, prefetch_config=NO_PREFETCH))

    def offered(self, registry: str, reference: str, *, prefetch: bool) -> str:
        """The script that has an image of a registry mounted at `MOUNT`; its bootstrap is here
        already, as a snapshotter has it."""
        name, _, tag = reference.partition(":")
        fsid = f"peer-{name.replace('/', '-')}"
        metadata = f"{IMAGES}/{fsid}"
        self._guest.python(BOOTSTRAP, registry, name, tag, metadata)
        wanted = entry(
            LocalImage(IMAGES, fsid),
            backend_type="registry",
            backend_config={"scheme": "http", "host": registry, "repo": name},
            prefetch_config=PREFETCH if prefetch else NO_PREFETCH,
        )
        options = f"fsid={fsid},domain_id={fsid}"
        return f"{_put(wanted)}; mkdir -p {MOUNT}; mount -t erofs -o {options} none {MOUNT}"

    def resident_mib(self) -> float:
        """Memory of the daemon."""
        shown = self._guest.run(["grep", "VmRSS", f"/proc/{self._pid}/status"]).stdout
        return int(shown.split()[1]) / 1024

    def stop(self) -> None:
        """See Runner."""
        umount_and_end(self._guest, self._pid)

    def end(self) -> None:
        """End it; nothing is mounted any more."""
        end(self._guest, self._pid)


def _put(wanted: Mapping[str, object]) -> str:
    """The script for one request."""
    body = shlex.quote(json.dumps(wanted))
    options = f"-sSf --unix-socket {SOCKET} -X PUT --data-binary {body}"
    return f"curl {options} http://d/api/v2/blobs"

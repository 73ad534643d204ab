"""Debian's containerd in a guest: pulls as a kubelet has it pull, runs containers by `ctr`.

Debian 12 has no client of the CRI; `ctr` unpacks only when all layers are there, where the CRI
unpacks each as it comes, and tells a snapshotter nothing of an image. So its one request is made
here: gRPC is a POST over HTTP/2 of a length and a message (grpc.io, "gRPC over HTTP2"), this one
two nested protobuf strings.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shlex
from collections.abc import Sequence

from harness import disk
from harness.command import CommandFailed
from harness.guest import Guest, Process

SOCKET = "/run/containerd/containerd.sock"
ROOT = f"{disk.CACHE_MOUNT}/containerd"
"""On the same disk as fscached's cache."""

BLOBS = f"{ROOT}/io.containerd.content.v1.content/blobs"
FILES = "/run/containerd-files"
METHOD = "http://localhost/runtime.v1.ImageService/PullImage"
CTR = ("ctr", "--namespace", "k8s.io")
OVERLAYFS = "overlayfs"

CONFIGURATION = """\
version = 2
root = "{root}"
state = "/run/containerd"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
disable_snapshot_annotations = false
"""
MIRROR = """\
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."{registry}"]
endpoint = ["http://{registry}"]
"""
PROXY = """\
[proxy_plugins.{snapshotter}]
type = "snapshot"
address = "{address}"
"""

TOOLS = ("/usr", "/lib", "/lib64", "/run/harness")
"""Directories of the guest with which a container of any image can run the harness' readers."""


class Containerd:
    """containerd in a guest; its content store is empty whenever it starts."""

    def __init__(
        self, guest: Guest, registries: Sequence[str], snapshotter: tuple[str, str] | None = None
    ) -> None:
        """`snapshotter`: name and socket of one of another process."""
        self._guest = guest
        self._process: Process | None = None
        self._snapshotter = snapshotter[0] if snapshotter else OVERLAYFS
        text = CONFIGURATION.format(root=ROOT, snapshotter=self._snapshotter)
        text += "".join(MIRROR.format(registry=registry) for registry in registries)
        if snapshotter:
            text += PROXY.format(snapshotter=snapshotter[0], address=snapshotter[1])
        guest.put(f"{FILES}/config.toml", text.encode())

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._guest.run(["rm", "-rf", ROOT])
        serve = ["containerd", "--config", f"{FILES}/config.toml"]
        self._process = self._guest.start(serve, log="/var/log/containerd.log")
        self._guest.run("for i in $(seq 300); do ctr version && exit; sleep 0.1; done; exit 1")

    def pull(self, reference: str) -> list[str]:
        """The command that pulls and unpacks an image."""
        self._guest.put(f"{FILES}/request", pull_request(reference))
        grpc = ["--header", "content-type: application/grpc", "--header", "te: trailers"]
        request = ["--data-binary", f"@{FILES}/request", "--output", f"{FILES}/answer"]
        curl = ["curl", "-sS", "--http2-prior-knowledge", "--unix-socket", SOCKET]
        return [*curl, "--dump-header", f"{FILES}/headers", *grpc, *request, METHOD]

    def require_pulled(self) -> None:
        """Raises CommandFailed when the last pull failed: gRPC says so with HTTP's status 200."""
        if b"sha256:" not in self._guest.get(f"{FILES}/answer"):
            said = self._guest.get(f"{FILES}/headers").decode()
            raise CommandFailed(f"containerd did not pull: {said}")

    def mount(self, reference: str, directory: str) -> list[str]:
        """The command that gives a container its own root file system of an image."""
        words = ["--rw", "--snapshotter", self._snapshotter, reference, directory]
        return [*CTR, "images", "mount", *words]

    def prepare(self, directory: str) -> None:
        """As much of the image that was pulled last, without looking for its layers: a remote
        snapshotter has not brought them."""
        words = [*self._snapshots, "prepare", "--target", directory, directory, self._chain()]
        self._guest.run(f"mkdir -p {directory}; {shlex.join(words)} | sh", timeout_s=120)

    def _chain(self) -> str:
        """The snapshot of the image that was pulled last (OCI image specification, ChainID)."""
        found = re.search(rb"sha256:[0-9a-f]{64}", self._guest.get(f"{FILES}/answer"))
        assert found is not None
        config = self._guest.get(f"{BLOBS}/{found[0].decode().replace(':', '/')}")
        layers: list[str] = json.loads(config)["rootfs"]["diff_ids"]
        return functools.reduce(_chained, layers)

    def run(self, reference: str, name: str, command: Sequence[str], *, tools: bool) -> Process:
        """Start a container that goes away when it ends; `tools`: with what is in `TOOLS`."""
        words = ["--rm", "--snapshotter", self._snapshotter]
        for directory in TOOLS if tools else ():
            options = "options=rbind:ro"
            words += ["--mount", f"type=bind,src={directory},dst={directory},{options}"]
        return self._guest.start([*CTR, "run", *words, reference, name, *command])

    def remove(self) -> None:
        """Unmount and remove every root file system that was given out, and every image."""
        for key in self.snapshots():
            if key.startswith("/"):
                self._guest.run(f"umount {key}; {shlex.join(self._snapshots)} rm {key}")
        ctr = shlex.join(CTR)
        self._guest.run(f"{ctr} images ls -q | xargs -r {ctr} images rm --sync", timeout_s=300)

    def snapshots(self) -> list[str]:
        """The keys of its snapshots."""
        rows = self._guest.run([*self._snapshots, "ls"]).stdout.splitlines()[1:]
        return [row.split()[0] for row in rows]

    @property
    def _snapshots(self) -> list[str]:
        return [*CTR, "snapshots", "--snapshotter", self._snapshotter]

    def stop(self, directory: str) -> None:
        """Unmount what was mounted there and end."""
        self._guest.run(f"! mountpoint -q {directory} || umount {directory}")
        if self._process is not None:
            self._process.signal()
            self._process.wait()
            self._process = None


def _chained(below: str, layer: str) -> str:
    return f"sha256:{hashlib.sha256(f'{below} {layer}'.encode()).hexdigest()}"


def pull_request(reference: str) -> bytes:
    """PullImageRequest(image=ImageSpec(image=reference)), in its frame (cri-api, api.proto)."""
    message = reference.encode()
    for _ in range(2):
        # Field 1, length-delimited; lengths below 128 are one byte.
        assert len(message) < 128
        message = b"\x0a" + bytes([len(message)]) + message
    return b"\0" + len(message).to_bytes(4, "big") + message

"""A full pull, as a kubelet has it done: Debian's containerd, asked over its CRI socket.

Debian 12 has no client of the CRI; `ctr` unpacks only when all layers are there, where the CRI
unpacks each as it comes. So its one request is made here: gRPC is a POST over HTTP/2 of a length
and a message (grpc.io, "gRPC over HTTP2"), this one two nested protobuf strings.
"""

from __future__ import annotations

from harness import disk
from harness.command import CommandFailed
from harness.guest import Guest, Process

SOCKET = "/run/containerd/containerd.sock"
ROOT = f"{disk.CACHE_MOUNT}/containerd"
"""On the same disk as fscached's cache."""

FILES = "/run/bench/containerd"
METHOD = "http://localhost/runtime.v1.ImageService/PullImage"
CTR = ("ctr", "--namespace", "k8s.io", "images")

CONFIGURATION = """\
version = 2
root = "{root}"
state = "/run/containerd"
[plugins."io.containerd.grpc.v1.cri".registry.mirrors."{registry}"]
endpoint = ["http://{registry}"]
"""


class Containerd:
    """containerd in a guest; its content store is empty whenever it starts."""

    def __init__(self, guest: Guest, registry: str) -> None:
        self._guest = guest
        self._process: Process | None = None
        configuration = CONFIGURATION.format(root=ROOT, registry=registry)
        guest.put(f"{FILES}/config.toml", configuration.encode())

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._guest.run(["rm", "-rf", ROOT])
        serve = ["containerd", "--config", f"{FILES}/config.toml"]
        self._process = self._guest.start(serve, log="/var/log/containerd.log")
        self._guest.run("for i in $(seq 300); do ctr version && exit; sleep 0.1; done; exit 1")

    def pull(self, reference: str) -> list[str]:
        """The command that pulls and unpacks an image."""
        self._guest.put(f"{FILES}/request", _pull_request(reference))
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
        return [*CTR, "mount", "--rw", "--snapshotter", "overlayfs", reference, directory]

    def stop(self, directory: str) -> None:
        """Unmount what was mounted there and end."""
        self._guest.run(f"! mountpoint -q {directory} || umount {directory}")
        if self._process is not None:
            self._process.signal()
            self._process.wait()
            self._process = None


def _pull_request(reference: str) -> bytes:
    """PullImageRequest(image=ImageSpec(image=reference)), in its frame (cri-api, api.proto)."""
    message = reference.encode()
    for _ in range(2):
        # Field 1, length-delimited; lengths below 128 are one byte.
        assert len(message) < 128
        message = b"\x0a" + bytes([len(message)]) + message
    return b"\0" + len(message).to_bytes(4, "big") + message

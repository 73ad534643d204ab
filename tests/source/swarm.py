"""A cluster on one machine: a registry, a scheduler and nodes, each a process with a peer of its
own; in network namespaces where that is allowed, else on loopback.

The registry is Debian's docker-registry behind nginx, whose access log is what counts. With
namespaces the link out of the registry's can be made slow, for all nodes together.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rafs_v6 import codec
from rafs_v6.layout import Digest
from tests.source import dfdaemon, swarm_node
from tests.source.docker_registry import docker_registry
from tests.source.nginx import Nginx, nginx

MIB: Final = 1 << 20
REPOSITORY: Final = "library/image"
NETWORK: Final = "10.77"
ROUTER: Final = "10.76.0.1"
# As Docker's documentation has it before a registry: bodies are not kept in files on the way.
_FORWARD: Final = """
proxy_max_temp_file_size 0; proxy_buffers 32 64k; proxy_http_version 1.1;
location / {{ proxy_pass http://{}; }}
"""
BURST_BYTES: Final = 128 << 10
QUEUE_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob, not compressed: its chunks follow each other."""

    body: bytes = field(repr=False)
    digests: tuple[str, ...]
    chunk_bytes: int = MIB

    @classmethod
    def random(cls, size_bytes: int) -> Layer:
        body = random.Random(size_bytes).randbytes(size_bytes)
        chunks = (body[at : at + MIB] for at in range(0, size_bytes, MIB))
        return cls(body, tuple(codec.digest(Digest.BLAKE3, chunk).hex() for chunk in chunks))


class Namespaces:
    """Network namespaces around a router, which is in one too: the machine's own network is left
    alone. All of them are gone when it is closed.

    On a bridge every node would know all others, and all namespaces of a kernel share one table of
    neighbours, of a thousand: with 64 nodes packets were lost.
    """

    def __init__(self) -> None:
        from pyroute2 import IPRoute, netns

        self._netns = netns
        self._open = IPRoute
        self._prefix = f"fscached-{os.getpid()}-"
        self._made: list[str] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> Namespaces:
        self._make("hub")
        with self.entered("hub"):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        return self

    def __exit__(self, *_: object) -> None:
        for full in self._made:
            with suppress(OSError):
                self._netns.remove(full)

    def remove(self, name: str) -> None:
        """Let a namespace go."""
        self._made.remove(self._prefix + name)
        self._netns.remove(self._prefix + name)

    def add(self, name: str) -> str:
        """A namespace with a link to the router; its address. Its loopback is up."""
        self._make(name)
        number = next(self._numbers)
        address = f"{NETWORK}.{number // 250}.{number % 250 + 1}"
        port, inside = f"p{number}", self._prefix + name
        with self._links("hub") as hub:
            hub.link("add", ifname=port, kind="veth", peer={"ifname": "eth0", "net_ns_fd": inside})
            link = hub.link_lookup(ifname=port)[0]
            hub.addr("add", index=link, address=ROUTER, prefixlen=32)
            hub.link("set", index=link, state="up")
            hub.route("add", dst=f"{address}/32", oif=link, scope="link")
        with self._links(name) as there:
            link = there.link_lookup(ifname="eth0")[0]
            there.addr("add", index=link, address=address, prefixlen=32)
            for index in (link, there.link_lookup(ifname="lo")[0]):
                there.link("set", index=index, state="up")
            there.route("add", dst=f"{ROUTER}/32", oif=link, scope="link")
            there.route("add", dst="default", gateway=ROUTER, oif=link)
        return address

    def shape(self, name: str, bytes_per_s: int) -> None:
        """What leaves a namespace, no faster than this; 0: as fast as it can."""
        with self._links(name) as there:
            link = there.link_lookup(ifname="eth0")[0]
            with suppress(Exception):
                there.tc("del", index=link, root=True)
            if bytes_per_s:
                there.tc(
                    "add",
                    "tbf",
                    index=link,
                    handle=0x10000,
                    rate=bytes_per_s,
                    burst=BURST_BYTES,
                    limit=QUEUE_BYTES,
                )

    @contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """This thread, and the processes it starts, are in a namespace."""
        self._netns.pushns(self._prefix + name)
        try:
            yield
        finally:
            self._netns.popns()

    @contextmanager
    def _links(self, name: str) -> Iterator[Any]:
        """The links, addresses and queues of a namespace."""
        with self.entered(name), self._open() as links:
            yield links

    def _make(self, name: str) -> None:
        self._made.append(self._prefix + name)
        self._netns.create(self._made[-1])


class Loopback:
    """The same without namespaces."""

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, name: str) -> str:
        return "127.0.0.1"

    def remove(self, name: str) -> None:
        pass

    @contextmanager
    def entered(self, name: str) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the nodes say, and how many body bytes the registry sent for each of its own."""

    nodes: list[dict[str, Any]]
    origin_ratio: float

    @property
    def started_s(self) -> float:
        """When the last of them had read what it starts with."""
        return max(float(node["started_s"]) for node in self.nodes)


class Cluster:
    """A registry with an image, and as many nodes as a run wants."""

    def __init__(self, places: Namespaces | Loopback, origin: Nginx, layers: dict[str, Layer]):
        self.places = places
        self.layers = layers
        self._origin = origin
        self._names = itertools.count()

    def run(self, count: int, **task: Any) -> Outcome:
        """Have so many new nodes do `task` at the same time (see `swarm_node.Task`)."""
        before = len(self._origin.accesses(0))
        with ExitStack() as stack:
            scheduler = self._start(
                stack, "scheduler", [dfdaemon.__file__, "--only-scheduler"], "--listen={}:0"
            )
            image = {
                blob_id: {"size_bytes": len(layer.body), "digests": layer.digests}
                for blob_id, layer in self.layers.items()
            }
            job = {
                "registry": self._origin.host,
                "scheduler": _said(scheduler)["scheduler"],
                "image": image,
            }
            words = ["{}", json.dumps(job | task)]
            nodes = [
                self._start(stack, "node", ["-m", swarm_node.__name__], *words)
                for _ in range(count)
            ]
            for node in nodes:
                _said(node)
            for node in nodes:
                _tell(node)
            said = [_said(node) for node in nodes]
        accesses = [each for each in self._origin.accesses(0)[before:] if each.status in (200, 206)]
        sent_bytes = sum(each.body_bytes for each in accesses if "/blobs/" in each.target)
        return Outcome(said, sent_bytes / sum(len(layer.body) for layer in self.layers.values()))

    def _start(
        self, stack: ExitStack, what: str, command: list[str], *arguments: str
    ) -> subprocess.Popen[str]:
        """A process in a place of its own, which is the first argument's `{}`."""
        name = f"{what}-{next(self._names)}"
        address = self.places.add(name)
        stack.callback(self.places.remove, name)
        first, *rest = arguments
        line = [sys.executable, *command, first.format(address), *rest]
        with self.places.entered(name):
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        stack.enter_context(process)
        stack.callback(process.kill)
        return process


def _said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError("a process of the cluster ended")
    found: dict[str, Any] = json.loads(line)
    return found


def _tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")


@contextmanager
def cluster(root: Path, layers: list[Layer], *, namespaces: bool) -> Iterator[Cluster]:
    """One whose registry has an image of these layers."""
    with ExitStack() as stack:
        places = stack.enter_context(Namespaces() if namespaces else Loopback())
        address = places.add("origin")
        with places.entered("origin"):
            registry = stack.enter_context(docker_registry(root / "registry"))
            forward = _FORWARD.format(registry.host)
            front = stack.enter_context(nginx(root / "nginx", forward, address=address))
        blobs = {registry.put_blob(REPOSITORY, layer.body): layer for layer in layers}
        yield Cluster(places, front, blobs)

"""A node, its origin and a peer in one guest: each in a network namespace, on links like real ones.

The node is the guest itself. The origin is Debian's docker-registry behind nginx, which sends the
blobs' files: docker-registry reads 4 MiB for every range.
"""

from __future__ import annotations

from typing import NamedTuple

from harness import registry
from harness.guest import Guest
from harness.registry import Registry

from environments import nginx
from environments.nginx import Ports
from environments.runtimes import Published

ORIGIN = "origin"
PEER = "peer"
ORIGIN_ADDRESS = "10.91.0.2"
NODE_ADDRESS = "10.91.2.1"
"""As the peer knows it."""
PEER_ADDRESS = "10.91.2.2"
REGISTRY = f"{ORIGIN_ADDRESS}:5000"
PORTS = Ports(5000, 5443, ORIGIN_ADDRESS)
REGISTRY_PORT = 5001
QUEUE_PACKETS = 10_000
ACCESS_LOG = "/var/log/origin-access.log"


class Link(NamedTuple):
    """How far and how wide, in each direction."""

    name: str
    round_trip_ms: float
    megabits_per_s: int


FAR = Link("20ms", 20, 300)
NEAR = Link("1ms", 1, 2000)
LINKS = {link.name: link for link in (FAR, NEAR)}

# Two ends each: a namespace ("" is the node), an interface, an address.
WIRES = (
    (("", "to-origin", "10.91.0.1"), (ORIGIN, "to-node", ORIGIN_ADDRESS)),
    ((PEER, "to-origin", "10.91.1.1"), (ORIGIN, "to-peer", "10.91.1.2")),
    (("", "to-peer", NODE_ADDRESS), (PEER, "to-node", PEER_ADDRESS)),
)


class Network:
    """The namespaces and the wires between them; they end with the guest."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        lines = [f"ip netns add {name}" for name in (ORIGIN, PEER)]
        for number, ends in enumerate(WIRES):
            lines.append(f"ip link add wire{number}a type veth peer name wire{number}b")
            for letter, (space, name, address) in zip("ab", ends, strict=True):
                wire = f"wire{number}{letter}"
                lines.append(f"ip link set {wire} netns {space} name {name}" if space else "")
                lines.append("" if space else f"ip link set {wire} name {name}")
                lines.append(f"{within(space)}ip address add {address}/24 dev {name}")
                lines.append(f"{within(space)}ip link set {name} up")
        lines += [f"{within(space)}ip link set lo up" for space in (ORIGIN, PEER)]
        lines.append(f"{within(PEER)}ip route add {ORIGIN_ADDRESS} via 10.91.1.2")
        guest.run("\n".join(filter(None, lines)))
        self.shape(NEAR)

    def shape(self, origin: Link, peer: Link = NEAR) -> None:
        """Have the origin, and the peer from the node, so far away."""
        for ends in WIRES:
            far = origin if any(space == ORIGIN for space, _, _ in ends) else peer
            shape = f"delay {far.round_trip_ms / 2}ms rate {far.megabits_per_s}mbit"
            for space, name, _ in ends:
                queue = f"netem {shape} limit {QUEUE_PACKETS}"
                self._guest.run(f"{within(space)}tc qdisc replace dev {name} root {queue}")


class Site:
    """The origin of one image."""

    def __init__(self, guest: Guest, image: Published) -> None:
        self._guest = guest
        self._storage = image.disk.mount
        self._within = within(ORIGIN).split()
        self._registry = Registry(
            guest, storage=self._storage, port=REGISTRY_PORT, within=self._within
        )

    def start(self) -> None:
        """Start it and wait until it answers. Raises CommandFailed when it does not."""
        self._registry.start()
        locations = nginx.registry(self._registry.address, self._storage)
        nginx.in_guest(self._guest, PORTS, locations, within=self._within, access_log=ACCESS_LOG)

    def warm(self) -> None:
        """Everything it serves is in memory, and nothing was asked yet."""
        self._guest.run(f"find {self._storage} -type f -exec cat {{}} + > /dev/null")
        self._guest.run(["truncate", "--size=0", ACCESS_LOG])

    def sent(self) -> tuple[int, int]:
        """Requests and the bytes that were sent for them, since `warm`."""
        asked = registry.requests(self._guest.get(ACCESS_LOG).decode())
        return len(asked), sum(request.sent_bytes for request in asked)


def within(space: str) -> str:
    """What goes before a command to run it in a namespace."""
    return f"ip netns exec {space} " if space else ""

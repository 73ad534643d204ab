"""A node, its origin and a peer in one guest: each in a network namespace, on links like real ones.

netem makes a guest's links. This machine's own kernel may lack it: there `link.c` is each of them.

The node is the guest itself. The origin is Debian's docker-registry behind nginx, which sends the
blobs' files: docker-registry reads 4 MiB for every range.
"""

from __future__ import annotations

from typing import NamedTuple

from harness import kernel, registry
from harness.guest import Guest, Process
from harness.registry import Registry

from environments import nginx
from environments.guest import PROGRAMS
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


class End(NamedTuple):
    """Of a wire: a namespace ("" is the node), an interface, its address."""

    space: str
    name: str
    address: str


WIRES = (
    (End("", "to-origin", "10.91.0.1"), End(ORIGIN, "to-node", ORIGIN_ADDRESS)),
    (End(PEER, "to-origin", "10.91.1.1"), End(ORIGIN, "to-peer", "10.91.1.2")),
    (End("", "to-peer", NODE_ADDRESS), End(PEER, "to-node", PEER_ADDRESS)),
)


class Network:
    """The namespaces and the wires between them; they end with the guest."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._programs: list[Process] = []
        lines = [f"ip netns add {name}" for name in (ORIGIN, PEER)]
        lines += [f"{within(space)}ip link set lo up" for space in (ORIGIN, PEER)]
        guest.run("\n".join(lines))
        self.shape(NEAR)

    def shape(self, origin: Link, peer: Link = NEAR) -> None:
        """Have the origin, and the peer from the node, so far away: all wires are laid anew."""
        self._take_away()
        for number, ends in enumerate(WIRES):
            link = origin if any(end.space == ORIGIN for end in ends) else peer
            devices = f"wire{number}a", f"wire{number}b"
            native = self._guest.kernel.name == kernel.NATIVE
            if native:
                self._lay_program(*devices, link)
            else:
                self._guest.run("ip link add {} type veth peer name {}".format(*devices))
            for device, end in zip(devices, ends, strict=True):
                self._connect(device, end)
                if not native:
                    self._delay(end, link)
        self._guest.run(f"{within(PEER)}ip route add {ORIGIN_ADDRESS} via 10.91.1.2")

    def _take_away(self) -> None:
        for program in self._programs:
            program.signal(9)
            program.wait()
        self._programs.clear()
        for end, _ in WIRES:
            command = f"{within(end.space)}ip link delete {end.name}"
            self._guest.run(f"{command} 2> /dev/null || true")

    def _delay(self, end: End, link: Link) -> None:
        shape = f"delay {link.round_trip_ms / 2}ms rate {link.megabits_per_s}mbit"
        queue = f"netem {shape} limit {QUEUE_PACKETS}"
        self._guest.run(f"{within(end.space)}tc qdisc add dev {end.name} root {queue}")

    def _lay_program(self, near: str, far: str, link: Link) -> None:
        words = [str(round(link.round_trip_ms * 1000)), str(link.megabits_per_s * 125_000)]
        argv = [f"{PROGRAMS}/link", near, far, *words]
        self._programs.append(self._guest.start(argv, log=f"/var/log/{near}.log"))
        there = f"ip link show {far} > /dev/null 2>&1"
        self._guest.run(f"for i in $(seq 100); do {there} && exit; sleep 0.05; done; exit 1")

    def _connect(self, device: str, end: End) -> None:
        inside = f"netns {end.space} " if end.space else ""
        self._guest.run(
            f"ip link set {device} {inside}name {end.name}\n"
            f"{within(end.space)}ip address add {end.address}/24 dev {end.name}\n"
            f"{within(end.space)}ip link set {end.name} txqueuelen {QUEUE_PACKETS} up"
        )


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

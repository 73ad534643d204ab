"""A link on this machine: the bench on its near end, servers on its far end.

The kernel may be one without netem, so `link.c` is the link: two TUN devices, each in a network
namespace that goes away with the bench.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from harness import command
from pyroute2 import netns

from environments.programs import HERE, compiled

NEAR, FAR = "fscached-bench-near", "fscached-bench-far"
FAR_ADDRESS = "10.91.0.2"
_ADDRESSES = {NEAR: "10.91.0.1/24", FAR: f"{FAR_ADDRESS}/24"}
_DEVICES = {NEAR: "near", FAR: "far"}


@contextmanager
def between(round_trip_ms: float, bytes_per_s: int) -> Iterator[None]:
    """The bench is on the near end in the block. Raises SystemExit where there is no TUN."""
    for name in (NEAR, FAR):
        netns.create(name)
    try:
        with entered(NEAR):
            words = [*_DEVICES.values(), str(round(round_trip_ms * 1000)), str(bytes_per_s)]
            with subprocess.Popen(
                [compiled(HERE / "link.c"), *words], stdout=subprocess.PIPE, text=True
            ) as link:
                try:
                    if not link.stdout or link.stdout.readline() != "up\n":
                        raise SystemExit("no link: is there /dev/net/tun?")
                    _connect()
                    yield
                finally:
                    link.kill()
    finally:
        for name in (NEAR, FAR):
            netns.remove(name)


@contextmanager
def entered(name: str) -> Iterator[None]:
    """Whatever is started in the block is in that network namespace."""
    netns.pushns(name)
    try:
        yield
    finally:
        netns.popns()


def _connect() -> None:
    command.run(["ip", "link", "set", _DEVICES[FAR], "netns", FAR])
    for name, device in _DEVICES.items():
        ip = ["ip", "-n", name]
        command.run([*ip, "link", "set", "lo", "up"])
        command.run([*ip, "address", "add", _ADDRESSES[name], "dev", device])
        command.run([*ip, "link", "set", device, "up"])

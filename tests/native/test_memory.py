"""What a daemon's memory may be: its own, and for each image that is mounted and read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.native.conftest import Node, image_of, noise
from tests.native.origin import Origin

MIB = 1 << 20
IDLE_LIMIT_BYTES = 45 * MIB
IMAGE_LIMIT_BYTES = MIB * 3 // 2
IMAGES, BLOBS = 5, 20
FILE_BYTES = 16 << 10


def resident_bytes(pid: int) -> int:
    """Memory of a process, libraries' included (proc(5))."""
    [found] = re.findall(r"^Rss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(found) << 10


@pytest.mark.timeout(180)
def test_memory_of_a_daemon_and_of_each_image(node: Node, registry: Origin) -> None:
    """Idle, and for each of five images with twenty blobs that are all read. The first image is not
    counted: what it has imported and the pool's memory are every image's."""
    node.start()
    pid = node.daemon_pid()
    idle = resident_bytes(pid)
    one_image(node, registry, 0)
    one = resident_bytes(pid)
    for number in range(1, 1 + IMAGES):
        one_image(node, registry, number)
    each = (resident_bytes(pid) - one) / IMAGES
    print(f"idle {idle / MIB:.1f}, one {one / MIB:.1f}, each further {each / MIB:.2f} MiB")
    assert node.daemon_pid() == pid
    assert idle <= IDLE_LIMIT_BYTES and each <= IMAGE_LIMIT_BYTES


def one_image(node: Node, registry: Origin, number: int) -> None:
    """Mount one that shares no blob with others, and read some of each blob."""
    layers = [
        {f"f{layer}": data} for layer, data in enumerate(noise(number, BLOBS, FILE_BYTES).values())
    ]
    target = node.mount(registry.add(f"app{number}", image_of(*layers)), f"mnt{number}")
    for layer in layers:
        for name, data in layer.items():
            assert (target / name).read_bytes() == data

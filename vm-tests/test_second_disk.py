"""The cache on a disk of its own, of each kind it may be on, and nothing else that can be written
but the runtime and the state directory; and a quota on it.

On one kernel and on this machine's own; with `--long` on every kernel.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from harness import disk, inspector, kernel, noise
from harness.daemon import CONFIG, LOG, OUTPUT, drop_caches
from harness.guest import Guest, Process
from harness.node import Node
from harness.registry import Registry

IMAGE, LIMITED = noise.CRASH
SHAPE = noise.IMAGES[IMAGE]
FILE_BLOCKS = SHAPE.file_bytes // noise.BLOCK_BYTES

KERNELS = {"6.12", kernel.NATIVE}
"""Those of a run without `--long`."""
MOUNT = "/mnt/image"
OVER = "/mnt/over"
PATIENCE_S = 120.0

DAEMONS = ["/run/fscached", disk.CACHE_MOUNT]
SCENARIOS = ["/etc/fscached", "/var/log", "/mnt"]
"""Configuration and logs are written by the scenario, and images are mounted below the last."""

SEAL = """
for own in "$@"; do
    mkdir -p "$own"
    mountpoint -q "$own" || mount --bind "$own" "$own"
done
cut -d' ' -f5 /proc/self/mountinfo | sort -u | while read -r point; do
    case " $* " in *" $point "*) continue ;; esac
    case $point in /proc* | /sys* | /dev*) continue ;; esac
    mount -o remount,bind,ro "$point"
done
"""
LIMIT = """
import fcntl, os, struct, sys
QUOTA_CTL, QUOTA_ENABLE, RESCAN_WAIT = 0xC0109428, 1, 0x942E
QGROUP_LIMIT, MAX_RFER = 0x8030942B, 1
directory, limit_bytes = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
fcntl.ioctl(directory, QUOTA_CTL, struct.pack("=QQ", QUOTA_ENABLE, 0))
fcntl.ioctl(directory, RESCAN_WAIT)
fcntl.ioctl(directory, QGROUP_LIMIT, struct.pack("=QQqQQQ", 0, MAX_RFER, limit_bytes, 0, 0, 0))
"""
"""From linux/btrfs.h; -1 is no limit. Quotas of ext4 and xfs do not hold the daemon, which is root
and has CAP_SYS_RESOURCE here."""

WRITABLE = """
import json, os, sys
from pathlib import Path
from fscached.transport.mount import mount_points
points = {point.target for point in mount_points(Path("/proc", sys.argv[1], "mountinfo"))}
own = (point for point in points if not point.startswith(("/proc", "/sys", "/dev")))
print(json.dumps([point for point in own if not os.statvfs(point).f_flag & os.ST_RDONLY]))
"""


@pytest.fixture(scope="module")
def sealed(
    boot_guest: Callable[..., Guest],
    tmp_path_factory: pytest.TempPathFactory,
    kernel: str,
    long: bool,
) -> Iterator[Node]:
    """A node whose registry runs and whose root cannot be written any more."""
    if not long and kernel not in KERNELS:
        pytest.skip(f"second disks are tried on {' and '.join(sorted(KERNELS))}; here by --long")
    directory = tmp_path_factory.mktemp("disks")
    seconds = [disk.second(directory / name, name) for name in disk.MAKE]
    disks = [disk.cache(directory / "cache.ext4"), *seconds, noise.origin().disk]
    guest = boot_guest(disks=disks)
    node = Node(guest, Registry(guest))
    own = [*DAEMONS, *SCENARIOS, *map(cache_of, disk.MAKE)]
    guest.run(["bash", "-euc", SEAL, "seal", *own])
    refused = guest.run("touch /written", check=False)
    assert refused.returncode and "Read-only" in refused.stderr
    node.registry.start()
    yield node
    node.registry.stop()


def cache_of(file_system: str) -> str:
    """Where the cache is on such a disk."""
    return f"{disk.SECOND}/{file_system}/cache"


@pytest.mark.parametrize("file_system", disk.MAKE)
def test_a_cache_on_a_second_disk(sealed: Node, file_system: str) -> None:
    """Cold reads, `kill -9` between them, a restart that fetches nothing again, culling, and all of
    it cold once more: every byte right, and nothing written elsewhere."""
    node, cache = sealed, cache_of(file_system)
    first, *others = names = noise.names(IMAGE)
    node.begin({"cache": {"directory": cache}})
    try:
        assert _kind_by_doctor(node) == file_system
        assert set(_writable(node)) == {*DAEMONS, *SCENARIOS, *map(cache_of, disk.MAKE)}

        node.mount(IMAGE, MOUNT)
        _assert_right(node, first)
        node.guest.run(["kill", "-9", str(node.daemon.pid())])
        _assert_right(node, *others)
        once = _sent_bytes(node)
        assert once >= SHAPE.blob_bytes

        node.unmount()
        assert node.daemon.stop() == 0
        node.daemon.start()
        node.mount(IMAGE, MOUNT)
        drop_caches(node.guest)
        _assert_right(node, *names)
        assert _sent_bytes(node) == once

        node.unmount()
        held = _held_bytes(node, cache)
        node.guest.run(["fscached", "cache", "gc", "--all"])
        assert node.daemon.status()["cache"]["culled_files"] > 0
        assert held >= SHAPE.blob_bytes > _held_bytes(node, cache)
        node.mount(IMAGE, MOUNT)
        _assert_right(node, *names)
        assert _sent_bytes(node) == once + SHAPE.blob_bytes

        assert node.daemon.status()["totals"]["reads_failed"] == 0
        assert "Read-only file system" not in node.daemon.log()
        left = node.guest.run(["find", "/etc/fscached", "/var/log", "-name", "*fscached*"]).stdout
        own = {"/etc/fscached", CONFIG, LOG, OUTPUT}
        assert set(left.split()) == own
    finally:
        node.end()


def test_a_quota_is_a_full_disk(sealed: Node) -> None:
    """One of btrfs is reached in the middle of a cold read (EDQUOT): that fails and says why, who
    reads what is there does not notice, and all works again once it is raised, without a
    restart."""
    node, cache = sealed, cache_of("btrfs")
    first, *others = names = noise.names(LIMITED)
    node.begin({"cache": {"directory": cache}, "fetch": {"window_limit_bytes": 1 << 20}})
    try:
        pid = node.daemon.pid()
        node.mount(LIMITED, MOUNT)
        _assert_right(node, first)
        resident = _start(node, "again", OVER, first)
        drop_caches(node.guest)
        node.guest.python(LIMIT, cache, str(_held_bytes(node, cache) + 2 * SHAPE.file_bytes))
        seen = inspector.seen(_start(node, "stream", *others), timeout_s=PATIENCE_S)
        assert (seen["error"], seen["wrong"]) == ("EIO", [])
        assert 0 < seen["blocks"] < len(others) * FILE_BLOCKS
        assert "Disk quota exceeded" in node.daemon.log()
        drop_caches(node.guest)
        _assert_right(node, first)
        node.guest.python(LIMIT, cache, "-1")
        _await_right(node, *names)
        node.guest.run(["touch", OVER])
        seen = inspector.seen(resident, timeout_s=PATIENCE_S)
        assert (seen["error"], seen["wrong"]) == (None, []) and seen["blocks"] > FILE_BLOCKS
        assert node.daemon.pid() == pid
    finally:
        node.end()


def _start(node: Node, kind: str, *words: object) -> Process:
    return inspector.start(node.guest, kind, MOUNT, *words, timeout_s=PATIENCE_S)


def _await_right(node: Node, *names: str) -> None:
    """All files read right, once the moment has passed in which a chunk that failed is refused."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        seen = inspector.seen(_start(node, "stream", *names), timeout_s=PATIENCE_S)
        assert not seen["wrong"] and time.monotonic() < deadline, seen
        if seen["error"] is None:
            return


def _assert_right(node: Node, *names: str) -> None:
    seen = inspector.seen(_start(node, "stream", *names), timeout_s=PATIENCE_S)
    assert (seen["error"], seen["wrong"], seen["blocks"]) == (None, [], len(names) * FILE_BLOCKS)


def _sent_bytes(node: Node) -> int:
    """What the origin has sent of the image's blob and its table of chunks."""
    [sent] = node.blob_bytes().values()
    return sent


def _kind_by_doctor(node: Node) -> str:
    """The cache's file system as `fscached doctor` names it, which finds nothing missing there."""
    said = node.guest.run(["fscached", "doctor", "-o", "json"], check=False).stdout
    [found] = [one for one in json.loads(said) if one["name"] == "cache-file-system"]
    assert found["ok"], found
    return str(found["found"])


def _writable(node: Node) -> list[str]:
    """The mount points that the daemon may write below."""
    points: list[str] = json.loads(node.guest.python(WRITABLE, str(node.daemon.pid())).stdout)
    return points


def _held_bytes(node: Node, directory: str) -> int:
    """What all files below it hold."""
    return int(node.guest.run(["du", "-sB1", directory]).stdout.split()[0])

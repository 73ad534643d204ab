"""Images come and go, daemons come and go: what stays, what is let go of, and what is said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import disk
from harness.daemon import drop_caches
from harness.guest import Guest
from harness.node import Node
from harness.registry import Registry
from harness.small import CROWD, ONE, TWO, Small, small

MOUNT = "/mnt/image"
OTHER = "/mnt/other"
THIRD = "/mnt/third"
CACHE_FILES = f"{disk.CACHE_MOUNT}/cache/cache/Ierofs,*"
SLOW_LINK = "8mbit"
LETTING_GO_S = 20.0
SIGTERM_LIMIT_S = 5.0
AT_ONCE_S = 5.0


@pytest.fixture(scope="module")
def images() -> Small:
    return small()


@pytest.fixture(scope="module")
def guest(
    boot_guest: Callable[..., Guest], images: Small, tmp_path_factory: pytest.TempPathFactory
) -> Guest:
    cache = disk.cache(tmp_path_factory.mktemp("disks") / "cache.ext4")
    return boot_guest(disks=[cache, images.origin.disk])


@pytest.fixture(scope="module")
def registry(guest: Guest) -> Registry:
    return Registry(guest)


@pytest.fixture
def idle_node(guest: Guest, registry: Registry) -> Iterator[Node]:
    """A node whose registry runs and whose daemon does not yet."""
    registry.start()
    node = Node(guest, registry)
    try:
        yield node
        node.end()
    finally:
        registry.stop()


@pytest.fixture
def node(idle_node: Node) -> Node:
    """A node with nothing cached, its daemon supervised."""
    idle_node.begin()
    return idle_node


def everything(node: Node, images: Small, name: str, directory: str) -> bool:
    """Whether every file of the image that is mounted there reads right."""
    files = images.files(name)
    read = node.read("whole", *(f"{directory}/{path}" for path in files))
    return dict(zip(files, read, strict=True)) == files


def eventually(true: Callable[[], bool]) -> bool:
    """CLOSE messages come a little after the umount they tell of."""
    deadline = time.monotonic() + LETTING_GO_S
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


# -- mounting and letting go ----------------------------------------------------------------------


def test_new_images_files_are_linked(node: Node) -> None:
    """After `mount` the cache files of a new image have names: a crash of the host leaves them."""
    node.mount(ONE, MOUNT)
    (mounted,) = node.daemon.status()["images"]
    assert mounted["settled"]
    found = node.guest.run(f"find {CACHE_FILES} -type f -links 1 -printf '%f\\n'").stdout
    names = (node.fsid(MOUNT), *(blob["id"] for blob in mounted["blobs"]))
    assert sorted(found.split()) == sorted(f"D{name}" for name in names)


def test_umount_lets_everything_go(node: Node, images: Small) -> None:
    """After the last umount no descriptor of the kernel's is open, and every OPEN has its CLOSE."""
    for name, directory in ((ONE, MOUNT), (TWO, OTHER), (CROWD, THIRD)):
        node.mount(name, directory)
    assert everything(node, images, ONE, MOUNT)
    # Three bootstraps, and of three layers a blob each: the base is shared.
    assert node.descriptors() == 3 + 4
    for directory in (MOUNT, OTHER, THIRD):
        node.daemon.umount(directory)
    assert eventually(lambda: node.descriptors() == 0)
    counts = node.guest.cachefiles_counts()
    assert counts["open"] == counts["close"] > 0
    totals = node.daemon.status()["totals"]
    assert (totals["open_objects"], totals["reads_waiting"]) == (0, 0)
    assert node.discrepancies() == {}


def test_second_mount_point_is_a_bind(node: Node, images: Small) -> None:
    """It costs no OPEN, outlives the first mount point, and the image is forgotten after both."""
    node.mount(ONE, MOUNT)
    opens = node.guest.cachefiles_counts()["open"]
    assert "second mount point" in node.mount(ONE, OTHER)
    assert node.guest.cachefiles_counts()["open"] == opens
    assert device(node, MOUNT) == device(node, OTHER)
    (shown,) = json.loads(node.guest.run(["fscached", "status", "-o", "json"]).stdout)["images"]
    assert shown["mounts"] == [MOUNT, OTHER]
    node.daemon.umount(MOUNT)
    assert everything(node, images, ONE, OTHER)
    assert len(node.daemon.status()["images"]) == 1
    node.daemon.umount(OTHER)
    assert node.daemon.status()["images"] == []
    assert eventually(lambda: node.descriptors() == 0)
    node.mount(ONE, MOUNT)
    assert everything(node, images, ONE, MOUNT)


def device(node: Node, directory: str) -> str:
    return node.guest.run(["findmnt", "-rn", "-o", "MAJ:MIN", directory]).stdout.strip()


@pytest.mark.parametrize("domain", ["", "fscached"])
def test_unknown_fsid_fails_at_once(node: Node, domain: str) -> None:
    """A mount of what was never registered fails, and the log says which and what to do."""
    node.guest.run(["mkdir", "-p", MOUNT])
    options = ",".join(["ro", "fsid=nobody", *([f"domain_id={domain}"] if domain else [])])
    mount = ["mount", "-t", "erofs", "-o", options, "none", MOUNT]
    began = time.monotonic()
    refused = node.guest.run(mount, check=False)
    assert time.monotonic() - began < AT_ONCE_S
    assert refused.returncode != 0
    (line,) = [line for line in node.daemon.log().splitlines() if "'nobody'" in line][-1:]
    assert repr(domain or "nobody") in line
    assert "not registered" in line and "fscached mount" in line
    assert node.descriptors() == 0
    node.mount(ONE, OTHER)
    assert node.read("bytes_at", f"{OTHER}/bin/busybox", 0) == [0x7F]


# -- another daemon -------------------------------------------------------------------------------


def test_replaced_daemon_fetches_nothing_twice(node: Node, images: Small) -> None:
    """A successor under the same mount goes on where its predecessor stopped: every byte of the
    blobs comes once, and descriptors, counts and mounts are as before."""
    node.mount(ONE, MOUNT)
    node.read("whole", f"{MOUNT}/shared/noise-0", f"{MOUNT}/one/few/49")
    before = node.blob_bytes()
    node.daemon.replace()
    drop_caches(node.guest)
    assert everything(node, images, ONE, MOUNT)
    after = node.blob_bytes()
    assert 0 < sum(before.values()) < sum(after.values())
    assert after == images.once_bytes(ONE)
    node.daemon.umount(MOUNT)
    assert eventually(lambda: node.descriptors() == 0)


def test_replaced_during_reads(node: Node, images: Small) -> None:
    """Readers of a daemon that is replaced in the middle only wait: no error, right bytes."""
    node.mount(CROWD, MOUNT)
    paths = [f"{MOUNT}/{name}" for name in ("spread", "together")]
    with slow_link(node.guest):
        load = node.start_reading("whole", *paths)
        for _ in range(2):
            eventually(lambda: node.daemon.status()["totals"]["reads_waiting"] > 0)
            node.daemon.replace()
        read = node.read_by(load)
    assert dict(zip(("spread", "together"), read, strict=True)) == images.files(CROWD)


def test_restarted_daemon_fetches_nothing_twice(node: Node, images: Small) -> None:
    """Cache files outlive umount and daemon: what was fetched for the one is there for the next,
    and the rest comes once."""
    node.mount(ONE, MOUNT)
    node.read("whole", f"{MOUNT}/shared/noise-1", f"{MOUNT}/shared/text")
    node.daemon.umount(MOUNT)
    assert node.daemon.stop() == 0
    before = node.blob_bytes()
    drop_caches(node.guest)
    node.daemon.start()
    node.mount(ONE, MOUNT)
    assert node.blob_bytes() == before
    assert everything(node, images, ONE, MOUNT)
    assert node.blob_bytes() == images.once_bytes(ONE)


def test_cached_image_needs_no_registry(node: Node, images: Small) -> None:
    """An image that is all here mounts and runs while the registry is down, also for a daemon
    that has never spoken with it."""
    node.mount(ONE, MOUNT)
    assert everything(node, images, ONE, MOUNT)
    node.daemon.umount(MOUNT)
    node.daemon.stop()
    node.registry.stop()
    drop_caches(node.guest)
    node.daemon.start()
    node.mount(ONE, MOUNT)
    shell = ["chroot", MOUNT, "/bin/busybox", "sh", "-c", "echo runs"]
    assert node.guest.run(shell).stdout == "runs\n"
    assert everything(node, images, ONE, MOUNT)
    assert node.daemon.status()["totals"]["received_bytes"] == 0


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "alone"])
def test_sigterm_during_load(idle_node: Node, supervised: bool) -> None:
    """A daemon with readers waiting ends of its own accord within 5 s, and no reader hangs."""
    idle_node.begin(supervised=supervised)
    idle_node.mount(CROWD, MOUNT)
    with slow_link(idle_node.guest):
        load = [
            idle_node.start_reading("whole", f"{MOUNT}/{name}") for name in ("spread", "together")
        ]
        assert eventually(lambda: idle_node.daemon.status()["totals"]["reads_waiting"] > 0)
        began = time.monotonic()
        assert idle_node.daemon.stop() == 0
        assert time.monotonic() - began < SIGTERM_LIMIT_S
        answers = [idle_node.read_by(reader) for reader in load]
    assert all(answer[0].startswith("EIO") for answer in answers)
    assert "Traceback" not in idle_node.daemon.log()


class slow_link:
    """The guest's loopback at a rate that keeps readers waiting for some seconds."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def __enter__(self) -> None:
        self._guest.run(f"tc qdisc add dev lo root netem rate {SLOW_LINK}")

    def __exit__(self, *_: Any) -> None:
        self._guest.run("tc qdisc del dev lo root")

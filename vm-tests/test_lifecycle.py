"""Images come and go, daemons come and go: what stays, what is let go of, and what is said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from harness import disk, link
from harness.daemon import drop_caches
from harness.guest import Guest
from harness.node import Node
from harness.registry import Registry
from harness.small import LONE, ONE, PAIR, PROGRAM, TWO, Small, noise, small

MOUNT = "/mnt/image"
OTHER = "/mnt/other"
THIRD = "/mnt/third"
CACHE_FILES = f"{disk.CACHE_MOUNT}/cache/cache/Ierofs,*"
NEW, REPLACED, DURING, RESTARTED, *ENDED = LONE
SLOW_BYTES_PER_S = 500_000
LETTING_GO_S = 20.0
SIGTERM_LIMIT_S = 5.0
AT_ONCE_S = 5.0

WINDOW = {"window_bytes": 256 << 10, "window_limit_bytes": 256 << 10}
"""Small: who has read one file has not had the next one fetched with it."""


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
def started(guest: Guest) -> Iterator[Node]:
    registry = Registry(guest)
    registry.start()
    node = Node(guest, registry)
    node.begin({"fetch": WINDOW})
    yield node
    node.end()


@pytest.fixture
def node(started: Node) -> Iterator[Node]:
    """A node where nothing is mounted, its registry up and its daemon supervised; scenarios that
    need something cold take an image that no other has read."""
    if not started.registry.running:
        started.registry.start()
    if not started.daemon.running:
        started.daemon.start()
    yield started
    if started.daemon.running:
        started.unmount()
    else:
        started.end()


def eventually(true: Callable[[], bool]) -> bool:
    """CLOSE messages come a little after the umount they tell of."""
    deadline = time.monotonic() + LETTING_GO_S
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


# -- mounting and letting go ----------------------------------------------------------------------


@pytest.mark.cachefiles
def test_new_images_files_are_linked(node: Node) -> None:
    """After `mount` the cache files of a new image have names: a crash of the host leaves them."""
    node.mount(NEW, MOUNT)
    (mounted,) = node.daemon.status()["images"]
    assert mounted["settled"]
    found = node.guest.run(f"find {CACHE_FILES} -type f -links 1 -printf '%f\\n'").stdout
    names = (node.fsid(MOUNT), *(blob["id"] for blob in mounted["blobs"]))
    assert set(found.split()) >= {f"D{name}" for name in names}


@pytest.mark.cachefiles
def test_umount_lets_everything_go(node: Node) -> None:
    """After the last umount no descriptor of the kernel's is open, and every OPEN has its CLOSE."""
    assert node.descriptors() == 0
    node.guest.reset_cachefiles_counts()
    for name, directory in ((ONE, MOUNT), (TWO, OTHER), (PAIR, THIRD)):
        node.mount(name, directory)
        node.digests(directory, noise(name))
    # Three bootstraps; two blobs each, one of them shared.
    assert node.descriptors() == 3 + 5
    for directory in (MOUNT, OTHER, THIRD):
        node.daemon.umount(directory)
    assert eventually(lambda: node.descriptors() == 0)
    counts = node.guest.cachefiles_counts()
    assert counts["open"] == counts["close"] > 0
    totals = node.daemon.status()["totals"]
    assert (totals["open_objects"], totals["reads_waiting"]) == (0, 0)


def test_second_mount_point_is_a_bind(node: Node, images: Small) -> None:
    """It costs no OPEN, outlives the first mount point, and the image is forgotten after both."""
    few = {path: images.files(ONE)[path] for path in noise(ONE)}
    node.mount(ONE, MOUNT)
    opens = node.daemon.status()["totals"]["opens"]
    assert "second mount point" in node.mount(ONE, OTHER)
    assert node.daemon.status()["totals"]["opens"] == opens
    assert device(node, MOUNT) == device(node, OTHER)
    (shown,) = json.loads(node.guest.run(["fscached", "status", "-o", "json"]).stdout)["images"]
    assert shown["mounts"] == [MOUNT, OTHER]
    node.daemon.umount(MOUNT)
    assert node.digests(OTHER, few) == few
    assert len(node.daemon.status()["images"]) == 1
    node.daemon.umount(OTHER)
    assert node.daemon.status()["images"] == []
    assert eventually(lambda: node.descriptors() == 0)
    node.mount(ONE, MOUNT)
    assert node.digests(MOUNT, few) == few


def device(node: Node, directory: str) -> str:
    return node.guest.run(["findmnt", "-rn", "-o", "MAJ:MIN", directory]).stdout.strip()


@pytest.mark.cachefiles
def test_unknown_fsid_fails_at_once(node: Node) -> None:
    """A mount of what was never registered fails, the log says which and what to do, and nothing
    else suffers."""
    node.guest.run(["mkdir", "-p", MOUNT])
    for domain, options in (("nobody", "fsid=nobody"), ("own", "fsid=nobody,domain_id=own")):
        began = time.monotonic()
        mount = ["mount", "-t", "erofs", "-o", f"ro,{options}", "none", MOUNT]
        refused = node.guest.run(mount, check=False)
        assert time.monotonic() - began < AT_ONCE_S
        assert refused.returncode != 0
        line = next(line for line in node.daemon.log().splitlines() if f"domain '{domain}'" in line)
        assert "'nobody'" in line and "not registered" in line and "fscached mount" in line
    assert node.descriptors() == 0
    node.mount(ONE, MOUNT)
    assert node.read("bytes_at", f"{MOUNT}/{PROGRAM}", 0) == [0x7F]


# -- another daemon -------------------------------------------------------------------------------


def test_replaced_daemon_fetches_nothing_twice(node: Node, images: Small) -> None:
    """A successor under the same mount goes on where its predecessor stopped: every byte of the
    blob comes once, and nothing is left open at the end."""
    node.mount(REPLACED, MOUNT)
    (blob_id,) = once = images.once_bytes(REPLACED)
    node.digests(MOUNT, noise(REPLACED)[:1])
    before = node.blob_bytes()[blob_id]
    node.daemon.replace()
    drop_caches(node.guest)
    assert node.digests(MOUNT, images.files(REPLACED)) == images.files(REPLACED)
    assert 0 < before < node.blob_bytes()[blob_id] == once[blob_id]
    node.daemon.umount(MOUNT)
    assert eventually(lambda: node.descriptors() == 0)


def test_replaced_during_reads(node: Node, images: Small) -> None:
    """Readers of a daemon that is replaced in the middle, twice, only wait."""
    node.mount(DURING, MOUNT)
    paths = noise(DURING)
    with link.shaped(node.guest, bytes_per_s=SLOW_BYTES_PER_S):
        load = node.start_reading("whole", *(f"{MOUNT}/{path}" for path in paths))
        for _ in range(2):
            assert eventually(lambda: node.daemon.status()["totals"]["reads_waiting"] > 0)
            node.daemon.replace()
        assert node.read_by(load) == [images.files(DURING)[path] for path in paths]


@pytest.mark.either
def test_restarted_daemon_fetches_nothing_twice(node: Node, images: Small) -> None:
    """Cache files outlive umount and daemon: what was fetched for the one is there for the next,
    and the rest comes once."""
    node.mount(RESTARTED, MOUNT)
    (blob_id,) = once = images.once_bytes(RESTARTED)
    node.digests(MOUNT, noise(RESTARTED)[:1])
    node.daemon.umount(MOUNT)
    assert node.daemon.stop() == 0
    before = node.blob_bytes()[blob_id]
    node.daemon.start()
    node.mount(RESTARTED, MOUNT)
    node.digests(MOUNT, noise(RESTARTED)[:1])
    assert node.blob_bytes()[blob_id] == before
    assert node.digests(MOUNT, images.files(RESTARTED)) == images.files(RESTARTED)
    assert before < node.blob_bytes()[blob_id] == once[blob_id]


@pytest.mark.either
def test_cached_image_needs_no_registry(node: Node, images: Small) -> None:
    """An image that is all here mounts and runs while the registry is down, also for a daemon
    that has never spoken with it."""
    node.mount(ONE, MOUNT)
    assert node.digests(MOUNT, images.files(ONE)) == images.files(ONE)
    node.daemon.umount(MOUNT)
    node.daemon.stop()
    node.registry.stop()
    node.daemon.start()
    node.mount(ONE, MOUNT)
    shell = ["chroot", MOUNT, f"/{PROGRAM}", "sh", "-c", "echo runs"]
    assert node.guest.run(shell).stdout == "runs\n"
    assert node.digests(MOUNT, images.files(ONE)) == images.files(ONE)
    assert node.daemon.status()["totals"]["received_bytes"] == 0


@pytest.mark.cachefiles
def test_dead_mounts_are_told(node: Node, images: Small) -> None:
    """A mount whose daemon ended cannot be read, nor can an image that shares a blob with it: both
    are refused until it is unmounted."""
    node.mount(ONE, MOUNT)
    node.daemon.stop()
    node.daemon.start()
    node.guest.run(["mkdir", "-p", OTHER])
    for name in (ONE, TWO):
        command = ["fscached", "mount", f"{node.registry.address}/{name}", OTHER]
        refused = node.guest.run(command, check=False)
        assert refused.returncode == 1
        assert f"daemon has ended, on {MOUNT}" in refused.stderr
    node.daemon.umount(MOUNT)
    assert node.daemon.status()["images"] == []
    node.mount(TWO, OTHER)
    few = {path: images.files(TWO)[path] for path in noise(TWO)}
    assert node.digests(OTHER, few) == few


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "supervised",
    [
        pytest.param(True, id="supervised"),
        # On fanotify nothing may serve alone.
        pytest.param(False, id="alone", marks=pytest.mark.cachefiles),
    ],
)
def test_sigterm_during_load(node: Node, supervised: bool) -> None:
    """A daemon with readers waiting ends of its own accord within 5 s, and no reader hangs."""
    if not supervised:
        node.daemon.stop()
        node.daemon.start(supervised=False)
    name = ENDED[supervised]
    node.mount(name, MOUNT)
    with link.shaped(node.guest, bytes_per_s=SLOW_BYTES_PER_S):
        load = [node.start_reading("whole", f"{MOUNT}/{path}") for path in noise(name)]
        assert eventually(lambda: node.daemon.status()["totals"]["reads_waiting"] > 0)
        began = time.monotonic()
        assert node.daemon.stop() == 0
        assert time.monotonic() - began < SIGTERM_LIMIT_S
        answers = [node.read_by(reader) for reader in load]
    # What a kernel says whose cache is closed: EIO 6.1, ENOBUFS 6.12.
    assert all(answer.partition(":")[0] in ("EIO", "ENOBUFS") for (answer,) in answers)
    assert "Traceback" not in node.daemon.log()

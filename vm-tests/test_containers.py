"""containerd, runc and nydus-snapshotter as Debian ships them, with fscached in nydusd's place."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

import pytest
from harness import disk, fleet, inspector, killer, noise, rounds, small, snapshotter
from harness.containers import Containers
from harness.guest import Guest
from harness.inspector import Seen
from harness.killer import Order, Report

# nydus-snapshotter has 3 s of patience with a daemon's successor.
pytestmark = [pytest.mark.only("6.12"), pytest.mark.alone]

MEMORY_BYTES = 96 << 20
"""What the daemon may take, all through; a hot upgrade has two."""

SUMS = "find / -xdev -type f -exec {busybox} sha256sum {{}} +"
IMAGE = noise.CRASH[0]
KILLS = {False: 10, True: 200}
LIVES = [(0.0, 1.0), (0.0, 1.0), (0.0, 3.0)]
"""From when the snapshotter keeps what a daemon holds."""

SLOW_BYTES_PER_S = 1 << 20
PATIENCE_S = 120.0
LONGEST_S = 3600.0

OBJECT = "anon_inode:[cachefiles]"
IDLE_DESCRIPTORS = 56
"""A daemon that has done nothing has 26; 18 connections to the origin stay for the next read (as
`demand_connections` and `prefetch_connections` say), and some of the snapshotter's to the API."""

GONE_S = 60.0


@pytest.fixture(scope="module")
def node(boot_guest: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory) -> Containers:
    """A node with everything running and no image."""
    cache = disk.cache(tmp_path_factory.mktemp("disks") / "cache.ext4")
    guest = boot_guest(disks=[cache, fleet.origin().disk, snapshotter.of_guests()])
    node = Containers(guest, MEMORY_BYTES)
    node.start()
    return node


def test_containers_see_their_images(node: Containers) -> None:
    """Two at once, of images that share a layer: every file is what it was made of, and nothing of
    the layer comes twice."""
    busybox = f"/{small.PROGRAM}"
    script = f"{busybox} {SUMS.format(busybox=busybox)}"
    for app in fleet.APPS:
        node.pull(app)
    running = [
        node.run(app, f"app-{number}", busybox, "sh", "-c", script)
        for number, app in enumerate(fleet.APPS)
    ]
    for app, container in zip(fleet.APPS, running, strict=True):
        done = container.wait(120)
        assert done.returncode == 0, done.stderr
        rows = (line.split("  /", 1) for line in done.stdout.splitlines())
        assert {path: digest for digest, path in rows} == small.small().files(app)
    origin = fleet.origin()
    shared = set(origin.blob_ids(fleet.APPS[0])) & set(origin.blob_ids(fleet.APPS[1]))
    asked = sorted((one.start, one.end) for blob in shared for one in node.ledger.asked(blob))
    assert asked and all(one[1] <= next_[0] for one, next_ in itertools.pairwise(asked))


def kill_the_daemon(node: Containers) -> None:
    node.guest.run(["kill", "-9", str(node.snapshotter.running())])


def kill_the_snapshotter(node: Containers) -> None:
    """And start it again, as its unit would."""
    node.snapshotter.kill()
    node.snapshotter.start()


def upgrade(node: Containers) -> None:
    node.snapshotter.upgrade()


INTERRUPTIONS = (kill_the_daemon, kill_the_snapshotter, upgrade)


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
@pytest.mark.parametrize("images", [0, 40])
def test_a_cold_read_is_interrupted(
    node: Containers, images: int, interruption: Callable[[Containers], None]
) -> None:
    """In a container, with so many other images bound: it ends, and every byte is right."""
    node.bind(images)
    node.pull(noise.COLD)
    node.pace(SLOW_BYTES_PER_S)
    before = node.snapshotter.running()
    place = INTERRUPTIONS.index(interruption) + (len(INTERRUPTIONS) if images else 0)
    file = noise.names(noise.COLD)[place]
    reader = node.read(noise.COLD, [file], f"reader-{place}")
    node.snapshotter.until(lambda: node.asked(noise.COLD), "the container does not read")
    interruption(node)
    node.ledger.hurry()
    seen = inspector.seen(reader, timeout_s=PATIENCE_S)
    assert (seen["error"], seen["wrong"]) == (None, [])
    assert seen["blocks"] == noise.IMAGES[noise.COLD].file_bytes // noise.BLOCK_BYTES
    print(
        f"{interruption.__name__}, {images} others: the longest read took {seen['slowest_s']:.2f} s"
    )
    after = node.snapshotter.running()
    assert (after == before) == (interruption is kill_the_snapshotter)
    assert len(node.snapshotter.status()["images"]) > images


def test_kills_during_cold_reads(node: Containers, kernel: str, seed: int, long: bool) -> None:
    """Killed with READs unanswered, again and again, as in `test_crash`: readers pause, get right
    bytes, and everybody is answered."""
    play, name = partial(_round_of_kills, node), f"snapshotter-{kernel}"
    rounds.until(KILLS[long], play, name, seed, keep=long, more=partial(_facts, node))


def _facts(node: Containers) -> dict[str, int]:
    """What is of the snapshotter's kills alone."""
    memory = node.snapshotter.memory()
    assert memory["oom_kill"] == 0
    return {
        "given_up_by_the_snapshotter": node.snapshotter.given_up(),
        "memory_limit_bytes": MEMORY_BYTES,
        "memory_peak_bytes": memory["peak"],
    }


def _round_of_kills(node: Containers, seed: int, kills: int) -> tuple[Report, list[Seen]]:
    """One cold image, read to its end while daemons die."""
    node.snapshotter.restart_if_given_up()
    directory = node.mount(IMAGE)
    node.pace(SLOW_BYTES_PER_S)
    node.guest.reset_cachefiles_counts()
    names = noise.names(IMAGE)
    readers = inspector.sixteen(node.guest, directory, names, seed, timeout_s=LONGEST_S)
    # A successor has 3 s until it listens, and every block that is checked takes an emulated CPU.
    node.guest.run(["renice", "-n", "19", "-p", *(str(reader.pid) for reader in readers)])
    order = Order(
        supervisor=node.snapshotter.pid,
        readers=[reader.pid for reader in readers],
        kills=kills,
        seed=seed,
        lives=LIVES,
        of=["read"],
        file="",
        log=snapshotter.LOG,
        traced=True,
    )
    report = killer.have_killed(node.guest, order, timeout_s=LONGEST_S)
    node.ledger.hurry()
    blocks = noise.IMAGES[IMAGE].file_bytes // noise.BLOCK_BYTES
    seen = inspector.all_right(readers, blocks, timeout_s=LONGEST_S)
    counts = node.guest.cachefiles_counts()
    assert counts["read"] == counts["cread"]
    node.containerd.remove()
    _await(node.containerd.snapshots, "snapshots")
    _await(node.cache_files, "cache files")
    node.bound = 0
    return report, seen


def test_nothing_is_left(node: Containers) -> None:
    """Images are removed, then everything is stopped: no mount, no cache file, no descriptor, no
    process is left, nor a zombie."""
    for app in fleet.APPS:
        node.mount(app)
    assert OBJECT in node.descriptors()
    node.containerd.remove()
    _await(node.containerd.snapshots, "snapshots")
    _await(node.cache_files, "cache files")
    assert node.snapshotter.status()["images"] == []
    open_ = node.descriptors()
    assert [name for name in open_ if name == OBJECT or name.startswith(disk.CACHE_MOUNT)] == []
    assert len(open_) < IDLE_DESCRIPTORS, open_
    memory = node.snapshotter.memory()
    print(f"memory of the daemons, of {MEMORY_BYTES >> 20} MiB: {memory}")
    assert memory["oom_kill"] == 0
    node.containerd.stop("/mnt")
    assert node.snapshotter.stop() == 0
    _await(node.left, "processes and mounts")


def _await(left: Callable[[], list[str]], what: str) -> None:
    """Wait until nothing is left."""
    end_s = time.monotonic() + GONE_S
    while found := left():
        assert time.monotonic() < end_s, f"{what} are left: {found}"
        time.sleep(0.2)

"""The daemon killed at moments nobody chose: readers pause, and no byte is wrong.

A run is a sample from a seed; with `--long` it is the whole count, kept in benchmarks/results after
each image that was read: an ended run says how far it came, and another one begins to count anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from harness import disk, inspector, killer, noise, record, rounds
from harness.daemon import drop_caches
from harness.guest import Guest, Process
from harness.inspector import Seen
from harness.killer import Order, Report
from harness.ledger import Asked
from harness.site import FILE_BLOCKS, LONGEST_S, PATIENCE_S, SHAPE, Site, chunks, whole

IMAGE = noise.CRASH[0]
MOUNT = "/mnt/image"

KILLS = {False: 6, True: 100}
OPEN_KILLS = {False: 2, True: 20}
"""On each kernel, of two for each transport: a few, or with `--long` all of them."""

LIVES = [(0.0, 1.0), (0.0, 1.0), (0.0, 3.0), (5.0, 6.0)]
"""Some daemons die as they start, some young; who has lived for 5 s is replaced without a pause."""

DEADLINE_S = 600.0
"""Longer than any pause: here EIO is always wrong."""

SLOW_BYTES_PER_S = 512 << 10

SLOW_OPEN_S = 0.5
HESITATION = f"""
import os, time
write = os.write
def slow(fd, data):
    if bytes(data).startswith(b"copen"):
        time.sleep({SLOW_OPEN_S})
    return write(fd, data)
os.write = slow
"""
"""A daemon that has taken an OPEN off the queue takes its time to answer: a wider target."""

PUNCH = """
import ctypes, os, sys
# include/uapi/linux/falloc.h: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
fallocate = ctypes.CDLL(None, use_errno=True).fallocate
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDWR)
assert fallocate(fd, 3, int(sys.argv[2]), 4096) == 0
"""


@pytest.fixture(scope="module")
def guest(boot_guest: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory) -> Guest:
    cache = disk.cache(tmp_path_factory.mktemp("disks") / "cache.ext4")
    return boot_guest(disks=[cache, noise.origin().disk])


@pytest.fixture
def site(guest: Guest) -> Iterator[Site]:
    """Cold; what it runs is ended."""
    site = Site(guest)
    site.node.registry.start()
    yield site
    site.node.end()
    site.ledger.stop()
    site.node.registry.stop()


def test_kills_during_cold_reads(site: Site, kernel: str, seed: int, long: bool) -> None:
    """Killed with READs unanswered, again and again: readers pause, get right bytes, and no chunk
    that was resident is asked for again."""
    rounds.until(KILLS[long], partial(_round_of_kills, site), kernel, seed, keep=long)


def _round_of_kills(site: Site, seed: int, kills: int) -> tuple[Report, list[Seen]]:
    """One cold image, read to its end while daemons die."""
    site.node.begin({"fetch": {"deadline_s": DEADLINE_S}})
    site.ledger.start(SLOW_BYTES_PER_S)
    site.mount(IMAGE, MOUNT)
    readers = site.readers(MOUNT, IMAGE, seed)
    report = _kill(site, readers, kills, seed, "read", LIVES)
    site.ledger.hurry()
    seen = inspector.all_right(readers, FILE_BLOCKS, timeout_s=PATIENCE_S)
    assert _fetched_twice(report, site.asked(IMAGE)) == []
    _assert_all_resident(site)
    site.node.end()
    site.ledger.stop()
    drop_caches(site.guest)
    return report, seen


def _kill(
    site: Site,
    readers: list[Process],
    kills: int,
    seed: int,
    of: str,
    lives: list[tuple[float, float]],
) -> Report:
    order = Order(
        supervisor=site.daemon.supervisor,
        readers=[reader.pid for reader in readers],
        kills=kills,
        seed=seed,
        lives=lives,
        of=[of],
        file=site.cache_file(IMAGE),
        log="",
        traced=site.guest.kernel.traced,
    )
    return killer.have_killed(site.guest, order, timeout_s=LONGEST_S)


def _assert_all_resident(site: Site) -> None:
    """Every READ was answered once, and nothing needs to be asked for any more."""
    if site.guest.kernel.traced:
        counts = site.guest.cachefiles_counts()
        assert counts["read"] == counts["cread"]
    reads = site.daemon.asked()
    assert site.resident(IMAGE) == set(range(SHAPE.chunks))
    asked = len(site.asked(IMAGE))
    drop_caches(site.guest)
    seen = site.stream(MOUNT, IMAGE)
    assert (seen["error"], seen["wrong"]) == (None, [])
    assert site.daemon.asked() == reads
    assert len(site.asked(IMAGE)) == asked


@pytest.mark.cachefiles
def test_kills_between_an_open_and_its_answer(
    site: Site, kernel: str, seed: int, long: bool
) -> None:
    """Killed when it has taken an OPEN and not answered it: the mount waits and succeeds."""
    site.guest.put("/run/hesitation/sitecustomize.py", HESITATION.encode())
    site.node.begin({"fetch": {"deadline_s": DEADLINE_S}})
    site.daemon.stop()
    site.daemon.start(env={"PYTHONPATH": "/run/hesitation"})
    site.ledger.start()
    kills = 0
    while kills < OPEN_KILLS[long]:
        site.guest.run(["mkdir", "-p", MOUNT])
        reference = f"{site.ledger.address}/{IMAGE}"
        mount = site.guest.start(["fscached", "mount", reference, MOUNT], timeout_s=PATIENCE_S)
        report = _kill(site, [mount], OPEN_KILLS[long] - kills, seed + kills, "open", [(0, 0)])
        done = mount.wait(PATIENCE_S)
        assert done.returncode == 0, done.stderr
        kills += sum(kill["unanswered"]["open"] > 0 for kill in report["kills"])
        seen = site.stream(MOUNT, IMAGE)
        assert (seen["error"], seen["wrong"]) == (None, [])
        site.daemon.wait()
        site.daemon.umount(MOUNT)
        name = "kills_with_an_open_unanswered"
        record.counted(kernel, seed, name, kills, OPEN_KILLS[long], {}, keep=long)


@pytest.mark.either
def test_a_chunk_with_a_missing_block_is_fetched_again(site: Site) -> None:
    """It, and no other: a chunk is resident only if all its blocks are data."""
    site.node.begin()
    site.ledger.start()
    site.mount(IMAGE, MOUNT)
    assert site.stream(MOUNT, IMAGE)["error"] is None
    site.node.end()
    torn = SHAPE.chunks // 2
    hole = torn * SHAPE.chunk_bytes + 5 * noise.BLOCK_BYTES
    site.guest.python(PUNCH, site.cache_file(IMAGE), str(hole))
    assert site.resident(IMAGE) == set(range(SHAPE.chunks)) - {torn}
    before = len(site.asked_chunks(IMAGE))
    site.daemon.start()
    site.mount(IMAGE, MOUNT)
    seen = site.stream(MOUNT, IMAGE)
    assert (seen["error"], seen["wrong"]) == (None, [])
    assert site.asked_chunks(IMAGE)[before:] == [torn]


def _fetched_twice(report: Report, asked: list[Asked]) -> list[tuple[float, int]]:
    """Chunks that were asked for after a kill that found them resident."""
    return [
        (one.at_s, chunk)
        for kill in report["kills"]
        for one in asked
        if one.at_s > kill["at_s"]
        for chunk in whole(kill["resident"]).intersection(chunks(one))
    ]

"""The daemon killed, the power cut, at moments nobody chose: readers pause, and no byte is wrong.

A run is a sample from a seed; with `--long` it is the whole count, kept in benchmarks/results.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import disk, inspector, noise, project
from harness.daemon import drop_caches
from harness.guest import Guest, Process
from harness.inspector import Seen
from harness.killer import Kill, Order, Report
from harness.ledger import Asked, Ledger
from harness.node import Node
from harness.registry import Registry

IMAGE, OTHER = noise.CRASH
SHAPE = noise.IMAGES[IMAGE]
FILE_BLOCKS = SHAPE.file_bytes // noise.BLOCK_BYTES
MOUNT, OTHER_MOUNT = "/mnt/image", "/mnt/other"
RESULTS = project.ROOT / "benchmarks/results"

KILLS = {False: 20, True: 200}
OPEN_KILLS = {False: 2, True: 20}
POWER_CUTS = {False: 5, True: 50}
"""On each kernel: a tenth, or with `--long` all of them."""

LIVES = [(0.0, 1.0), (0.0, 3.0), (5.0, 7.0)]
"""Some daemons die as they start, some young; who has lived for 5 s is replaced without a pause."""

DEADLINE_S = 120.0
"""Longer than any pause: here EIO is always wrong."""

PATIENCE_S = 300.0
SLOW_BYTES_PER_S = 512 << 10
CUT_BYTES_PER_S = 4 << 20
CUT_AFTER_S = 5.0
COMMIT = "noatime,commit=1"
"""Mount options of the disk that survives: with the usual 5 s there would be little to survive."""

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

EXTENTS = """
import json, sys
sys.path.insert(0, "/run")
from harness.killer import extents
print(json.dumps(extents(sys.argv[1])))
"""

PUNCH = """
import ctypes, os, sys
# include/uapi/linux/falloc.h: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
fallocate = ctypes.CDLL(None, use_errno=True).fallocate
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDWR)
assert fallocate(fd, 3, int(sys.argv[2]), 4096) == 0
"""


class Site:
    """A node whose origin keeps a ledger."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.node = Node(guest, Registry(guest))
        self.daemon = self.node.daemon
        self.ledger = Ledger(guest, self.node.registry)

    def mount(self, image: str, directory: str) -> None:
        self.daemon.mount(f"{self.ledger.address}/{image}", directory)

    def start(self, kind: str, *words: object) -> Process:
        return inspector.start(self.guest, kind, *map(str, words), timeout_s=LONGEST_S)

    def readers(self, mount: str, image: str, seed: int) -> list[Process]:
        """Sixteen at once: for every file two that read and two that map, one of each with
        readahead and one without."""
        return [
            self.start(kind, mount, *words, name)
            for name in noise.names(image)
            for kind, *words in (("stream",), ("alone",), ("pages_ahead",), ("pages", seed))
        ]

    def stream(self, mount: str, image: str) -> Seen:
        reader = self.start("stream", mount, *noise.names(image))
        return inspector.seen(reader, timeout_s=PATIENCE_S)

    def cache_file(self, image: str) -> str:
        """Where the data of an image is in the guest, empty when it is nowhere."""
        # cachefiles puts a D before the name of a file of data (fs/cachefiles/key.c).
        name = f"{'D' if self.guest.kernel.traced else ''}{_blob_id(image)}"
        found = self.guest.run(["find", disk.CACHE_MOUNT, "-name", name, "-size", "+0"])
        return found.stdout.strip()

    def resident(self, image: str) -> set[int]:
        """The chunks whose every block is data in the cache file, by looking at it."""
        path = self.cache_file(image)
        return _whole(json.loads(self.guest.python(EXTENTS, path).stdout)) if path else set()

    def asked_chunks(self, image: str) -> list[int]:
        """Every chunk that was asked of the origin, as often as it was."""
        return [chunk for asked in self.asked(image) for chunk in _chunks(asked)]

    def asked(self, image: str) -> list[Asked]:
        """What was asked of the image's data; what lies behind it is the chunks' own table."""
        asked = self.ledger.asked(_blob_id(image))
        return [one for one in asked if one.start < SHAPE.blob_bytes]


LONGEST_S = 3600.0


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
    kills: list[Kill] = []
    pauses, idle = [], 0
    while len(kills) < KILLS[long]:
        report, seen = _round_of_kills(site, seed + len(kills), KILLS[long] - len(kills))
        kills += report["kills"]
        idle += report["idle"]
        pauses.append(max(one["slowest_s"] for one in seen))
    unanswered = Counter(kill["unanswered"]["read"] for kill in kills)
    facts = {
        "count": len(kills),
        "idle_and_not_counted": idle,
        "longest_pause_s": round(max(pauses), 2),
        "kills_by_unanswered_reads": dict(sorted(unanswered.items())),
    }
    print(f"seed {seed}: {facts}")
    if long:
        _keep(kernel, seed, "kills", facts)


def _round_of_kills(site: Site, seed: int, kills: int) -> tuple[Report, list[Seen]]:
    """One cold image, read to its end while daemons die."""
    site.node.begin({"fetch": {"deadline_s": DEADLINE_S}})
    site.ledger.start(SLOW_BYTES_PER_S)
    site.mount(IMAGE, MOUNT)
    readers = site.readers(MOUNT, IMAGE, seed)
    report = _kill(site, readers, kills, seed, "read", LIVES)
    site.ledger.hurry()
    seen = [inspector.seen(reader, timeout_s=PATIENCE_S) for reader in readers]
    assert [(one["error"], one["wrong"]) for one in seen] == [(None, [])] * len(readers)
    assert [one["blocks"] for one in seen] == [FILE_BLOCKS] * len(readers)
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
    )
    killer = ["/usr/bin/python3", "-m", "harness.killer", json.dumps(order)]
    done = site.guest.run(killer, cwd="/run", timeout_s=LONGEST_S)
    report: Report = json.loads(done.stdout)
    return report


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
    print(f"seed {seed}: {kills} kills with an OPEN unanswered")
    if long:
        _keep(kernel, seed, "kills_with_an_open_unanswered", {"count": kills})


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


@pytest.mark.machine
def test_power_cuts_during_cold_reads(
    boot_guest: Callable[..., Guest], tmp_path: Path, kernel: str, seed: int, long: bool
) -> None:
    """QEMU killed at random moments, the disk kept: every chunk that is whole in the cache file is
    served from it, every other one is fetched again, once, and every byte is right."""
    rng = random.Random(seed)
    cache = tmp_path / "cache.ext4"
    kept = []
    for number in range(POWER_CUTS[long] + 1):
        kept_disk = dataclasses.replace(disk.cache(cache, lasting=True), options=COMMIT)
        guest = boot_guest(disks=[kept_disk, noise.origin().disk])
        torn, cold = noise.CRASH[number % 2], noise.CRASH[1 - number % 2]
        site = Site(guest)
        site.node.registry.start()
        site.ledger.start()
        if path := site.cache_file(cold):
            guest.run(["rm", path])
        whole = site.resident(torn)
        site.daemon.configure({"fetch": {"deadline_s": DEADLINE_S}})
        site.daemon.start()
        if number:
            _assert_mended(site, torn, whole)
            kept.append(len(whole))
        if number < POWER_CUTS[long]:
            _cut_power(site, cold, rng)
    print(f"seed {seed}: chunks that survived each cut, of {SHAPE.chunks}: {kept}")
    if long:
        facts = {"count": len(kept), "chunks": SHAPE.chunks, "survived": kept, "wrong_bytes": 0}
        _keep(kernel, seed, "power_cuts", facts)


def _assert_mended(site: Site, image: str, whole: set[int]) -> None:
    site.mount(image, OTHER_MOUNT)
    seen = site.stream(OTHER_MOUNT, image)
    assert (seen["error"], seen["wrong"]) == (None, [])
    assert sorted(site.asked_chunks(image)) == sorted(set(range(SHAPE.chunks)) - whole)


def _cut_power(site: Site, image: str, rng: random.Random) -> None:
    """At a random moment from the first READ of data on."""
    site.ledger.stop()
    site.ledger.start(CUT_BYTES_PER_S)
    site.mount(image, MOUNT)
    site.guest.reset_cachefiles_counts()
    site.readers(MOUNT, image, rng.randrange(1 << 32))
    while not site.daemon.asked():
        pass
    time.sleep(rng.uniform(0, CUT_AFTER_S))
    site.guest.kill()


def _blob_id(image: str) -> str:
    [blob_id] = noise.origin().blob_ids(image)
    return blob_id


def _whole(extents: list[tuple[int, int]]) -> set[int]:
    """The chunks that lie in extents altogether."""
    size = SHAPE.chunk_bytes
    return {chunk for start, end in extents for chunk in range(-(-start // size), end // size)}


def _chunks(asked: Asked) -> range:
    """The chunks a request has bytes of."""
    return range(asked.start // SHAPE.chunk_bytes, -(-asked.end // SHAPE.chunk_bytes))


def _fetched_twice(report: Report, asked: list[Asked]) -> list[tuple[float, int]]:
    """Chunks that were asked for after a kill that found them resident."""
    return [
        (one.at_s, chunk)
        for kill in report["kills"]
        for one in asked
        if one.at_s > kill["at_s"]
        for chunk in _whole(kill["resident"]).intersection(_chunks(one))
    ]


def _keep(kernel: str, seed: int, name: str, facts: dict[str, Any]) -> None:
    """Put the result of a long run beside the others of its kernel."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"crash-{kernel}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    head = ["git", "-C", str(project.ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    kept[name] = {"seed": seed, "commit": commit, "date": date, **facts}
    path.write_text(json.dumps(kept, indent=2) + "\n")

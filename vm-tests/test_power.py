"""The power cut at moments nobody chose: what reached the disk is served from it, the rest comes
again, and no byte is wrong. Every guest of this file is one of a series with one disk.

A run is a sample from a seed; with `--long` it is the whole count, kept in benchmarks/results after
each cut: an ended run says how far it came, and another one begins to count anew.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import disk, noise, record
from harness.guest import Guest
from harness.site import FILE_BLOCKS, SHAPE, Site

POWER_CUTS = {False: 3, True: 50}
"""On each kernel: a few, or with `--long` all of them."""

MOUNT, OTHER_MOUNT = "/mnt/image", "/mnt/other"
DEADLINE_S = 120.0
"""Longer than any pause: here EIO is always wrong."""

CUT_BYTES_PER_S = 4 << 20
CUT_AFTER_S = 5.0
COMMIT = "noatime,commit=1"
"""Mount options of the disk that survives: with the usual 5 s there would be little to survive."""


@pytest.mark.machine
def test_power_cuts_during_cold_reads(
    boot_guest: Callable[..., Guest], tmp_path: Path, kernel: str, seed: int, long: bool
) -> None:
    """QEMU killed at random moments, the disk kept: every chunk that is whole in the cache file is
    served from it, every other one is fetched again, once, and every byte is right."""
    rng = random.Random(seed)
    cache = tmp_path / "cache.ext4"
    survived: list[int] = []
    compared = 0
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
            compared += _assert_mended(site, torn, whole)
            survived.append(len(whole))
            facts = {"chunks": SHAPE.chunks, "survived": survived, "compared_blocks": compared}
            record.counted(kernel, seed, "power_cuts", number, POWER_CUTS[long], facts, keep=long)
        if number < POWER_CUTS[long]:
            _cut_power(site, cold, rng)


def _assert_mended(site: Site, image: str, whole: set[int]) -> int:
    """How many blocks of it were compared."""
    site.mount(image, OTHER_MOUNT)
    seen = site.stream(OTHER_MOUNT, image)
    assert (seen["error"], seen["wrong"], seen["blocks"]) == (None, [], SHAPE.files * FILE_BLOCKS)
    assert sorted(site.asked_chunks(image)) == sorted(set(range(SHAPE.chunks)) - whole)
    return seen["blocks"]


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

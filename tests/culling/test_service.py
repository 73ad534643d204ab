"""Housekeeping over a stand-in kernel and a real state directory, by a clock of the test's."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace

import pytest
import pytest_asyncio

from fscached.config import Cache
from fscached.culling.keeper import Look, OpenObject
from fscached.culling.service import SETTLE_S, Culling
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.store import Store
from fscached.transport import CacheFile, ObjectKey
from tests.fake_kernel import CacheFile as File
from tests.fake_kernel import FakeKernel
from tests.fill.conftest import until
from tests.rafs_v6.trees import build, directory, regular

pytestmark = pytest.mark.asyncio

BLOCK = 4096
START_S = 1.8e9
HOUR_S = 3600.0


class House:
    """A cache of which the tests say everything."""

    def __init__(self, directory, **limits) -> None:
        self.now_s = START_S
        self.free_percent = 50
        self.bound: set[ObjectKey] = set()
        self.opened: list[OpenObject] = []
        self.kernel = FakeKernel()
        self.store = Store(directory)
        self.crew = Crew(1, Pool(1 << 24))
        self.limits = Cache(directory=str(directory), domain_id="v", **limits)
        self.culling = Culling(
            self.limits,
            self.kernel,
            self.store,
            self.crew,
            lambda: Look(frozenset(self.bound), list(self.opened)),
            lambda: self.now_s,
            self._statvfs,
        )

    def _statvfs(self, directory: str) -> os.statvfs_result:
        found = SimpleNamespace(
            f_blocks=10_000, f_bavail=100 * self.free_percent, f_frsize=BLOCK, f_files=0, f_ffree=0
        )
        return found  # type: ignore[return-value]

    def put(self, cookie: str, blocks: int = 1, used_s: float = START_S, volume="v") -> ObjectKey:
        key = ObjectKey(volume, cookie)
        data = bytearray(blocks * BLOCK)
        self.kernel.cache_files[key] = File(len(data), data, set(range(blocks)), True, used_s)
        return key

    @property
    def cookies(self) -> set[str]:
        return {file.key.cookie for file in self.kernel.files.listed()}


@pytest_asyncio.fixture
async def make(tmp_path) -> AsyncIterator:
    made: list[House] = []

    def house(**limits) -> House:
        made.append(House(tmp_path, **limits))
        return made[-1]

    yield house
    for it in made:
        it.crew.close()
        it.kernel.close()


def cookies(files: Iterable[CacheFile]) -> list[str]:
    return [file.key.cookie for file in files]


async def test_a_file_is_culled_when_it_is_asked_for(make) -> None:
    """In every volume; others stay, and the empty volume's directories go."""
    house = make()
    house.put("a"), house.put("a", volume="w"), house.put("b")
    house.culling.cull("a")
    await house.culling.settle()
    assert house.cookies == {"b"} and house.culling.waiting == 0
    assert set(house.kernel.files.tidied) == {"v", "w"}
    assert (house.culling.counts.culled_files, house.culling.counts.culled_bytes) == (2, 2 * BLOCK)


async def test_what_is_in_use_is_culled_later(make) -> None:
    """Nobody has to ask again: not while it is bound, not while the kernel has it."""
    house = make()
    key = house.put("a")
    house.bound.add(key)
    house.culling.cull("a")
    await house.culling.settle()
    assert house.cookies == {"a"} and house.culling.waiting == 1
    house.bound.clear()
    house.kernel.closing.add(key)
    await house.culling.settle()
    assert house.cookies == {"a"} and house.culling.waiting == 1
    house.kernel.closing.clear()
    await house.culling.settle()
    assert house.cookies == set() and house.culling.waiting == 0


async def test_a_file_that_has_no_name_yet_is_waited_for(make) -> None:
    """It gets one at its CLOSE, some milliseconds after the daemon has heard of that."""
    house = make()
    key = house.put("a")
    house.kernel.cache_files[key].linked = False
    house.culling.cull("a")
    await house.culling.settle()
    house.now_s += SETTLE_S - 1
    house.culling.closed(key)
    await house.culling.settle()
    assert house.culling.waiting == 1
    house.kernel.cache_files[key].linked = True
    house.now_s += 1
    await house.culling.settle()
    assert house.cookies == set() and house.culling.waiting == 0


async def test_what_never_turns_up_is_forgotten(make) -> None:
    """Plain layers have no cache file at all."""
    house = make()
    house.culling.cull("never")
    await house.culling.settle()
    assert house.culling.waiting == 1
    house.now_s += SETTLE_S
    await house.culling.settle()
    assert house.culling.waiting == 0


async def test_a_close_is_the_last_use(make) -> None:
    """Which the file itself remembers."""
    house = make()
    key = house.put("a", used_s=1.0)
    house.culling.closed(key)
    house.now_s += 5
    await house.culling.settle()
    assert house.kernel.cache_files[key].used_s == START_S


async def test_a_command_that_fails_holds_up_no_other(make, caplog) -> None:
    """It is said, and tried again."""
    house = make()
    house.put("a"), house.put("b")
    house.kernel.files.errors.append(OSError(errno.EIO, "cachefiles refused cull"))
    house.culling.cull("a")
    house.culling.cull("b")
    await house.culling.settle()
    assert house.cookies == {"a"} and "cachefiles refused cull" in caplog.text
    await house.culling.settle()
    assert house.cookies == set()


async def test_orphans_go_when_nobody_has_claimed_them_for_long(make) -> None:
    """A snapshotter binds its images again after a boot: not before it has had time to."""
    house = make(orphan_age_s=HOUR_S)
    house.put("old", used_s=1.0)
    bound = house.put("bound", used_s=1.0)
    house.bound.add(bound)
    assert not (await house.culling.sweep()).culled
    house.now_s += HOUR_S - 1
    house.put("young", used_s=house.now_s)
    assert not (await house.culling.sweep()).culled
    house.now_s += 1
    swept = await house.culling.sweep()
    assert [(it.file.key.cookie, it.why) for it in swept.culled] == [("old", "orphan")]
    assert house.cookies == {"bound", "young"}


async def test_an_image_that_was_pulled_is_no_orphan(make) -> None:
    """It may be mounted again: its files go for the budget only, and then all of it."""
    house = make(orphan_age_s=0)
    built = build(directory({b"a": regular(b"a" * 5000)}))
    [blob_id] = built.blobs
    house.store.adopt("host/app:1", "sha256:0", built.image.bootstrap, frozenset({blob_id}))
    fsid = hashlib.sha256(built.image.bootstrap).hexdigest()
    house.put(fsid), house.put(blob_id)
    (house.store._blobs / f"{blob_id}.meta").write_bytes(b"")
    (house.store._blobs / "stranger.meta").write_bytes(b"")
    house.now_s += 2e9
    assert not (await house.culling.sweep()).culled
    assert [known.fsid for known in house.store.known()] == [fsid]
    assert [kept for kept, _ in house.store.metas()] == [blob_id]
    swept = await house.culling.sweep(all_idle=True)
    assert len(swept.culled) == 2 and list(house.store.known()) == []
    assert not house.store.bootstrap(fsid).parent.exists()
    await house.culling.sweep()
    assert list(house.store.metas()) == []


async def test_the_budget_takes_the_least_recently_used(make) -> None:
    """Whole files, as few as will do; what is bound or open stays however old."""
    house = make(budget_bytes=4 * BLOCK)
    ancient = house.put("ancient", 2, used_s=1.0)
    house.bound.add(ancient)
    closing = house.put("closing", 1, used_s=2.0)
    house.kernel.closing.add(closing)
    house.put("old", 2, used_s=3.0)
    house.put("new", 1, used_s=4.0)
    swept = await house.culling.sweep()
    assert [(it.file.key.cookie, it.why) for it in swept.culled] == [("old", "budget")]
    assert cookies(swept.busy) == ["closing"] and not swept.excess
    assert swept.used_bytes == 4 * BLOCK == house.culling.counts.used_bytes


async def test_nameless_files_count(make, caplog) -> None:
    """A new object is unlinked until its CLOSE: no directory shows what it takes."""
    house = make(budget_bytes=3 * BLOCK)
    opening = asyncio.create_task(house.kernel.open(key := ObjectKey("v", "new")))
    await asyncio.sleep(0)
    [opened] = house.kernel.drain()
    house.kernel.open_ok(opened.object, 8 * BLOCK)
    await opening
    house.kernel.settle(key)
    house.kernel.cache_files[key].resident = {0, 1, 5}
    house.opened = [OpenObject(opened.object, key, 8 * BLOCK)]
    house.bound.add(key)
    house.put("old", 1, used_s=1.0)
    census = await house.culling.census()
    assert [(it.path, it.allocated_bytes) for it in census.nameless] == [("", 3 * BLOCK)]
    assert cookies(it.file for it in (await house.culling.sweep()).culled) == ["old"]
    house.kernel.cache_files[key].resident.add(6)
    swept = await house.culling.sweep()
    assert swept.excess.allocated_bytes == BLOCK and "is in use" in caplog.text


async def test_a_full_disk_is_culled_without_a_budget(make) -> None:
    """Below the kernel's `cull` percentage, until there is `run` again."""
    house = make()
    for number in range(400):
        house.put(f"{number:03}", 1, used_s=float(number))
    house.free_percent = 4
    swept = await house.culling.sweep()
    assert cookies(it.file for it in swept.culled) == [f"{number:03}" for number in range(300)]


async def test_a_dry_run_deletes_nothing(make) -> None:
    """It says what would go."""
    house = make()
    house.put("a")
    swept = await house.culling.sweep(all_idle=True, dry_run=True)
    assert cookies(it.file for it in swept.culled) == ["a"] and house.cookies == {"a"}
    assert house.culling.counts.culled_files == 0


async def test_a_file_in_use_for_long_is_known_to_be(make) -> None:
    """So that after a crash of the host it is not taken for the oldest."""
    house = make()
    key = house.put("a", used_s=START_S)
    house.bound.add(key)
    house.now_s += 2 * HOUR_S
    await house.culling.sweep()
    assert house.kernel.cache_files[key].used_s == house.now_s


async def test_the_patrol_does_it_by_itself(make, monkeypatch) -> None:
    """What is asked for goes soon, and the rest by looking now and then."""
    monkeypatch.setattr("fscached.culling.service.SPACE_PAUSE_S", 0.01)
    house = make(orphan_age_s=0)
    house.put("orphan", used_s=1.0)
    house.culling.begin()
    await until(lambda: not house.cookies)
    house.bound.add(house.put("bound"))
    house.put("wanted", used_s=house.now_s)
    house.culling.cull("wanted")
    await until(lambda: not house.culling.waiting)
    assert house.cookies == {"bound"}
    house.culling.end()

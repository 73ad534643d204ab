"""How much has to go, and in which order."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from fscached.config import Cache
from fscached.culling.budget import Excess, excess, oldest_first
from fscached.transport import CacheFile, ObjectKey

GIB = 1 << 30


def space(free_percent: float = 50, free_files_percent: float = 50, files: int = 1000):
    return SimpleNamespace(
        f_blocks=100_000,
        f_bavail=round(1000 * free_percent),
        f_frsize=4096,
        f_files=files,
        f_ffree=round(files * free_files_percent / 100),
    )


def file(name: str, used_s: float, allocated_bytes: int = 4096) -> CacheFile:
    return CacheFile(ObjectKey("v", name), f"/{name}", 1 << 20, allocated_bytes, used_s)


def test_without_a_budget_a_disk_with_room_keeps_everything() -> None:
    """However much there is."""
    assert not excess(1 << 50, space(), Cache())


def test_the_budget_is_for_all_files_together() -> None:
    """What is above it is too much."""
    limits = Cache(budget_bytes=2 * GIB)
    assert not excess(2 * GIB, space(), limits)
    assert excess(2 * GIB + 5, space(), limits) == Excess(5, 0)


def test_a_full_disk_wants_as_much_as_brings_it_to_run() -> None:
    """As the kernel's own limits have it: culling begins below 5 % and ends at 7 %."""
    assert not excess(0, space(5.0), Cache())
    assert excess(0, space(4.9), Cache()) == Excess(2100 * 4096, 0)
    assert excess(0, space(50, 4), Cache()) == Excess(0, 30)


def test_a_file_system_that_counts_no_files_has_enough() -> None:
    """btrfs says 0 of 0."""
    assert not excess(0, space(files=0), Cache())


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 100), st.integers(0, 100))
def test_what_is_too_much_is_never_negative(used, budget, blocks, files) -> None:
    """And nothing of it is left when all that was too much is gone."""
    limits = Cache(budget_bytes=budget)
    over = excess(used, space(blocks, files), limits)
    assert over.allocated_bytes >= 0 and over.files >= 0
    for _ in range(over.files):
        over = over.without(file("x", 0, 0))
    assert not over.without(file("x", 0, over.allocated_bytes))


@given(st.lists(st.integers(0, 50), max_size=20), st.sets(st.integers(0, 19)))
def test_the_oldest_goes_first_and_what_is_needed_stays(uses, needed) -> None:
    """By last use alone."""
    files = [file(str(number), used_s) for number, used_s in enumerate(uses)]
    keys = {ObjectKey("v", str(number)) for number in needed}
    order = oldest_first(files, keys)
    assert [it.used_s for it in order] == sorted(it.used_s for it in order)
    assert {it.key for it in order} == {it.key for it in files} - keys

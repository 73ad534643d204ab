"""Who gave which bytes of a read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fscached.source.trail import TRAILS_LIMIT, Trail, Trails

STEPS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), max_size=8)
"""Givers, and how many bytes each gave."""


def walked(trail: Trail[str], steps: list[tuple[str, int]]) -> list[str]:
    """Walk a trail; who gave each byte of it."""
    bytes_of = []
    for giver, size in steps:
        trail.step(giver)
        trail.position += size
        bytes_of += [giver] * size
    return bytes_of


@given(begin=st.integers(0, 20), steps=STEPS, start=st.integers(0, 60), size=st.integers(1, 60))
def test_every_byte_has_its_giver(
    begin: int, steps: list[tuple[str, int]], start: int, size: int
) -> None:
    """The givers of a range are those of its bytes, in order; of bytes it did not bring, nobody."""
    trail: Trail[str] = Trail("blob", begin)
    bytes_of = walked(trail, steps)
    found = trail.givers("blob", start, start + size)
    if begin <= start and start + size <= begin + len(bytes_of):
        expected = bytes_of[start - begin : start - begin + size]
        assert list(dict.fromkeys(found)) == list(dict.fromkeys(expected))
    else:
        assert found == []
    assert trail.givers("another", start, start + size) == []


@given(before=STEPS, after=STEPS, start=st.integers(0, 60), size=st.integers(1, 60))
def test_the_last_read_has_the_last_word(
    before: list[tuple[str, int]], after: list[tuple[str, int]], start: int, size: int
) -> None:
    """Of two reads that brought the same bytes the later one's are in the cache."""
    trails: Trails[str] = Trails()
    walks = [(trails.begin("blob", 0), steps) for steps in (before, after)]
    for trail, steps in walks:
        walked(trail, steps)
    first, second = (trail.givers("blob", start, start + size) for trail, _ in walks)
    assert trails.givers("blob", start, start + size) == (second or first)


def test_who_gave_nothing_gave_nothing() -> None:
    """One that was asked in vain is no giver, neither before another nor at the end."""
    trail: Trail[str] = Trail("blob", 5)
    walked(trail, [("a", 0), ("b", 4), ("c", 0)])
    assert trail.givers("blob", 5, 9) == ["b"]


def test_old_reads_are_forgotten() -> None:
    """What is remembered has a limit."""
    trails: Trails[str] = Trails()
    walked(trails.begin("old", 0), [("a", 1)])
    for _ in range(TRAILS_LIMIT):
        assert trails.givers("old", 0, 1) == ["a"]
        walked(trails.begin("new", 0), [("b", 1)])
    assert trails.givers("old", 0, 1) == []

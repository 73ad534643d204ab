"""When a link is fast."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fscached.source.link import FAST_BYTES_PER_S, SAMPLE_BYTES, SAMPLES, Link


def test_it_has_to_be_shown() -> None:
    """Nothing is known at first, and short reads say nothing."""
    link = Link()
    assert not link.fast
    for _ in range(20):
        link.brought(SAMPLE_BYTES - 1, 1e-9)
    assert not link.fast


@given(st.lists(st.floats(1e3, 1e10), min_size=1, max_size=40))
def test_the_slowest_of_the_last_reads_counts(speeds: list[float]) -> None:
    """All of them were fast, and there were some."""
    link = Link()
    for speed in speeds:
        link.brought(1 << 20, (1 << 20) / speed)
    last = speeds[-SAMPLES:]
    slack = 1 + 1e-9
    if link.fast:
        assert len(last) >= 4 and min(last) * slack >= FAST_BYTES_PER_S
    else:
        assert len(last) < 4 or min(last) <= FAST_BYTES_PER_S * slack

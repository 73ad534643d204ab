"""Extents against a set of bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.cache.extents import Extents

ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair))),
    max_size=8,
)


@given(ranges, st.integers(0, 70), st.integers(0, 30))
def test_covers_agrees_with_a_set_of_bytes(pairs, start, length):
    """A range is covered exactly when every byte of it is in one of the ranges."""
    held = {byte for first, end in pairs for byte in range(first, end)}
    extents = Extents(pairs)
    assert extents.covers(start, start + length) == held.issuperset(range(start, start + length))
    assert extents.total_bytes == len(held)


@given(ranges)
def test_iteration_is_ascending_and_disjoint(pairs):
    """What comes out is sorted, and ranges that touch have become one."""
    out = list(Extents(pairs))
    assert all(left[1] < right[0] for left, right in itertools.pairwise(out))
    assert all(start < end for start, end in out)


def test_backward_range_is_refused():
    """A range that ends before it starts is a bug of the caller."""
    with pytest.raises(ValueError, match="ends before it starts"):
        Extents([(8, 4)])

"""What a daemon leaves is whole at every moment."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.handover import Handover


@given(st.lists(st.text(max_size=200), max_size=12))
def test_the_last_value_is_what_a_successor_reads(values):
    """Values of growing and shrinking size replace each other."""
    handover = Handover()
    try:
        for value in values:
            handover.save(value)
            assert Handover(handover.fd).load() == value
        assert (handover.load() is None) == (not values)
    finally:
        os.close(handover.fd)


@given(st.text(max_size=100), st.text(max_size=300))
def test_a_crash_before_the_head_leaves_the_value_before(first, second):
    """The data is written beside the half that counts, never over it."""
    handover = Handover()
    try:
        handover.save(first)
        head = os.pread(handover.fd, 16, 0)
        handover.save(second)
        os.pwrite(handover.fd, head, 0)
        assert handover.load() == first
    finally:
        os.close(handover.fd)


def test_foreign_memory_is_refused():
    """A descriptor that is not ours does not become registrations."""
    fd = os.memfd_create("foreign")
    try:
        with pytest.raises(ValueError, match="cut short"):
            Handover(fd).load()
        os.pwrite(fd, b"\xff" * 32, 0)
        with pytest.raises(ValueError, match="claims"):
            Handover(fd).load()
        os.pwrite(fd, struct.pack("=QQ", 16, 16), 0)
        with pytest.raises(ValueError, match="damaged"):
            Handover(fd).load()
    finally:
        os.close(fd)

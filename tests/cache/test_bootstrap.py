"""A bootstrap is written once for all who wait."""

from __future__ import annotations

from fscached.cache.bootstrap import Bootstrap


def test_all_who_wait_are_woken_by_one_write():
    """The first READ begins the write, later ones join it."""
    target = Bootstrap(8192)
    assert not target.want(1) and target.write()
    assert not target.want(2) and not target.write()
    assert target.landed() == [1, 2]
    assert target.want(3)


def test_a_failed_write_fails_who_waits_and_is_tried_anew():
    """No object is dead for good."""
    target = Bootstrap(8192)
    target.want(1)
    target.write()
    assert target.lost() == [1]
    target.want(2)
    assert target.write()

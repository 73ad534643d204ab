"""Budgets: never more than the limit over time, demand first, never stuck."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.prefetch.budget import DEBT_S, RANGE_S, Budget, Speed

RATE = 1_000_000
SIZES = st.integers(1, 8_000_000)


@given(st.lists(SIZES, max_size=40))
def test_prefetch_gets_what_the_limit_gives(sizes):
    """Whatever lengths it asks for: whoever waits as long as told has spent, when the last one
    begins, at most the limit and what may be spent at once; and that is not much less."""
    budget, now_s, spent = Budget(RATE), 0.0, 0
    for size in sizes:
        now_s += budget.wait_s(now_s)
        assert spent <= RATE * (now_s + RANGE_S) + 1
        budget.prefetch(size, now_s)
        spent += size
    assert now_s <= spent / RATE + 0.001


@given(st.lists(st.tuples(st.booleans(), SIZES, st.floats(0, 5)), max_size=40))
def test_demand_holds_prefetch_up_for_a_bounded_time(events):
    """Demand is never refused, and when it ends prefetch goes on within its own debt and DEBT_S."""
    budget, now_s, largest = Budget(RATE), 0.0, 0
    for demand, size, pause_s in events:
        now_s += pause_s
        if demand:
            budget.demand(size, now_s)
        elif budget.wait_s(now_s) == 0:
            budget.prefetch(size, now_s)
            largest = max(largest, size)
        assert 0 <= budget.wait_s(now_s) <= max(DEBT_S, largest / RATE) + 0.001


def test_under_constant_demand_of_half_the_limit_prefetch_gets_the_other_half():
    """Demand first, and the sum is the limit."""
    budget, now_s, brought = Budget(RATE), 0.0, 0
    while now_s < 10:
        budget.demand(RATE // 20, now_s)
        if budget.wait_s(now_s) == 0:
            budget.prefetch(RATE // 10, now_s)
            brought += RATE // 10
        now_s += 0.1
    assert 4.5 * RATE <= brought <= 6.5 * RATE


def test_under_demand_beyond_the_limit_prefetch_gets_nothing():
    """The limit is the operator's, and readers have all of it."""
    budget = Budget(RATE)
    for tick in range(100):
        budget.demand(RATE // 5, tick / 10)
        assert tick < 5 or budget.wait_s(tick / 10) > 0


@given(SIZES, st.floats(0, 100))
def test_no_limit_is_none(size, now_s):
    budget = Budget(0)
    budget.demand(size, now_s)
    budget.prefetch(size, now_s)
    assert not budget.limited and budget.wait_s(now_s) == 0
    assert budget.range_bytes(size) == size


@given(st.integers(1, 1 << 40), st.integers(65536, 1 << 30))
def test_requests_are_as_long_as_the_limit_allows(rate, most):
    assert 65536 <= max(65536, Budget(rate).range_bytes(most)) <= most


def test_speed_is_that_of_the_last_seconds():
    speed = Speed()
    assert speed.bytes_per_s(0) == 0
    for second in range(100):
        speed.brought(RATE, second, second + 1)
    assert speed.bytes_per_s(100) == pytest.approx(RATE, rel=0.15)
    assert speed.bytes_per_s(120) == 0
    speed.brought(RATE, 200, 201)
    assert speed.bytes_per_s(201) == pytest.approx(RATE)

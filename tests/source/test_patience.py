"""When to try again."""

from __future__ import annotations

import bisect
import heapq
import random
import time
from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fscached.source import Fault, Refusal, SourceError
from fscached.source.patience import RETRY_AFTER_LIMIT_S, Budget, Busy, Patience, retry_after_s


@given(failures=st.integers(1, 20))
def test_pauses_double_up_to_a_limit(failures: int) -> None:
    """A pause is between a half and the whole of its doubled length, and there are `retries`."""
    pause_s = Patience(8, 0.1, 3).pause_after(SourceError("", Fault.NETWORK), failures)
    if failures > 8:
        assert pause_s is None
    else:
        longest_s = min(3, 0.1 * 2 ** (failures - 1))
        assert pause_s is not None and longest_s / 2 <= pause_s <= longest_s


def test_patience_without_end() -> None:
    """Some go on until their deadline: no number of failures is too many."""
    pause_s = Patience(10**9, 0.1, 3).pause_after(SourceError("", Fault.NETWORK), 10**6)
    assert pause_s is not None and 1.5 <= pause_s <= 3


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (SourceError("", Fault.NETWORK), True),
        (SourceError("", Fault.ORIGIN), True),
        (SourceError("", Fault.AUTH), False),
        (SourceError("", Fault.PROTOCOL), False),
        (SourceError("", Fault.LOCAL), False),
        (Refusal("", Fault.ORIGIN), False),
        (Busy("", 0, ""), True),
    ],
)
def test_what_is_tried_again(error: SourceError, again: bool) -> None:
    """Only what may pass."""
    assert (Patience().pause_after(error, 1) is not None) == again


def test_the_server_may_ask_for_more() -> None:
    """Retry-After lengthens a pause."""
    assert Patience().pause_after(Busy("", 7, ""), 1) == 7


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("0", 0),
        ("7", 7),
        ("99999999999999999999", RETRY_AFTER_LIMIT_S),
        ("-3", 0),
        ("soon", 0),
        ("", 0),
        (formatdate(0, usegmt=True), 0),
        (formatdate(time.time() + 9999, usegmt=True), RETRY_AFTER_LIMIT_S),
    ],
)
def test_retry_after(value: str, wait_s: float) -> None:
    """Seconds or a date, never more than the limit, and nonsense is no wish."""
    assert retry_after_s({"retry-after": value}) == wait_s


@given(st.text())
def test_any_retry_after(value: str) -> None:
    """No text of a server's raises."""
    assert 0 <= retry_after_s({"retry-after": value}) <= RETRY_AFTER_LIMIT_S


@given(
    rate_s=st.floats(0.1, 50),
    readers=st.integers(1, 300),
    window_s=st.floats(0.1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_no_storm(rate_s: float, readers: int, window_s: float, seed: int) -> None:
    """However many readers fail at once, however often each would try: in any time there are no
    more tries than the budget of that time, and one burst."""
    budget, patience = Budget(rate_s), Patience(10**9, 0.1, 5)
    rng, error = random.Random(seed), SourceError("", Fault.NETWORK)
    due = [(rng.random() / 100, 0) for _ in range(readers)]
    heapq.heapify(due)
    tries: list[float] = []
    while due[0][0] < 10 and len(tries) < 2000:
        now_s, failures = heapq.heappop(due)
        wait_s = budget.take(now_s) if failures else 0.0
        if wait_s:
            heapq.heappush(due, (now_s + max(wait_s, 0.001), failures))
            continue
        if failures:
            tries.append(now_s)
        pause_s = patience.pause_after(error, failures + 1)
        assert pause_s is not None
        heapq.heappush(due, (now_s + pause_s, failures + 1))
    allowed = max(rate_s, 1) + rate_s * window_s + 1
    for index, began_s in enumerate(tries):
        end = bisect.bisect(tries, began_s + window_s)
        assert end - index <= allowed


def test_answers_let_more_come_back() -> None:
    """Each lets two more try, up to as many as may at once."""
    budget = Budget(10)
    assert [budget.take(5) for _ in range(10)] == [0] * 10
    assert budget.take(5) == pytest.approx(0.1)
    budget.answered()
    assert [budget.take(5) for _ in range(2)] == [0, 0] and budget.take(5) > 0
    for _ in range(100):
        budget.answered()
    assert [budget.take(5) for _ in range(10)] == [0] * 10 and budget.take(5) > 0
    assert budget.take(5.1) == 0


def test_the_smallest_budget() -> None:
    """One try in ten seconds is one at once, and the next after ten."""
    budget = Budget(0.1)
    assert budget.take(0) == 0 and budget.take(0) == pytest.approx(10)
    assert budget.take(9.9) > 0 and budget.take(10) == 0

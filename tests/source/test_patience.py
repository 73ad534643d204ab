"""When to try again."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source import Fault, Refusal, SourceError
from fscached.source.patience import RETRY_AFTER_LIMIT_S, Busy, Patience, retry_after_s


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

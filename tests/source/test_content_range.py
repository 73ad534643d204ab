"""Which answers to a Range request are taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source.content_range import RangeError, promised_bytes

offsets = st.integers(0, 2**62)


@given(start=offsets, length=st.integers(1, 2**31), sent=st.integers(1, 2**31), more=offsets)
def test_a_beginning_is_taken(start: int, length: int, sent: int, more: int) -> None:
    """Any non-empty beginning of the range is promised as it was sent."""
    sent = min(sent, length)
    total = start + length + more
    headers = {
        "content-range": f"bytes {start}-{start + sent - 1}/{total}",
        "content-length": str(sent),
    }
    assert promised_bytes(206, headers, start, start + length) == sent


@given(
    start=st.integers(0, 40),
    length=st.integers(1, 40),
    first=st.integers(0, 99),
    last=st.integers(0, 99),
    total=st.integers(0, 99) | st.just("*"),
)
def test_nothing_else_is_taken(
    start: int, length: int, first: int, last: int, total: int | str
) -> None:
    """Whatever is taken lies within the range, begins with it, and within the total."""
    end = start + length
    try:
        promised = promised_bytes(
            206, {"content-range": f"bytes {first}-{last}/{total}"}, start, end
        )
    except RangeError:
        assert first != start or not first <= last < end or (total != "*" and int(total) < end)
    else:
        assert first == start and promised == last + 1 - first <= length
        assert total == "*" or int(total) >= end


@given(st.text())
def test_any_text_is_an_error_or_a_range(text: str) -> None:
    """A hostile header raises nothing but RangeError."""
    try:
        promised_bytes(206, {"content-range": text, "content-length": text}, 0, 10)
    except RangeError as error:
        assert len(str(error)) < 200


@pytest.mark.parametrize(
    ("start", "length", "taken"),
    [(0, "10", True), (0, "11", False), (0, None, False), (1, "10", False), (1, "9", False)],
)
def test_200(start: int, length: str | None, taken: bool) -> None:
    """200 is taken only where the whole body is the range."""
    headers = {} if length is None else {"content-length": length}
    if taken:
        assert promised_bytes(200, headers, start, 10) == 10
    else:
        with pytest.raises(RangeError, match="ignored Range"):
            promised_bytes(200, headers, start, 10)

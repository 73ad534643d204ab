"""Which of two fetches brings a chunk sooner, as far as anybody can know."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import Mock

import pytest

from fscached.fill import forecast
from fscached.fill.forecast import SLACK_S, Forecast
from fscached.source import Priority
from rafs_v6.layout import Compressor
from tests.fill.conftest import Remote

CHUNK = 65536
BYTES_PER_S = 10 * CHUNK
ROUND_TRIP_S = 0.5


@dataclass
class Progress:
    """How far a flight is (what is asked of a `Flight`)."""

    asked_s: float
    brought_bytes: int
    first_byte_s: float = ROUND_TRIP_S
    remote_start: int = 0
    stopped: bool = False


class Case:
    """A prefetch of all 16 chunks with number 7, and a clock to set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forecast = Forecast(Remote([CHUNK] * 16, Compressor.NONE).chunks)
        self.task = Mock()
        self.now_s = 100.0
        monkeypatch.setattr(forecast, "monotonic", lambda: self.now_s)

    def demand_took(self, chunks: int) -> None:
        """A demand flight has brought so many chunks at the usual pace."""
        began_s = self.now_s - ROUND_TRIP_S - chunks * CHUNK / BYTES_PER_S
        self.forecast.ended(1, Progress(began_s, chunks * CHUNK), Priority.DEMAND)  # type: ignore[arg-type]

    def prefetch(self, ago_s: float, brought_bytes: int) -> Progress:
        flight = Progress(self.now_s - ago_s if ago_s else 0.0, brought_bytes)
        self.forecast.prefetch(7, flight, self.task)  # type: ignore[arg-type]
        return flight

    def slow(self) -> list[int]:
        """Chunks that a fetch of their own would bring sooner."""
        return [index for index in range(16) if self.forecast.slow(7, index)]


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(monkeypatch)


def test_what_comes_within_a_round_trip_is_joined(case):
    """Half a second, and a chunk more, are six chunks at this pace; four are here."""
    case.demand_took(4)
    case.prefetch(ROUND_TRIP_S + 0.4, 4 * CHUNK)
    assert case.slow() == list(range(10, 16))


def test_before_its_first_byte_a_prefetch_is_reckoned_with_the_usual_pace(case):
    """It is a quarter of a second ahead of a fetch made now: two chunks and a half."""
    case.demand_took(4)
    case.prefetch(0.25, 0)
    assert case.slow() == list(range(3, 16))


def test_an_overdue_first_byte_is_slow(case):
    """Nobody knows when it will come."""
    case.demand_took(4)
    case.prefetch(ROUND_TRIP_S + SLACK_S + 0.01, 0)
    assert case.slow() == list(range(16))


def test_a_prefetch_that_stalls_becomes_slow(case):
    """The longer nothing comes, the later the rest is to be expected."""
    case.demand_took(4)
    case.prefetch(ROUND_TRIP_S + 0.4, 4 * CHUNK)
    assert 5 not in case.slow()
    case.now_s += 1.5
    assert 5 in case.slow()


def test_one_that_has_not_asked_is_slow(case):
    """It may be held up for readers."""
    case.demand_took(4)
    case.prefetch(0.0, 0)
    assert case.slow() == list(range(16))


def test_of_what_never_left_or_is_over_nothing_is_expected(case):
    """And without any flight so far a fetch will tell."""
    case.demand_took(4)
    assert case.slow() == list(range(16))
    flight = case.prefetch(ROUND_TRIP_S + 0.4, 4 * CHUNK)
    assert case.slow() != list(range(16))
    case.forecast.ended(7, flight, Priority.PREFETCH)  # type: ignore[arg-type]
    assert case.slow() == list(range(16))


def test_before_any_demand_a_prefetch_is_judged_by_its_own_pace(case):
    """It knows what a round trip is."""
    case.prefetch(0.25, 0)
    assert case.slow() == list(range(16))
    case.prefetch(ROUND_TRIP_S + 0.4, 4 * CHUNK)
    assert case.slow() == list(range(10, 16))


def test_a_window_that_brought_nothing_says_nothing(case):
    """Nor does it take away what is known."""
    case.demand_took(4)
    case.forecast.ended(2, Progress(case.now_s - 9, 0), Priority.DEMAND)  # type: ignore[arg-type]
    case.prefetch(ROUND_TRIP_S + 0.4, 4 * CHUNK)
    assert case.slow() == list(range(10, 16))


def test_one_that_is_stopped_is_cancelled_once(case):
    """From then on nothing is expected of it."""
    case.demand_took(4)
    flight = case.prefetch(ROUND_TRIP_S + 0.4, 4 * CHUNK)
    case.forecast.stop(7)
    case.forecast.stop(7)
    assert flight.stopped and case.task.cancel.call_count == 1
    assert case.slow() == list(range(16))

"""When a peer is asked: states, pauses, pings. Times are given, not waited for."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source.health import (
    LIES_LIMIT,
    PAUSE_LIMIT_S,
    TRANSITIONS,
    Health,
    Sign,
    State,
    Watch,
)


def health(*, failure_limit: int = 2, pause_s: float = 10, lie_pause_s: float = 100) -> Health:
    return Health(failure_limit=failure_limit, pause_s=pause_s, lie_pause_s=lie_pause_s)


def down(now_s: float = 0) -> Health:
    """One that has failed twice at `now_s`, and is left alone for 10 s."""
    one = health()
    for _ in range(2):
        assert one.admit(now_s)
        one.failed(now_s)
    assert one.state is State.DOWN
    return one


def test_failures_in_a_row() -> None:
    """The limit is of failures without a success in between: nydusd never forgets one."""
    one = health(failure_limit=3)
    for _ in range(5):
        one.failed(0)
        one.failed(0)
        one.served()
    assert one.state is State.UP and one.admit(0)
    for _ in range(3):
        one.failed(0)
    assert one.state is State.DOWN and not one.admit(0)


def test_a_pause_and_one_trial() -> None:
    """When the pause is over one read tries it, and no other goes there meanwhile."""
    one = down()
    one.revived(9.9)
    assert not one.admit(9.9)
    one.revived(10)
    assert one.state is State.DUE
    assert one.admit(10) and one.state is State.TRIAL
    assert not one.admit(10)
    one.served()
    assert one.state is State.UP and one.admit(10) and one.admit(10)


def test_trials_that_fail() -> None:
    """Each doubles the pause, up to a limit; a success makes it short again."""
    one, now_s = down(), 0.0
    for expected_s in [10.0, 20, 40, 80, 160, *[PAUSE_LIMIT_S] * 3]:
        one.revived(now_s + expected_s - 0.1)
        assert one.state is State.DOWN
        now_s += expected_s
        one.revived(now_s)
        assert one.admit(now_s)
        one.failed(now_s)
    now_s += PAUSE_LIMIT_S
    one.revived(now_s)
    assert one.admit(now_s)
    one.served()
    for _ in range(2):
        one.failed(now_s)
    one.revived(now_s + 10)
    assert one.state is State.DUE


def test_a_trial_that_says_nothing() -> None:
    """Cancelled, or ended by the origin's fault: the next read is the trial."""
    one = down()
    one.revived(10)
    assert one.admit(10)
    one.left()
    assert one.state is State.DUE and one.admit(10)


def test_late_failures_of_reads_that_began_before() -> None:
    """One while it is down begins the pause anew; one does not bring down who has come back."""
    one = down()
    one.failed(5)
    one.revived(10)
    assert one.state is State.DOWN
    one.revived(15)
    assert one.admit(15)
    one.served()
    one.failed(16)
    assert one.state is State.UP


def test_busy() -> None:
    """Left alone for as long as it says, without being down."""
    one = health()
    one.busy(5)
    assert one.state is State.UP and not one.admit(4.9) and one.admit(5)
    one = down()
    one.revived(10)
    assert one.admit(10)
    one.busy(20)
    assert not one.admit(19) and one.admit(20) and one.state is State.TRIAL


def test_lies_of_several_images() -> None:
    """One image may be wrong at its origin; two are the peer's fault."""
    assert LIES_LIMIT == 2
    one = health()
    one.lied("a", 0)
    one.lied("a", 1)
    assert one.admit(1)
    one.lied("b", 102)
    assert one.admit(102), "the lie about the first is long ago"
    one.lied("c", 103)
    assert one.state is State.DOWN
    one.revived(202.9)
    assert not one.admit(202.9)
    one.revived(203)
    assert one.admit(203) and one.state is State.TRIAL


def test_the_table_is_whole() -> None:
    """Every state can be left, and reached."""
    assert {state for state, _ in TRANSITIONS} == set(State) == set(TRANSITIONS.values())
    assert {sign for _, sign in TRANSITIONS} == set(Sign)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "served", "failed", "left", "busy", "lied", "revived"]),
            st.floats(0, 200),
        ),
        max_size=60,
    )
)
def test_whatever_happens(events: list[tuple[str, float]]) -> None:
    """No peer is lost for good: after the longest pause it gets a chance. And while it is tried
    nobody else goes there."""
    one, now_s = health(lie_pause_s=250), 0.0
    for name, passed_s in events:
        now_s += passed_s
        trial = one.state is State.TRIAL
        match name:
            case "admit":
                assert not (one.admit(now_s) and trial)
            case "failed" | "revived":
                getattr(one, name)(now_s)
            case "busy":
                one.busy(now_s + 60)
            case "lied":
                one.lied(str(now_s), now_s)
            case _:
                getattr(one, name)()
        if one.state is State.DOWN:
            assert not one.admit(now_s)
    if one.state is State.TRIAL:
        one.failed(now_s)
    one.revived(now_s + PAUSE_LIMIT_S)
    assert one.admit(now_s + PAUSE_LIMIT_S)


class Pings:
    """A ping whose answers a test gives, and a clock to wait by."""

    def __init__(self, answers: list[bool]) -> None:
        self.answers = answers
        self.sent = 0

    async def __call__(self) -> bool:
        self.sent += 1
        return self.answers.pop(0)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeps take no time but let others run; how long they should have been."""
    sleeps: list[float] = []

    async def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        await turn(0)

    monkeypatch.setattr("fscached.source.health.asyncio.sleep", sleep)
    return sleeps


def a_watch(ping: Callable[[], object] | None, *, idle_s: float = 1000) -> Watch:
    return Watch("http://peer", health(pause_s=0), ping=ping, interval_s=7, idle_s=idle_s)  # type: ignore[arg-type]


turn = asyncio.sleep


async def settled() -> None:
    """Let the pings go on until they are over."""
    for _ in range(50):
        await turn(0)


@pytest.mark.asyncio
async def test_pings_only_while_down(slept: list[float]) -> None:
    """One that is up is not pinged; one that is down is, until it answers; then a read tries it."""
    pings = Pings([False, False, True])
    watch = a_watch(pings)
    now_s = asyncio.get_running_loop().time()
    assert watch.admit(now_s)
    watch.failed(now_s, "reset")
    await settled()
    assert pings.sent == 0 and slept == []
    watch.failed(now_s, "reset")
    assert watch.state is State.DOWN
    assert not watch.admit(now_s) and not watch.admit(now_s)
    await settled()
    assert pings.sent == 3 and slept == [7, 7, 7]
    assert watch.state is State.DUE
    assert watch.admit(now_s)
    watch.served()
    assert watch.state is State.UP


@pytest.mark.asyncio
async def test_pings_pause_when_nobody_reads(slept: list[float]) -> None:
    """An idle daemon sends nothing; the next read begins again."""
    pings = Pings([False] * 9)
    watch = a_watch(pings, idle_s=0)
    for _ in range(2):
        watch.failed(0, "reset")
    for rounds in (1, 2):
        assert not watch.admit(asyncio.get_running_loop().time())
        await settled()
        assert pings.sent == 0 and len(slept) == rounds
    await watch.close()


@pytest.mark.asyncio
async def test_without_a_ping_reads_find_out() -> None:
    """The first read after the pause is the trial."""
    watch = Watch("p", health(pause_s=10), ping=None, interval_s=1, idle_s=1)
    for _ in range(2):
        watch.failed(100, "reset")
    assert not watch.admit(109)
    assert watch.admit(110) and watch.state is State.TRIAL


@pytest.mark.asyncio
async def test_closing_ends_the_pings() -> None:
    """Also one that waits for its answer."""
    asked = asyncio.Event()

    async def ping() -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    watch = Watch("p", health(), ping=ping, interval_s=0, idle_s=1000)
    for _ in range(2):
        watch.failed(0, "reset")
    watch.admit(asyncio.get_running_loop().time())
    await asked.wait()
    await watch.close()
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.asyncio
async def test_one_line_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    """Going down is a warning with its reason, coming back is told; a hundred reads are not."""
    watch = Watch("http://p", health(pause_s=0), ping=None, interval_s=1, idle_s=1)
    with caplog.at_level(logging.INFO):
        for now_s in itertools.repeat(5, 20):
            watch.failed(now_s, "connection refused")
        assert watch.admit(5)
        watch.served()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "connection refused" in caplog.text and "http://p" in caplog.text

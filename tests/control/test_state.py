"""The state table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.control.state import TRANSITIONS, Lifecycle, State, Trigger, WrongState


def test_a_normal_life() -> None:
    """INIT, READY, RUNNING, and back to STOPPED."""
    life = Lifecycle()
    seen = [life.state]
    seen += map(life.fire, [Trigger.MOUNT, Trigger.START, Trigger.STOP, Trigger.EXIT])
    assert seen == [State.INIT, State.READY, State.RUNNING, State.READY, State.STOPPED]


@given(st.lists(st.sampled_from(Trigger)))
def test_a_trigger_follows_the_table_or_changes_nothing(triggers: list[Trigger]) -> None:
    """No other way to a state; nothing leaves STOPPED."""
    life = Lifecycle()
    for trigger in triggers:
        before = life.state
        if (before, trigger) in TRANSITIONS:
            assert life.fire(trigger) is TRANSITIONS[before, trigger]
            assert before is not State.STOPPED
        else:
            with pytest.raises(WrongState, match=rf"UnexpectedEvent\({trigger.value}\)"):
                life.fire(trigger)
            assert life.state is before

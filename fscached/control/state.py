"""The daemon's states, as nydusd names them on the wire, and the one table of their changes."""

from __future__ import annotations

import enum
from typing import Final


class State(enum.StrEnum):
    """INIT: waits for a takeover. READY: knows its images. RUNNING: answers the kernel."""

    INIT = "INIT"
    READY = "READY"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"


class Trigger(enum.Enum):
    """What changes a state."""

    MOUNT = "Mount"
    TAKEOVER = "Takeover"
    START = "Start"
    STOP = "Stop"
    EXIT = "Exit"


TRANSITIONS: Final = {
    (State.INIT, Trigger.MOUNT): State.READY,
    (State.INIT, Trigger.TAKEOVER): State.READY,
    (State.INIT, Trigger.STOP): State.STOPPED,
    (State.READY, Trigger.START): State.RUNNING,
    (State.READY, Trigger.STOP): State.STOPPED,
    (State.READY, Trigger.EXIT): State.STOPPED,
    (State.RUNNING, Trigger.STOP): State.READY,
}


class WrongState(Exception):
    """The trigger means nothing in this state."""

    def __init__(self, state: State, trigger: Trigger) -> None:
        super().__init__(f"UnexpectedEvent({trigger.value}): the daemon is {state}")
        self.state = state
        self.trigger = trigger


class Lifecycle:
    """The state of one daemon; begins in INIT."""

    def __init__(self) -> None:
        self.state = State.INIT

    def check(self, trigger: Trigger) -> State:
        """The state that a trigger would lead to. Raises WrongState."""
        try:
            return TRANSITIONS[self.state, trigger]
        except KeyError:
            raise WrongState(self.state, trigger) from None

    def fire(self, trigger: Trigger) -> State:
        """Change the state; the new one. Raises WrongState and changes nothing."""
        self.state = self.check(trigger)
        return self.state

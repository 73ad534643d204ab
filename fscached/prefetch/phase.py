"""How far prefetch of an image is, in a word. Imported by whoever only says it."""

from __future__ import annotations

import enum


class Phase(enum.StrEnum):
    """How prefetch of an image goes on."""

    OFF = "off"
    """Not wanted."""
    UNMOUNTED = "unmounted"
    """None of it is open."""
    WAITING = "waiting"
    """Its chunks are not known yet, or the kernel does not answer for its files."""
    RUNNING = "running"
    PAUSED = "paused"
    """It goes on by itself, when readers, the budget or the source let it."""
    STOPPED = "stopped"
    """The disk is nearly full; it goes on when there is room again."""
    DONE = "done"
    """All that its policies want is there."""

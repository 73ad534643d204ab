"""The kernel's own account of every READ, the same whoever answers it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from harness.command import CommandFailed
from harness.guest import Guest

INSTANCE = "/sys/kernel/tracing/instances/bench"
BUFFER_KIB = 8192

# include/trace/events/cachefiles.h. `read` fires before the READ is queued, `cread` in the ioctl
# that wakes the reader. A message has its number only when it is read from the device (6.12: mid=0
# until then), so a READ is known by its object alone: readers must take turns.
EVENTS = ("open", "read", "cread")
LINE = re.compile(r"(\d+\.\d{6}): cachefiles_ondemand_(open|read|cread): o=(\w+)")


class Trace:
    """The events of one stretch of time; complete once the `with` of `recorded` has ended."""

    def __init__(self) -> None:
        self.text = ""

    def read_times_us(self) -> list[float]:
        """Microseconds from READ to completion of the object opened last: the image's blob, whose
        OPEN comes after its bootstrap's."""
        events = LINE.findall(self.text)
        blob = [object for _, event, object in events if event == "open"][-1]
        stamps = [(event, float(s)) for s, event, object in events if object == blob]
        return [
            (ended - began) * 1e6
            for (event, began), (next_event, ended) in pairwise(stamps)
            if (event, next_event) == ("read", "cread")
        ]


@contextmanager
def recorded(guest: Guest) -> Iterator[Trace]:
    """Record from here to the end of the block. Raises CommandFailed when events were lost."""
    enable = " ".join(f"{INSTANCE}/events/cachefiles/cachefiles_ondemand_{e}" for e in EVENTS)
    guest.run(
        f"mkdir -p {INSTANCE}; cd {INSTANCE}; echo mono > trace_clock; "
        f"echo {BUFFER_KIB} > buffer_size_kb; echo > trace; "
        f"for event in {enable}; do echo 1 > $event/enable; done; echo 1 > tracing_on"
    )
    trace = Trace()
    yield trace
    trace.text = guest.run(f"echo 0 > {INSTANCE}/tracing_on; cat {INSTANCE}/trace").stdout
    lost = guest.run(f"cat {INSTANCE}/per_cpu/*/stats | grep overrun | grep -v ': 0$' || true")
    if lost.stdout:
        raise CommandFailed(f"the trace lost events, its buffer is too small: {lost.stdout}")

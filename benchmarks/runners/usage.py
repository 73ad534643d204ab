"""What a daemon has used since it started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from fscached.control.messages import Totals


@dataclass(frozen=True)
class Usage:
    """Seconds of processors; requests sent and the bytes of their answers."""

    cpu_s: float
    requests: int
    received_bytes: int

    @classmethod
    def read(cls, totals: Totals, stat: str) -> Self:
        """From `/api/v2/status` and /proc/PID/stat (proc(5): utime and stime, fields 14 and 15,
        in ticks of 10 ms, children not among them)."""
        fields = stat.rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return cls(ticks / os.sysconf("SC_CLK_TCK"), totals.requests, totals.received_bytes)

    def since(self, before: Usage) -> Usage:
        """What was used after `before`."""
        return Usage(
            self.cpu_s - before.cpu_s,
            self.requests - before.requests,
            self.received_bytes - before.received_bytes,
        )

"""One ranged GET, and how it ended."""

from __future__ import annotations

from typing import NamedTuple

from fscached.source import Fault, Priority
from fscached.source.origin import Trust


class Pace(NamedTuple):
    """A transfer slower than `bytes_s` for `seconds` on end has failed; 0: however slow it is."""

    bytes_s: int
    seconds: int


class Request(NamedTuple):
    """A GET of bytes [start, end). `headers` are whole lines, `Name: value`, that were checked to
    hold no line end. `proxy` is the URL of an HTTP proxy to ask through; empty: none."""

    url: str
    headers: tuple[str, ...]
    start: int
    end: int
    priority: Priority
    trust: Trust
    proxy: str = ""
    pace: Pace = Pace(0, 0)


class Reply(NamedTuple):
    """How one request ended. Without a `fault` the exchange was sound, whatever its `status` says,
    and for 200 and 206 `fed_bytes` is all the server promised. `headers` has lower-case names,
    repeated ones joined by a comma. `reason` explains a fault and holds no secret."""

    status: int
    headers: dict[str, str]
    fed_bytes: int
    fault: Fault | None
    reason: str

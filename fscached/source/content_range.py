"""Whether an answer to a Range request holds the bytes that were asked for (RFC 9110 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)


class RangeError(ValueError):
    """The answer's body must not be taken for the range; the text says why."""


def promised_bytes(status: int, headers: Mapping[str, str], start: int, end: int) -> int:
    """How many bytes from `start` on the body of a 200 or 206 brings, at most `end - start`.

    A server may send less than it was asked for; it may not send something else. `headers` has
    lower-case names. Raises RangeError.

    A 200 that tells both its range and its length is taken for the 206 it should be: Dragonfly's
    client answered so before v1.3.11.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RangeError(f"the body is encoded ({encoding[:20]}), these are not the blob's bytes")
    length = headers.get("content-length")
    if status == 200 and not ("content-range" in headers and length is not None):
        if start == 0 and length == str(end):
            return end
        raise RangeError(
            "the server ignored Range and answered 200 with the whole blob; "
            "reading on demand needs one that serves ranges"
        )
    promised = _promised_part(headers.get("content-range", ""), start, end)
    if length is not None and length != str(promised):
        raise RangeError(f"Content-Length {length[:20]} contradicts Content-Range")
    return promised


def _promised_part(content_range: str, start: int, end: int) -> int:
    match = _CONTENT_RANGE.fullmatch(content_range)
    if match is None:
        raise RangeError("206 without a Content-Range of one part")
    first, last = int(match[1]), int(match[2])
    if first != start or not start <= last < end:
        raise RangeError(f"bytes {first}-{last} were sent, {start}-{end - 1} were asked for")
    if match[3] != "*":
        total = int(match[3])
        if last >= total:
            raise RangeError(f"Content-Range ends behind its own total of {total} bytes")
        if total < end:
            raise RangeError(f"the blob has only {total} bytes there, {end} are needed")
    return last + 1 - start

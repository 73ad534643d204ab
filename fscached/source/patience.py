"""Whether, how often and how soon to try again."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fscached.source import Fault, Refusal, SourceError

RETRIED_STATUSES: Final = frozenset({408, 425, 429, 499, 500, 502, 503, 504})
RETRY_AFTER_LIMIT_S: Final = 60.0
ANSWER_TRIES: Final = 2.0
"""More than one, or those who wait would come back no faster than one after the other."""

_PASSING: Final = (Fault.NETWORK, Fault.ORIGIN, Fault.PEER)


class Busy(SourceError):
    """`origin` wants to be asked later: after `retry_after_s`, 0 when it did not say."""

    def __init__(self, message: str, retry_after_s: float, origin: str) -> None:
        super().__init__(message, Fault.ORIGIN)
        self.retry_after_s = retry_after_s
        self.origin = origin


@dataclass(frozen=True, slots=True)
class Patience:
    """Further tries after failures in a row, and the pause before the first; it doubles.

    A transfer that brought bytes before it broke is no failure in a row.
    """

    retries: int = 5
    pause_s: float = 0.1
    pause_limit_s: float = 5.0

    def pause_after(self, error: SourceError, failures: int) -> float | None:
        """Seconds to wait after so many failures in a row (1 is the first); None: give up.

        The jitter of a half keeps many readers from coming back together.
        """
        lasting = isinstance(error, Refusal) or error.fault not in _PASSING
        if lasting or failures > self.retries:
            return None
        longest_s: float = min(self.pause_limit_s, self.pause_s * 2 ** min(failures - 1, 32))
        pause_s = longest_s * random.uniform(0.5, 1)
        return max(pause_s, error.retry_after_s) if isinstance(error, Busy) else pause_s


class Budget:
    """Further tries at one host, of all its readers together: `rate_s` a second, as many at once,
    and ANSWER_TRIES more for each good answer, so that those who waited for the host to come back
    return as fast as it serves them. Times are in seconds on any one clock that does not jump."""

    def __init__(self, rate_s: float) -> None:
        self._rate_s = rate_s
        self._limit = self._tries = max(rate_s, 1.0)
        self._counted_s = 0.0

    def take(self, now_s: float) -> float:
        """0: a try may be made, and is taken. Else seconds until one may be, without an answer."""
        self._tries += (now_s - self._counted_s) * self._rate_s
        self._counted_s = now_s
        self._tries = min(self._tries, self._limit)
        # What is left of sums of small numbers must not cost another turn.
        if self._tries >= 1 - 1e-9:
            self._tries -= 1
            return 0.0
        return (1 - self._tries) / self._rate_s

    def answered(self) -> None:
        """The host gave bytes."""
        self._tries = min(self._tries + ANSWER_TRIES, self._limit)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds the server asks to be left alone (RFC 9110 10.2.3), capped; 0 when it does not."""
    value = headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), RETRY_AFTER_LIMIT_S)
    from email.utils import parsedate_to_datetime

    try:
        wait_s = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(wait_s, 0.0), RETRY_AFTER_LIMIT_S)

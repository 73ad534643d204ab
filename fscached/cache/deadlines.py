"""How long chunks may be waited for, and what fails at once afterwards.

The kernel asks two to four times before it gives a reader EIO (tried on 6.1 and 6.12), and asks for
one chunk after the other (6.18), so a deadline per want would multiply: it belongs to the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Deadlines:
    """Those of one blob's chunks. Times are in seconds on any one clock that does not jump.

    A chunk may be waited for `deadline_s`; or, where its source is what keeps it, `outage_limit_s`
    (None: no longer than any other). Wants for it fail at once for `refusal_s` after that, and
    wants for any other if nothing has landed for a whole deadline.
    """

    def __init__(self, deadline_s: float, refusal_s: float, outage_limit_s: float | None) -> None:
        self._deadline_s = deadline_s
        self._refusal_s = refusal_s
        self._extension_s = None if outage_limit_s is None else outage_limit_s - deadline_s
        # One deadline_s and one extension for all: the order of insertion is the order of expiry.
        self._first: dict[int, float] = {}
        self._extended: dict[int, float] = {}
        self._refused_until: dict[int, float] = {}
        self._silent_since: float | None = None
        """The first want since something landed."""
        self._silent_until = 0.0

    @property
    def outlasts(self) -> bool:
        """Whether readers wait for a source that is away."""
        return self._extension_s is not None

    @property
    def next_s(self) -> float | None:
        """When `expired` has something to say, or None."""
        firsts = [next(iter(which.values())) for which in (self._first, self._extended) if which]
        return min(firsts, default=None)

    def refuses(self, chunks: Iterable[int], now_s: float) -> bool:
        """Whether a want for these fails at once."""
        if now_s < self._silent_until:
            return True
        refused = self._refused_until
        return bool(refused) and any(refused.get(chunk, now_s) > now_s for chunk in chunks)

    def begin(self, chunk: int, now_s: float) -> None:
        """A reader waits for a chunk, the first or a further one."""
        if self._silent_since is None:
            self._silent_since = now_s
        if chunk not in self._extended:
            self._first.setdefault(chunk, now_s + self._deadline_s)
        self._refused_until.pop(chunk, None)

    def end(self, chunk: int) -> bool:
        """Nobody waits for a chunk any more; whether somebody did."""
        waited = self._first.pop(chunk, None), self._extended.pop(chunk, None)
        return waited != (None, None)

    def landed(self) -> None:
        """Something has: the source and the disk work."""
        self._silent_since, self._silent_until = None, 0.0

    def refuse(self, chunk: int, now_s: float) -> None:
        """A chunk has failed whoever waited for it."""
        if self.end(chunk):
            self._refused_until[chunk] = now_s + self._refusal_s

    def has_time(self, chunk: int, now_s: float) -> bool:
        """Whether a chunk that its source keeps may be waited for a while longer."""
        if (first_s := self._first.get(chunk)) is not None:
            return first_s + (self._extension_s or 0.0) > now_s
        return self._extended.get(chunk, now_s) > now_s

    def expired(self, now_s: float, here: Callable[[int], bool]) -> list[int]:
        """The chunks whose time is up. `here` says of one whether its bytes have come: then what
        keeps it is not its source."""
        late = []
        for chunk, at_s in _until(self._first, now_s):
            if self._extension_s is None or here(chunk):
                late.append(chunk)
            else:
                del self._first[chunk]
                self._extended[chunk] = at_s + self._extension_s
        late += [chunk for chunk, _ in _until(self._extended, now_s)]
        silent_since = self._silent_since
        if late and silent_since is not None and now_s >= silent_since + self._deadline_s:
            self._silent_until = now_s + self._refusal_s
        return late


def _until(deadlines: dict[int, float], now_s: float) -> list[tuple[int, float]]:
    """Those that are over."""
    over = []
    for chunk, at_s in deadlines.items():
        if at_s > now_s:
            break
        over.append((chunk, at_s))
    return over

"""The one exception a person at a terminal sees: what is wrong, and what to do about it."""

from __future__ import annotations

from typing import ClassVar


class Failure(Exception):
    """Something that a person has to mend.

    `what` says what is wrong, `where` in what of several, a file for instance, and `remedy` what to
    do; none holds a secret. The command line prints them in one line and ends with `exit_code`: 1
    it did not work, 2 it was asked wrongly (arguments, configuration), 3 something must be there
    first.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, remedy: str, where: str = "") -> None:
        super().__init__(": ".join(filter(None, (where, what, remedy))))
        self.what = what
        self.remedy = remedy
        self.where = where


class Missing(Failure):
    """A precondition is not met: no daemon, no kernel feature, no directory."""

    exit_code = 3

"""Texts that leave the machine, without what must not leave it.

Three nets: words that name a credential take the value beside them along; the forms in which
credentials travel (`fscached.log.scrub`); and whatever is known here to be one, wherever it stands.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from fscached.log import SECRET_KEY, scrub

HIDDEN: Final = "***"
SHORTEST: Final = 4
"""A known credential that is shorter would take half of the text along."""

_NAME: Final = r"[\w.-]*(?:auth|passw|secret|token|credential|signature|access_key)[\w.-]*"
_VALUES: Final = (
    r"\\+\"(?:(?!\\*\").)+\\+\"",  # within a text that is quoted itself
    r"\"(?:[^\"\\]|\\.)+\"",
    r"'(?:[^'\\]|\\.)+'",
    r"[^\s,;&}\]\"'\\]+",
)
_BESIDE: Final = re.compile(rf"(?i)({_NAME}\\*[\"']?\s*[:=]\s*)({'|'.join(_VALUES)})")


class Redaction:
    """Takes credentials out of texts. `known`: those that are known."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = sorted({it for it in known if len(it) >= SHORTEST}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """The text without credentials."""
        for known in self._known:
            text = text.replace(known, HIDDEN)
        # First what has a form: `Authorization: Bearer x` has its credential one word later.
        return _BESIDE.sub(rf"\1{HIDDEN}", scrub(text))

    def value(self, value: Any) -> Any:
        """The same of a JSON value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self._beside(str(key), inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(inner) for inner in value]
        return value

    def _beside(self, key: str, value: Any) -> Any:
        hides = SECRET_KEY.search(key) and isinstance(value, str) and value
        return HIDDEN if hides else self.value(value)


def secrets_in(value: Any, under: str = "") -> Iterator[str]:
    """Everything in a JSON value that a key, or one above it, calls a credential; of
    `user:password` in base64 the password too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            name = str(key) if SECRET_KEY.search(str(key)) else under
            yield from secrets_in(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from secrets_in(inner, under)
    elif under and isinstance(value, str):
        yield value
        yield from _packed(value)


def _packed(value: str) -> Iterator[str]:
    try:
        plain = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, ValueError):
        return
    _, colon, password = plain.partition(":")
    yield plain
    if colon:
        yield password

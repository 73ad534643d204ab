"""Log lines: one event, one line, key=value. Modules log through `logging.getLogger(__name__)`.

    log.info("mounted", extra={"fsid": fsid, "blobs": 3})
    time=2026-01-31T10:00:00.123+0000 level=info logger=fscached.store event=mounted fsid=… blobs=3

Values are quoted when they need it and line ends escaped, so a hostile image name cannot forge a
line. Credentials are taken out of every line: keys that name one, `Basic …` and `Bearer …`, user
and password in URLs, and the query of URLs (redirect targets carry signatures there).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

LEVELS: Final = {
    "off": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": 5,
}
"""nydusd's names of levels, which its API and command line take."""

_NAMES: Final = {number: name for name, number in LEVELS.items()} | {logging.CRITICAL: "error"}
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN: Final = re.compile(r"[!#-<>-\[\]-~]+")
SECRET_KEY: Final = re.compile(r"(?i)auth|password|secret|token|credential|cookie_header")
"""What a name has that names a credential."""
_SECRETS: Final = (
    (re.compile(r"(?i)\b(basic|bearer)\s+[A-Za-z0-9._~+/=-]{12,}"), r"\1 ***"),
    (re.compile(r"(://)[^/\s@\"]*@"), r"\1***@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?\"]*)\?[^\s\"]*"), r"\1?***"),
)


def scrub(text: str) -> str:
    """The text without credentials."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class KeyValueFormatter(logging.Formatter):
    """A record as one line of key=value pairs; an exception becomes `error` and `trace`."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(" ".join(f"{key}={_quoted(value)}" for key, value in self._pairs(record)))

    def _pairs(self, record: logging.LogRecord) -> Iterator[tuple[str, str]]:
        zone = time.strftime("%z", time.localtime(record.created))
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        yield "time", f"{moment}.{int(record.msecs):03d}{zone}"
        yield "level", _NAMES.get(record.levelno, str(record.levelno))
        yield "logger", record.name
        yield "event", record.getMessage()
        for key, value in vars(record).items():
            if key not in _STANDARD:
                yield key, "***" if SECRET_KEY.search(key) else str(value)
        if record.exc_info and record.exc_info[1] is not None:
            yield "error", f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            yield "trace", self.formatException(record.exc_info)


class ErrorLog(logging.Handler):
    """The last errors, for `GET /api/v1/daemon/events`; both counts and sizes are bounded."""

    MAX_ERRORS: Final = 64
    MAX_LINE_CHARACTERS: Final = 1024

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(KeyValueFormatter())
        self.lines: deque[str] = deque(maxlen=self.MAX_ERRORS)
        self.total_errors = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.total_errors += 1
        try:
            self.lines.append(self.format(record)[: self.MAX_LINE_CHARACTERS])
        except Exception:
            self.handleError(record)  # logging's own rule: a bad log call breaks nothing else


recent_errors: Final = ErrorLog()
"""Errors of this process. Logging is global to the process, and so is this."""


def configure(level: str = "info") -> None:
    """Log to standard error. A daemon, which must not wait for it, begins `log_writer`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(handlers=[handler, recent_errors], force=True)
    set_level(level)


def set_level(level: str) -> None:
    """Log `level` and worse. Raises ValueError for a level not in LEVELS."""
    if level not in LEVELS:
        raise ValueError(f"unknown log level {level!r}: give one of {', '.join(LEVELS)}")
    root = logging.getLogger()
    root.setLevel(max(LEVELS[level], logging.WARNING))
    logging.getLogger("fscached").setLevel(LEVELS[level])


def _quoted(value: str) -> str:
    if _PLAIN.fullmatch(value):
        return value
    return json.dumps(value)

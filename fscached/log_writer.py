"""Log lines of a daemon are written by a thread of their own.

A disk that is frozen, or a terminal that nobody reads, must not hold up whoever logs: deadlines are
kept by the same thread. What cannot be written in time is counted and dropped.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from logging.handlers import (
    QueueHandler,
    QueueListener,
    RotatingFileHandler,
    WatchedFileHandler,
)
from queue import Full, Queue
from typing import Final

from fscached import log as logs

WAITING_LINES_MAX: Final = 4096
FLUSH_LIMIT_S: Final = 1.0
"""At the end, for what still waits."""


class Lines(QueueHandler):
    """Formats a record at once, so that it says how things are now, and leaves it to the thread."""

    def __init__(self, waiting: Queue[logging.LogRecord]) -> None:
        super().__init__(waiting)
        self.waiting = waiting
        self.setFormatter(logs.KeyValueFormatter())
        self._lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.waiting.put_nowait(record)
        except Full:
            self._lost += 1
            return
        if self._lost and not self.waiting.full():
            lost, self._lost = self._lost, 0
            record = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING})
            record.msg = f"{lost} log lines are lost: they could not be written in time"
            self.enqueue(self.prepare(record))

    def written(self, limit_s: float) -> bool:
        """Wait until nothing waits; False when it takes longer."""
        done = self.waiting.all_tasks_done
        with done:
            return done.wait_for(lambda: not self.waiting.unfinished_tasks, limit_s)


def begin(level: str, file: str = "", rotate_bytes: int = 0, rotated_files: int = 0) -> None:
    """Log to `file` (appended, its directories made) or to standard error, until the process ends.

    A file that would become larger than `rotate_bytes` is put aside as `file.1`, and so on up to
    `rotated_files`; with 0 it is left to others, and opened anew when they have moved it. Raises
    OSError when the file cannot be opened.
    """
    sink = _sink(file, rotate_bytes, rotated_files)
    sink.setFormatter(logging.Formatter("%(message)s"))
    waiting: Queue[logging.LogRecord] = Queue(WAITING_LINES_MAX)
    logging.basicConfig(handlers=[Lines(waiting), logs.recent_errors], force=True)
    logs.set_level(level)
    QueueListener(waiting, sink).start()
    atexit.register(flush)


def flush(limit_s: float = FLUSH_LIMIT_S) -> bool:
    """Wait until everything is written; False when it takes longer."""
    written = True
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Lines):
            written &= handler.written(limit_s)
    return written


def _sink(file: str, rotate_bytes: int, rotated_files: int) -> logging.Handler:
    if not file:
        return logging.StreamHandler(sys.stderr)
    os.makedirs(os.path.dirname(os.path.abspath(file)), mode=0o755, exist_ok=True)
    if not rotate_bytes:
        return WatchedFileHandler(file, encoding="utf-8")
    return RotatingFileHandler(
        file, maxBytes=rotate_bytes, backupCount=max(1, rotated_files), encoding="utf-8"
    )

"""Lines are written by a thread: in order, into files that are put aside, and never in the way."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fscached import log, log_writer

LOG = logging.getLogger("fscached.x")


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """Logging is global: put back what the test changes."""
    root, ours = logging.getLogger(), logging.getLogger("fscached")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before
    log.recent_errors.lines.clear()


def events(path: Path) -> list[str]:
    return [line.split("event=")[1] for line in path.read_text().splitlines()]


def test_a_file_is_appended_and_its_directory_made(tmp_path: Path) -> None:
    """nydus-snapshotter names a log file in a directory that nobody made."""
    path = tmp_path / "logs" / "a" / "fscached.log"
    log_writer.begin("debug", str(path))
    LOG.debug("one")
    assert log_writer.flush()
    log_writer.begin("warn", str(path))
    LOG.info("two")
    assert log_writer.flush() and events(path) == ["one"]


def test_a_line_says_how_things_were(tmp_path: Path) -> None:
    """Not how they are when it is written; and an exception is on it, without credentials."""
    path, state = tmp_path / "log", {"blob": 1}
    log_writer.begin("info", str(path))
    LOG.info("now %s", state)
    state["blob"] = 2
    try:
        raise ValueError("https://ann:hunter2@host/")
    except ValueError:
        LOG.exception("then", extra={"password": "hunter2"})
    assert log_writer.flush()
    one, two = path.read_text().splitlines()
    assert "'blob': 1" in one and 'error="ValueError: https://***@host/" trace="Trace' in two
    assert "hunter2" not in two
    assert list(log.recent_errors.lines) == [two]


def test_a_large_file_is_put_aside(tmp_path: Path) -> None:
    """As many as are to be kept, none larger than it may be, and no line is lost between them."""
    path = tmp_path / "log"
    log_writer.begin("info", str(path), rotate_bytes=2048, rotated_files=3)
    for number in range(100):
        LOG.info("%03d %s", number, "x" * 20)
    assert log_writer.flush()
    files = sorted(tmp_path.iterdir(), reverse=True)
    assert [file.name for file in files] == ["log.3", "log.2", "log.1", "log"]
    assert all(file.stat().st_size <= 2048 for file in files)
    kept = [int(event.strip('"')[:3]) for file in files for event in events(file)]
    assert kept == list(range(kept[0], 100)) and len(kept) > 30


def test_a_file_that_others_have_moved_is_opened_anew(tmp_path: Path) -> None:
    """As logrotate does."""
    path = tmp_path / "log"
    log_writer.begin("info", str(path))
    LOG.info("one")
    assert log_writer.flush()
    path.rename(tmp_path / "log.1")
    LOG.info("two")
    assert log_writer.flush()
    assert events(tmp_path / "log.1") == ["one"] and events(path) == ["two"]


def test_who_logs_does_not_wait_for_who_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nobody reads the pipe: lines are counted and dropped, and what is written later says so."""
    reader, writer = os.pipe()
    monkeypatch.setattr(log_writer, "WAITING_LINES_MAX", 8)
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as pipe:
        monkeypatch.setattr(sys, "stderr", stream)
        log_writer.begin("info")
        for number in range(200):
            LOG.info("%d %s", number, "x" * 5000)
        assert not log_writer.flush(0.01)
        os.set_blocking(reader, False)
        said = ""
        while not log_writer.flush(0.01):
            said += drained(pipe)
        LOG.info("after")
        assert log_writer.flush()
        said += drained(pipe)
        lines = said.splitlines()
        assert "log lines are lost" in lines[-1] and lines[-2].endswith("event=after")
        assert 8 < len(lines) < 100


def drained(pipe) -> str:
    try:
        return os.read(pipe.fileno(), 1 << 20).decode()
    except BlockingIOError:
        return ""


def test_a_wrong_log_call_breaks_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its record is dropped with a complaint on standard error."""
    log_writer.begin("info", str(tmp_path / "log"))
    LOG.error("%d", "no number")
    LOG.error("fine")
    assert log_writer.flush() and events(tmp_path / "log") == ["fine"]
    assert "Logging error" in capsys.readouterr().err

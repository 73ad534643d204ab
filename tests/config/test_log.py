"""Log lines: one line each, readable by machines, without credentials."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached import log


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """Logging is global: put back what the test changes."""
    root, ours = logging.getLogger(), logging.getLogger("fscached")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before
    log.recent_errors.lines.clear()


def line(message: str, **extra: object) -> str:
    record = logging.makeLogRecord({"name": "fscached.x", "levelno": logging.INFO, **extra})
    record.msg = message
    return log.KeyValueFormatter().format(record)


def test_a_record_is_one_line_of_pairs() -> None:
    """Message and extra keys, quoted only where needed."""
    text = line("mounted", fsid="a b", blobs=3)
    assert text.endswith('level=info logger=fscached.x event=mounted fsid="a b" blobs=3')


@given(st.text())
def test_no_text_can_forge_a_line(text: str) -> None:
    """Whatever an image is called, a record stays one line of printable ASCII."""
    found = line("opened %s", args=(text,), name_of_image=text)
    assert found.isascii()
    assert found.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Basic dXNlcjpodW50ZXIy",
        "sent bearer eyJhbGciOiJub25lIn0.hunter2",
        "GET https://user:hunter2@host/v2/",
        "redirected to http://s3/blob?X-Amz-Signature=hunter2&x=hunter2",
    ],
)
def test_credentials_in_a_message_are_taken_out(text: str) -> None:
    """Headers, URLs with a password, and the query of redirect targets."""
    for found in (line(text), line("x", where=text)):
        assert "hunter2" not in found
        assert "dXNlcjpodW50ZXIy" not in found
        assert "***" in found


def test_a_key_that_names_a_credential_has_no_value() -> None:
    """Also when it is logged by mistake."""
    assert line("x", password="hunter2", registry_token="hunter2").count("***") == 2


def test_an_exception_is_on_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The trace is a value like any other."""
    log.configure()
    try:
        raise ValueError("bad\nblob")
    except ValueError:
        logging.getLogger("fscached.x").exception("while reading")
    [text] = capsys.readouterr().err.splitlines()
    assert 'event="while reading" error="ValueError: bad\\nblob" trace="Traceback' in text
    assert list(log.recent_errors.lines) == [text]


def test_the_last_errors_are_kept_and_bounded() -> None:
    """The error log forgets the oldest and cuts long lines."""
    errors = log.ErrorLog()
    for number in range(100):
        record = {"name": "x", "levelno": logging.ERROR, "msg": f"{number} " * 999}
        errors.handle(logging.makeLogRecord(record))
    assert errors.total_errors == 100
    assert len(errors.lines) == errors.MAX_ERRORS
    assert max(map(len, errors.lines)) == errors.MAX_LINE_CHARACTERS


def test_a_wrong_log_call_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Its record is dropped with a complaint on standard error."""
    log.configure()
    logging.getLogger("fscached.x").error("%d", "no number")
    assert "Logging error" in capsys.readouterr().err


def test_an_unknown_level_is_refused() -> None:
    """The error lists the levels there are."""
    with pytest.raises(ValueError, match=r"'loud'.*off, error, warn, info, debug, trace"):
        log.set_level("loud")

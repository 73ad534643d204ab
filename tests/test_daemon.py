"""What the daemon says and refuses before it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from fscached import config, log_writer, standalone
from fscached.failure import Missing
from fscached.transport import descriptors

ARTICLE = Path(__file__).parent / "data" / "nydusd" / "article.json"


def test_keys_that_do_not_apply_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon started on nydusd's file says what it makes nothing of."""

    def end(_: int) -> None:
        raise Missing("the rest", "is other tests'")

    monkeypatch.setattr(descriptors, "allow", end)
    with pytest.raises(Missing, match="the rest"):
        standalone.main(config.load(ARTICLE))
    assert log_writer.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert "level=info" in line
    assert "mode" in line and "digest_validate" in line and "enable_xattr" in line

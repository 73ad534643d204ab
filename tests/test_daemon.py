"""What the daemon says and refuses before it serves."""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fscached import config, log_writer, serving, standalone
from fscached.control.notify import FdStore
from fscached.failure import Missing
from fscached.transport import descriptors, opening

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


def test_what_a_unit_lends_and_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API answers on the unit's socket, and signs of life begin when it is ready; should they
    end, whoever ends the process learns where it stood."""
    seen: list[bytes | str | bool] = []

    async def serve(
        _: config.Config,
        beginning: serving.Beginning,
        *,
        ready: Callable[[str], None],
        listener: socket.socket,
        lent: bool,
    ) -> None:
        ready("serves")
        seen.extend([listener.getsockname(), lent, manager.recv(99), manager.recv(99)])
        listener.close()

    monkeypatch.setattr(faulthandler, "enable", lambda _: seen.append("faulthandler"))
    monkeypatch.setattr(opening, "anew", lambda _: SimpleNamespace(needs_holder=False, holdings={}))
    monkeypatch.setattr(descriptors, "allow", lambda _: None)
    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    settings = tmp_path / "fscached.toml"
    settings.write_text(
        f"[paths]\nruntime_directory = '{tmp_path}'\nstate_directory = '{tmp_path}'\n"
        f"[cache]\ndirectory = '{tmp_path}'\n"
    )
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX) as unit,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20.0)
        unit.bind(str(tmp_path / "api.sock"))
        unit.listen()
        monkeypatch.setattr(FdStore, "take", lambda _: {"api": os.dup(unit.fileno())})
        monkeypatch.setattr(FdStore, "put", lambda *_: True)
        assert standalone.main(config.load(settings)) == 0
    ready = b"READY=1\nSTATUS=serves"
    assert seen == ["faulthandler", str(tmp_path / "api.sock"), True, ready, b"WATCHDOG=1"]

"""Listeners that somebody else made: a socket unit's."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fscached.control import listener
from fscached.failure import Failure


def test_a_units_socket_is_taken_as_it_is(tmp_path: Path) -> None:
    """It listens, and from now on does not block: systemd gives it so that it does."""
    path = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)
        made.listen()
        with listener.lent(os.dup(made.fileno()), path) as lent:
            assert lent.getsockname() == path and not os.get_blocking(made.fileno())


def test_a_unit_that_listens_elsewhere_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Readers of mounted images are served all the same."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "other.sock"))
        made.listen()
        listener.lent(os.dup(made.fileno()), str(tmp_path / "api.sock")).close()
    assert "the socket unit listens elsewhere" in caplog.text


def test_a_socket_of_another_kind_is_refused() -> None:
    """ListenDatagram=, or an address."""
    with (
        socket.socket(socket.AF_INET) as made,
        pytest.raises(Failure, match="no socket for the API"),
    ):
        listener.lent(os.dup(made.fileno()), "/run/api.sock")

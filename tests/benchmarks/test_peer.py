"""Another daemon is called and spoken to as nydusd is."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runners import LocalImage
from runners.peer import PROGRAM, Peer

from fscached.cli import singleton
from fscached.control import entry as entries


class Guest:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.files: dict[str, bytes] = {}

    def run(self, command: Any, **_: Any) -> Any:
        self.ran.append(command)
        return SimpleNamespace(stdout="0.1 17\n")

    def python(self, *argv: str) -> None:
        self.ran.append(argv)

    def put(self, path: str, content: bytes, *, mode: int) -> None:
        self.files[path] = content


def _body(script: str) -> bytes:
    words = shlex.split(script.partition(";")[0])
    return words[words.index("--data-binary") + 1].encode()


def test_a_program_of_this_machine_is_taken_along() -> None:
    """With its arguments; one that the guest has is called by its name."""
    guest = Guest()
    Peer(guest, f"{sys.executable} -v").start("/cache")  # type: ignore[arg-type]
    assert guest.files[PROGRAM] == Path(sys.executable).read_bytes()
    assert guest.ran[-1][4:7] == [PROGRAM, "-v", "singleton"]


def test_its_command_line_is_nydusds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which our own `singleton` takes as it is."""
    import argparse

    guest = Guest()
    Peer(guest, "peer").start("/cache")  # type: ignore[arg-type]
    words = guest.ran[-1]
    parser = argparse.ArgumentParser()
    singleton.add_parser(parser.add_subparsers())
    said = parser.parse_args(words[words.index("singleton") :])
    assert said.fscache == "/cache"


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_image_is_asked_for_as_a_snapshotter_does(prefetch: bool) -> None:
    """By an entry that our own API understands, from a directory or a registry."""
    guest = Guest()
    peer = Peer(guest, "peer")  # type: ignore[arg-type]
    peer.offer(LocalImage("/images", "one"))
    assert not entries.parse(_body(guest.ran[-1])).prefetch.enable
    script = peer.offered("127.0.0.1:5000", "a/b:latest", prefetch=prefetch)
    parsed = entries.parse(_body(script))
    assert parsed.prefetch.enable == prefetch
    assert json.loads(_body(script))["config"]["backend_config"]["repo"] == "a/b"
    assert "fsid=peer-a-b,domain_id=peer-a-b" in script

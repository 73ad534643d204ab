"""What real kernels sent, replayed: recorded by `vm-tests/record_transcript.py`.

Stand-in: the `Kernel` of `device.py`; descriptors in OPENs are replaced by those of ordinary files.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fscached.transport import Closed, Event, ObjectKey, Opened, Wanted
from fscached.transport import cachefiles as module
from tests.transport.device import Kernel

TRANSCRIPTS = sorted((Path(__file__).parent.parent / "data" / "cachefiles").glob("*.jsonl"))
CHUNK_BYTES = 1 << 20


class Replay:
    """A transcript, sent to a transport that answers as the recorded daemon did."""

    def __init__(self, kernel: Kernel, lines: list[dict[str, Any]]) -> None:
        self.cookies: dict[str, int] = lines[0]["cookies"]
        self.events: list[Event] = []
        for line in lines[1:]:
            if "message" in line:
                kernel.send(self._with_descriptor(kernel, bytes.fromhex(line["message"])))
                for event in kernel.transport.drain():
                    self.events.append(event)
                    self._answer(kernel, event)

    def _with_descriptor(self, kernel: Kernel, message: bytes) -> bytes:
        if struct.unpack_from("=I", message, 4) != (0,):
            return message
        return message[:24] + struct.pack("=I", kernel.object_fd()) + message[28:]

    def _answer(self, kernel: Kernel, event: Event) -> None:
        match event:
            case Opened(object, key):
                kernel.transport.open_ok(object, self.cookies[key.cookie])
            case Wanted(object, _, _, ticket):
                kernel.transport.done(object, ticket)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_kernels_messages_are_understood(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every message is the event it should be, and every answer the one the kernel accepted."""
    completed: list[int] = []
    monkeypatch.setattr(module, "read_complete", lambda fd, msg_id: completed.append(msg_id))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kernel = Kernel(tmp_path)
    replay = Replay(kernel, lines)
    counts = asdict(kernel.transport.counts)
    commands = kernel.commands()
    kernel.transport.close()
    kernel.hang_up()
    assert commands == [line["command"] for line in lines if "command" in line]
    assert completed == [line["read_complete"] for line in lines if "read_complete" in line]
    assert set(counts.values()) == {0}

    keys = [event.key for event in replay.events if isinstance(event, Opened)]
    assert sorted(keys) == sorted([ObjectKey("domain", cookie) for cookie in replay.cookies] * 2)
    assert sum(isinstance(event, Closed) for event in replay.events) == len(keys)
    for event in replay.events:
        if isinstance(event, Wanted):
            assert event.end - event.start <= 128 * 1024
            assert event.start // CHUNK_BYTES == (event.end - 1) // CHUNK_BYTES


def test_there_is_a_transcript_of_each_kernel() -> None:
    """Both kernels the VM tests boot are on record."""
    assert [path.stem for path in TRANSCRIPTS] == ["6.1", "6.12"]

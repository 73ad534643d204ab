"""Messages between a host and the agent in its guest: one line of JSON, then `bytes` raw bytes."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

Header = dict[str, Any]

PORT = "org.fscached.agent"
"""Name of the virtio-serial port."""


def encode(header: Header, payload: bytes = b"") -> bytes:
    """One message."""
    return json.dumps({**header, "bytes": len(payload)}).encode() + b"\n" + payload


def receive(stream: BinaryIO) -> tuple[Header, bytes] | None:
    """The next message, or None at the end of the stream."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header: Header = json.loads(line)
    payload = stream.read(header["bytes"])
    return (header, payload) if len(payload) == header["bytes"] else None

"""What a daemon leaves for its successor: registrations with their credentials, in a memfd.

The memfd lies with whoever holds the kernel's device as well (`fscached supervise`, systemd), so
that no secret is written to a disk. `kill -9` may come between any two system calls: the memfd has
two halves, and one write of sixteen bytes says which of them counts.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import msgspec

from fscached.malformed import MALFORMED

NAME = "state"
"""Of the descriptor, among all that outlive a daemon."""

_HEAD = struct.Struct("<QQ")
"""Offset and length in bytes of the half that counts; zeros when nothing was saved yet."""

_LIMIT_BYTES = 64 * 1024 * 1024


class Handover:
    """A JSON value that survives the process. The descriptor is to be given to a holder."""

    def __init__(self, fd: int | None = None) -> None:
        """`fd`: what a predecessor left, or None to begin with nothing."""
        self.fd = os.memfd_create("fscached-state", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.pwrite(self.fd, _HEAD.pack(0, 0), 0)

    def load(self) -> Any:
        """What was saved last, or None.

        Raises ValueError when the memory is not one of ours.
        """
        head = self._head()
        while True:
            offset, length = _HEAD.unpack(head)
            if length > _LIMIT_BYTES:
                raise ValueError(f"the state left by the predecessor claims {length} bytes")
            data = os.pread(self.fd, length, offset)
            # A predecessor that still lives may have begun the half that was read.
            before, head = head, self._head()
            if before == head:
                return _decoded(data) if length else None

    def _head(self) -> bytes:
        head = os.pread(self.fd, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            raise ValueError("the state left by the predecessor is cut short")
        return head

    def save(self, value: Any) -> None:
        """Replace what was saved. Raises ValueError when it is larger than 64 MiB."""
        data = msgspec.json.encode(value)
        if len(data) > _LIMIT_BYTES:
            raise ValueError(f"a state of {len(data)} bytes is more than a successor would read")
        offset, length = _HEAD.unpack(os.pread(self.fd, _HEAD.size, 0))
        start = _HEAD.size if offset - _HEAD.size >= len(data) else offset + length
        start = max(start, _HEAD.size)
        os.pwrite(self.fd, data, start)
        os.pwrite(self.fd, _HEAD.pack(start, len(data)), 0)


def _decoded(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except MALFORMED as error:
        raise ValueError(f"the state left by the predecessor is damaged: {error}") from None

"""From fetched bytes to the cache file: decompress, verify, write. Runs in worker threads.

The codecs, the hashes and the system calls release the GIL, so two workers use two cores.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fscached.cache.blob import Run
from rafs_v6 import ImageError, codec
from rafs_v6.blob import ChunkMap

SPAN_BYTES = 2 * 1024 * 1024
"""Chunks adjacent in the cache file are written together up to this length."""

Write = Callable[[int, memoryview], None]
"""Writes aligned memory at an offset of the object's file; raises OSError."""


@dataclass(slots=True)
class Landing:
    """What became of a run: which chunks are in the file, which were not what they should be."""

    landed: list[Run] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    woken: list[int] = field(default_factory=list)
    """Tickets that were answered already."""


class Writer:
    """Writes runs of one blob's chunks. `verify` off leaves out the digest, nothing else."""

    _local = threading.local()

    def __init__(self, chunks: ChunkMap, write: Write, verify: bool) -> None:
        self._chunks = chunks
        self._write = write
        self._verify = verify

    def stage(self, size_bytes: int) -> memoryview:
        """This thread's memory for remote bytes that it reads itself."""
        return _grown(self._local, "staged", size_bytes)[:size_bytes]

    def land(self, run: Run, staged: memoryview) -> Landing:
        """Bring chunks into the cache file. `staged` holds their remote bytes, back to back.

        Raises OSError when the file cannot be written; chunks of the run may be in it then.
        """
        chunks = self._chunks
        landing = Landing()
        base = chunks.remote_offset(run.first)
        span = Run(run.first, run.first)
        for index in range(run.first, run.end):
            if span.end > span.first and self._length(span.first, index + 1) > SPAN_BYTES:
                self._flush(span, landing)
                span = Run(index, index)
            at = chunks.remote_offset(index) - base
            reason = self._decode(span.first, index, staged[at : at + chunks.remote_size(index)])
            if reason is None:
                span = Run(span.first, index + 1)
            else:
                self._flush(span, landing)
                landing.bad.append((index, reason))
                span = Run(index + 1, index + 1)
        self._flush(span, landing)
        return landing

    def _length(self, first: int, end: int) -> int:
        return self._chunks.padded_end(end - 1) - self._chunks.offset(first)

    def _decode(self, first: int, index: int, remote: memoryview) -> str | None:
        """Put one chunk behind those of its span, padded with zeros; or say what is wrong."""
        chunks = self._chunks
        start = chunks.offset(index) - chunks.offset(first)
        end = start + chunks.size(index)
        span = self._span(start + chunks.padded_end(index) - chunks.offset(index))
        plain = span[start:end]
        try:
            if chunks.compressed(index):
                codec.decompress_into(chunks.compressor, remote, plain)
            else:
                plain[:] = remote
        except ImageError as error:
            return str(error)
        expected = chunks.digest(index) if self._verify else None
        if expected is not None and codec.digest(chunks.digester, plain) != expected:
            return "its digest is not the one the image names"
        padding = chunks.padded_end(index) - chunks.offset(index) - chunks.size(index)
        span[end : end + padding] = bytes(padding)
        return None

    def _flush(self, span: Run, landing: Landing) -> None:
        if span.end == span.first:
            return
        length = self._length(span.first, span.end)
        self._write(self._chunks.offset(span.first), self._span(length)[:length])
        landing.landed.append(span)

    def _span(self, size_bytes: int) -> memoryview:
        """This thread's memory for one span."""
        return _grown(self._local, "span", size_bytes)


def _grown(local: threading.local, name: str, size_bytes: int) -> memoryview:
    """A thread's aligned memory of that name. Its start stays what it was when it grows."""
    memory: memoryview | None = getattr(local, name, None)
    if memory is None or len(memory) < size_bytes:
        grown = memoryview(mmap.mmap(-1, max(SPAN_BYTES, size_bytes)))
        if memory is not None:
            grown[: len(memory)] = memory
        setattr(local, name, grown)
        memory = grown
    return memory

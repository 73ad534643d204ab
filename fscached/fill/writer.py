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
from rafs_v6.blob import Chunk, ChunkMap

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
        landing = Landing()
        base = self._chunks.remote_offset(run.first)
        first, start, end = run.first, 0, 0
        for index in range(run.first, run.end):
            chunk = self._chunks[index]
            if end > start and chunk.padded_end - start > SPAN_BYTES:
                self._flush(Run(first, index), start, end, landing)
                start = end
            if end == start:
                first, start = index, chunk.offset
            remote = staged[chunk.remote_offset - base : chunk.remote_end - base]
            reason = self._decode(index, chunk, start, remote)
            if reason is None:
                end = chunk.padded_end
            else:
                landing.bad.append((index, reason))
                self._flush(Run(first, index), start, end, landing)
                start = end
        self._flush(Run(first, run.end), start, end, landing)
        return landing

    def _decode(self, index: int, chunk: Chunk, start: int, remote: memoryview) -> str | None:
        """Put a chunk into the span that starts at byte `start` of the file, padded with zeros;
        or say what is wrong."""
        span = _grown(self._local, "span", chunk.padded_end - start)
        end = chunk.offset + chunk.size - start
        plain = span[chunk.offset - start : end]
        try:
            if chunk.compressed:
                codec.decompress_into(self._chunks.compressor, remote, plain)
            else:
                plain[:] = remote
        except ImageError as error:
            return str(error)
        expected = self._chunks.digest(index) if self._verify else None
        if expected is not None and codec.digest(self._chunks.digester, plain) != expected:
            return "its digest is not the one the image names"
        padding = chunk.padded_end - start - end
        span[end : end + padding] = bytes(padding)
        return None

    def _flush(self, span: Run, start: int, end: int, landing: Landing) -> None:
        """Write the chunks that are bytes [start, end) of the file."""
        if start < end:
            self._write(start, _grown(self._local, "span", end - start)[: end - start])
            landing.landed.append(span)


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

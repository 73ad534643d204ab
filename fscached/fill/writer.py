"""From fetched bytes to the cache file: decompress, verify, write. Runs in worker threads.

The codecs, the hashes and the system calls release the GIL, so two workers use two cores.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from fscached.cache.blob import Run
from fscached.fill.stages import Stamps
from rafs_v6 import ImageError, codec
from rafs_v6.blob import Chunk, ChunkMap

SPAN_BYTES = 2 * 1024 * 1024
"""Chunks adjacent in the cache file are written together up to this length."""

TOGETHER_BYTES = 32 * 1024
"""Chunks up to this size are decompressed in one call (`rafs_v6.codec.decompress_together`)."""

Write = Callable[[int, memoryview], None]
"""Writes aligned memory at an offset of the object's file; raises OSError."""


@dataclass(slots=True)
class Landing:
    """What became of a run: which chunks are in the file, which were not what they should be."""

    landed: list[Run] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    woken: list[int] = field(default_factory=list)
    """Tickets that were answered already."""
    write_s: float = 0.0
    """How long the writing took."""
    stamps: Stamps | None = None


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
        chunks = [self._chunks[index] for index in range(run.first, run.end)]
        at = 0
        while at < len(chunks):
            span = chunks[at : at + _span_count(chunks, at)]
            remotes = [staged[c.remote_offset - base : c.remote_end - base] for c in span]
            self._land_span(run.first + at, span, remotes, landing)
            at += len(span)
        return landing

    def _land_span(
        self, first: int, chunks: list[Chunk], remotes: list[memoryview], landing: Landing
    ) -> None:
        """Bring adjacent chunks, of which `first` is the first, into the file together."""
        start = chunks[0].offset
        memory = _grown(self._local, "span", chunks[-1].padded_end - start)
        plains = [memory[c.offset - start : c.offset - start + c.size] for c in chunks]
        reasons = self._decode(chunks, remotes, plains)
        good = 0
        for at, (chunk, plain) in enumerate(zip(chunks, plains, strict=True)):
            reason = reasons.get(at) or self._fault(first + at, plain)
            if reason is None:
                end = chunk.offset + chunk.size
                memory[end - start : chunk.padded_end - start] = bytes(chunk.padded_end - end)
                continue
            landing.bad.append((first + at, reason))
            self._flush(first, chunks, good, at, memory, landing)
            good = at + 1
        self._flush(first, chunks, good, len(chunks), memory, landing)

    def _decode(
        self, chunks: list[Chunk], remotes: list[memoryview], plains: list[memoryview]
    ) -> dict[int, str]:
        """Fill `plains`; what is wrong, by position, with those that cannot be."""
        todo = list(range(len(chunks)))
        small = [at for at in todo if chunks[at].compressed and chunks[at].size <= TOGETHER_BYTES]
        if len(small) > 1 and codec.decompress_together(
            self._chunks.compressor, [remotes[at] for at in small], [plains[at] for at in small]
        ):
            todo = sorted({*todo} - {*small})
        reasons = {}
        for at in todo:
            try:
                if chunks[at].compressed:
                    codec.decompress_into(self._chunks.compressor, remotes[at], plains[at])
                else:
                    plains[at][:] = remotes[at]
            except ImageError as error:
                reasons[at] = str(error)
        return reasons

    def _fault(self, index: int, plain: memoryview) -> str | None:
        """What is wrong with the bytes of a chunk."""
        expected = self._chunks.digest(index) if self._verify else None
        if expected is not None and codec.digest(self._chunks.digester, plain) != expected:
            return "its digest is not the one the image names"
        return None

    def _flush(
        self,
        first: int,
        chunks: list[Chunk],
        begin: int,
        end: int,
        memory: memoryview,
        landing: Landing,
    ) -> None:
        """Write the chunks from position `begin` to `end`."""
        if begin < end:
            base, start = chunks[0].offset, chunks[begin].offset
            began_s = monotonic()
            self._write(start, memory[start - base : chunks[end - 1].padded_end - base])
            landing.write_s += monotonic() - began_s
            landing.landed.append(Run(first + begin, first + end))


def _span_count(chunks: list[Chunk], at: int) -> int:
    """How many from there on are written together: one, or as many as SPAN_BYTES hold."""
    end, start = at + 1, chunks[at].offset
    while end < len(chunks) and chunks[end].padded_end - start <= SPAN_BYTES:
        end += 1
    return end - at


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

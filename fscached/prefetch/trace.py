"""Access traces: which parts of an image were read first, in which order, how soon.

Nothing here knows a clock or a file: times come with the calls, and a trace is bytes or an object.
Places are bytes of cache files, a chunk each. Those are a pure function of the image, while a
chunk's number depends on where its blob's chunk map came from (`rafs_v6.blob`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final, NamedTuple, Protocol
from urllib.parse import quote_from_bytes, unquote_to_bytes

import msgspec
from msgspec import Meta

from fscached.malformed import MALFORMED

ACCESS_LIMIT: Final = 65_536
"""Accesses kept of one image, those expected last left out: 64 GiB in chunks of 1 MiB."""
FILE_LIMIT: Final = 8192
"""Files kept of one image, those used first."""
NAMES_LIMIT_BYTES: Final = 2 << 20
"""Of all names of one image's files; hostile images have long ones."""
TRACE_LIMIT_BYTES: Final = 16 << 20
"""Of an encoded trace: room for as many accesses with the largest numbers (112 bytes each), and
for as many files, with every byte of their names quoted."""
RUN_LIMIT: Final = 1_000_000
_OFFSET_LIMIT: Final = 1 << 45  # rafs_v6.layout's MAX_CACHE_BYTES is less
_MOMENT_LIMIT_MS: Final = 366 * 86_400_000
_BLOB_LIMIT: Final = 256
_PATH_LIMIT: Final = 4096


class TraceError(ValueError):
    """What is given is no trace, or traces that have nothing to do with each other."""


class Access(NamedTuple):
    """A chunk: bytes [start, end) of a blob's cache file, and how it was first of use.

    `after_s` is seconds from the image's first READ: when it was first read, or, if it never was,
    when prefetch asked for it; the earliest of all runs. `demands` and `prefetches` are the runs
    in which a reader was first, or prefetch (whether it was read later nobody knows). For the
    reader bytes up to `reach` were fetched; what is behind `end` may have been read unasked.
    """

    blob_id: str
    start: int
    end: int
    after_s: float
    demands: int = 1
    prefetches: int = 0
    reach: int = 0

    @property
    def demanded(self) -> bool:
        """Whether a reader ever asked for it."""
        return self.demands > 0


class FileUse(NamedTuple):
    """A file that was read: its path with the leading slash, when, and how many of its chunks."""

    path: bytes
    after_s: float
    chunks_read: int
    chunk_count: int

    @property
    def mostly(self) -> bool:
        """Whether at least half of it was read, so that bringing all of it costs little."""
        return self.chunks_read * 2 >= self.chunk_count


class Trace(NamedTuple):
    """The accesses of one image in the order of their first use, from one run or several.

    `runs` counts cold ones: a run that found part of the image in the cache says what was read,
    and nothing against what was not. `files` are names for the accesses, first used first, where
    somebody has looked them up (`fscached.prefetch.files`): an image built anew has other blobs.
    """

    fsid: str
    reference: str
    runs: int
    accesses: tuple[Access, ...]
    files: tuple[FileUse, ...] = ()

    def expected(self) -> Iterator[Access]:
        """What will be read, soonest first: what at least half of the runs have read that could
        have been the first to, then the rest. What only prefetch asked for is no evidence."""
        demanded = [access for access in self.accesses if access.demanded]
        yield from (access for access in demanded if self.usual(access))
        yield from (access for access in demanded if not self.usual(access))

    def usual(self, access: Access) -> bool:
        """Whether at least half of the runs have read it that could have been the first to."""
        return access.demands * 2 >= self.runs - access.prefetches


def merge(traces: Iterable[Trace]) -> Trace:
    """One trace of all their runs, whatever their order. Raises TraceError for traces of different
    images, or none at all."""
    given = list(traces)
    if not given:
        raise TraceError("no traces to merge: give at least one")
    first = given[0]
    known: dict[tuple[str, int], Access] = {}
    for trace in given:
        if trace.fsid != first.fsid:
            raise TraceError(
                f"traces of different images: {first.reference} (fsid {first.fsid[:12]}) and "
                f"{trace.reference} (fsid {trace.fsid[:12]}): merge those of one image"
            )
        for access in trace.accesses:
            key = access.blob_id, access.start
            before = known.get(key)
            known[key] = access if before is None else _joined(before, access)
    runs = min(sum(trace.runs for trace in given), RUN_LIMIT)
    reference = max(trace.reference for trace in given)
    files = _merged_files(use for trace in given for use in trace.files)
    return bounded(Trace(first.fsid, reference, runs, tuple(known.values()), files))


def _merged_files(uses: Iterable[FileUse]) -> tuple[FileUse, ...]:
    known: dict[bytes, FileUse] = {}
    for use in uses:
        before = known.get(use.path, use)
        known[use.path] = FileUse(
            use.path,
            min(before.after_s, use.after_s),
            max(before.chunks_read, use.chunks_read),
            max(before.chunk_count, use.chunk_count),
        )
    return tuple(known.values())


def bounded(trace: Trace) -> Trace:
    """The trace in order of first use, without what is beyond the limits."""
    accesses = sorted(trace.accesses, key=_soonest)
    if len(accesses) > ACCESS_LIMIT:
        read = [access for access in accesses if access.demanded]
        rest = [access for access in accesses if not access.demanded]
        accesses = sorted((read + rest)[:ACCESS_LIMIT], key=_soonest)
    return trace._replace(accesses=tuple(accesses), files=tuple(_bounded_files(trace.files)))


def _bounded_files(uses: Iterable[FileUse]) -> Iterator[FileUse]:
    room = NAMES_LIMIT_BYTES
    for use in sorted(uses, key=lambda use: (use.after_s, use.path))[:FILE_LIMIT]:
        room -= len(use.path)
        if room < 0:
            return
        yield use


def _soonest(access: Access) -> tuple[float, str, int]:
    return access.after_s, access.blob_id, access.start


def _joined(one: Access, other: Access) -> Access:
    """Of two accesses to one chunk: the sooner, and one that was read before one that was not."""
    demanded = [access for access in (one, other) if access.demanded] or [one, other]
    return Access(
        one.blob_id,
        one.start,
        max(one.end, other.end),
        min(access.after_s for access in demanded),
        min(one.demands + other.demands, RUN_LIMIT),
        min(one.prefetches + other.prefetches, RUN_LIMIT),
        max(one.reach, other.reach),
    )


# The file: {"trace": 1, "fsid": …, "reference": …, "runs": …, "blobs": [id, …],
# "accesses": [[blob, start, end, ms, demands, prefetches, reach], …],
# "files": [[path, ms, chunks read, chunks], …]}. `blob` is a position in `blobs`; a path has its
# bytes that are no printable ASCII as %XX.

_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,200}\Z")]
_Count = Annotated[int, Meta(ge=0, le=RUN_LIMIT)]
_Offset = Annotated[int, Meta(ge=0, le=_OFFSET_LIMIT)]
_Row = tuple[
    Annotated[int, Meta(ge=0, lt=_BLOB_LIMIT)],
    _Offset,
    _Offset,
    Annotated[int, Meta(ge=0, le=_MOMENT_LIMIT_MS)],
    _Count,
    _Count,
    _Offset,
]


_Path = Annotated[str, Meta(min_length=2, max_length=3 * 4096, pattern=r"^/[\x20-\x7e]+\Z")]
_Use = tuple[
    _Path,
    Annotated[int, Meta(ge=0, le=_MOMENT_LIMIT_MS)],
    Annotated[int, Meta(ge=1, le=1 << 32)],
    Annotated[int, Meta(ge=1, le=1 << 32)],
]
_PLAIN: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    trace: int
    fsid: _Name
    reference: Annotated[str, Meta(max_length=1024, pattern=r"^[\x20-\x7e]*\Z")]
    runs: _Count
    blobs: Annotated[tuple[_Name, ...], Meta(max_length=_BLOB_LIMIT)]
    accesses: Annotated[tuple[_Row, ...], Meta(max_length=ACCESS_LIMIT)]
    files: Annotated[tuple[_Use, ...], Meta(max_length=FILE_LIMIT)] = ()


class _Version(msgspec.Struct, frozen=True):
    trace: int


VERSION: Final = 1


def encode(trace: Trace) -> bytes:
    """The trace as compact JSON, times in whole milliseconds."""
    numbers: dict[str, int] = {}
    kept = bounded(trace)
    rows = [
        (
            numbers.setdefault(access.blob_id, len(numbers)),
            access.start,
            access.end,
            round(access.after_s * 1000),
            access.demands,
            access.prefetches,
            access.reach,
        )
        for access in kept.accesses
    ]
    files = tuple(
        (
            quote_from_bytes(use.path, safe=_PLAIN),
            round(use.after_s * 1000),
            use.chunks_read,
            use.chunk_count,
        )
        for use in kept.files
    )
    blobs = tuple(numbers)
    file = _File(VERSION, trace.fsid, trace.reference, trace.runs, blobs, tuple(rows), files)
    return msgspec.json.encode(file) + b"\n"


def decode(data: bytes) -> Trace:
    """The trace in a file. Raises TraceError, whose text says what is wrong and what would do."""
    if len(data) > TRACE_LIMIT_BYTES:
        raise TraceError(f"{len(data)} bytes; a trace has at most {TRACE_LIMIT_BYTES}: not one")
    try:
        version = msgspec.json.decode(data, type=_Version).trace
        if version != VERSION:
            raise TraceError(
                f"a trace of version {version}, not {VERSION}: export it with this fscached"
            )
        file = msgspec.json.decode(data, type=_File)
    except MALFORMED as error:
        raise TraceError(f"not a trace of `fscached trace export`: {error}") from None
    accesses = tuple(_accesses(file))
    return bounded(Trace(file.fsid, file.reference, file.runs, accesses, tuple(_uses(file))))


def _uses(file: _File) -> Iterator[FileUse]:
    seen = set()
    for number, (name, moment_ms, chunks_read, chunk_count) in enumerate(file.files):
        path = unquote_to_bytes(name)
        if b"\0" in path or len(path) > _PATH_LIMIT or path in seen or chunks_read > chunk_count:
            raise TraceError(
                f"file {number}: {name[:255]!r}, {chunks_read} of {chunk_count} chunks: no file's "
                "name, there twice, or more of it than there is"
            )
        seen.add(path)
        yield FileUse(path, moment_ms / 1000, chunks_read, chunk_count)


def _accesses(file: _File) -> Iterator[Access]:
    seen = set()
    for number, row in enumerate(file.accesses):
        blob, start, end, moment_ms, demands, prefetches, reach = row
        if blob >= len(file.blobs) or start >= end or not demands + prefetches:
            raise TraceError(
                f"access {number}: blob {blob} of {len(file.blobs)}, bytes {start} to {end}, in "
                f"{demands + prefetches} runs: damaged, record or export the trace again"
            )
        if (blob, start) in seen:
            raise TraceError(f"access {number}: bytes from {start} of blob {blob} are there twice")
        seen.add((blob, start))
        after_s = moment_ms / 1000
        yield Access(file.blobs[blob], start, end, after_s, demands, prefetches, reach)


class Chunks(Protocol):
    """What is asked of a blob's chunk map (`rafs_v6.blob.ChunkMap`)."""

    @property
    def count(self) -> int: ...
    def offset(self, index: int) -> int: ...
    def padded_end(self, index: int) -> int: ...
    def overlapping(self, start: int, end: int) -> range: ...


class Recorder:
    """One run of one image. Times are seconds on any one clock that does not jump.

    It keeps one access per chunk, a READ's before a prefetch's, and no more than ACCESS_LIMIT.
    """

    def __init__(self, fsid: str, reference: str) -> None:
        self._fsid = fsid
        self._reference = reference
        self._began_s: float | None = None
        self._blobs: dict[str, _Blob] = {}
        self._room = ACCESS_LIMIT
        self._cold = True
        self._early: list[tuple[str, int, int, float]] = []
        """READs of blobs whose chunks are not known yet: the first of each, mostly."""

    @property
    def began_s(self) -> float | None:
        """When the image's first READ came; None before it."""
        return self._began_s

    def learn(self, blob_id: str, chunks: Chunks, resident: bool) -> None:
        """A blob's chunks are known now. `resident`: some of them were here before the run."""
        if blob_id in self._blobs:
            return
        self._cold = self._cold and not resident
        self._blobs[blob_id] = _Blob(chunks, bytearray(chunks.count), [], [], [])
        early, self._early = self._early, []
        for read in early:
            self.read(*read)

    def read(self, blob_id: str, start: int, end: int, now_s: float) -> None:
        """A READ of bytes [start, end) of a blob's cache file."""
        if self._began_s is None:
            self._began_s = now_s
        blob = self._blobs.get(blob_id)
        if blob is None:
            if len(self._early) < _EARLY_LIMIT:
                self._early.append((blob_id, start, end, now_s))
            return
        flags = blob.flags
        for index in blob.chunks.overlapping(start, end):
            if not flags[index] & _READ:
                flags[index] |= _READ
                if self._room > 0:
                    self._room -= 1
                    blob.reads.append((index, now_s))

    def fetched(self, blob_id: str, first: int, end: int) -> None:
        """For a reader the chunks [first, end) of a blob's map are fetched."""
        blob = self._blobs.get(blob_id)
        if blob is not None and len(blob.windows) < ACCESS_LIMIT:
            blob.windows.append((first, end))

    def prefetched(self, blob_id: str, first: int, end: int, now_s: float) -> None:
        """Prefetch asks for the chunks [first, end) of a blob's map."""
        blob = self._blobs.get(blob_id)
        if blob is None:
            return
        for index in range(first, end):
            if not blob.flags[index] and len(blob.asked) < ACCESS_LIMIT:
                blob.flags[index] |= _ASKED
                blob.asked.append((index, now_s))

    def trace(self) -> Trace | None:
        """The run as far as it has come; None when nothing was read."""
        if self._began_s is None:
            return None
        accesses = tuple(
            access for blob_id, blob in self._blobs.items() for access in self._of(blob_id, blob)
        )
        return bounded(Trace(self._fsid, self._reference, int(self._cold), accesses))

    def _of(self, blob_id: str, blob: _Blob) -> Iterator[Access]:
        reaches = blob.reaches()
        for index, at_s in blob.reads:
            yield self._access(blob_id, blob, index, at_s, 1, 0, reaches.get(index, 0))
        for index, at_s in blob.asked:
            if not blob.flags[index] & _READ:
                yield self._access(blob_id, blob, index, at_s, 0, 1, 0)

    def _access(
        self,
        blob_id: str,
        blob: _Blob,
        index: int,
        at_s: float,
        demands: int,
        prefetches: int,
        reach: int,
    ) -> Access:
        assert self._began_s is not None
        start, end = blob.chunks.offset(index), blob.chunks.padded_end(index)
        after_s = min(max(at_s - self._began_s, 0.0), _MOMENT_LIMIT_MS / 1000)
        return Access(blob_id, start, end, round(after_s, 3), demands, prefetches, reach)


_EARLY_LIMIT: Final = 4096
_READ: Final = 1
_ASKED: Final = 2


class _Blob(NamedTuple):
    """`flags` says of each chunk whether it was read or prefetched; the lists when, in order.
    `windows` are the chunks fetched for readers."""

    chunks: Chunks
    flags: bytearray
    reads: list[tuple[int, float]]
    asked: list[tuple[int, float]]
    windows: list[tuple[int, int]]

    def reaches(self) -> dict[int, int]:
        """Of chunks that were read, up to which byte was fetched for it. A window ahead of a reader
        belongs to what it read last."""
        owners: dict[int, int] = {}
        found: dict[int, int] = {}
        for first, end in self.windows:
            owner = first if self.flags[first] & _READ else owners.pop(first, None)
            if owner is not None:
                owners[end] = owner
                found[owner] = max(self.chunks.padded_end(end - 1), found.get(owner, 0))
        return found

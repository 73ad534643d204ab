"""What an image should recommend to fetch first: names given, and what a trace says was read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fscached.failure import Failure, Missing
from fscached.prefetch.files import uses
from fscached.prefetch.trace import TRACE_LIMIT_BYTES, Trace, TraceError, decode
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.layout import FileType
from rafs_v6.owners import Place, files


def read_trace(name: str) -> Trace:
    """A trace from a file. Raises Missing when there is none, Failure when it is no trace."""
    try:
        with Path(name).open("rb") as file:
            data = file.read(TRACE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise Missing(
            "no such file", "export it with `fscached trace export`", where=name
        ) from None
    try:
        return decode(data)
    except TraceError as error:
        raise Failure(name, str(error)) from None


def names(trace: Trace) -> tuple[bytes, ...]:
    """Files for an image built anew, first used first. Raises Failure when the trace has no names.

    Files of which less than half was read are left out: a table has whole files only.
    """
    if not trace.files:
        raise Failure(
            f"the trace of {trace.reference or trace.fsid[:12]} names no files",
            "export it with `fscached trace export` where the image is, which adds the names",
        )
    return tuple(use.path.strip(b"/") for use in trace.files if use.mostly)


def recommended(image: Bootstrap, trace: Trace | None, given: Sequence[str]) -> list[int]:
    """Inodes of an image, in order: the paths given, then what the trace says.

    A trace of this image's blobs is taken as it is; another one by the names in it. Raises Failure
    and ImageError.
    """
    wanted = [os.fsencode(path).strip(b"/") for path in given]
    found = _nids(image, wanted, directories=True)
    for path, name in zip(wanted, given, strict=True):
        if path not in found:
            raise ImageError(f"{name}: to be prefetched, but not in the image")
    nids = [found[path] for path in wanted]
    if trace is not None:
        nids += _traced(image, trace)
    return list(dict.fromkeys(nids))


def hot_places(image: Bootstrap, trace: Trace | None, nids: Sequence[int]) -> list[Place]:
    """Chunks of an image that come first, in order: those the trace has of its blobs, as they were
    read, then those of the files recommended."""
    numbers = {blob.blob_id: blob.blob_index for blob in image.blobs}
    read = [
        Place(numbers[access.blob_id], access.start)
        for access in (trace.expected() if trace is not None else ())
        if access.blob_id in numbers
    ]
    return list(dict.fromkeys([*read, *_places_below(image, nids)]))


def _places_below(image: Bootstrap, nids: Sequence[int]) -> Iterator[Place]:
    """Chunks of files, and of all files below directories, in the order of `nids`."""
    rank = {nid: position for position, nid in enumerate(nids)}
    paths = {
        path.rstrip(b"/"): rank[inode.nid] for path, inode in image.walk() if inode.nid in rank
    }
    found: list[tuple[int, list[Place]]] = []
    for file, places in files(image):
        above = [paths[path] for path in _upwards(file.path) if path in paths]
        if above or file.nid in rank:
            found.append((min([*above, rank.get(file.nid, len(rank))]), places))
    for _, places in sorted(found, key=lambda each: each[0]):
        yield from places


def _upwards(path: bytes) -> Iterator[bytes]:
    """A path and all directories it is in; the root's is empty."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]
    yield b""


def renumbered(before: Bootstrap, after: Bootstrap, nids: Sequence[int]) -> list[int]:
    """The same names in an image that was laid out anew."""
    names = {inode.nid: path.strip(b"/") for path, inode in before.walk()}
    wanted = [names[nid] for nid in nids]
    found = _nids(after, wanted, directories=True)
    return [found[name] for name in wanted]


def _traced(image: Bootstrap, trace: Trace) -> list[int]:
    ids = {blob.blob_id for blob in image.blobs}
    if any(access.blob_id in ids for access in trace.accesses):
        return [use.file.nid for use in uses(image, trace.accesses) if use.brief.mostly]
    wanted = names(trace)
    found = _nids(image, wanted, directories=False)
    if len(found) < len(wanted):
        say_missing(len(wanted) - len(found), len(wanted))
    return [found[path] for path in wanted if path in found]


def say_missing(missing: int, total: int) -> None:
    """A newer image need not have all that was read of an older one."""
    print(f"{missing} of {total} names are not in the image, or there twice", file=sys.stderr)


def _nids(image: Bootstrap, wanted: Iterable[bytes], *, directories: bool) -> dict[bytes, int]:
    kinds = {FileType.REGULAR, FileType.DIRECTORY} if directories else {FileType.REGULAR}
    names = set(wanted)
    return {
        path.strip(b"/"): inode.nid
        for path, inode in (image.walk() if names else ())
        if path.strip(b"/") in names and inode.type in kinds
    }

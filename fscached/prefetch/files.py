"""A trace in the words of people: which files were read, and which never before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from fscached.prefetch.trace import Access, FileUse
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.owners import File, Owners, Place, owners


class Use(NamedTuple):
    """A file that was read: when first, and which of its chunks.

    `twins` is how many other files have every one of these chunks, so that it may have been one
    of them: equal data is stored once.
    """

    file: File
    after_s: float
    chunks_read: int
    twins: int

    @property
    def brief(self) -> FileUse:
        """What a trace's file says of it."""
        return FileUse(self.file.path, self.after_s, self.chunks_read, self.file.chunk_count)


def uses(image: Bootstrap, accesses: Iterable[Access]) -> list[Use]:
    """The files that readers asked for, first used first.

    A chunk of several files counts for one of them: one that was read anyhow, else the first.
    Raises ImageError for an image that cannot be walked.
    """
    read = _places(image, (access for access in accesses if access.demanded))
    return _uses(read, owners(image, read))


def news(image: Bootstrap, before: Iterable[Access], now: Iterable[Access]) -> list[Use]:
    """The files that readers asked for now and never before, first used first.

    A file is known when one of the chunks that are its alone was read before; a chunk that was
    read before says nothing. So equal files cannot be told apart, and what is read of a file that
    is known goes unnoticed. Raises ImageError.
    """
    known = _places(image, (access for access in before if access.demanded))
    read = _places(image, (access for access in now if access.demanded))
    everybody = owners(image, [*known, *read])
    acquainted = {
        everybody[place].files[0].nid
        for place in known
        if place in everybody and everybody[place].total == 1
    }
    fresh = {place: after_s for place, after_s in read.items() if place not in known}
    return [use for use in _uses(fresh, everybody, acquainted) if use.file.nid not in acquainted]


def _places(image: Bootstrap, accesses: Iterable[Access]) -> dict[Place, float]:
    """When each chunk of the image was read first, in order of time."""
    numbers = {blob.blob_id: blob.blob_index for blob in image.blobs}
    return {
        Place(numbers[access.blob_id], access.start): access.after_s
        for access in sorted(accesses, key=lambda access: access.after_s)
        if access.blob_id in numbers
    }


def _uses(
    read: dict[Place, float], everybody: dict[Place, Owners], acquainted: Collection[int] = ()
) -> list[Use]:
    sure = {
        everybody[place].files[0].nid
        for place in read
        if place in everybody and everybody[place].total == 1
    } | set(acquainted)
    first: dict[int, tuple[File, float, int]] = {}
    count: Counter[int] = Counter()
    for place, after_s in read.items():
        if place not in everybody:
            continue
        file = _chosen(everybody[place], sure)
        sure.add(file.nid)
        count[file.nid] += 1
        twins = everybody[place].total - 1
        _, since_s, fewest = first.get(file.nid, (file, after_s, twins))
        first[file.nid] = file, since_s, min(fewest, twins)
    return [Use(file, after_s, count[file.nid], twins) for file, after_s, twins in first.values()]


def _chosen(known: Owners, sure: Collection[int]) -> File:
    return next((file for file in known.files if file.nid in sure), known.files[0])

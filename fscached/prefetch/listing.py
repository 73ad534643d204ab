"""Files of an image that are to come first: by its own prefetch table, and by patterns of paths.

Directories stand for all that is below them. No name of either makes a hostile bootstrap be looked
at for longer than it has entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from typing import Final

from fscached.prefetch.policy import Range
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap, Inode
from rafs_v6.layout import BLOCK_BYTES, DIRENT_BYTES, FileType, align_up

LINK_LIMIT: Final = 40
"""Symbolic links followed for one path, as Linux does."""
DEPTH_LIMIT: Final = 256
"""Directories that `**` goes down."""
_LOOKS: Final = 4
"""How often one name may look at each entry: `**` looks twice, for itself and for what follows."""


def table(bootstrap: Bootstrap) -> Iterator[Range]:
    """What the image's prefetch table names, in its order. Raises ImageError."""
    walk = _Walk(bootstrap)
    for nid in bootstrap.prefetch_nids():
        walk.begin()
        yield from walk.below(bootstrap.inode(nid))


def patterns(bootstrap: Bootstrap, texts: Iterable[str]) -> Iterator[Range]:
    """What patterns of absolute paths name, in their order: `*`, `?` and `[…]` within one name, as
    in a shell; `**` is any number of directories. What names nothing is nothing.

    Raises ImageError.
    """
    walk = _Walk(bootstrap)
    for text in texts:
        walk.begin()
        names = [name for name in text.encode("utf-8", "surrogateescape").split(b"/") if name]
        try:
            for inode in walk.matching([bootstrap.root], names, LINK_LIMIT):
                yield from walk.below(inode)
        except RecursionError:
            raise ImageError(f"pattern {text[:80]!r}: links in the image lead too deep") from None


class _Walk:
    """One listing's way through a bootstrap: no file twice, no more entries than there can be."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self._bootstrap = bootstrap
        self._seen: set[int] = set()
        self._room = 0

    def begin(self) -> None:
        """Another name of the listing."""
        self._room = self._bootstrap.size_bytes // DIRENT_BYTES * _LOOKS

    def below(self, top: Inode) -> Iterator[Range]:
        """The data of a file, or of all files below a directory, by name."""
        unfinished = [top]
        while unfinished:
            inode = unfinished.pop()
            if inode.nid in self._seen:
                continue
            self._seen.add(inode.nid)
            if inode.type is FileType.REGULAR:
                yield from self._data(inode)
            elif inode.type is FileType.DIRECTORY:
                unfinished += reversed([child for _, child in self._children(inode)])

    def matching(self, way: list[Inode], names: list[bytes], links: int) -> Iterator[Inode]:
        """The inodes that `names` name from the last directory of `way` on."""
        if not names:
            yield way[-1]
            return
        here, (name, *rest) = way[-1], names
        if name == b"**":
            yield from self._anywhere(way, rest, links)
        elif name in (b".", b".."):
            yield from self.matching(way[:-1] if name == b".." and way[1:] else way, rest, links)
        elif here.type is FileType.DIRECTORY:
            fits = _fitting(name)
            for known, child in self._children(here):
                if fits(known):
                    yield from self._followed(way, child, rest, links)

    def _anywhere(self, way: list[Inode], rest: list[bytes], links: int) -> Iterator[Inode]:
        """`rest` in this directory and in all below it; links are not followed on the way."""
        yield from self.matching(way, rest, links)
        if way[-1].type is FileType.DIRECTORY and len(way) < DEPTH_LIMIT:
            for _, child in self._children(way[-1]):
                if child.type is FileType.DIRECTORY:
                    yield from self._anywhere([*way, child], rest, links)

    def _followed(
        self, way: list[Inode], child: Inode, rest: list[bytes], links: int
    ) -> Iterator[Inode]:
        if child.type is not FileType.SYMLINK:
            yield from self.matching([*way, child], rest, links)
        elif links:
            target = self._bootstrap.read_link(child)
            names = [name for name in target.split(b"/") if name]
            # A name of the image's is none of ours: nothing in it is a pattern.
            literal = [re.sub(rb"([*?\[])", rb"[\1]", name) for name in names]
            start = way[:1] if target.startswith(b"/") else way
            yield from self.matching(start, literal + rest, links - 1)

    def _children(self, directory: Inode) -> Iterator[tuple[bytes, Inode]]:
        for name, child in self._bootstrap.children(directory):
            self._room -= 1
            if self._room < 0:
                raise ImageError("its directories have more entries than there is room for")
            yield name, child

    def _data(self, inode: Inode) -> Iterator[Range]:
        """Chunks that follow each other are one range."""
        at: Range | None = None
        left = inode.size
        for index in self._bootstrap.chunks(inode):
            size = min(self._bootstrap.chunk_bytes, left)
            left -= size
            start = index.start_block * BLOCK_BYTES
            end = align_up(start + size)
            blob_id = self._bootstrap.blobs[index.blob_index].blob_id
            if at is not None and (at.blob_id, at.end) == (blob_id, start):
                at = at._replace(end=end)
                continue
            if at is not None:
                yield at
            at = Range(blob_id, start, end)
        if at is not None:
            yield at


def _fitting(name: bytes) -> Callable[[bytes], bool]:
    """Whether a name fits one of a pattern. Names are bytes; of their characters none is special
    but those of ASCII."""
    expression = re.compile(translate(name.decode("latin-1")))
    return lambda known: expression.match(known.decode("latin-1")) is not None

"""Where every inode of a bootstrap goes, and the data behind it.

The rules are those of nydus-image, found by comparing with its output: they fill gaps in blocks
already begun, which keeps a bootstrap near the size mkfs.erofs would give it. Offsets are relative
to the metadata's start, where the first block stays empty so that the root's nid is not 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import fsdecode

from rafs_v6 import ImageError
from rafs_v6.layout import (
    BLOCK_BYTES,
    CHUNK_INDEX_BYTES,
    INODE_BYTES,
    NID_BYTES,
    DataLayout,
    align_up,
    dirent_bytes,
    pack_xattrs,
    xattr_icount,
)
from rafs_v6.tree import Node, groups

MAX_INODES = (1 << 31) - 1
MAX_PATH_BYTES = 4094
"""Longest path below the root: PATH_MAX without the leading slash and the NUL."""
_MAX_XATTR_ICOUNT = 0xFFFF
_SLOTS = BLOCK_BYTES // NID_BYTES


@dataclass(slots=True, eq=False)
class Inode:
    """An inode of the image. `size` is that of its data; `data_offset` where whole blocks of it
    are; `entries` a directory's names with `.` and `..`, sorted."""

    node: Node
    number: int
    xattrs: bytes
    size: int = 0
    nlink: int = 1
    offset: int = 0
    data_offset: int = 0
    layout: DataLayout = DataLayout.FLAT_PLAIN
    entries: list[tuple[bytes, Inode]] = field(default_factory=list)

    @property
    def nid(self) -> int:
        return self.offset // NID_BYTES

    @property
    def head_bytes(self) -> int:
        """Bytes of the inode and its xattrs: an inline tail starts behind them."""
        return INODE_BYTES + len(self.xattrs)

    @property
    def indexes_offset(self) -> int:
        return align_up(self.offset + self.head_bytes, CHUNK_INDEX_BYTES)


@dataclass(slots=True)
class Placement:
    """`inodes` in the order of their numbers, the root first; `end` is where metadata ends;
    `names` counts the names in the image, the root's included."""

    inodes: list[Inode]
    end: int
    names: int

    @property
    def root(self) -> Inode:
        return self.inodes[0]

    def files(self) -> Iterator[Node]:
        """Every regular file once."""
        return (inode.node for inode in self.inodes if inode.node.is_regular)


def place(root: Node, chunk_count: Callable[[Node], int]) -> Placement:
    """Give everything in a merged tree its place. Raises ImageError naming the path."""
    return _Placing(root, chunk_count).all()


def block_names(entries: list[tuple[bytes, Inode]]) -> list[list[tuple[bytes, Inode]]]:
    """A directory's entries, block by block: as many as fit into each, in order."""
    blocks: list[list[tuple[bytes, Inode]]] = [[]]
    used = 0
    for entry in entries:
        needed = dirent_bytes(entry[0])
        if used + needed > BLOCK_BYTES:
            blocks.append([])
            used = 0
        blocks[-1].append(entry)
        used += needed
    return blocks


class _Placing:
    def __init__(self, root: Node, chunk_count: Callable[[Node], int]) -> None:
        self._chunk_count = chunk_count
        self._space = _Space()
        self._inodes: list[Inode] = []
        self._names = 1
        self._shared: dict[Node, Inode] = {}
        self._root = root
        top = self._inode(b"", root)
        top.entries = [(b"..", top)]

    def all(self) -> Placement:
        for group in groups(self._root):
            directory = self._shared[group.directory]
            for name, node in group.entries:
                directory.entries.append((name, self._named(group.path_of(name), node, directory)))
            self._place_directory(directory)
            for _, inode in directory.entries:
                if not inode.node.is_directory and not inode.offset:
                    self._place_leaf(inode)
        return Placement(self._inodes, self._space.end, self._names)

    def _named(self, path: bytes, node: Node, parent: Inode) -> Inode:
        self._names += 1
        if node in self._shared:
            self._shared[node].nlink += 1
            return self._shared[node]
        inode = self._inode(path, node)
        if node.is_directory:
            inode.entries = [(b"..", parent)]
            parent.nlink += 1
        return inode

    def _inode(self, path: bytes, node: Node) -> Inode:
        where = fsdecode(path) or "the root"
        if len(path) > MAX_PATH_BYTES or len(self._inodes) == MAX_INODES:
            raise ImageError(f"{where[:99]}…: path of {len(path)} bytes, or too many files")
        try:
            inode = Inode(node, len(self._inodes) + 1, pack_xattrs(node.xattrs))
        except ImageError as error:
            raise ImageError(f"{where}: {error}") from error
        if xattr_icount(len(inode.xattrs)) > _MAX_XATTR_ICOUNT:
            raise ImageError(f"{where}: {len(inode.xattrs)} bytes of xattrs, 256 KiB can be")
        self._inodes.append(inode)
        if node.is_directory:
            inode.nlink = 2
        # As nydus-image has it, only regular files share an inode; other hard links are copies.
        if node.is_directory or node.is_regular:
            self._shared[node] = inode
        return inode

    def _place_directory(self, inode: Inode) -> None:
        inode.entries.append((b".", inode))
        inode.entries.sort(key=lambda entry: entry[0])
        *full, last = block_names(inode.entries)
        inode.size = len(full) * BLOCK_BYTES + sum(dirent_bytes(name) for name, _ in last)
        self._space.put_flat(inode)

    def _place_leaf(self, inode: Inode) -> None:
        node = inode.node
        if node.is_regular:
            inode.size = node.size
            inode.layout = DataLayout.CHUNK_BASED
            indexes = self._chunk_count(node) * CHUNK_INDEX_BYTES
            inode.offset = self._space.put(align_up(inode.head_bytes, CHUNK_INDEX_BYTES) + indexes)
        elif node.is_symlink:
            inode.size = len(node.target)
            self._space.put_flat(inode)
        else:
            inode.offset = self._space.append(inode.head_bytes)


class _Space:
    """The metadata region as it grows, and the gaps left in its blocks by size."""

    def __init__(self) -> None:
        self.end = BLOCK_BYTES
        self._gaps: list[deque[int]] = [deque() for _ in range(_SLOTS)]

    def append(self, size: int) -> int:
        """Room at the end, where an inode may start."""
        offset = self.end
        self.end = align_up(offset + size, NID_BYTES)
        return offset

    def put(self, size: int) -> int:
        """Room in a gap if there is one, else at the end."""
        offset = self._from_gap(size)
        return self.append(size) if offset is None else offset

    def put_flat(self, inode: Inode) -> None:
        """Room for an inode and data that is not in chunks: the tail behind the inode if one
        block can hold both, because the kernel wants it in one block; the rest in whole blocks."""
        tail = inode.size % BLOCK_BYTES
        inline = 0 < tail <= BLOCK_BYTES - inode.head_bytes
        if inline:
            inode.layout = DataLayout.FLAT_INLINE
            inode.offset = self._in_one_block(inode.head_bytes + tail)
        else:
            inode.layout = DataLayout.FLAT_PLAIN
            inode.offset = self.put(inode.head_bytes)
        whole = inode.size - tail if inline else align_up(inode.size)
        if whole:
            self._leave_gap(self.end)
            inode.data_offset = align_up(self.end)
            self.end = inode.data_offset + whole

    def _in_one_block(self, size: int) -> int:
        offset = self._from_gap(size)
        if offset is not None:
            return offset
        if -self.end % BLOCK_BYTES < size and self.end % BLOCK_BYTES:
            self._leave_gap(self.end)
            self.end = align_up(self.end)
        return self.append(size)

    def _leave_gap(self, offset: int) -> None:
        room = -offset % BLOCK_BYTES // NID_BYTES
        if room:
            self._gaps[room].append(offset // BLOCK_BYTES * BLOCK_BYTES)

    def _from_gap(self, size: int) -> int | None:
        if size >= BLOCK_BYTES:
            return None
        needed = align_up(size, NID_BYTES) // NID_BYTES
        for room in range(needed, _SLOTS):
            if self._gaps[room]:
                offset = self._gaps[room].popleft() + BLOCK_BYTES - room * NID_BYTES
                self._leave_gap(offset + needed * NID_BYTES)
                return offset
        return None

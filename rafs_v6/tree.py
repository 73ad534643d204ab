"""A tree of files, as a layer or a whole image holds it: what to build an image from.

A node is an inode, and the same node under several names is a hard link. Trees are built once and
then only read; merging layers makes new directories and shares everything else.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, TypeAlias

from rafs_v6 import ImageError

Data: TypeAlias = Callable[[], BinaryIO]
"""Opens the content of a regular file, at its start; may be called more than once."""


@dataclass(slots=True, eq=False)
class Node:
    """One inode. `mode` has the file type; `size` and `data` are a regular file's, `target` a
    symlink's, `device` (major, minor) a device node's, `children` a directory's."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    mtime_nsec: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    size: int = 0
    data: Data | None = None
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    def entries(self) -> list[tuple[bytes, Node]]:
        """Names and nodes of a directory in the order of EROFS: by raw bytes."""
        return sorted(self.children.items())

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """The content of a regular file, `chunk_bytes` at a time.

        Raises ImageError when there is less or more of it than `size` says.
        """
        if self.data is None or not self.size:
            return
        with self.data() as data:
            for start in range(0, self.size, chunk_bytes):
                wanted = min(chunk_bytes, self.size - start)
                chunk = data.read(wanted)
                if len(chunk) < wanted:
                    raise ImageError(f"ends at {start + len(chunk)} of {self.size} bytes")
                yield chunk
            if data.read(1):
                raise ImageError(f"goes on after its {self.size} bytes")


class Group(NamedTuple):
    """A directory, its path (no leading slash, empty for the root) and its sorted entries."""

    path: bytes
    directory: Node
    entries: list[tuple[bytes, Node]]

    def path_of(self, name: bytes) -> bytes:
        return self.path + b"/" + name if self.path else name


def groups(root: Node) -> Iterator[Group]:
    """Every directory before those inside it, in order of names: how RAFS lays out an image.

    Not recursive: a hostile tree may be deeper than Python's stack.
    """
    todo = [(b"", root)]
    while todo:
        group = Group(*(top := todo.pop()), top[1].entries())
        yield group
        todo += [
            (group.path_of(name), node)
            for name, node in reversed(group.entries)
            if node.is_directory
        ]


def lookup(root: Node, path: bytes) -> Node | None:
    """The node at a slash-separated path; symlinks are not followed."""
    node: Node | None = root
    for name in filter(None, path.split(b"/")):
        node = node.children.get(name) if node else None
    return node


def read_directory(path: str | os.PathLike[str]) -> Node:
    """The tree below a directory of this machine, mount points included.

    Contents are read later, when the image is built. Raises OSError, and ImageError when `path`
    is no directory or something vanished.
    """
    links: dict[tuple[int, int], Node] = {}
    top = os.fsencode(path)
    root = _read_node(top, os.stat(top), links)
    if not root.is_directory:
        raise ImageError(f"{os.fsdecode(top)}: not a directory")
    todo = [(top, root)]
    while todo:
        where, directory = todo.pop()
        with os.scandir(where) as found:
            for entry in found:
                status = entry.stat(follow_symlinks=False)
                node = _read_node(entry.path, status, links)
                directory.children[entry.name] = node
                if node.is_directory:
                    todo.append((entry.path, node))
    return root


def _read_node(path: bytes, status: os.stat_result, links: dict[tuple[int, int], Node]) -> Node:
    regular = stat.S_ISREG(status.st_mode)
    identity = (status.st_dev, status.st_ino)
    if regular and status.st_nlink > 1 and identity in links:
        return links[identity]
    device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    node = Node(
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime=status.st_mtime_ns // 10**9,
        mtime_nsec=status.st_mtime_ns % 10**9,
        xattrs=_read_xattrs(path),
        size=status.st_size if regular else 0,
        data=functools.partial(_open_regular, path) if regular else None,
        target=os.readlink(path) if stat.S_ISLNK(status.st_mode) else b"",
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if device else (0, 0),
    )
    if regular:
        links[identity] = node
    return node


def _open_regular(path: bytes) -> BinaryIO:
    # What was a file when the tree was read may be a fifo or a symlink by now: neither wait for
    # a writer nor follow.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags), "rb")


def _read_xattrs(path: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    return {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}

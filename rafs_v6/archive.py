"""A layer's tar becomes a tree: OCI image specification, layer.md.

The archive is hostile. Names are taken relative to the layer's root, whatever they say; a path
that runs through a symlink is followed inside the root, also one of the layers below, as
containerd does when it unpacks a layer onto them.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import re
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Self, cast

import zstandard

from rafs_v6 import ImageError
from rafs_v6.bootstrap import MAX_TARGET_BYTES
from rafs_v6.merge import hides
from rafs_v6.tree import Node

MAX_LAYER_BYTES = 1 << 38
MAX_ENTRIES = 1 << 22
MAX_READ_BYTES = 1 << 24
"""Most the tar reader gets at once: the largest chunk. Its headers must be smaller, too."""

_COPY_BYTES = 1 << 20
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4096
_MAX_SYMLINKS = 40
_XATTR_KEYWORD = "SCHILY.xattr."
_TIME = re.compile(r"(-?\d{1,15})(?:\.(\d{1,9})\d*)?")
_TYPES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
_DEVICES = frozenset({stat.S_IFCHR, stat.S_IFBLK})
_MAJORS, _MINORS = 1 << 12, 1 << 20
"""Device numbers the kernel has (include/linux/kdev_t.h)."""
_BROKEN = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    zstandard.ZstdError,
    gzip.BadGzipFile,
)
_UNREADABLE = (ValueError, OverflowError, IndexError, RecursionError)
"""What tarfile raises besides its own errors when a header's numbers make no sense."""


class _Reader:
    """A seekable file that refuses reads no honest archive causes.

    Python's tarfile reads extended headers whole, whatever size they claim, also a negative one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header claims a size of {size} bytes")
        return self._file.read(size)


class Archive:
    """A layer's tar, plain or compressed with gzip or zstd, opened for random access.

    A compressed one is unpacked into a temporary file first (of at most `limit_bytes`): the data
    of a tree is read in the order of its names, not in that of the archive. Trees are usable
    until `close`. Raises ImageError for a damaged archive.
    """

    def __init__(self, file: BinaryIO, limit_bytes: int = MAX_LAYER_BYTES) -> None:
        self._content = file
        self._resources = contextlib.ExitStack()
        file.seek(0)
        magic = file.read(4)
        file.seek(0)
        if magic[:2] == b"\x1f\x8b":
            self._unpack(cast(BinaryIO, gzip.GzipFile(fileobj=file)), limit_bytes)
        elif magic == b"\x28\xb5\x2f\xfd":
            self._unpack(
                zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True),
                limit_bytes,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the temporary file; the file given is the caller's."""
        self._resources.close()

    def _unpack(self, stream: BinaryIO, limit_bytes: int) -> None:
        with contextlib.ExitStack() as resources:
            spool = resources.enter_context(tempfile.TemporaryFile(prefix="fscached-layer-"))
            try:
                while data := stream.read(_COPY_BYTES):
                    if spool.tell() + len(data) > limit_bytes:
                        raise ImageError(f"layer archive unpacks to more than {limit_bytes} bytes")
                    spool.write(data)
            except _BROKEN as error:
                raise ImageError(f"layer archive does not unpack: {error}") from error
            self._content = cast(BinaryIO, spool)
            self._resources = resources.pop_all()

    def tree(self, below: Node | None = None) -> Node:
        """The layer as a tree, whiteouts still in it.

        `below` is the merged tree of the layers below: where this layer puts files into a
        directory it does not itself describe, and where its hard links may lead.
        """
        unpacking = _Unpacking(below)
        try:
            self._content.seek(0)
            tar = tarfile.TarFile(
                fileobj=cast(BinaryIO, _Reader(self._content)),
                encoding="utf-8",
                errors="surrogateescape",
            )
            for member in _members(tar):
                unpacking.add(tar, member)
            # tarfile takes whatever is no header for the end of the archive, and zstandard a
            # frame cut short for a whole one.
            self._content.seek(tar.offset)
            if self._content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("neither a header nor the end mark, cut short?")
        except ImageError:
            raise
        except (*_BROKEN, *_UNREADABLE) as error:
            at = self._content.tell()
            raise ImageError(f"layer archive is damaged at byte {at}: {error}") from error
        return unpacking.root


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    end = 0
    for _ in range(MAX_ENTRIES):
        member = tar.next()
        if member is None:
            return
        if member.size < 0 or tar.offset <= end:
            raise tarfile.ReadError(f"{member.name!r} has a size of {member.size} bytes")
        end = tar.offset
        _require_honest_map(tar, member)
        yield member
    raise tarfile.ReadError(f"more than {MAX_ENTRIES} entries")


def _require_honest_map(tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    pieces = cast("list[tuple[int, int]] | None", member.sparse)
    end = stored = 0
    for offset, size in pieces or ():
        if not end <= offset <= offset + size <= member.size:
            raise tarfile.ReadError(f"{member.name!r} has impossible holes")
        end, stored = offset + size, stored + size
    if stored > tar.offset - member.offset_data:
        raise tarfile.ReadError(f"{member.name!r} has less data than its map of holes says")


class _Unpacking:
    def __init__(self, below: Node | None) -> None:
        self._below = below
        self.root = _implied(below)

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = _parts(member.name)
        if not path:
            if not member.isdir():
                raise ImageError("layer archive: the root is not a directory")
            self.root = _node(tar, member, self.root)
            return
        parent, _ = self._directory(path[:-1])
        if member.islnk():
            parent.children[path[-1]] = self._linked(member)
        else:
            parent.children[path[-1]] = _node(tar, member, parent.children.get(path[-1]))

    def _linked(self, member: tarfile.TarInfo) -> Node:
        path = _parts(member.linkname)
        if path:
            above, below = self._directory(path[:-1])
            node = above.children.get(path[-1])
            if node is None and below is not None:
                node = below.children.get(path[-1])
            if node is not None and not node.is_directory:
                return node
        raise ImageError(
            f"layer archive: {member.name!r} is a hard link to {member.linkname!r}, "
            "which is no file in this layer or below"
        )

    def _directory(self, path: list[bytes]) -> tuple[Node, Node | None]:
        """The directory at a path: in this layer, created if need be, and in those below."""
        way: list[tuple[Node, Node | None]] = [(self.root, self._below)]
        todo, symlinks = path[::-1], 0
        while todo:
            name = todo.pop()
            above, below = way[-1]
            if name == b"..":
                del way[max(len(way) - 1, 1) :]
                continue
            under = below.children.get(name) if below and not hides(above, name) else None
            node = above.children.get(name) or under
            if node is not None and node.is_symlink:
                symlinks += 1
                if symlinks > _MAX_SYMLINKS:
                    raise ImageError(f"layer archive: {b'/'.join(path)!r}: symlinks in a circle")
                if node.target.startswith(b"/"):
                    del way[1:]
                todo += [part for part in node.target.split(b"/")[::-1] if part not in (b"", b".")]
                continue
            step = above.children.setdefault(name, _implied(under))
            if not step.is_directory:
                raise ImageError(f"layer archive: {b'/'.join(path)!r}: {name!r} is no directory")
            way.append((step, under if under and under.is_directory else None))
        return way[-1]


def _implied(below: Node | None) -> Node:
    """A directory the layer does not describe: like the one below, or else root's with 0755."""
    if below is None or not below.is_directory:
        return Node(stat.S_IFDIR | 0o755)
    return Node(below.mode, below.uid, below.gid, below.mtime, below.mtime_nsec, dict(below.xattrs))


def _parts(name: str) -> list[bytes]:
    path = _raw(name)
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            parts = parts[:-1]
        elif part not in (b"", b"."):
            parts.append(part)
    longest = max(map(len, parts), default=0)
    if longest > _MAX_NAME_BYTES or len(path) > _MAX_PATH_BYTES or b"\0" in path:
        raise ImageError(f"layer archive: name {name[:64]!r}… is too long or holds a NUL")
    return parts


def _node(tar: tarfile.TarFile, member: tarfile.TarInfo, replaced: Node | None) -> Node:
    if member.type not in _TYPES:
        raise ImageError(f"layer archive: {member.name!r}: unknown entry type {member.type!r}")
    kind = _TYPES[member.type]
    target = _raw(member.linkname) if member.issym() else b""
    if member.issym() and not 0 < len(target) <= MAX_TARGET_BYTES:
        raise ImageError(
            f"layer archive: symlink {member.name!r}: target of {len(target)} bytes "
            f"(1 to {MAX_TARGET_BYTES} can be)"
        )
    if not (0 <= member.uid < 1 << 32 and 0 <= member.gid < 1 << 32):
        raise ImageError(f"layer archive: {member.name!r}: owner {member.uid}:{member.gid}")
    device = (member.devmajor, member.devminor) if kind in _DEVICES else (0, 0)
    if not (0 <= device[0] < _MAJORS and 0 <= device[1] < _MINORS):
        raise ImageError(f"layer archive: {member.name!r}: device {device[0]}:{device[1]}")
    mtime, mtime_nsec = _time(member)
    regular = kind == stat.S_IFREG
    return Node(
        mode=kind | stat.S_IMODE(member.mode),
        uid=member.uid,
        gid=member.gid,
        mtime=mtime,
        mtime_nsec=mtime_nsec,
        xattrs={
            _raw(keyword.removeprefix(_XATTR_KEYWORD)): _raw(value)
            for keyword, value in member.pax_headers.items()
            if keyword.startswith(_XATTR_KEYWORD)
        },
        size=member.size if regular else 0,
        data=functools.partial(_content, tar, member) if regular else None,
        target=target,
        device=device,
        children=replaced.children if member.isdir() and replaced is not None else {},
    )


def _raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _time(member: tarfile.TarInfo) -> tuple[int, int]:
    """Seconds and nanoseconds; tarfile's own value is a float and rounds."""
    text = member.pax_headers.get("mtime") or str(int(member.mtime))
    match = _TIME.fullmatch(text)
    if not match:
        raise ImageError(f"layer archive: {member.name!r}: unreadable time {text[:40]!r}")
    seconds, fraction = int(match[1]), int((match[2] or "").ljust(9, "0"))
    if text.startswith("-") and fraction:
        return seconds - 1, 10**9 - fraction
    return seconds, fraction


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    return cast(BinaryIO, tar.extractfile(member))

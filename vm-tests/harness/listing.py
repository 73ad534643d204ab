"""What a tree consists of, one JSON object per line: the same program lists source and mount.

`python3 -m harness.listing DIR` lists DIR; with `--compare EXPECTED` it says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NotRequired, TypedDict


class Entry(TypedDict):
    """One of a tree. `mode`: permission bits; `mtime`: whole seconds; `xattrs`: hexadecimal. Files
    have `size` and `sha256`, symlinks `target`, devices `rdev`."""

    path: str
    type: str
    mode: int
    uid: int
    gid: int
    mtime: int
    xattrs: dict[str, str]
    size: NotRequired[int]
    sha256: NotRequired[str]
    target: NotRequired[str]
    rdev: NotRequired[tuple[int, int]]


TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}

READ_BYTES = 1 << 20


def entries(root: str) -> Iterator[Entry]:
    """Every entry below `root` and `root` itself (path `.`), in byte order of the paths.

    Names that are not UTF-8 keep their bytes as lone surrogates (PEP 383). Files are hashed on
    all processors.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(partial(entry, root), [".", *_below(root, "")])


def _below(root: str, directory: str) -> Iterator[str]:
    with os.scandir(os.path.join(root, directory)) as found:
        children = sorted(found, key=lambda child: os.fsencode(child.name))
    for child in children:
        path = os.path.join(directory, child.name)
        yield path
        if child.is_dir(follow_symlinks=False):
            yield from _below(root, path)


def entry(root: str, path: str) -> Entry:
    """What is at one path."""
    full = os.path.join(root, path)
    status = os.lstat(full)
    kind = TYPES[stat.S_IFMT(status.st_mode)]
    listed: Entry = {
        "path": path,
        "type": kind,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime": int(status.st_mtime),
        "xattrs": _xattrs(full),
    }
    if kind == "file":
        listed |= {"size": status.st_size, "sha256": _sha256(full)}
    elif kind == "symlink":
        listed["target"] = os.readlink(full)
    elif kind in ("char", "block"):
        listed["rdev"] = os.major(status.st_rdev), os.minor(status.st_rdev)
    return listed


def _xattrs(path: str) -> dict[str, str]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def dump(root: str) -> str:
    """The listing of `root` as JSON lines, ASCII only."""
    return "".join(json.dumps(listed) + "\n" for listed in entries(root))


def differences(expected: str, found: str) -> list[str]:
    """Every way in which two listings differ, one sentence each."""
    wanted, given = _by_path(expected), _by_path(found)
    lines = [f"{path!r} is missing" for path in wanted.keys() - given.keys()]
    lines += [f"{path!r} should not be there" for path in given.keys() - wanted.keys()]
    for path in wanted.keys() & given.keys():
        for key in wanted[path].keys() | given[path].keys():
            want, have = wanted[path].get(key), given[path].get(key)
            if want != have:
                lines.append(f"{path!r}: {key} is {have}, should be {want}")
    return sorted(lines)


def _by_path(listing: str) -> dict[str, dict[str, object]]:
    return {listed["path"]: listed for listed in map(json.loads, listing.splitlines())}


if __name__ == "__main__":
    sys.stdout.write(dump(sys.argv[1]))

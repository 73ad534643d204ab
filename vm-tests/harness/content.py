"""Real image content: a Debian root file system with Python, as three layers with whiteouts."""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness import command, debian, store

PYTHON_PACKAGES = ("python3", "python3-requests", "python3-yaml", "python3-pygments")

# OCI image specification, layer.md, "Whiteouts".
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"

SCRIPT = """\
import hashlib, json, platform, sqlite3, yaml
print(json.dumps({"python": platform.python_version(), "yaml": yaml.safe_load("answer: 42"),
                  "sha256": hashlib.sha256(b"fscached").hexdigest()}))
"""


@dataclass(frozen=True)
class Content:
    """`layers` are directories, lowest first, with OCI whiteouts; `tree` is what they amount to.

    `tree`/app/main.py is a small script for its Python.
    """

    layers: tuple[Path, ...]
    tree: Path


def content() -> Content:
    """The content, kept. At least 150 MB and 5,000 files; made in about a minute."""
    name = store.key(debian.RELEASE, PYTHON_PACKAGES, Path(__file__).read_bytes())
    kept = store.kept("content", name, _build, keep=2)
    return Content(tuple(kept / f"layer{number}" for number in (1, 2, 3)), kept / "tree")


def _build(directory: Path) -> None:
    base, python, tree = (directory / name for name in ("layer1", "python", "tree"))
    with ThreadPoolExecutor() as pool:
        made = pool.submit(debian.make, base, ())
        debian.make(python, PYTHON_PACKAGES)
        made.result()
    for stage in (base, python):
        _settle(stage)
    command.run(["cp", "-a", python, tree])
    opaque = _change(tree)
    _settle(tree)
    difference(base, python, directory / "layer2")
    difference(python, tree, directory / "layer3", opaque)
    shutil.rmtree(python)


def _settle(tree: Path) -> None:
    """Cut times to whole seconds: the header of a layer's archive holds no more."""
    for path in [tree, *tree.rglob("*")]:
        seconds = int(path.lstat().st_mtime)
        os.utime(path, (seconds, seconds), follow_symlinks=False)


# -- layer 3: what an application's image does to a distribution's -------------------------------


def _change(tree: Path) -> set[str]:
    """Remove, replace and add; returns the directories that are replaced as a whole."""
    shutil.rmtree(tree / "usr/share/doc/apt")
    for removed in ("etc/motd", "usr/share/common-licenses/GPL-3", "usr/bin/nl"):
        (tree / removed).unlink()
    shutil.rmtree(tree / "etc/apt")
    _write(tree / "etc/apt/apt.conf", b'APT::Install-Recommends "false";\n')
    (tree / "etc/issue").unlink()
    _write(tree / "etc/issue/was-a-file", b"now a directory\n")
    shutil.rmtree(tree / "usr/share/base-files")
    _write(tree / "usr/share/base-files", b"was a directory\n")
    (tree / "usr/bin/tac").chmod(0o4755)
    _write(tree / "app/main.py", SCRIPT.encode(), mode=0o755)
    _names(tree / "app/names")
    _inodes(tree / "app/inodes")
    _sizes(tree / "app/sizes")
    return {"etc/apt"}


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _names(directory: Path) -> None:
    """Names that programs stumble over, and a directory of many blocks."""
    odd = [
        b"with space",
        b"new\nline",
        b"back\\slash",
        b"quote'\"",
        "žluť-猫".encode(),
        b"\xff\xfe",
    ]
    for name in (*odd, b"-rf", b"n" * 255, b"wh.harmless"):
        _write(directory / os.fsdecode(name), name)
    for number in range(1000):
        _write(directory / "many" / f"a-rather-long-file-name-{number:04}", b"%d\n" % number)


def _inodes(directory: Path) -> None:
    """Every kind of inode, and the ends of their fields' ranges."""
    _write(directory / "one", b"one inode, three names\n")
    os.link(directory / "one", directory / "two")
    os.link(directory / "one", directory.parent / "three")
    os.mkfifo(directory / "fifo", 0o600)
    os.mknod(directory / "char", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(directory / "block", stat.S_IFBLK | 0o660, os.makedev(259, 300000))
    os.symlink("/nowhere/at/all", directory / "dangling")
    os.symlink("../" * 1300 + "etc/passwd", directory / "long-symlink")
    (directory / "sticky").mkdir()
    (directory / "sticky").chmod(0o1777)
    _write(directory / "owned", b"by somebody beyond 16 bits\n", mode=0o640)
    os.chown(directory / "owned", 1_000_000, 4_000_000_000)
    for name, seconds in (("epoch", 0), ("after-2038", 1 << 32)):
        _write(directory / name, name.encode())
        os.utime(directory / name, (seconds, seconds))
    _write(directory / "attributes", b"extended\n")
    os.setxattr(directory / "attributes", "user.note", b"ano")
    os.setxattr(directory / "attributes", "user.empty", b"")
    os.setxattr(directory / "attributes", "user.long", bytes(range(256)) * 8)
    os.setxattr(directory / "attributes", "trusted.fscached", b"\0\1\2")
    os.setxattr(directory / "sticky", "user.note", b"on a directory")
    # include/uapi/linux/capability.h: VFS_CAP_REVISION_2, effective; CAP_NET_RAW permitted.
    capability = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    _write(directory / "capable", b"#!/bin/true\n", mode=0o755)
    os.setxattr(directory / "capable", "security.capability", capability)


def _sizes(directory: Path) -> None:
    """Sizes around the block and the chunk, data that compresses not at all, fully, and a hole."""
    noise = _noise(9 << 20)
    for size in (0, 1, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, len(noise)):
        _write(directory / f"noise-{size}", noise[:size])
    _write(directory / "zeros", bytes(5 << 20))
    with (directory / "sparse").open("wb") as sparse:
        sparse.seek(3 << 20)
        sparse.write(b"the end\n")


def _noise(size: int) -> bytes:
    """The same incompressible bytes every time."""
    return hashlib.shake_128(b"fscached").digest(size)


# -- trees to layers ------------------------------------------------------------------------------


def difference(lower: Path, upper: Path, layer: Path, opaque: Set[str] = frozenset()) -> None:
    """Make the directory `layer` that turns the tree `lower` into `upper`, with OCI whiteouts.

    Directories in `opaque` hide what is below them and come whole.
    """
    before, after = paths(lower), paths(upper)
    changed = {name for name in after if _within(name, opaque) or _differs(lower, upper, name)}
    changed |= _linked(upper, after, changed)
    gone = _topmost(set(before) - set(after), upper, opaque)
    touched = changed | {name for path in (*changed, *gone) for name in _parents(path)}
    _copy(upper, layer, [name for name in after if name in touched])
    for name in gone:
        (layer / name).with_name(WHITEOUT + Path(name).name).touch(0o644)
    for name in opaque:
        (layer / name / OPAQUE).touch(0o644)
    for name in {str(Path(path).parent) for path in gone} | set(opaque):
        status = (upper / name).stat()
        os.utime(layer / name, ns=(status.st_atime_ns, status.st_mtime_ns))


def paths(tree: Path) -> list[str]:
    """Every path in `tree`, relative, parents first; the root is `.`."""
    found = []
    for directory, below, files in os.walk(tree):
        top = os.path.relpath(directory, tree)
        found += [os.path.normpath(os.path.join(top, name)) for name in (*below, *files)]
    return [".", *sorted(found)]


def _parents(name: str) -> list[str]:
    return [str(parent) for parent in Path(name).parents]


def _within(name: str, directories: Set[str]) -> bool:
    return not directories.isdisjoint([name, *_parents(name)])


def _differs(lower: Path, upper: Path, name: str) -> bool:
    one, other = lower / name, upper / name
    if not os.path.lexists(one) or _metadata(one) != _metadata(other):
        return True
    regular = stat.S_ISREG(other.lstat().st_mode)
    return regular and not filecmp.cmp(one, other, shallow=False)


def _metadata(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    identity = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev)
    names = sorted(os.listxattr(path, follow_symlinks=False))
    xattrs = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
    target = os.readlink(path) if path.is_symlink() else None
    # A directory's size and link count are the file system's business.
    shape = None if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_nlink)
    return (*identity, xattrs, target, shape)


def _linked(tree: Path, names: list[str], changed: Set[str]) -> set[str]:
    """All names of the files of which one name is in `changed`: one alone would lose the link."""
    inodes = {name: (tree / name).lstat().st_ino for name in names}
    wanted = {inodes[name] for name in changed}
    return {name for name, inode in inodes.items() if inode in wanted}


def _topmost(gone: Set[str], upper: Path, opaque: Set[str]) -> list[str]:
    """The paths that need a whiteout: their directory is still one, and hides nothing itself."""
    return [
        name
        for name in sorted(gone)
        if stat.S_ISDIR(_mode((upper / name).parent)) and not _within(name, opaque)
    ]


def _mode(path: Path) -> int:
    return path.lstat().st_mode if os.path.lexists(path) else 0


def _copy(source: Path, target: Path, names: list[str]) -> None:
    """Copy these entries as they are: owners, modes, times, xattrs, hard links, holes, devices."""
    target.mkdir()
    with tempfile.NamedTemporaryFile() as listing:
        listing.write(b"".join(os.fsencode(name) + b"\0" for name in names))
        listing.flush()
        pipeline = (
            'tar -C "$1" --format=pax --sparse --xattrs --xattrs-include="*" --numeric-owner '
            '--no-recursion -c --null --verbatim-files-from -T "$2" '
            '| tar -C "$3" --xattrs --xattrs-include="*" --numeric-owner '
            "--delay-directory-restore -px"
        )
        bash = ["bash", "-o", "pipefail", "-c", pipeline, "bash"]
        command.run([*bash, source, listing.name, target])

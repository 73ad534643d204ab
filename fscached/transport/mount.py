"""EROFS mounts whose bytes the kernel asks for, and what is mounted already.

Over fscache an image is mounted by names, over plain files (fanotify) by its bootstrap's path.

Through the file-descriptor mount API: its context log says why EROFS refused, which mount(2) does
not. Mounting makes the kernel ask for the image's superblock and root directory, so whoever mounts
waits for the daemon: never call it from the daemon's event loop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cdefs import mount
from fscached.failure import Failure
from fscached.transport import ObjectKey
from fscached.transport.cache_file import closing

NAME_BYTES_MAX = 200
"""Of a fsid or domain: with `erofs,` and a prefix it still is one file name of the cache."""

FSCACHE = Path("/proc/fs/fscache")

READ_AHEAD_KIB = 512
"""Of an image that is mounted from files. With the kernel's 128 KiB a sequential reader asks four
times as often where there are marks, and reads 20 % slower where there are none; 1 MiB is slower
than both (6.18, ext4 below: docs/decisions/fanotify.md)."""

_LOG_LINES_MAX = 16
_VOLUME_PREFIX = "erofs,"
_HEXADECIMAL = re.compile(r"([0-9a-f]{2})*")
_MOUNTINFO = Path("/proc/self/mountinfo")
_READ_AHEADS = Path("/sys/class/bdi")
_READ_AHEADS_NAME = "erofs-*/read_ahead_kb"
_BOOTSTRAP = re.compile(r"/.*/images/([0-9a-f]{64})/image\.boot")
"""A bootstrap as `fscached.store` keeps it."""
_NOT_SUPPORTED = re.compile(r"option not supported|Unknown parameter '(fsid|domain_id)'")

_TYPE_REMEDIES = {
    errno.ENODEV: "load the erofs module, or boot a kernel that has it",
    errno.EPERM: "mount as root",
}
_CREATE_REMEDIES = {
    errno.EBUSY: "this fsid is mounted already: bind-mount the first mount point",
    errno.EEXIST: "this fsid is mounted already in its domain: bind-mount the first mount point",
    errno.ENOENT: "the daemon does not know this image: register it first",
    errno.ENOBUFS: "nobody serves the cache, or its file system is full: see `fscached doctor`",
    errno.EIO: "the image could not be read: see the daemon's log",
    errno.ENOTBLK: "this kernel's erofs mounts no plain files: see `fscached doctor`",
    errno.EINVAL: "not a RAFS v6 image this kernel can mount: see the kernel's log",
    errno.EPERM: "mount as root",
}
_TARGET_REMEDIES = {
    errno.ENOENT: "create the directory first",
    errno.ENOTDIR: "mount on a directory",
    errno.EBUSY: "something in that directory is in use: stop it, or unmount lazily",
    errno.EINVAL: "nothing is mounted there",
    errno.EPERM: "mount as root",
}


class MountError(Failure):
    """A mount or unmount the kernel refused: what it said (with its errno) and what to do."""

    def __init__(self, what: str, remedy: str, code: int) -> None:
        super().__init__(what, remedy)
        self.errno = code


class MountPoint(NamedTuple):
    """One line of mountinfo. `device` is major:minor: the same for all mounts of a superblock."""

    device: str
    target: str
    fs_type: str
    options: tuple[tuple[str, str], ...]
    """Of the superblock, in order, repeated ones too."""
    source: str = ""
    follows: bool = False
    """It is a slave of another namespace's: what is unmounted here stays mounted there."""


class Mount(NamedTuple):
    """An image that is mounted; bind mounts of it have the same `device`."""

    fsid: str
    domain_id: str
    """Empty: its blobs are shared with nobody, or it is mounted from files."""
    target: str
    device: str
    bootstrap: str = ""
    """The file it is mounted from; empty over fscache."""

    @property
    def key(self) -> ObjectKey:
        """Its bootstrap's."""
        return ObjectKey(self.domain_id or self.fsid, self.fsid)


def mount_fsid(target: str, fsid: str, domain_id: str = "") -> None:
    """Mount the image `fsid` read-only on the directory `target` (absolute).

    Images of one domain share the cache files of blobs they have in common; an empty domain is
    none. Blocks until the daemon has answered. Raises MountError.
    """
    _check_name("fsid", fsid)
    if domain_id:
        _check_name("domain_id", domain_id)
    _check_target(target)
    names = [("domain_id", domain_id)] if domain_id else []
    _mount(f"mounting {fsid} on {target}", [*names, ("fsid", fsid)], target)


def mount_files(
    target: str, bootstrap: str, devices: Sequence[str], read_aheads: Path = _READ_AHEADS
) -> None:
    """Mount the image whose bootstrap is a file, and whose blobs are files in the order of its
    device table, read-only on the directory `target` (absolute).

    Where the kernel can (`directio`), no page of a blob is in memory twice. Raises MountError.
    """
    _check_target(target)
    before = set(read_aheads.glob(_READ_AHEADS_NAME))
    files = [("device", path) for path in devices]
    options = [("source", bootstrap), *files]
    _mount(f"mounting {bootstrap} on {target}", options, target, wishes=["directio"])
    # Nothing tells which of them is whose (mm/backing-dev.c numbers them): all that are new.
    for read_ahead in set(read_aheads.glob(_READ_AHEADS_NAME)) - before:
        with contextlib.suppress(OSError):
            read_ahead.write_text(str(READ_AHEAD_KIB))


def _mount(
    what: str, options: Sequence[tuple[str, str]], target: str, wishes: Sequence[str] = ()
) -> None:
    """Mount with these options, and with those of the `wishes` that this kernel knows."""
    with _refused(what, _TYPE_REMEDIES), closing(mount.fsopen("erofs")) as context:
        with _refused(what, _CREATE_REMEDIES, context):
            for key, value in options:
                mount.fsconfig_set_string(context, key, value)
            mount.fsconfig_set_flag(context, "ro")
            for wish in wishes:
                try:
                    mount.fsconfig_set_flag(context, wish)
                except OSError:
                    _context_log(context)  # is not why something else fails
            mount.fsconfig_create(context)
            mounted = mount.fsmount(context)
        with closing(mounted), _refused(what, _TARGET_REMEDIES):
            mount.move_mount(mounted, target)


def bind(source: str, target: str) -> None:
    """Make the mount at `source` appear at the directory `target` too. Raises MountError."""
    _check_target(target)
    what = f"binding {source} to {target}"
    with _refused(what, _TARGET_REMEDIES), closing(mount.open_tree_clone(source)) as tree:
        mount.move_mount(tree, target)


def unmount(target: str, lazy: bool = False) -> None:
    """Unmount what was mounted last on `target`; `lazy` even while it is in use.

    Raises MountError.
    """
    with _refused(f"unmounting {target}", _TARGET_REMEDIES):
        mount.umount(target, detach=lazy)


def mounted(mountinfo: Path = _MOUNTINFO) -> list[Mount]:
    """All images that are mounted in this mount namespace, the oldest first."""
    found = []
    for point in mount_points(mountinfo):
        options = dict(point.options)
        bootstrap = _BOOTSTRAP.fullmatch(point.source)
        if not is_image(point):
            continue
        if bootstrap is not None:
            found.append(Mount(bootstrap[1], "", point.target, point.device, point.source))
        else:
            domain_id = options.get("domain_id", "")
            found.append(Mount(options["fsid"], domain_id, point.target, point.device))
    return found


def is_image(point: MountPoint) -> bool:
    """Whether reads below it may wait for a daemon of ours."""
    if point.fs_type != "erofs":
        return False
    return any(key == "fsid" for key, _ in point.options) or bool(
        _BOOTSTRAP.fullmatch(point.source)
    )


def dead(fscache: Path = FSCACHE) -> frozenset[ObjectKey]:
    """Bootstraps and blobs that are mounted while the cache they were in is gone, as it is when
    the last holder of its device has ended.

    Every read of them fails until all these mounts are gone, another daemon or not; an image of
    the same domain that is mounted later and shares a blob gets the dead one (tried on 6.1 and
    6.12). In use (ACT) but quiescent (-): fs/fscache/cookie.c (6.12: fs/netfs/fscache_cookie.c).
    """
    volumes = {row[0]: row[6] for row in _rows(fscache / "volumes", 7)}
    return frozenset(
        ObjectKey(volume.removeprefix(_VOLUME_PREFIX), _cookie(row[7]))
        for row in _rows(fscache / "cookies", 8)
        if row[5] == "-" and row[3] != "0"
        if (volume := volumes.get(row[1], "")).startswith(_VOLUME_PREFIX)
    )


def _rows(table: Path, columns: int) -> list[list[str]]:
    """The lines of such a table that have all columns; none where there is no fscache."""
    try:
        lines = table.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = (line.split(maxsplit=columns - 1) for line in lines)
    return [row for row in rows if len(row) == columns]


def _cookie(definition: str) -> str:
    """Key and auxiliary data, hexadecimal."""
    key = definition.partition(",")[0]
    return bytes.fromhex(key).decode(errors="replace") if _HEXADECIMAL.fullmatch(key) else ""


def mount_points(mountinfo: Path = _MOUNTINFO) -> list[MountPoint]:
    """Everything that is mounted in this mount namespace, the oldest first."""
    # Not splitlines(): a carriage return in a path is not escaped.
    return [_mount_point(line) for line in mountinfo.read_bytes().split(b"\n") if line]


def is_apart(mountinfo: Path = _MOUNTINFO) -> bool:
    """Whether this mount namespace follows another one, as that of a service with ProtectSystem=
    does: then nothing can be unmounted for everybody (systemd.exec(5), MountFlags=)."""
    roots = [point for point in mount_points(mountinfo) if point.target == "/"]
    return bool(roots) and roots[-1].follows


def _mount_point(line: bytes) -> MountPoint:
    """proc_pid_mountinfo(5): six fields, any number of tags, a dash, three fields."""
    fields, _, rest = line.partition(b" - ")
    _id, _parent, device, _root, target, _options, *tags = fields.split(b" ")
    fs_type, source, options = rest.split(b" ", 2)
    pairs = (option.partition(b"=") for option in options.split(b","))
    return MountPoint(
        device.decode(),
        _unescaped(target),
        _unescaped(fs_type),
        tuple((_unescaped(key), _unescaped(value)) for key, _, value in pairs),
        _unescaped(source),
        any(tag.startswith(b"master:") for tag in tags),
    )


def _unescaped(field: bytes) -> str:
    """Blanks, backslashes and the like are written as three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 255]), field))


def name_fault(name: str) -> str:
    """What is wrong with a name that becomes part of a file name of the cache and ends a mount
    option; empty: nothing."""
    if not name or len(os.fsencode(name)) > NAME_BYTES_MAX:
        return f"must have 1 to {NAME_BYTES_MAX} bytes"
    if bad := set(name) & set("/,\0\n\\"):
        return f"must not contain {min(bad)!r}"
    return "must not be a directory's own name" if name in {".", ".."} else ""


def _check_name(what: str, name: str) -> None:
    if fault := name_fault(name):
        raise MountError(f"{what} {name[:NAME_BYTES_MAX]!r}", fault, errno.EINVAL)


def _check_target(target: str) -> None:
    if not os.path.isabs(target) or "\0" in target:
        raise MountError(f"mount point {target!r}", "give an absolute path", errno.EINVAL)


@contextlib.contextmanager
def _refused(what: str, remedies: dict[int, str], context: int | None = None) -> Iterator[None]:
    """Turn a refused system call into what a person needs."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        said = _context_log(context) if context is not None else []
        remedy = remedies.get(code, "see the kernel's log (dmesg)")
        if any(map(_NOT_SUPPORTED.search, said)):
            remedy = "this kernel's erofs has no on-demand mode: see scripts/kernel-modules"
        reason = "; ".join([str(error.strerror), *said])
        raise MountError(f"{what}: {reason}", remedy, code) from error


def _context_log(context: int) -> list[str]:
    """What the file system had to say about a configuration, e.g. `e erofs: ...`; ENODATA ends."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        while len(lines) < _LOG_LINES_MAX and (line := os.read(context, 4096)):
            lines.append(line.decode(errors="replace").strip()[2:])
    return lines

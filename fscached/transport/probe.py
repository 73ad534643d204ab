"""What must be there before the kernel can ask: each precondition, what was found, what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fscached.config import Cache, Fetch, Kernel
from fscached.transport import BLOCK_BYTES, descriptors, probe_files
from fscached.transport.host import (
    Finding,
    Host,
    descriptor_targets,
    has_module,
    judged,
    kernel_option,
    kernel_symbols,
    processes,
    text_of,
    this_host,
)
from fscached.transport.mount import MountPoint, is_image, mount_points

KERNEL_FIRST = (5, 19)
KERNEL_GONE = (7, 2)
"""EROFS over fscache came with 5.19 and was taken out of EROFS by 7.2."""

RESTORE_FIRST = (6, 8)
_CAP_SYS_ADMIN = 1 << 21
_CAP_SYS_RESOURCE = 1 << 24
_OBJECT = "anon_inode:[cachefiles]"
_REBUILD = "build the modules with on-demand mode: scripts/kernel-modules --install"
_BETTER_PLACE = "put the cache on a local ext4, xfs or btrfs: directory in [cache]"
_REFUSED_FILE_SYSTEMS = {
    *("tmpfs", "ramfs", "devtmpfs", "overlay", "9p", "virtiofs", "nfs", "nfs4", "cifs", "smb3"),
    *("ceph", "vfat", "exfat", "erofs", "squashfs", "iso9660"),
}
"""What may pass the trial of a file and still is no place for a cache: gone after a boot, on
another machine, on top of another file system, or read-only."""


class Holder(NamedTuple):
    """A process that keeps the device open, or (a copy of) an object's descriptor."""

    pid: int
    comm: str
    what: str


def choice(host: Host) -> tuple[str, str]:
    """The transport for this kernel, and why: cachefiles where it works, since what is resident
    costs nothing there; else fanotify if the kernel is new enough."""
    symbols = kernel_symbols(host)
    erofs_lacks = "erofs_register_sysfs" in symbols and "erofs_fscache_register_fs" not in symbols
    if "cachefiles_ondemand_copen" in symbols and not erofs_lacks and host.version < KERNEL_GONE:
        return "cachefiles", "the kernel has EROFS over fscache"
    if host.version >= probe_files.FIRST:
        return "fanotify", f"no EROFS over fscache here, and Linux {host.release} asks by fanotify"
    return "cachefiles", f"Linux {host.release} is too old for fanotify (6.14)"


def survey(
    host: Host,
    cache: Cache,
    kernel: Kernel,
    paths: Iterable[str] = (),
    fetch: Fetch = Fetch(),  # noqa: B008 - frozen
) -> list[Finding]:
    """Every precondition of the configured transport, the most basic first. `paths` are files the
    daemon needs besides its own program: its configuration, its state."""
    transport, reason = str(kernel.transport), "as configured"
    if transport == "auto":
        transport, reason = choice(host)
    points = mount_points(host.proc / "self/mountinfo")
    needs = _cachefiles(host) if transport == "cachefiles" else _files(host, cache)
    findings = [
        _privilege(host),
        Finding("transport", True, f"{transport}: {reason}"),
        *needs,
        _page_size(host),
        _descriptors(host, descriptors.needed(cache, kernel)),
        _hung_tasks(host, fetch),
        _own_files([*_program(), cache.directory, *paths], points),
    ]
    # A path inside an image must not even be looked at: it may wait for the daemon.
    if served_by(cache.directory, points) is None:
        findings += _cache_directory(host, cache, points)
    return findings


def _cachefiles(host: Host) -> Iterator[Finding]:
    symbols = kernel_symbols(host)
    yield _kernel(host)
    yield _device(host, symbols)
    yield _device_free(host)
    for module, base, mark in (
        ("cachefiles", "cachefiles_add_cache", "cachefiles_ondemand_copen"),
        ("erofs", "erofs_register_sysfs", "erofs_fscache_register_fs"),
    ):
        yield _ondemand(host, symbols, module, base, mark)
    yield _restore(host, symbols)


def _files(host: Host, cache: Cache) -> Iterator[Finding]:
    return probe_files.survey(host, _existing(cache.directory))


def explain_open_failure(error: OSError, host: Host | None = None) -> str:
    """Why `Cachefiles.open` or `bind` failed, and what to do: for people, one line."""
    host = host or this_host()
    reason, symbols = str(error.strerror), kernel_symbols(host)
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO if not host.device.exists():
            finding = _device(host, symbols)
            reason, remedy = finding.found, finding.remedy
        case errno.EBUSY:
            held = _held_by(holders(host))
            reason = f"busy: {held or 'no process that can be seen holds it'}"
            remedy = "stop that process"
            if not held:
                remedy = "end nydus-snapshotter, which keeps it, or look in other PID namespaces"
        case errno.EPERM | errno.EACCES:
            remedy = "run as root, outside of user namespaces (CAP_SYS_ADMIN)"
        case errno.EINVAL if "cachefiles_ondemand_copen" not in symbols:
            reason, remedy = f"{reason}: it has no on-demand mode", _REBUILD
        case errno.EOPNOTSUPP:
            remedy = _BETTER_PLACE
        case _:
            remedy = "see `fscached doctor` and the kernel's log (dmesg)"
    return f"{reason}; {remedy}"


def holders(host: Host) -> list[Holder]:
    """Who has the device or an object open, this process left out."""
    found = []
    for directory in processes(host):
        for target in sorted(descriptor_targets(directory)):
            if target in {str(host.device), _OBJECT}:
                what = "an object" if target == _OBJECT else "the device"
                found.append(Holder(int(directory.name), text_of(directory / "comm").strip(), what))
    return found


def has_objects(pid: int) -> bool:
    """Whether a process has an object of cachefiles open."""
    return _OBJECT in descriptor_targets(Path("/proc", str(pid)))


def served_by(path: str, points: list[MountPoint]) -> str | None:
    """The mount point of an EROFS over fscache that `path` lies on, also below an overlay; None:
    on nothing of the kind. Judged by names alone."""
    path = os.path.normpath(path)
    point = _mount_of(path, points)
    if point is None:
        return None
    if is_image(point):
        return point.target
    below = [layer for key, value in point.options for layer in _layers(point, key, value)]
    older = points[: points.index(point)]
    return next((target for layer in below if (target := served_by(layer, older))), None)


def _layers(point: MountPoint, key: str, value: str) -> list[str]:
    if point.fs_type != "overlay" or key not in {"lowerdir", "lowerdir+", "upperdir"}:
        return []
    return [layer for layer in value.split(":") if layer.startswith("/")]


def _mount_of(path: str, points: list[MountPoint]) -> MountPoint | None:
    """The last mount among those with the longest mount point above the path."""
    above = [
        point
        for point in points
        if path == point.target or path.startswith(point.target.rstrip("/") + "/")
    ]
    return max(reversed(above), key=lambda point: len(point.target), default=None)


def _privilege(host: Host) -> Finding:
    capable = _capable(host, _CAP_SYS_ADMIN)
    inherited = text_of(host.proc / "self/uid_map").split() == ["0", "0", "4294967295"]
    return judged(
        "privilege",
        capable and inherited,
        "CAP_SYS_ADMIN" if capable else "no CAP_SYS_ADMIN",
        "run as root, outside of user namespaces",
        "" if inherited else " of a user namespace",
    )


def _capable(host: Host, capability: int) -> bool:
    status = text_of(host.proc / "self/status")
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(match and int(match[1], 16) & capability)


def _kernel(host: Host) -> Finding:
    remedy = (
        "boot Linux 7.1 or older: 7.2 has no EROFS over fscache"
        if host.version >= KERNEL_GONE
        else "boot Linux 5.19 or newer (6.1 for shared domains)"
    )
    ok = KERNEL_FIRST <= host.version < KERNEL_GONE
    return judged("kernel", ok, host.release, remedy)


def _page_size(host: Host) -> Finding:
    return judged(
        "page-size",
        host.page_bytes == BLOCK_BYTES,
        f"{host.page_bytes} bytes",
        "boot a kernel with pages of 4 KiB: EROFS over fscache has no other blocks",
    )


def _device(host: Host, symbols: frozenset[str]) -> Finding:
    with contextlib.suppress(OSError):
        if stat.S_ISCHR(os.stat(host.device).st_mode):
            return Finding("device", True, str(host.device))
        return Finding(
            "device", False, f"{host.device} is no device", "remove it: modprobe makes the device"
        )
    if "cachefiles_add_cache" in symbols:
        remedy = "give this container the host's /dev: the module is loaded"
    elif has_module(host, "cachefiles"):
        remedy = "modprobe cachefiles"
    else:
        remedy = "boot a kernel with CONFIG_CACHEFILES"
    return Finding("device", False, f"no {host.device}", remedy)


def _device_free(host: Host) -> Finding:
    found = holders(host)
    strangers = [holder for holder in found if holder.comm != "fscached"]
    held = _held_by(strangers or found)
    remedy = "stop that process; it alone is asked by the kernel"
    return judged("device-free", not strangers, held or "nobody has it open", remedy)


def _held_by(found: list[Holder]) -> str:
    """`held by pid 812 (cachefilesd: the device)`, at most three of them."""
    names = dict.fromkeys(f"pid {pid} ({comm}: {what})" for pid, comm, what in found)
    return f"held by {', '.join(list(names)[:3])}" if names else ""


def _ondemand(host: Host, symbols: frozenset[str], module: str, base: str, mark: str) -> Finding:
    """The running kernel's symbols say it; before the module is loaded its configuration does,
    though not for modules that were rebuilt since."""
    name = f"{module}-ondemand"
    if mark in symbols:
        return Finding(name, True, f"{module} has on-demand mode")
    option = "CONFIG_CACHEFILES_ONDEMAND" if module == "cachefiles" else "CONFIG_EROFS_FS_ONDEMAND"
    if base in symbols:
        loaded = f"\n{module} " in "\n" + text_of(host.proc / "modules")
        remedy = _REBUILD if loaded else f"boot a kernel with {option}: it is built in"
        return Finding(name, False, f"{module} was built without on-demand mode", remedy)
    if not has_module(host, module):
        return Finding(name, False, f"this kernel has no {module}", f"boot one with {option}")
    built = kernel_option(host, option)
    told = "unknown" if built is None else "configured" if built else "off in the configuration"
    found = f"{module} is not loaded; on-demand mode is {told}"
    remedy = f"modprobe {module}, then look again"
    return Finding(name, False, found, remedy if built else f"{remedy}; or {_REBUILD}")


def _restore(host: Host, symbols: frozenset[str]) -> Finding:
    """Without it everything works until the daemon dies."""
    name, mark = "restore", "cachefiles_ondemand_restore"
    if mark in symbols:
        return Finding(name, True, "mounts outlive the daemon")
    if "cachefiles_add_cache" not in symbols and host.version >= RESTORE_FIRST:
        return Finding(name, True, "Linux has it since 6.8")
    known = "cachefiles_ondemand_copen" in symbols
    return Finding(
        name,
        False,
        "no restore: a daemon that dies takes its mounts along" if known else "not known yet",
        "boot Linux 6.8 or newer, or Debian's 6.1" if known else "load an on-demand cachefiles",
    )


def _descriptors(host: Host, wanted: int) -> Finding:
    """The daemon raises its limit as far as it may: to the kernel's own with CAP_SYS_RESOURCE."""
    limit = host.descriptors_max
    if _capable(host, _CAP_SYS_RESOURCE):
        limit = int(text_of(host.proc / "sys/fs/nr_open") or limit)
    remedy = f"set LimitNOFILE={wanted}, or a smaller [cache] open_objects"
    return judged("descriptors", limit >= wanted, f"at most {limit}", remedy)


def _hung_tasks(host: Host, fetch: Fetch) -> Finding:
    """Readers wait in the kernel, and so does whoever waits for the page that one of them reads. A
    task that does so without a break for too long has hung (kernel/hung_task.c)."""
    outlasts = fetch.on_source_outage == "wait"
    name, wait_s = "deadline_s", fetch.deadline_s
    if outlasts:
        name, wait_s = "outage_limit_s", fetch.outage_limit_s
    sysctl = host.proc / "sys/kernel"
    limit_s = int(text_of(sysctl / "hung_task_timeout_secs") or 0)
    panics = text_of(sysctl / "hung_task_panic").strip() not in {"", "0"}
    found = f"a read waits {wait_s:g} s at most"
    if limit_s:
        found += f", a task has hung after {limit_s} s" + (" and the kernel panics" * panics)
    remedy = (
        f"set {name} in [fetch] below {limit_s}, or raise the kernel's limit: "
        f"sysctl kernel.hung_task_timeout_secs={round(2 * wait_s)}"
    )
    return judged("hung-tasks", not limit_s or wait_s < limit_s, found, remedy)


def _own_files(paths: Iterable[str], points: list[MountPoint]) -> Finding:
    for path in paths:
        if target := served_by(path, points):
            return Finding(
                "own-files",
                False,
                f"{path} lies in the image mounted on {target}",
                "install fscached and its files elsewhere: it would wait for itself",
            )
    return Finding("own-files", True, "none lies in an image")


def _program() -> list[str]:
    """Interpreter, library and package of this process."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [sys.executable, os.path.dirname(os.__file__), package]


def _cache_directory(host: Host, cache: Cache, points: list[MountPoint]) -> Iterator[Finding]:
    """The daemon makes the directory; until then the one it will be in is looked at."""
    directory, name = cache.directory, "cache-directory"
    if not os.path.isabs(directory):
        yield Finding(name, False, directory, "give an absolute path: directory in [cache]")
        return
    directory = _existing(directory)
    if not os.path.isdir(directory):
        yield Finding(name, False, f"{directory} is no directory", "directory in [cache] needs one")
        return
    made = directory == cache.directory
    yield Finding(name, True, directory if made else f"{cache.directory}, to be made")
    yield _cache_file_system(host, directory, points)
    yield _space(host, directory, cache)


def _existing(directory: str) -> str:
    """The directory, or the nearest one above it that is there."""
    while not os.path.lexists(directory):
        directory = os.path.dirname(directory)
    return directory


def _cache_file_system(host: Host, directory: str, points: list[MountPoint]) -> Finding:
    point = _mount_of(os.path.realpath(directory), points)
    fs_type = point.fs_type if point else "unknown file system"
    lacks = ""
    if fs_type.startswith("fuse") or fs_type in _REFUSED_FILE_SYSTEMS:
        lacks = "cannot hold a cache"
    elif host.statvfs(directory).f_bsize > BLOCK_BYTES:
        lacks = f"blocks of {host.statvfs(directory).f_bsize} bytes, more than 4 KiB"
    else:
        lacks = host.trial(directory)
    found = f"{fs_type}: {lacks}" if lacks else fs_type
    return judged("cache-file-system", not lacks, found, _BETTER_PLACE)


def _space(host: Host, directory: str, cache: Cache) -> Finding:
    """Above the floors, in the kernel's own arithmetic (cachefiles_has_space)."""
    state = host.statvfs(directory)
    blocks = 100 * state.f_bavail // state.f_blocks if state.f_blocks else 0
    # btrfs counts no inodes: 0 of 0 are free, and the kernel's floor is 0 too.
    inodes = 100 * state.f_ffree // state.f_files if state.f_files else 100
    ok = blocks > cache.block_stop_percent and inodes > cache.file_stop_percent
    return judged(
        "free-space",
        ok,
        f"{blocks} % of blocks and {inodes} % of inodes are free",
        f"free some: at {cache.block_stop_percent} % of blocks or {cache.file_stop_percent} % of "
        "inodes reads of what is not cached fail",
    )

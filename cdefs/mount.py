"""<linux/mount.h> of Linux 6.1: the mount system calls that take and give descriptors.

Each function is the system call of its name; each raises OSError that names the call and what it
was asked. Descriptors returned are close-on-exec and belong to the caller. All of them may block
for as long as the file system does; the GIL is released meanwhile.
"""

from __future__ import annotations

import os

from cdefs._abi import ffi, lib

_HERE = -100  # AT_FDCWD


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ffi.errno, f"{what}: {os.strerror(ffi.errno)}")
    return result


def fsopen(fs_name: str) -> int:
    """A descriptor on which a file system of this type is configured. ENODEV: no such type."""
    return _checked(lib.sys_fsopen(fs_name.encode(), lib.FSOPEN_CLOEXEC), f"fsopen {fs_name}")


def fsconfig_set_string(fs_fd: int, key: str, value: str) -> None:
    """Set the mount option `key=value`."""
    result = lib.sys_fsconfig(fs_fd, lib.FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
    _checked(result, f"fsconfig {key}={value}")


def fsconfig_set_flag(fs_fd: int, key: str) -> None:
    """Set the mount option `key`."""
    result = lib.sys_fsconfig(fs_fd, lib.FSCONFIG_SET_FLAG, key.encode(), ffi.NULL, 0)
    _checked(result, f"fsconfig {key}")


def fsconfig_create(fs_fd: int) -> None:
    """Make the superblock: the file system reads its device here."""
    result = lib.sys_fsconfig(fs_fd, lib.FSCONFIG_CMD_CREATE, ffi.NULL, ffi.NULL, 0)
    _checked(result, "fsconfig create")


def fsmount(fs_fd: int) -> int:
    """A read-only mount of a created superblock, attached nowhere yet."""
    return _checked(lib.sys_fsmount(fs_fd, lib.FSMOUNT_CLOEXEC, lib.MOUNT_ATTR_RDONLY), "fsmount")


def open_tree_clone(path: str) -> int:
    """A copy of the mount at `path`, attached nowhere yet (the first half of a bind mount)."""
    flags = lib.OPEN_TREE_CLONE | lib.OPEN_TREE_CLOEXEC
    return _checked(lib.sys_open_tree(_HERE, os.fsencode(path), flags), f"open_tree {path}")


def move_mount(mount_fd: int, target: str) -> None:
    """Attach a mount that has a descriptor to the directory `target`."""
    result = lib.sys_move_mount(
        mount_fd, b"", _HERE, os.fsencode(target), lib.MOVE_MOUNT_F_EMPTY_PATH
    )
    _checked(result, f"move_mount to {target}")


def umount(target: str, *, detach: bool) -> None:
    """Take away the topmost mount at `target`, a symbolic link refused; `detach` also while it is
    in use: it disappears at once and ends with its last user."""
    flags = lib.UMOUNT_NOFOLLOW | (lib.MNT_DETACH if detach else 0)
    _checked(lib.sys_umount2(os.fsencode(target), flags), f"umount {target}")

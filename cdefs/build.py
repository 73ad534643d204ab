"""Builds `cdefs._abi` (cffi API mode): the compiler checks every declaration in `*.h`.

System calls go by number, so that a libc older than the kernel (glibc < 2.36 has no fsopen) does.
"""

from pathlib import Path

from cffi import FFI

SOURCE = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/cachefiles.h>
#include <linux/falloc.h>
#include <linux/fanotify.h>
#include <linux/mount.h>

/* Not in any kernel header user space gets; <sys/mount.h> and <linux/mount.h> exclude each other
   before glibc 2.37. */
#ifndef MNT_DETACH
#define MNT_DETACH 0x00000002
#define UMOUNT_NOFOLLOW 0x00000008
#endif

/* Linux 6.14; the kernel may be newer than the headers. */
#ifndef FAN_PRE_ACCESS
#define FAN_PRE_ACCESS 0x00100000
#define FAN_EVENT_INFO_TYPE_RANGE 6
#define FAN_ERRNO_SHIFT 24
struct fanotify_event_info_range {
    struct fanotify_event_info_header hdr;
    __u32 pad;
    __u64 offset;
    __u64 count;
};
#endif

static int sys_cachefiles_read_complete(int object_fd, unsigned long msg_id)
{ return ioctl(object_fd, CACHEFILES_IOC_READ_COMPLETE, msg_id); }

static int sys_fsopen(const char *fs_name, unsigned int flags)
{ return syscall(SYS_fsopen, fs_name, flags); }

static int sys_fsconfig(int fs_fd, unsigned int command, const char *key, const char *value,
                        int aux)
{ return syscall(SYS_fsconfig, fs_fd, command, key, value, aux); }

static int sys_fsmount(int fs_fd, unsigned int flags, unsigned int attributes)
{ return syscall(SYS_fsmount, fs_fd, flags, attributes); }

static int sys_open_tree(int directory_fd, const char *path, unsigned int flags)
{ return syscall(SYS_open_tree, directory_fd, path, flags); }

static int sys_move_mount(int from_fd, const char *from_path, int to_fd, const char *to_path,
                          unsigned int flags)
{ return syscall(SYS_move_mount, from_fd, from_path, to_fd, to_path, flags); }

static int sys_fanotify_init(unsigned int flags, unsigned int event_flags)
{ return syscall(SYS_fanotify_init, flags, event_flags); }

static int sys_fanotify_mark(int group_fd, unsigned int flags, uint64_t mask, int file_fd)
{ return syscall(SYS_fanotify_mark, group_fd, flags, mask, file_fd, NULL); }

static int sys_fallocate(int fd, int mode, int64_t offset, int64_t length)
{ return syscall(SYS_fallocate, fd, mode, offset, length); }

static int sys_unshare(int flags)
{ return syscall(SYS_unshare, flags); }

static int sys_umount2(const char *target, int flags)
{ return syscall(SYS_umount2, target, flags); }
"""


def text(name: str) -> str:
    """A file beside this one."""
    return Path(__file__).with_name(name).read_text()


ffibuilder = FFI()
for header in ("attend.h", "cachefiles.h", "fanotify.h", "files.h", "mount.h"):
    ffibuilder.cdef(text(header))
ffibuilder.set_source("cdefs._abi", SOURCE + text("attend.h") + text("attend.c"))

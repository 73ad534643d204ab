"""The machine as the doctor sees it: where to look, and what was found.

Looks, and changes nothing but a nameless file in the cache directory. Other processes are seen
through /proc/PID/fd and comm only: cmdline, maps and environ take the process's mmap lock, which a
reader that waits for us may hold.
"""

from __future__ import annotations

import contextlib
import gzip
import mmap
import os
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cdefs import fanotify
from fscached.transport import BLOCK_BYTES

_SYMBOLS = (
    "cachefiles_add_cache",
    "cachefiles_ondemand_copen",
    "cachefiles_ondemand_restore",
    "erofs_register_sysfs",
    "erofs_fscache_register_fs",
    "erofs_fileio_submit_bio",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One precondition. `remedy` is empty when it is met."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """Where to look, so that a test can show another machine."""

    release: str
    page_bytes: int
    descriptors_max: int
    trial: Callable[[str], str]
    """What a file in this directory cannot do that the kernel will want; empty: nothing."""
    group: Callable[[str], str]
    """Why reads of files in this directory cannot be asked for; empty: they can."""
    statvfs: Callable[[str], os.statvfs_result] = os.statvfs
    device: Path = Path("/dev/cachefiles")
    proc: Path = Path("/proc")
    boot: Path = Path("/boot")
    modules: Path = Path("/lib/modules")

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor of the running kernel; (0, 0) when its name has none."""
        match = re.match(r"(\d+)\.(\d+)", self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)


def this_host(device: str = "/dev/cachefiles") -> Host:
    """The machine this runs on."""
    return Host(
        release=os.uname().release,
        page_bytes=mmap.PAGESIZE,
        descriptors_max=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        trial=_trial,
        group=_group,
        device=Path(device),
    )


def judged(name: str, ok: bool, found: str, remedy: str, suffix: str = "") -> Finding:
    """A finding whose remedy counts only if it is not met."""
    return Finding(name, ok, found + suffix, "" if ok else remedy)


def _trial(directory: str) -> str:
    """Do with a nameless file what the kernel will do with its own."""
    step = "no nameless files with direct I/O (O_TMPFILE, O_DIRECT)"
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        try:
            step = "no user extended attributes"
            os.setxattr(fd, "user.fscached", b"1")
            step = "no direct writes of 4 KiB"
            os.ftruncate(fd, 256 * BLOCK_BYTES)
            with mmap.mmap(-1, BLOCK_BYTES) as block:
                os.pwrite(fd, block, 128 * BLOCK_BYTES)
            step = "holes in files are not told (SEEK_DATA)"
            if os.lseek(fd, 0, os.SEEK_DATA) == 128 * BLOCK_BYTES:
                return ""
        finally:
            os.close(fd)
    except OSError as error:
        return f"{step}: {error.strerror}"
    return step


def _group(directory: str) -> str:
    """Have a nameless file watched."""
    step = "no fanotify before content is read, or none with an unlimited queue"
    try:
        group_fd = fanotify.init()
        try:
            step = f"files in {directory} cannot be watched"
            with tempfile.TemporaryFile(dir=directory) as trial:
                fanotify.mark(group_fd, trial.fileno())
        finally:
            os.close(group_fd)
    except OSError as error:
        return f"{step}: {os.strerror(error.errno or 0)}"
    return ""


def kernel_symbols(host: Host) -> frozenset[str]:
    """Which of `_SYMBOLS` the running kernel has; names are told without privilege."""
    pattern = re.compile(rb" (" + "|".join(_SYMBOLS).encode() + rb")(?=[\t\n]|\Z)")
    with contextlib.suppress(OSError):
        text = (host.proc / "kallsyms").read_bytes()
        return frozenset(match.decode() for match in pattern.findall(text))
    return frozenset()


def kernel_option(host: Host, name: str) -> bool | None:
    """Whether the kernel was configured with it; None: its configuration cannot be found."""
    with contextlib.suppress(OSError, EOFError):
        return f"\n{name}=" in gzip.decompress((host.proc / "config.gz").read_bytes()).decode()
    text = text_of(host.boot / f"config-{host.release}")
    return f"\n{name}=" in text if text else None


def has_module(host: Host, module: str) -> bool:
    """Whether the kernel comes with it, as a file or built in."""
    lists = (host.modules / host.release / name for name in ("modules.dep", "modules.builtin"))
    return any(f"/{module}.ko" in text_of(path) for path in lists)


def processes(host: Host) -> Iterator[Path]:
    """/proc/PID of every process but this one."""
    for entry in sorted(host.proc.iterdir()):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            yield entry


def descriptor_targets(directory: Path) -> Iterator[str]:
    """What a process has open. Processes and descriptors come and go while one looks."""
    with contextlib.suppress(OSError):
        for descriptor in os.scandir(directory / "fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(descriptor.path)


def text_of(path: Path) -> str:
    """A file's text; empty when it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

"""This machine itself as a bench's environment, and nothing left on it afterwards.

`scripts/bench` has given the bench mounts and processes of its own: whatever ends it, they go too.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from harness import command

from environments import Options, host

CONTROL_GROUPS = Path("/sys/fs/cgroup")
GROUP = "fscached-bench"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class MemoryGroup:
    """A control group whose processes, page cache included, share a limit that comes and goes."""

    def __init__(self) -> None:
        unified = (CONTROL_GROUPS / "cgroup.controllers").exists()
        parent = CONTROL_GROUPS if unified else CONTROL_GROUPS / "memory"
        self._directory = parent / GROUP
        self._limit = "memory.max" if unified else "memory.limit_in_bytes"
        self._none = "max" if unified else "-1"
        if unified:
            (parent / "cgroup.subtree_control").write_text("+memory")
        self._directory.mkdir(exist_ok=True)

    @contextmanager
    def limited(self, limit_bytes: int) -> Iterator[None]:
        """With this limit until the end of the block."""
        limit = self._directory / self._limit
        limit.write_text(str(limit_bytes))
        try:
            yield
        finally:
            limit.write_text(self._none)

    def within(self, argv: Sequence[str | Path]) -> list[str | Path]:
        """The command to run `argv` in the group."""
        join = 'echo 0 > "$0" && exec "$@"'
        return ["sh", "-c", join, self._directory / "cgroup.procs", *argv]

    def remove(self) -> None:
        """All its processes have ended."""
        self._directory.rmdir()


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A group for this bench. Raises SystemExit where there are no control groups."""
    try:
        group = MemoryGroup()
    except OSError as error:
        raise SystemExit(f"{error}: control groups of memory are needed") from None
    try:
        yield group
    finally:
        with suppress(OSError):
            group.remove()


def described(options: Options) -> dict[str, object]:
    """What has to stand beside a figure from this machine."""
    return {
        **host(options),
        "kernel": platform.release(),
        "native": True,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


def drop_caches() -> None:
    """Pages, directory entries and inodes; what is not written yet is written first."""
    os.sync()
    DROP_CACHES.write_text("3")


@contextmanager
def processors(count: int) -> Iterator[None]:
    """Whatever is started in the block has so many processors."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def awake() -> Iterator[None]:
    """No processor idles: each has a loop of the lowest class, which gives way at once. An idle
    virtual processor has to be woken by its host, which costs more than what is measured."""
    loops = []
    try:
        for cpu in sorted(os.sched_getaffinity(0)):
            argv = ["taskset", "-c", str(cpu), "chrt", "-i", "0", "sh", "-c", "while :; do :; done"]
            loops.append(subprocess.Popen(argv))
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def known_as(name: str, scratch: Path) -> Iterator[None]:
    """A name for the loopback address, in the bench's own mounts."""
    hosts = Path("/etc/hosts")
    ours = scratch / "hosts"
    ours.write_text(f"{hosts.read_text()}\n127.0.0.1 {name}\n")
    command.run(["mount", "--bind", ours, hosts])
    try:
        yield
    finally:
        command.run(["umount", hosts])


@contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    """A disk that was made for guests."""
    directory.mkdir()
    command.run(["mount", "-o", "loop,ro", image, directory])
    try:
        yield directory
    finally:
        command.run(["umount", directory])

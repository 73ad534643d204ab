"""Kills the daemon below a supervisor again and again, run in a guest:
`python3 -m harness.killer ORDER`, an order in JSON; prints a report in JSON.

A kill counts only if the kernel had asked for something before it that nobody had answered after
it. cachefiles counts messages and answers itself; of fanotify the kernel tells which readers wait
for an answer (proc_pid_wchan(5)), and the daemon is stopped first, so that none comes meanwhile.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from harness.tracepoints import hits

if TYPE_CHECKING:
    from harness.guest import Guest

WAITING = "fanotify_"
"""Begins the name of the function they wait in; which it is depends on what was inlined."""

KEPT = b"receives states"
ANSWERS = {"read": "cread", "open": "copen"}
LOOK_S = 0.005
READ_BYTES = 1 << 16


Find = Callable[[int], int | None]
"""Finds the daemon after one that is dead, 0: any; None when nobody can wait for it."""


class Order(TypedDict):
    """`supervisor` is a process id. Ends after so many `kills` that count, or when none of the
    `readers` is left. Each daemon lives for a time drawn from one of `lives` (shortest, longest, in
    seconds), and until one of the messages `of` (read, open) is unanswered. `file` is a cache file
    to look at after each kill. `log` is nydus-snapshotter's where that is the supervisor: it has
    one successor taken over after the other, and loses one that dies before it is through with it,
    so nobody dies before it has left what it holds. `traced`: whether cachefiles is who asks, and
    counts it; of Debian's kernels one that has both ways to ask knows its tracepoints too."""

    supervisor: int
    readers: list[int]
    kills: int
    seed: int
    lives: list[tuple[float, float]]
    of: list[str]
    file: str
    log: str
    traced: bool


class Kill(TypedDict):
    """One that counted: what was unanswered, and what the cache file held at `at_s`."""

    at_s: float
    unanswered: dict[str, int]
    resident: list[tuple[int, int]]


class Report(TypedDict):
    """`idle` kills came when nothing was unanswered."""

    kills: list[Kill]
    idle: int


def have_killed(guest: Guest, order: Order, *, timeout_s: float) -> Report:
    """Carry out an order in a guest."""
    command = ["/usr/bin/python3", "-m", "harness.killer", json.dumps(order)]
    report: Report = json.loads(guest.run(command, cwd="/run", timeout_s=timeout_s).stdout)
    return report


def carry_out(order: Order) -> Report:
    rng = random.Random(order["seed"])
    report = Report(kills=[], idle=0)
    readers = order["readers"]
    find = _kept(order["log"], readers) if order["log"] else _child(order["supervisor"])
    daemon = 0
    while len(report["kills"]) < order["kills"] and (found := find(daemon)) is not None:
        daemon = found
        time.sleep(rng.uniform(*rng.choice(order["lives"])))
        if not _await_unanswered(order):
            break
        unanswered = _killed(daemon, order)
        resident = extents(order["file"])
        if any(count > 0 for count in unanswered.values()):
            kill = Kill(at_s=time.monotonic(), unanswered=unanswered, resident=resident)
            report["kills"].append(kill)
        else:
            report["idle"] += 1
    return report


def extents(path: str) -> list[tuple[int, int]]:
    """Where a file holds data: [start, end) in bytes, ascending; nothing when there is no file."""
    found = []
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return []
    try:
        end = 0
        size = os.fstat(fd).st_size
        while end < size:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, end))
    except OSError:  # ENXIO: no data behind `end`
        pass
    finally:
        os.close(fd)
    return found


def _await_unanswered(order: Order) -> bool:
    """Wait until something is; a moment later it may not be, which is for the counts to tell.
    False when nobody is left who could ask."""
    while _alive(order["readers"]):
        if any(count > 0 for name, count in _unanswered(order).items() if name in order["of"]):
            return True
        time.sleep(LOOK_S)
    return False


def _killed(daemon: int, order: Order) -> dict[str, int]:
    """Kill it; what was unanswered at that moment."""
    if order["traced"]:
        before = _messages()
        _kill(daemon)
        after = _answers()
        return {name: before[name] - after[name] for name in ANSWERS}
    os.kill(daemon, signal.SIGSTOP)
    unanswered = _unanswered(order)
    _kill(daemon)
    return unanswered


def _unanswered(order: Order) -> dict[str, int]:
    if order["traced"]:
        asked, answered = _messages(), _answers()
        return {name: asked[name] - answered[name] for name in ANSWERS}
    return {"read": sum(_waits(reader) for reader in order["readers"]), "open": 0}


def _waits(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/wchan") as file:
            return file.read().startswith(WAITING)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _child(supervisor: int) -> Find:
    """Finds the supervisor's daemon, once it is another process than before."""

    def find(before: int) -> int | None:
        while True:
            with open(f"/proc/{supervisor}/task/{supervisor}/children") as file:
                children = [int(child) for child in file.read().split()]
            if children and children[0] != before:
                return children[0]
            time.sleep(LOOK_S)

    return find


def _kept(log: str, readers: Sequence[int]) -> Find:
    """Finds the snapshotter's daemon, which may be nobody's child, once it has left what it holds
    with the snapshotter; None when no reader is left who could wait for that."""
    fd = os.open(log, os.O_RDONLY)
    os.lseek(fd, 0, os.SEEK_END)

    def find(before: int) -> int | None:
        told = b""
        while before and KEPT not in told:
            if not _alive(readers):
                return None
            time.sleep(LOOK_S)
            told += os.read(fd, READ_BYTES)
        while not (found := [pid for pid in _singletons() if pid != before]):
            time.sleep(LOOK_S)
        return found[0]

    return find


def _singletons() -> list[int]:
    """The living daemons in nydusd's place."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # gone, or a zombie's
            continue
        if b"singleton" in words:
            found.append(int(path.parent.name))
    return found


def _kill(pid: int) -> None:
    """End a process and wait until its last thread and descriptor are gone."""
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        select.select([fd], [], [])
    finally:
        os.close(fd)


def _alive(pids: Sequence[int]) -> bool:
    return any(os.path.exists(f"/proc/{pid}/mem") and not _zombie(pid) for pid in pids)


def _zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before open, or before read
        return True


def _messages() -> dict[str, int]:
    return {name: hits(name) for name in ANSWERS}


def _answers() -> dict[str, int]:
    return {name: hits(answer) for name, answer in ANSWERS.items()}


if __name__ == "__main__":
    print(json.dumps(carry_out(json.loads(sys.argv[1]))))

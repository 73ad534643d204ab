"""The tiny parent that holds the kernel's fds while daemons come and go.

It speaks systemd's protocol (`fscached.control.notify`): the daemon stores fds here by datagram and
its successor finds them at fd 3 and up. The kernel's cache lives as long as one of these fds does,
so readers of a daemon that has died wait, and the next daemon answers them. A successor is started
only after waitpid(2): by then every fd of the predecessor is closed, as `restore` requires.

It also watches the daemon as systemd watches it: who gives no sign of life (WATCHDOG=1, from the
event loop) is replaced. A listener of systemd's for the API goes to every daemon.

Standard library only, and little of it: this process should be the last one to need memory.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from fscached.control.notify import API, FIRST_FD, FdStore, alive, heartbeat_s, notify

log = logging.getLogger(__name__)

STOP_GRACE_S: Final = 5.0
BACKOFF_S: Final = (0.0, 0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
"""Pause before the n-th restart in a row; the last one for all that follow. Readers wait in the
kernel meanwhile, so the first ones come at once, and it never gives up."""
SETTLED_S: Final = 5.0
"""A daemon that lived this long begins BACKOFF_S anew."""
SILENCE_LIMIT_S: Final = 90.0
"""A daemon that is silent for so long is replaced; half of WatchdogSec= where systemd has one.
Readers wait meanwhile, and must have their bytes before the kernel reports a hung task (120 s); a
machine with too much to do starves a process for tens of seconds."""
SILENT_TURNS: Final = 3
"""Looks in that time. One that comes late counts once: who was frozen together with the daemon
(a paused machine, a frozen control group) gives it time to be heard again."""

CANNOT_START: Final = 126
STORED_LIMIT: Final = 16
NEEDS_LEAVE: Final = "fanotify"
"""A stored fd of this name may only be closed after a run of the command with `--leave`: its last
close lets all readers go on, and they would read zeros."""
DATAGRAM_LIMIT_BYTES: Final = 8192
# Stored fds are kept above those that a daemon is given them at, so that no dup2 hits another.
_HELD_FROM: Final = FIRST_FD + STORED_LIMIT + 1  # and the listener
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid; unix(7)
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(STORED_LIMIT * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
# LISTEN_PID must hold a pid that does not exist before the spawn: the shell writes its own, then
# becomes the daemon.
_TRAMPOLINE: Final = ("/bin/sh", "-c", 'export LISTEN_PID=$$ WATCHDOG_PID=$$; exec "$@"', "sh")
_RELAYED: Final = ("READY=1", "STATUS=")
_OURS: Final = {
    *("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"),
    *("WATCHDOG_USEC", "WATCHDOG_PID"),
}


class Phase(enum.Enum):
    """What the supervisor is waiting for."""

    SERVING = "the daemon runs"
    PAUSING = "the daemon has died and its successor is due after a pause"
    REPLACING = "the daemon ends to make room for its successor"
    STOPPING = "the daemon ends, and the supervisor after it"
    LEAVING = "the command's last run, `--leave`, ends, and the supervisor after it"
    ENDED = "nothing"


class Event(enum.Enum):
    """What can happen to a supervisor."""

    DIED = "the daemon has ended"
    STOP = "SIGTERM or SIGINT"
    REPLACE = "SIGHUP"
    DEADLINE = "the time is up"
    SILENT = "the daemon's event loop has given no sign of life for too long"


class Supervisor:
    """Runs `command` again and again. `run` blocks until it is told to stop or the daemon ends of
    its own accord, and needs the main thread for its signals."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = [*_TRAMPOLINE, *command]
        self._phase = Phase.SERVING
        self._stored: dict[str, int] = {}
        self._listener: dict[str, int] = {}
        self._pid = 0
        self._pidfd = -1
        self._status = 0
        self._born_s = 0.0
        self._due: dict[Callable[[], None], float] = {}
        self._heartbeat_s = heartbeat_s(os.environ)
        self._silence_s = self._heartbeat_s or SILENCE_LIMIT_S
        self._silent_turns = 0
        self._failures = 0
        self._was_ready = False
        self._selector = selectors.DefaultSelector()
        self._inbox = _inbox()
        self._wakeup, self._alarm = socket.socketpair()

    def run(self) -> int:
        """The exit status to end with: the daemon's own, or 128 and its signal."""
        self._listen()
        for name, fd in FdStore().take().items():
            self._hold(name, fd)
            os.close(fd)
        self._beat()
        self._spawn()
        while self._phase is not Phase.ENDED:
            for key, _ in self._selector.select(self._patience_s()):
                key.data()
            self._act()
        return self._status

    def _listen(self) -> None:
        for end in (self._wakeup, self._alarm):
            end.setblocking(False)
        signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._signalled)
        self._selector.register(self._inbox, selectors.EVENT_READ, self._read_inbox)

    def _patience_s(self) -> float | None:
        return max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None

    def _after(self, pause_s: float, action: Callable[[], None]) -> None:
        """Instead of what was said of this action before."""
        self._due[action] = time.monotonic() + pause_s

    def _act(self) -> None:
        now_s = time.monotonic()
        for action in [action for action, due_s in self._due.items() if due_s <= now_s]:
            # Not when one before it has called it off.
            if self._due.pop(action, None) is not None:
                action()

    def _beat(self) -> None:
        if self._heartbeat_s is not None:
            alive(os.environ)
            self._after(self._heartbeat_s, self._beat)

    def _expire(self) -> None:
        self._happened(Event.DEADLINE)

    def _heard(self) -> None:
        self._silent_turns = 0
        self._after(self._silence_s / SILENT_TURNS, self._doubt)

    def _doubt(self) -> None:
        self._silent_turns += 1
        if self._silent_turns < SILENT_TURNS:
            self._after(self._silence_s / SILENT_TURNS, self._doubt)
        else:
            self._happened(Event.SILENT)

    def _signalled(self) -> None:
        for number in self._wakeup.recv(64):
            if event := _SIGNALS.get(signal.Signals(number)):
                self._happened(event)

    def _happened(self, event: Event) -> None:
        if action := _ACTIONS.get((self._phase, event)):
            action(self)

    def _spawn(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _OURS}
        environment["NOTIFY_SOCKET"] = "@" + os.fsdecode(self._inbox.getsockname()[1:])
        given = self._listener | self._stored
        environment["LISTEN_FDS"] = str(len(given))
        environment["LISTEN_FDNAMES"] = ":".join(given)
        environment["WATCHDOG_USEC"] = str(int(self._silence_s * 1e6))
        if self._phase is not Phase.LEAVING:
            self._phase = Phase.SERVING
        self._due.pop(self._expire, None)
        self._born_s = time.monotonic()
        try:
            self._pid = self._exec(environment, list(given.values()))
        except OSError as error:
            log.error("cannot start a daemon: %s", error)
            self._status = CANNOT_START
            self._happened(Event.DIED)
            return
        self._pidfd = os.pidfd_open(self._pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._died)
        log.info("daemon started", extra={"pid": self._pid, "stored": len(self._stored)})

    def _exec(self, environment: dict[str, str], fds: Sequence[int]) -> int:
        return os.posix_spawn(
            self._command[0],
            [*self._command, "--leave"] if self._phase is Phase.LEAVING else self._command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, fd, FIRST_FD + place) for place, fd in enumerate(fds)
            ],
            setpgroup=0,  # a terminal's Ctrl-C comes here, and is handed on once
            setsigmask=(),
            setsigdef=tuple(_SIGNALS),
        )

    def _died(self) -> None:
        self._read_inbox()  # before the pid is forgotten: what is queued was sent in time
        status = os.waitpid(self._pid, 0)[1]
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        code = os.waitstatus_to_exitcode(status)
        if self._phase is not Phase.LEAVING:
            self._status = code if code >= 0 else 128 - code
        log.info("daemon ended", extra={"pid": self._pid, "status": self._status})
        self._pid = 0
        for action in (self._expire, self._doubt):
            self._due.pop(action, None)
        self._happened(Event.DIED)

    def _mourn(self) -> None:
        """Restart what ended by accident; end with what ended on purpose or never began."""
        if self._status == 0 or not (self._stored or self._was_ready):
            self._end()
            return
        settled = time.monotonic() - self._born_s >= SETTLED_S
        self._failures = 0 if settled else self._failures + 1
        pause_s = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        log.error(
            "daemon died; readers wait for its successor",
            extra={"status": self._status, "pause_s": pause_s},
        )
        self._phase = Phase.PAUSING
        self._after(pause_s, self._expire)

    def _stop(self) -> None:
        self._terminate(Phase.STOPPING)

    def _replace(self) -> None:
        self._terminate(Phase.REPLACING)

    def _replace_silent(self) -> None:
        log.error(
            "the daemon's event loop stands still: another takes its place",
            extra={"pid": self._pid, "silent_s": self._silence_s},
        )
        # As systemd's watchdog does it. The daemon's last words are where each thread stands.
        self._terminate(Phase.REPLACING, signal.SIGABRT)

    def _terminate(self, phase: Phase, number: signal.Signals = signal.SIGTERM) -> None:
        self._phase = phase
        self._after(STOP_GRACE_S, self._expire)
        self._signal(number)

    def _kill(self) -> None:
        log.error("daemon does not end: killed", extra={"pid": self._pid})
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _end(self) -> None:
        """Unless what is stored may be closed only after a last run of the command."""
        if NEEDS_LEAVE in self._stored and self._phase is not Phase.LEAVING:
            log.info("the last daemon has ended; images with holes are unmounted")
            self._phase = Phase.LEAVING
            self._spawn()
        else:
            for name in self._stored:
                self._relay(["FDSTOREREMOVE=1", f"FDNAME={name}"])
            self._phase = Phase.ENDED

    def _read_inbox(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = self._inbox.recvmsg(
                    DATAGRAM_LIMIT_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            pid, fds = _unpacked(ancillary)
            # The address is abstract, so anybody can write to it; the kernel vouches for the pid.
            if pid == self._pid:
                self._noted(data.decode(errors="replace").splitlines(), fds)
            for fd in fds:
                os.close(fd)

    def _noted(self, lines: list[str], fds: list[int]) -> None:
        name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "")
        if "FDSTOREREMOVE=1" in lines and name in self._stored:
            os.close(self._stored.pop(name))
        if "FDSTORE=1" in lines and len(fds) == 1 and _is_name(name):
            self._store(name, fds[0])
        if "READY=1" in lines:
            self._was_ready = True
        if "READY=1" in lines or "WATCHDOG=1" in lines:
            self._heard()
        if relayed := [line for line in lines if line.startswith(_RELAYED)]:
            self._relay(relayed)

    def _store(self, name: str, fd: int) -> None:
        if name not in self._stored and len(self._stored) >= STORED_LIMIT:
            log.error("more than %d stored fds: %s is not stored", STORED_LIMIT, name)
            return
        if name in self._stored:
            os.close(self._stored[name])
            self._relay(["FDSTOREREMOVE=1", f"FDNAME={name}"])
        self._hold(name, fd)
        self._relay(["FDSTORE=1", f"FDNAME={name}", "FDPOLL=0"], [fd])

    def _hold(self, name: str, fd: int) -> None:
        place = self._listener if name == API else self._stored
        place[name] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HELD_FROM)

    def _relay(self, lines: list[str], fds: Sequence[int] = ()) -> None:
        """Tell a service manager: it is the last holder, should this process die."""
        try:
            notify(*lines, fds=fds, environment=os.environ)
        except OSError as error:
            log.warning("cannot tell the service manager: %s", error)


_SIGNALS: Final = {
    signal.SIGTERM: Event.STOP,
    signal.SIGINT: Event.STOP,
    signal.SIGHUP: Event.REPLACE,
}

_ACTIONS: Final[dict[tuple[Phase, Event], Callable[[Supervisor], None]]] = {
    (Phase.SERVING, Event.DIED): Supervisor._mourn,
    (Phase.SERVING, Event.STOP): Supervisor._stop,
    (Phase.SERVING, Event.REPLACE): Supervisor._replace,
    (Phase.SERVING, Event.SILENT): Supervisor._replace_silent,
    (Phase.PAUSING, Event.DEADLINE): Supervisor._spawn,
    (Phase.PAUSING, Event.REPLACE): Supervisor._spawn,
    (Phase.PAUSING, Event.STOP): Supervisor._end,
    (Phase.REPLACING, Event.DIED): Supervisor._spawn,
    (Phase.REPLACING, Event.STOP): Supervisor._stop,
    (Phase.REPLACING, Event.DEADLINE): Supervisor._kill,
    (Phase.STOPPING, Event.DIED): Supervisor._end,
    (Phase.STOPPING, Event.DEADLINE): Supervisor._kill,
    (Phase.LEAVING, Event.DIED): Supervisor._end,
    (Phase.LEAVING, Event.STOP): Supervisor._kill,
}


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of `fscached run`: this interpreter and what is installed for it when the
    command starts, never what lies in the working directory (-P)."""
    return [sys.executable, "-P", "-m", "fscached", "run", *arguments]


def _inbox() -> socket.socket:
    inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    inbox.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    inbox.bind("")  # an abstract address of the kernel's choice, unix(7) "autobind"
    return inbox


def _unpacked(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, list[int]]:
    """The sender's pid, and the fds it sent along."""
    pid, fds = 0, list[int]()
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % 4
            fds += struct.unpack(f"{whole // 4}i", data[:whole])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
    return pid, fds


def _is_name(name: str) -> bool:
    plain = 0 < len(name) <= 255 and ":" not in name and name.isprintable() and name.isascii()
    return plain and name != API

"""The supervisor, as a process of its own, with a stand-in for the daemon that obeys the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fscached.control import supervisor
from fscached.control.supervisor import SILENCE_LIMIT_S, SILENT_TURNS, Event, Phase

ROOT = Path(__file__).parents[2]
STANDIN = Path(__file__).parent / "daemon_standin.py"
PATIENCE_S = 20.0

SUPERVISE = """
import sys
from fscached import log
from fscached.control import supervisor

log.configure()
supervisor.STOP_GRACE_S = float(sys.argv[1])
supervisor.BACKOFF_S = (0.0, 0.0, float(sys.argv[2]))
sys.exit(supervisor.Supervisor(sys.argv[3:]).run())
"""


class Daemon:
    """One life of the stand-in, seen from the test."""

    def __init__(self, channel: socket.socket) -> None:
        channel.settimeout(PATIENCE_S)
        self._lines = channel.makefile("rw")
        channel.close()
        self.about: dict[str, Any] = self.hear()
        self.pid: int = self.about["pid"]

    def hear(self) -> Any:
        """The next line; None when it has ended."""
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def tell(self, command: str) -> Any:
        """Give a command, return its answer."""
        self._lines.write(command + "\n")
        self._lines.flush()
        return self.hear()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._lines.close()


class Supervised:
    """A supervisor that runs, and the lives of its daemon."""

    def __init__(self, tmp_path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(tmp_path / "channel"))
        self._listener.listen()
        self._listener.settimeout(PATIENCE_S)
        self._path = str(tmp_path / "channel")
        self._lives: list[Daemon] = []
        self.process: subprocess.Popen[str] | None = None

    def start(
        self,
        grace_s: float = 10.0,
        pause_s: float = 0.0,
        listener: socket.socket | None = None,
        **environment: str,
    ) -> subprocess.Popen[str]:
        command = [sys.executable, str(STANDIN), self._path]
        fds = [listener.fileno()] if listener else []
        given = [
            f"exec 3<&{fd}; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=api" for fd in fds
        ]
        shell = ["/bin/bash", "-c", "; ".join([*given, 'exec "$@"']), "bash"]
        self.process = subprocess.Popen(
            [*shell, sys.executable, "-c", SUPERVISE, str(grace_s), str(pause_s), *command],
            env=os.environ | environment,
            pass_fds=fds,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def daemon(self) -> Daemon:
        """The next life of the daemon."""
        self._lives.append(Daemon(self._listener.accept()[0]))
        return self._lives[-1]

    def ended(self) -> tuple[int, str]:
        """Exit status and log of the supervisor."""
        assert self.process
        log = self.process.communicate(timeout=PATIENCE_S)[1]
        return self.process.returncode, log

    def close(self) -> None:
        self._listener.close()
        for life in self._lives:
            life.close()
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=PATIENCE_S)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    """A supervisor to start."""
    found = Supervised(tmp_path)
    yield found
    found.close()


def test_what_is_stored_survives_kill_9(supervised: Supervised) -> None:
    """The next daemon gets the same open files back, and nothing else."""
    supervised.start()
    first = supervised.daemon()
    assert first.about["stored"] == {}
    inodes = {
        "cachefiles": first.tell("store cachefiles device"),
        "state": first.tell("store state one"),
    }
    os.kill(first.pid, signal.SIGKILL)
    second = supervised.daemon()
    assert second.pid != first.pid
    assert second.about["stored"] == inodes
    assert second.about["text"] == {"cachefiles": "device", "state": "one"}
    # 0 to 2, the two stored, the test's channel, and the listing's own.
    assert second.about["inherited"] == list(range(7))


def test_a_replaced_fd_is_the_one_that_comes_back(supervised: Supervised) -> None:
    """Over three lives; a removed one does not come back."""
    supervised.start()
    daemon = supervised.daemon()
    daemon.tell("store state one")
    daemon.tell("store other thing")
    for text in ("two", "three"):
        daemon.tell(f"store state {text}")
        os.kill(daemon.pid, signal.SIGKILL)
        daemon = supervised.daemon()
        assert daemon.about["text"] == {"state": text, "other": "thing"}
    daemon.tell("remove other")
    os.kill(daemon.pid, signal.SIGKILL)
    assert supervised.daemon().about["text"] == {"state": "three"}


def test_what_was_sent_just_before_death_counts(supervised: Supervised) -> None:
    """A datagram in the queue is read although its sender is gone."""
    supervised.start()
    daemon = supervised.daemon()
    for number in range(5):
        assert daemon.tell(f"store-and-die state {number}") is None
        daemon = supervised.daemon()
        assert daemon.about["text"] == {"state": str(number)}


def test_only_the_daemon_itself_is_believed(supervised: Supervised) -> None:
    """Another process cannot plant an fd, although it knows the address."""
    supervised.start()
    daemon = supervised.daemon()
    inode = daemon.tell("store state genuine")
    assert daemon.tell("impostor") == "sent"
    os.kill(daemon.pid, signal.SIGKILL)
    assert supervised.daemon().about["stored"] == {"state": inode}


def test_the_daemon_has_its_own_process_group(supervised: Supervised) -> None:
    """A terminal's Ctrl-C reaches the supervisor alone, which hands it on once."""
    supervised.start()
    daemon = supervised.daemon()
    assert daemon.about["group"] == daemon.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping(supervised: Supervised, number: signal.Signals) -> None:
    """The signal is handed on as SIGTERM; both end, with the daemon's status."""
    process = supervised.start()
    daemon = supervised.daemon()
    daemon.tell("store state one")
    process.send_signal(number)
    assert daemon.hear() == "SIGTERM"
    assert supervised.ended()[0] == 0


def test_a_daemon_that_does_not_stop_is_killed(supervised: Supervised) -> None:
    """After the grace, by its pid; the status says by which signal."""
    process = supervised.start(grace_s=0.05)
    daemon = supervised.daemon()
    assert daemon.tell("deaf") == "deaf"
    process.send_signal(signal.SIGTERM)
    status, log = supervised.ended()
    assert status == 128 + signal.SIGKILL
    assert "daemon does not end: killed" in log


@pytest.mark.parametrize("deaf", [False, True])
def test_replacing(supervised: Supervised, deaf: bool) -> None:
    """SIGHUP: the daemon ends, willing or not, and the next one has what it stored."""
    process = supervised.start(grace_s=0.05 if deaf else 10.0)
    first = supervised.daemon()
    inode = first.tell("store cachefiles device")
    if deaf:
        first.tell("deaf")
    process.send_signal(signal.SIGHUP)
    assert first.hear() == (None if deaf else "SIGTERM")
    assert supervised.daemon().about["stored"] == {"cachefiles": inode}


def test_a_daemon_that_ends_by_itself_ends_the_supervisor(supervised: Supervised) -> None:
    """Status 0 is on purpose (`PUT /api/v1/daemon/exit`), even with fds stored."""
    supervised.start()
    daemon = supervised.daemon()
    daemon.tell("store state one")
    daemon.tell("exit 0")
    assert supervised.ended()[0] == 0


def test_a_daemon_that_cannot_begin_is_not_restarted(supervised: Supervised) -> None:
    """A wrong configuration is one clear end, with the daemon's status."""
    supervised.start()
    supervised.daemon().tell("exit 2")
    assert supervised.ended()[0] == 2


@pytest.mark.parametrize("command", ["ready", "store state one"])
def test_a_daemon_that_served_is_restarted_whatever_its_status(
    supervised: Supervised, command: str
) -> None:
    """Readers may be waiting: never give up once it was ready or holds an fd."""
    supervised.start()
    daemon = supervised.daemon()
    daemon.tell(command)
    for status in (1, 2, 3):
        daemon.tell(f"exit {status}")
        daemon = supervised.daemon()


def between_lives(supervised: Supervised) -> subprocess.Popen[str]:
    """A supervisor that pauses for an hour, and keeps a state."""
    process = supervised.start(pause_s=3600.0)
    supervised.daemon().tell("store-and-die state one")
    supervised.daemon().tell("exit 7")
    assert process.stderr
    while "pause_s=3600" not in process.stderr.readline():
        pass
    return process


def test_stopping_during_a_pause(supervised: Supervised) -> None:
    """Between two lives there is nobody to wait for."""
    between_lives(supervised).send_signal(signal.SIGTERM)
    assert supervised.ended()[0] == 7


def test_replacing_during_a_pause_starts_at_once(supervised: Supervised) -> None:
    """Whoever has mended the cause need not wait for the pause to end."""
    between_lives(supervised).send_signal(signal.SIGHUP)
    assert supervised.daemon().about["text"] == {"state": "one"}


def test_readiness_is_handed_on(supervised: Supervised, tmp_path: Path) -> None:
    """The supervisor's own service manager hears READY and STATUS, and holds what is stored until
    the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        supervised.start(NOTIFY_SOCKET=str(tmp_path / "notify"))
        daemon = supervised.daemon()
        daemon.tell("store state one")
        data, fds, _, _ = socket.recv_fds(manager, 4096, 4)
        assert data == b"FDSTORE=1\nFDNAME=state\nFDPOLL=0"
        with os.fdopen(fds[0], "rb") as file:
            assert os.pread(file.fileno(), 10, 0) == b"one"
        daemon.tell("ready")
        assert manager.recv(4096) == b"READY=1\nSTATUS=well"
        daemon.tell("exit 0")
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=state"


def test_what_a_service_manager_held_is_given_on(tmp_path: Path) -> None:
    """A supervisor that was killed is started again with what it had stored."""
    program = "import os; print(os.environ['LISTEN_FDNAMES'], os.read(3, 9).decode())"
    with tempfile.TemporaryFile() as file:
        file.write(b"something")
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        shell = (
            f'exec 3</proc/self/fd/{file.fileno()}; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        )
        supervise = [sys.executable, "-c", SUPERVISE, "1", "0", sys.executable, "-c", program]
        done = subprocess.run(
            ["/bin/sh", "-c", shell, "sh", *supervise],
            env=os.environ | {"LISTEN_FDNAMES": "state"},
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    assert done.stdout == "state something\n", done.stderr


def test_a_silent_daemon_is_replaced(supervised: Supervised) -> None:
    """Whatever it is that holds up its event loop; what it has stored is its successor's."""
    process = supervised.start(grace_s=0.05, WATCHDOG_USEC="200000")
    wedged = supervised.daemon()
    inode = wedged.tell("store cachefiles device")
    wedged.tell("ready")
    os.kill(wedged.pid, signal.SIGSTOP)
    assert supervised.daemon().about["stored"] == {"cachefiles": inode}
    process.terminate()
    log = supervised.ended()[1]
    assert "event loop stands still" in log and "does not end: killed" in log


def test_a_daemon_is_asked_for_signs_of_life(supervised: Supervised) -> None:
    """Also where nobody asks the supervisor."""
    supervised.start()
    assert supervised.daemon().about["heartbeat_s"] == SILENCE_LIMIT_S / 2


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[supervisor.Supervisor, list[int]]]:
    """A supervisor without a process, and the signals that it sends."""
    sent: list[int] = []
    monkeypatch.setattr(supervisor.Supervisor, "_signal", lambda _, number: sent.append(number))
    found = supervisor.Supervisor(["daemon"])
    yield found, sent
    for end in (found._inbox, found._wakeup, found._alarm):
        end.close()


def test_who_is_heard_in_time_is_left_alone(
    alone: tuple[supervisor.Supervisor, list[int]],
) -> None:
    """Each sign of life gives it all of the time again."""
    found, sent = alone
    for sign in ("READY=1", "WATCHDOG=1", "WATCHDOG=1"):
        found._noted([sign], [])
        for _ in range(SILENT_TURNS - 1):
            found._doubt()
    assert sent == []
    found._doubt()
    assert sent == [signal.SIGABRT] and found._phase is Phase.REPLACING


def test_a_look_that_comes_late_counts_once(
    alone: tuple[supervisor.Supervisor, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Supervisor and daemon were frozen together for an hour."""
    found, sent = alone
    found._noted(["READY=1"], [])
    thawed_s = time.monotonic() + 3600
    monkeypatch.setattr(time, "monotonic", lambda: thawed_s)
    found._act()
    assert sent == [] and found._silent_turns == 1
    assert found._patience_s() == SILENCE_LIMIT_S / SILENT_TURNS


def test_who_is_not_ready_yet_is_not_waited_for(
    alone: tuple[supervisor.Supervisor, list[int]],
) -> None:
    """A machine with too much to do takes minutes to start a daemon, and another would be no
    quicker."""
    found, _ = alone
    found._noted(["STATUS=soon"], [])
    assert found._patience_s() is None


def test_the_supervisor_itself_gives_signs_of_life(supervised: Supervised, tmp_path: Path) -> None:
    """Without end, and whether or not it has heard of its daemon."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        supervised.start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="20000")
        for _ in range(3):
            assert manager.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("waited_for", [{}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}])
def test_nobody_who_does_not_wait_is_told(
    supervised: Supervised, tmp_path: Path, waited_for: dict[str, str]
) -> None:
    """No watchdog, or that of another process; nor are the daemon's signs handed on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        supervised.start(NOTIFY_SOCKET=str(tmp_path / "notify"), **waited_for)
        daemon = supervised.daemon()
        daemon.tell("alive")
        daemon.tell("ready")
        assert manager.recv(4096) == b"READY=1\nSTATUS=well"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[socket.socket]:
    """What a socket unit listens on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen()
        yield listener


def test_who_asks_between_two_daemons_waits(supervised: Supervised, api: socket.socket) -> None:
    """The listener is each daemon's, beside all that can be stored, and is stored with nobody."""
    process = supervised.start(pause_s=3600.0, listener=api)
    first = supervised.daemon()
    for number in range(supervisor.STORED_LIMIT):
        first.tell(f"store state{number} thing")
    os.kill(first.pid, signal.SIGKILL)
    supervised.daemon().tell("exit 7")
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(PATIENCE_S)
        asker.connect(api.getsockname())
        asker.sendall(b"who?")
        process.send_signal(signal.SIGHUP)
        second = supervised.daemon()
        assert len(second.about["stored"]) == supervisor.STORED_LIMIT
        assert second.tell("answer") == "answered"
        assert asker.recv(99) == b"who?"


def test_a_listener_is_nothing_to_go_on_for(supervised: Supervised, api: socket.socket) -> None:
    """A daemon that cannot begin ends the supervisor, whoever listens."""
    supervised.start(listener=api)
    supervised.daemon().tell("exit 2")
    assert supervised.ended()[0] == 2


def test_the_group_is_not_closed_before_a_last_run(supervised: Supervised) -> None:
    """What is stored as `fanotify` outlives the last daemon for a run with `--leave`; a second
    SIGTERM ends that too."""
    process = supervised.start()
    first = supervised.daemon()
    inode = first.tell("store fanotify group")
    process.terminate()
    last = supervised.daemon()
    assert last.about["stored"] == {"fanotify": inode} and last.about["arguments"] == ["--leave"]
    process.terminate()
    assert last.hear() is None
    assert supervised.ended()[0] == 0


def test_a_command_that_cannot_be_executed_ends_with_the_shells_status(tmp_path: Path) -> None:
    """The trampoline says 127; nothing was stored, so nothing is retried."""
    command = [sys.executable, "-c", SUPERVISE, "1", "0", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 127


def test_every_phase_can_end() -> None:
    """From each phase some event leads on; the table has no dead end."""
    for phase in set(Phase) - {Phase.ENDED}:
        assert any((phase, event) in supervisor._ACTIONS for event in Event)


def test_it_is_small() -> None:
    """Only the standard library is imported, and of that nothing heavy."""
    code = "import sys, fscached.control.supervisor, fscached.log; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    foreign = {
        name.partition(".")[0]
        for name in modules
        if name.partition(".")[0] not in sys.stdlib_module_names | {"fscached", "__main__"}
    }
    assert foreign == set()
    heavy = {"asyncio", "subprocess", "ssl", "http", "multiprocessing", "urllib", "tomllib"}
    assert heavy.isdisjoint(modules)

"""systemd's notification and fd-store protocol, seen from the daemon."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fscached.control.notify import FdStore, alive, heartbeat_s, notify

Environment = dict[str, str]


@pytest.fixture
def environment(manager: socket.socket) -> Environment:
    """What the manager gives to the daemon."""
    return {"NOTIFY_SOCKET": manager.getsockname()}


def received(manager: socket.socket) -> tuple[list[str], list[int]]:
    data, fds, _, _ = socket.recv_fds(manager, 4096, 16)
    return data.decode().splitlines(), fds


def test_without_a_manager_nothing_is_sent() -> None:
    """`fscached run` from a shell has nobody to tell."""
    assert notify("READY=1", environment={}) is False
    assert FdStore({}).put("state", 0) is False
    assert FdStore({}).take() == {}


def test_ready_with_a_status(manager: socket.socket, environment: Environment) -> None:
    """One datagram."""
    FdStore(environment).ready("serving 3 images")
    assert received(manager) == (["READY=1", "STATUS=serving 3 images"], [])


def test_an_abstract_address_begins_with_an_at_sign() -> None:
    """As in systemd's own documentation."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")
        address = "@" + receiver.getsockname()[1:].decode()
        assert notify("READY=1", environment={"NOTIFY_SOCKET": address})
        assert receiver.recv(99) == b"READY=1"


def test_a_stored_fd_goes_by_name(manager: socket.socket, environment: Environment) -> None:
    """FDPOLL=0: systemd must not drop a device because of what poll says of it."""
    with open(os.devnull, "rb") as file:
        assert FdStore(environment).put("cachefiles", file.fileno())
    lines, [fd] = received(manager)
    os.close(fd)
    assert lines == ["FDSTORE=1", "FDNAME=cachefiles", "FDPOLL=0"]


def test_a_manager_that_is_gone_is_logged_and_survived(
    manager: socket.socket, environment: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon goes on; the log says what that means."""
    manager.close()
    with open(os.devnull, "rb") as file:
        assert FdStore(environment).put("cachefiles", file.fileno()) is False
    assert "when this daemon ends, mounts end with it" in caplog.text


def test_fds_for_another_process_are_not_taken(environment: Environment) -> None:
    """LISTEN_PID names somebody else: a parent's fds leaked into us. The variables go anyway."""
    environment |= {"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "state"}
    assert FdStore(environment).take() == {}
    assert list(environment) == ["NOTIFY_SOCKET"]


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_half_of_what_is_waited_for(environment: Environment, wanted: float | None) -> None:
    """If anybody waits for one of this process."""
    assert heartbeat_s(environment) == wanted


def test_a_sign_of_life_that_nobody_takes_is_dropped(
    manager: socket.socket, environment: Environment
) -> None:
    """The event loop waits for no manager: its queue is full, then it is gone."""
    alive(environment)
    assert received(manager) == (["WATCHDOG=1"], [])
    with pytest.raises(BlockingIOError):
        while True:
            notify("STATUS=more", environment=environment, patience_s=0.0)
    alive(environment)
    manager.close()
    alive(environment)


SUCCESSOR = """
import fcntl, os
from fscached.control.notify import FdStore

os.environ["LISTEN_PID"] = str(os.getpid())
for name, fd in FdStore().take().items():
    print(name, fd, os.fstat(fd).st_ino, fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC)
print([key for key in os.environ if key.startswith("LISTEN_")])
"""


def test_a_successor_takes_what_was_stored(tmp_path: Path) -> None:
    """From fd 3 up, by name, CLOEXEC, and only once."""
    files = [os.open(tmp_path / name, os.O_CREAT | os.O_RDWR) for name in "ab"]
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in files]
    inodes = [os.fstat(fd).st_ino for fd in files]
    shell = f'exec 3<&{high[0]} 4<&{high[1]}; exec "$@"'
    output = subprocess.run(
        ["/bin/bash", "-c", shell, "bash", sys.executable, "-c", SUCCESSOR],
        env=os.environ | {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "cachefiles:state"},
        pass_fds=high,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for fd in files + high:
        os.close(fd)
    assert output == [f"cachefiles 3 {inodes[0]} True", f"state 4 {inodes[1]} True", "[]"]

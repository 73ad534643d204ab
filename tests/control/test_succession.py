"""A daemon's states as the API turns them, and two daemons that follow one another."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from fscached import config
from fscached.control import api, http, succession
from fscached.control.http import ApiError
from fscached.control.state import State, WrongState
from fscached.control.succession import Succession
from fscached.failure import Failure
from fscached.transport import probe
from tests.control.conftest import StandInReign
from tests.control.custodian import Custodian

pytestmark = pytest.mark.asyncio


class Daemon:
    """One with the supervisor of the test."""

    def __init__(self, custodian: Custodian, place: str = "") -> None:
        self.places: list[str] = []
        self.reign = StandInReign()
        self.inherited: dict[str, int] = {}
        self.stopped = asyncio.Event()
        self.life = Succession(
            self.stopped.set, self._heir, "d1", custodian.path, place, self._answer_at
        )

    def _heir(self, holdings: dict[str, int]) -> StandInReign:
        self.inherited = holdings
        return self.reign

    async def _answer_at(self, path: str) -> None:
        self.places.append(path)


@pytest.fixture
def device() -> Iterator[int]:
    """What a daemon holds."""
    fd = os.memfd_create("device")
    yield fd
    os.close(fd)


async def left(daemon: Daemon, custodian: Custodian, device: int) -> None:
    """A daemon runs and has left with the supervisor what it holds."""
    daemon.reign.holdings = {"cachefiles": device}
    daemon.life.accede(daemon.reign, takeover=False)
    custodian.receives()
    await daemon.life.send_fd()
    custodian.done()


async def test_a_daemon_with_the_device_runs_before_anybody_asks() -> None:
    """Started by our own supervisor it may be a successor."""
    for takeover, told in ((False, "begin"), (True, "take over")):
        life, reign = Succession(lambda: None), StandInReign()
        life.accede(reign, takeover)
        assert (life.state, reign.told) == (State.RUNNING, [told])
        assert (life.info().id, life.info().supervisor) == (None, None)


async def test_one_follows_the_other(custodian: Custodian, device: int) -> None:
    """The hot upgrade, in the snapshotter's order: INIT, READY, the old one's exit, RUNNING."""
    old, new = Daemon(custodian), Daemon(custodian)
    await left(old, custodian, device)
    assert new.life.info().state is State.INIT
    assert (new.life.info().id, new.life.info().supervisor) == ("d1", custodian.path)
    custodian.gives()
    await new.life.take_over()
    assert (new.life.state, new.reign.told) == (State.READY, [])
    assert os.fstat(new.inherited["cachefiles"]).st_ino == os.fstat(device).st_ino
    await old.life.exit()
    assert old.reign.told == ["begin", "end"] and old.stopped.is_set()
    assert old.life.state is State.STOPPED
    await new.life.start()
    assert (new.life.state, new.reign.told) == (State.RUNNING, ["take over"])
    os.close(new.inherited["cachefiles"])


async def test_a_successor_answers_where_its_predecessors_did(
    custodian: Custodian, device: int, tmp_path: Path
) -> None:
    """Once it runs, and whoever follows it does too; the path of its own is no other place."""
    paths = [str(tmp_path / name) for name in ("api.sock", "api1.sock", "api1.sock", "api3.sock")]
    before: Daemon | None = None
    for number, path in enumerate(paths):
        daemon = Daemon(custodian, path)
        if before is None:
            await left(daemon, custodian, device)
        else:
            custodian.gives()
            await daemon.life.take_over()
            assert daemon.places == []
            await daemon.life.start()
            daemon.reign.holdings = daemon.inherited
            custodian.receives()
            await daemon.life.send_fd()
            custodian.done()
        before = daemon
        assert set(daemon.places) == set(paths[:number]) - {path}


async def test_start_waits_for_the_predecessors_objects(
    custodian: Custodian, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`restore` while somebody has an object open would leave its readers waiting."""
    old, new = Daemon(custodian), Daemon(custodian)
    await left(old, custodian, device)
    custodian.gives()
    await new.life.take_over()
    looks = iter([True, True, False])
    monkeypatch.setattr(probe, "has_objects", lambda pid: pid == os.getpid() and next(looks))
    await new.life.start()
    assert list(looks) == [] and new.reign.told == ["take over"]
    os.close(new.inherited["cachefiles"])


async def test_a_predecessor_that_does_not_end(
    custodian: Custodian, device: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Other readers need not wait for the objects that it keeps."""
    monkeypatch.setattr(succession, "PREDECESSOR_LIMIT_S", 0.0)
    monkeypatch.setattr(probe, "has_objects", lambda pid: True)
    old, new = Daemon(custodian), Daemon(custodian)
    await left(old, custodian, device)
    custodian.gives()
    await new.life.take_over()
    await new.life.start()
    assert new.life.state is State.RUNNING
    assert f"process {os.getpid()} still has objects open" in caplog.text
    os.close(new.inherited["cachefiles"])


@pytest.mark.parametrize("trouble", [Failure("no restore", "buy"), ValueError("x"), OSError("y")])
async def test_a_takeover_that_fails_may_be_tried_again(
    custodian: Custodian, device: int, trouble: Exception
) -> None:
    """It is INIT as before, and the error says why."""
    old = Daemon(custodian)
    await left(old, custodian, device)

    def refuse(holdings: dict[str, int]) -> StandInReign:
        for fd in holdings.values():
            os.close(fd)
        raise trouble

    new = Succession(lambda: None, refuse, "d1", custodian.path)
    for _ in range(2):
        custodian.gives()
        with pytest.raises(ApiError, match=str(trouble)) as error:
            await new.take_over()
        assert (error.value.status, new.state) == (500, State.INIT)


async def test_a_kernel_without_restore(custodian: Custodian, device: int) -> None:
    """`start` says so, and the daemon stays READY."""
    old, new = Daemon(custodian), Daemon(custodian)
    await left(old, custodian, device)
    custodian.gives()
    await new.life.take_over()

    def refuse(takeover: bool) -> None:
        raise Failure("the mounts cannot be taken over: no restore", "kernel 6.8 has it")

    new.reign.begin = refuse  # type: ignore[method-assign]
    with pytest.raises(ApiError, match="no restore"):
        await new.life.start()
    assert new.life.state is State.READY
    os.close(new.inherited["cachefiles"])


async def test_what_is_nothing_in_this_state(custodian: Custodian) -> None:
    """Each is an error that names the state, and changes nothing."""
    waiting = Daemon(custodian).life
    with pytest.raises(WrongState, match=r"Start.*INIT"):
        await waiting.start()
    with pytest.raises(ApiError, match=r"SendFd.*INIT") as error:
        await waiting.send_fd()
    assert error.value.status == 400
    running = Succession(lambda: None)
    running.accede(StandInReign(), takeover=False)
    with pytest.raises(WrongState, match=r"Takeover.*RUNNING"):
        await running.take_over()
    await running.send_fd()
    with pytest.raises(ApiError, match="no supervisor"):
        await Succession(lambda: None).take_over()


async def test_send_fd_connects_or_fails(custodian: Custodian, device: int) -> None:
    """A 204 without a connection would have the snapshotter wait for ever."""
    daemon = Daemon(custodian)
    daemon.life.accede(daemon.reign, takeover=False)
    with pytest.raises(ApiError, match="No such file"):
        await daemon.life.send_fd()


async def test_the_supervisor_is_given_the_same_each_time(
    custodian: Custodian, device: int
) -> None:
    """The real one closes none of what it got before."""
    daemon, given = Daemon(custodian), set()
    await left(daemon, custodian, device)
    for _ in range(3):
        assert custodian.fd is not None
        given.add(os.fstat(custodian.fd).st_ino)
        custodian.receives()
        await daemon.life.send_fd()
        custodian.done()
    assert len(given) == 1


@pytest.mark.parametrize("parent", [1, 4711])
async def test_an_orphan_that_nobody_speaks_to_ends(
    custodian: Custodian, monkeypatch: pytest.MonkeyPatch, parent: int
) -> None:
    """Whoever started it is gone before it said what to do."""
    monkeypatch.setattr(succession, "ORPHAN_S", 0.001)
    daemon = Daemon(custodian)
    monkeypatch.setattr(os, "getppid", lambda: parent)
    daemon.life.await_takeover(predecessor_lives=True)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    await asyncio.wait_for(daemon.stopped.wait(), 20)


async def test_a_successor_whom_nobody_asks_takes_over(
    custodian: Custodian, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its predecessor is dead and the snapshotter may have given up on it; when it asks after all,
    what it asks for is done."""
    monkeypatch.setattr(succession, "UNASKED_S", 0.001)
    old, new = Daemon(custodian), Daemon(custodian)
    await left(old, custodian, device)
    custodian.gives()
    new.life.await_takeover(predecessor_lives=False)
    await asyncio.wait_for(new.reign.begun.wait(), 20)
    assert new.reign.told == ["take over"]
    await new.life.take_over()
    await new.life.start()
    assert (new.life.state, new.reign.told) == (State.RUNNING, ["take over"])
    os.close(new.inherited["cachefiles"])


async def test_who_is_asked_does_not_take_over_twice(
    custodian: Custodian, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is to replace a daemon that lives waits until it is told; a failed attempt leaves it to
    the snapshotter."""
    monkeypatch.setattr(succession, "UNASKED_S", 0.001)
    old, new = Daemon(custodian), Daemon(custodian)
    await left(old, custodian, device)
    before = asyncio.all_tasks()
    new.life.await_takeover(predecessor_lives=True)
    assert asyncio.all_tasks() == before
    custodian.message = b"of somebody else"
    custodian.gives()
    new.life.await_takeover(predecessor_lives=False)
    [attempt] = asyncio.all_tasks() - before
    await asyncio.wait_for(attempt, 20)
    custodian.done()
    assert new.life.state is State.INIT
    with pytest.raises(WrongState):
        await new.life.start()


async def test_over_the_api(
    custodian: Custodian,
    device: int,
    socket_path: str,
    service: Any,
    exchange: Callable[[bytes], Coroutine[Any, Any, bytes]],
) -> None:
    """nydusd's paths and statuses; images are nobody's business before the takeover."""
    old, new = Daemon(custodian), Daemon(custodian)
    await left(old, custodian, device)

    def running() -> Any:
        return service if new.life.state is State.RUNNING else None

    server = http.Server(socket_path, api.routes(new.life, running), config.Api())
    await server.start()

    async def put(path: str) -> bytes:
        head = b"PUT /api/v1/daemon/%s HTTP/1.1\r\nHost: u\r\nContent-Length: 0\r\n\r\n"
        return (await exchange(head % path.encode())).split(b"\r\n", 1)[0]

    status = b"GET /api/v2/status HTTP/1.1\r\nHost: u\r\n\r\n"
    assert (
        b" 503 " in (reply := await exchange(status)) and b"NotReady: the daemon is INIT" in reply
    )
    assert b" 400 " in await put("start")
    assert b" 400 " in await put("fuse/sendfd")
    custodian.gives()
    assert b" 204 " in await put("fuse/takeover")
    assert b" 400 " in await put("fuse/takeover")
    assert b" 204 " in await put("start")
    assert b" 400 " in await put("start")
    assert b" 200 " in await exchange(status)
    custodian.receives()
    assert b" 204 " in await put("fuse/sendfd")
    custodian.done()
    assert b" 204 " in await put("exit")
    assert new.stopped.is_set()
    await server.close()
    os.close(new.inherited["cachefiles"])

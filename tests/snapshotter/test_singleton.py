"""The daemon alone, as the snapshotter starts it: how soon it listens, and what it bears."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fscached.control.client import Client, DaemonAway, DaemonError
from tests.control.custodian import Custodian
from tests.native.origin import Origin
from tests.rafs_v6.trees import Built
from tests.snapshotter.device import Device
from tests.snapshotter.snapshotter import HOUSE, until

DOMAIN, IMAGES, MOUNTED, HALF_OPEN = "shared", 1000, 40, 10_000
READY_LIMIT_S, SUCCESSOR_LIMIT = 0.4, 0.75
MEMORY_LIMIT_BYTES = 64 << 20
READ_BYTES = 128 << 10
BEGUN = b"PUT /api/v2/blobs HTTP/1.1\r\nHost: unix\r\nContent-Length: 9999\r\n\r\n{"


class Alone:
    """A daemon of nydusd's command line, its supervisor, and an image with one blob."""

    def __init__(self, root: Path, device: Device, registry: Origin, built: Built) -> None:
        self.root = root
        self.device = device
        self.custodian = Custodian(root)
        self.socket = root / "api.sock"
        self.api = Client(str(self.socket), 30.0)
        self.log = root / "log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._registry = registry
        self._built = built
        (self.blob,) = built.blobs
        self.bytes = built.cache_file(self.blob)
        (root / "cache").mkdir()
        (root / "image.boot").write_bytes(built.image.bootstrap)
        (root / "fscached.toml").write_text(f"""
[paths]
runtime_directory = "{root}/run"
state_directory = "{root}/state"
[kernel]
device = "{device.path}"
[prefetch]
enabled = false
""")

    def start(self, *words: str, socket: Path | None = None) -> subprocess.Popen[bytes]:
        """Start one, and wait until it listens."""
        place = socket or self.socket
        command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(HOUSE)!r})"]
        command[-1] += "; from tests.snapshotter.nydusd import main"
        command[-1] += f"; sys.exit(main({str(self.root / 'fscached.toml')!r}, sys.argv[1:]))"
        order = ["singleton", "--fscache", str(self.root / "cache"), "--apisock", str(place)]
        order += ["--id", "d1", "--supervisor", self.custodian.path, *words]
        with self.log.open("ab") as log:
            process = subprocess.Popen([*command, *order], stdout=log, stderr=log)
        self.processes.append(process)

        def listens() -> dict[str, Any] | None:
            assert process.poll() is None, self.log.read_text()[-3000:]
            try:
                return dict(Client(str(place), 30.0).get("/api/v1/daemon"))
            except DaemonAway:
                return None

        until(listens, "it does not listen")
        return process

    def bind(self, number: int) -> str:
        """Bind an image; its fsid."""
        fsid = f"image-{number}"
        backend = {"host": self._registry.host, "repo": "app", "scheme": "http"}
        config = {
            "backend_type": "registry",
            "backend_config": backend,
            "cache_config": {"work_dir": str(self.root)},
            "metadata_path": str(self.root / "image.boot"),
        }
        entry = {"type": "bootstrap", "id": fsid, "domain_id": DOMAIN, "config": config}
        self.api.put("/api/v2/blobs", entry)
        return fsid

    def put(self, path: str) -> None:
        """Ask for a change of its state."""
        self.api.put(f"/api/v1/daemon/{path}")

    def read(self, place: int) -> None:
        """Have a reader ask for bytes that are not there."""
        start, end = place * READ_BYTES, (place + 1) * READ_BYTES
        assert self.device.read(DOMAIN, self.blob, start, end) == self.bytes[start:end]

    def close(self) -> None:
        """End all of it."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.custodian.close()


@pytest.fixture
def alone(root: Path, device: Device, registry: Origin, built: Built) -> Iterator[Alone]:
    """Not started yet."""
    alone = Alone(root, device, registry, built)
    yield alone
    alone.close()


def spent_s(pid: int) -> float:
    """Processor time of a process, user's and system's, in seconds (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Its memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_it_listens_within_the_failover_budget(alone: Alone) -> None:
    """A first daemon in 400 ms, a successor, whom the snapshotter gives 2 s, in less: seconds of a
    processor until it answers, the least of three starts, since seconds on the clock are the
    neighbours' too (docs/decisions/benchmarks.md). Of `singleton`: nobody waits for `run`."""
    first, successor = [], []
    for _ in range(3):
        process = alone.start()
        first.append(spent_s(process.pid))
        process.kill()
        process.wait()
        alone.device.until_free()
        process = alone.start("--upgrade")
        assert alone.api.get("/api/v1/daemon")["state"] == "INIT"
        successor.append(spent_s(process.pid))
        process.kill()
        process.wait()
    print(f"processor seconds: first {min(first):.2f}, successor {min(successor):.2f}")
    assert min(first) <= READY_LIMIT_S
    assert (
        min(successor) <= SUCCESSOR_LIMIT * min(first) + 0.02
    )  # the clock ticks 100 times a second


def test_what_another_has_is_left_alone(alone: Alone) -> None:
    """A device that is busy, without a dead predecessor's socket: nobody follows anybody."""
    alone.start()
    other = alone.root / "other.sock"
    with pytest.raises(AssertionError, match=r"cannot be used: busy"):
        alone.start(socket=other)
    assert alone.processes[-1].wait() == 3 and not other.exists()
    assert alone.api.get("/api/v1/daemon")["state"] == "RUNNING"


def test_ten_thousand_half_open_connections(alone: Alone) -> None:
    """More than its limit are told so; memory stays bounded, reads go on, and so do the requests of
    whoever was there before."""
    process = alone.start()
    alone.device.open(DOMAIN, alone.bind(1))
    alone.device.open(DOMAIN, alone.blob)
    before = resident_bytes(process.pid)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(HALF_OPEN, hard - 1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 900, hard))
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(alone.socket))
    opened = [silent]
    try:
        for number in range(count):
            opened.append(one := socket.socket(socket.AF_UNIX))
            one.connect(str(alone.socket))
            with contextlib.suppress(OSError):  # refused already
                one.send(BEGUN)
            if number % (count // 4) == 0:
                alone.read(number // (count // 4))
        assert "more than 256 connections" in until(lambda: _refusal(alone), "it does not answer")
        silent.send(b"GET /api/v1/daemon HTTP/1.1\r\nHost: unix\r\n\r\n")
        assert b"RUNNING" in silent.recv(4096)
        grown = resident_bytes(process.pid) - before
        print(f"{count} connections: {grown >> 10} KiB more")
        assert grown < MEMORY_LIMIT_BYTES
    finally:
        for one in opened:
            one.close()
    until(lambda: _refusal(alone) == "" or None, "it does not recover")
    alone.read(5)


def _refusal(alone: Alone) -> str | None:
    """What it says to one more; empty: nothing against it, None: it has not come to it yet."""
    try:
        alone.api.get("/api/v1/daemon")
    except DaemonError as error:
        return str(error)
    except DaemonAway:
        return None
    return ""


def test_a_supervisor_that_hangs_costs_its_own_request(alone: Alone) -> None:
    """Reads go on, other requests too, and the snapshotter is told."""
    alone.start()
    alone.device.open(DOMAIN, alone.bind(1))
    alone.device.open(DOMAIN, alone.blob)
    with socket.socket(socket.AF_UNIX) as deaf, socket.socket(socket.AF_UNIX) as first:
        deaf.bind(alone.custodian.path)
        deaf.listen(0)
        first.connect(alone.custodian.path)
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(alone.socket))
            asking.send(
                b"PUT /api/v1/daemon/fuse/sendfd HTTP/1.1\r\nHost: u\r\nContent-Length: 0\r\n\r\n"
            )
            alone.read(0)
            assert alone.api.get("/api/v1/daemon")["state"] == "RUNNING"
            reply = asking.recv(4096)
    assert reply.startswith(b"HTTP/1.1 500") and b"no end of it within 2 s" in reply


def test_a_lying_supervisor_starts_no_successor(alone: Alone) -> None:
    """What it gives is not ours: the takeover says so, and can be tried again."""
    first = alone.start()
    alone.custodian.receives()
    alone.put("fuse/sendfd")
    alone.custodian.done()
    truth = alone.custodian.message
    first.kill()
    first.wait()
    alone.start()
    assert alone.api.get("/api/v1/daemon")["state"] == "INIT"
    alone.custodian.message = b"\x01dbs-snapshot" * 100
    alone.custodian.gives()
    with pytest.raises(DaemonError, match="not of fscached"):
        alone.put("fuse/takeover")
    alone.custodian.message = truth
    alone.custodian.gives()
    alone.put("fuse/takeover")
    alone.put("start")
    assert alone.api.get("/api/v1/daemon")["state"] == "RUNNING"


def test_objects_are_closed_before_exit_is_answered(alone: Alone) -> None:
    """A successor may write `restore` then: nobody else answers their READs any more. However many
    images are bound, what the supervisor keeps is read in one piece."""
    old = alone.start()
    fsids = [alone.bind(number) for number in range(IMAGES)]
    for fsid in fsids[:MOUNTED]:
        alone.device.open(DOMAIN, fsid)
    alone.device.open(DOMAIN, alone.blob)
    alone.read(0)
    alone.custodian.receives()
    alone.put("fuse/sendfd")
    alone.custodian.done()
    assert len(alone.custodian.message) < 1024
    assert len(alone.device.held()) == MOUNTED + 1
    new_socket = alone.root / "api1.sock"
    alone.start("--upgrade", socket=new_socket)
    new = Client(str(new_socket), 30.0)
    alone.custodian.gives()
    new.put("/api/v1/daemon/fuse/takeover")
    assert new.get("/api/v1/daemon")["state"] == "READY"
    assert "restore" not in alone.device.commands[-1:]
    alone.put("exit")
    assert alone.device.held() == []
    new.put("/api/v1/daemon/start")
    alone.read(1)
    assert alone.device.commands[-2:] == ["restore", "drained"]
    assert len(new.get("/api/v2/blobs")) == IMAGES
    assert old.wait(30) == 0

"""Debian's nydus-snapshotter starts, loses, replaces and ends the daemon; readers only wait.

Its mount(2) of an EROFS image fails wherever the kernel has none over fscache: images that stay
bound are bound over the daemon's API, as the snapshotter binds them.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from fscached.control.client import Client
from tests.native.origin import Origin
from tests.rafs_v6.trees import Built
from tests.snapshotter.device import Device
from tests.snapshotter.snapshotter import Snapshotter, until

DOMAIN = "shared"
READ_BYTES = 128 << 10
PATIENCE_S = 5.0
"""More than the snapshotter has: it looks for a successor 20 times, every 100 to 200 ms."""


class Site:
    """A node: the snapshotter, the kernel's end, and images of one blob in one domain."""

    def __init__(
        self, snapshotter: Snapshotter, device: Device, registry: Origin, built: Built
    ) -> None:
        self.snapshotter = snapshotter
        self.device = device
        self.registry = registry
        (self.blob,) = built.blobs
        self.bytes = built.cache_file(self.blob)
        self.bootstrap = built.image.bootstrap
        (snapshotter.root / "image.boot").write_bytes(self.bootstrap)

    def entry(self, number: int) -> dict[str, Any]:
        """What the snapshotter sends to bind an image."""
        fsid = hashlib.sha256(b"nydus-snapshot-%d" % number).hexdigest()
        root = self.snapshotter.root
        backend = {"host": self.registry.host, "repo": "app", "scheme": "http", "retry_limit": 2}
        backend |= {"proxy": {"fallback": False}, "readahead": False, "timeout": 5}
        return {
            "type": "bootstrap",
            "id": fsid,
            "domain_id": DOMAIN,
            "config": {
                "id": fsid,
                "backend_type": "registry",
                "backend_config": backend,
                "cache_type": "fscache",
                "cache_config": {"work_dir": str(root)},
                "metadata_path": str(root / "image.boot"),
            },
        }

    def bind(self, count: int) -> list[str]:
        """Bind images; their fsids."""
        entries = [self.entry(number) for number in range(count)]
        for entry in entries:
            self.snapshotter.daemon.put("/api/v2/blobs", entry)
        return [entry["id"] for entry in entries]

    def bound(self) -> set[str]:
        """The fsids of what is bound."""
        return {image["fsid"] for image in self.snapshotter.daemon.get("/api/v2/blobs")}

    def mount(self, fsid: str) -> None:
        """Open both objects, and read the bootstrap."""
        assert self.device.open(DOMAIN, fsid) == len(self.bootstrap)
        assert self.device.read(DOMAIN, fsid, 0, 4096) == self.bootstrap[:4096]
        assert self.device.open(DOMAIN, self.blob) == len(self.bytes)

    def running(self, *others: int) -> int:
        """Wait for a daemon that runs and is none of these."""

        def look() -> int | None:
            if self.snapshotter.info().get("state") != "RUNNING":
                return None
            return next((pid for pid in self.snapshotter.daemons() if pid not in others), None)

        return until(look, self.snapshotter.log.read_text()[-3000:])


@pytest.fixture
def site(snapshotter: Snapshotter, device: Device, registry: Origin, built: Built) -> Site:
    """Everything, running, and the daemon's descriptors are kept."""
    snapshotter.keeps(1)
    return Site(snapshotter, device, registry, built)


def listed(snapshotter: Snapshotter) -> list[dict[str, Any]]:
    """The daemons its system controller knows."""
    return list(snapshotter.system.get("/api/v1/daemons"))


def test_it_starts_the_daemon_and_keeps_what_outlives_it(site: Site) -> None:
    """The exec'd process serves; it is subscribed to, and its descriptors are with the
    supervisor."""
    (pid,) = site.snapshotter.daemons()
    (daemon,) = listed(site.snapshotter)
    info = site.snapshotter.info()
    assert (daemon["pid"], daemon["id"]) == (pid, info["id"])
    assert Path(f"/proc/{pid}/stat").read_text().count(")") == 1
    assert "Subscribe daemon" in site.snapshotter.log.read_text()
    assert site.snapshotter.stop() == 0
    site.device.until_free()
    assert site.snapshotter.daemons() == []


def test_a_container_is_prepared(site: Site) -> None:
    """A pull asks nothing of the daemon; the run binds the image and mounts it, which fails in a
    kernel without EROFS over fscache, and only there: then it is unbound again."""
    snapshots, labels = site.snapshotter.snapshots, "containerd.io/snapshot/"
    reference = {f"{labels}cri.image-ref": f"{site.registry.host}/app:1"}
    data = {f"{labels}nydus-blob": "true", "containerd.io/snapshot.ref": "chain-1", **reference}
    data |= {f"{labels}cri.layer-digest": f"sha256:{site.blob}"}
    with pytest.raises(grpc.RpcError) as error:
        snapshots.prepare("extract-1", "", data)
    assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
    snapshots.stat("chain-1")
    boot = {f"{labels}nydus-bootstrap": "true", "containerd.io/snapshot.ref": "chain-2"}
    boot |= reference | {f"{labels}cri.layer-digest": f"sha256:{'0' * 64}"}
    snapshots.prepare("extract-2", "chain-1", boot)
    (upper,) = site.snapshotter.root.glob("r/snapshots/2/fs")
    (upper / "image").mkdir()
    (upper / "image/image.boot").write_bytes(site.bootstrap)
    snapshots.commit("chain-2", "extract-2", boot)
    site.snapshotter.daemon.put("/api/v1/daemon", {"log_level": "debug"})
    with pytest.raises(grpc.RpcError) as error:
        snapshots.prepare("container", "chain-2", {})
    assert "failed to mount" in (error.value.details() or ""), error.value.details()
    fsid = site.entry(2)["id"]
    until(lambda: len(asked(site)) >= 5 or None, "the daemon was asked less")
    assert asked(site)[1:] == [
        "PUT /api/v2/blobs 204",
        "PUT /api/v1/daemon/fuse/sendfd 204",
        f"DELETE /api/v2/blobs {fsid} 204",
        "PUT /api/v1/daemon/fuse/sendfd 204",
    ]
    assert site.bound() == set()
    for key in ("container", "chain-2", "chain-1"):
        snapshots.remove(key)
    culled = f"DELETE /api/v2/blobs {site.blob} 204"
    until(lambda: culled in asked(site) or None, "the blob is not culled")


def asked(site: Site) -> list[str]:
    """What the daemon's API was asked and answered, as its log has it at level debug."""
    found = re.findall(r'event=asked request="(.*)" status=(\d+)', site.snapshotter.log.read_text())
    return [f"{request} {status}" for request, status in found if "GET" not in request]


@pytest.mark.parametrize("images", [1, 40])
def test_a_daemon_that_is_killed_has_a_successor(site: Site, images: int) -> None:
    """Its images are bound, and the READ that it left unanswered is answered."""
    fsids = site.bind(images)
    site.mount(fsids[0])
    site.registry.open.clear()
    read = site.device.begin_read(DOMAIN, site.blob, 0, READ_BYTES)
    until(
        lambda: site.snapshotter.daemon.get("/api/v2/status")["totals"]["reads_waiting"] or None,
        "the READ does not come",
    )
    (pid,) = site.snapshotter.daemons()
    begun_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    site.registry.open.set()
    data = site.device.end_read(DOMAIN, site.blob, read)
    print(f"{images} images: the reader waited {time.monotonic() - begun_s:.2f} s")
    assert data == site.bytes[:READ_BYTES]
    assert site.running(pid) and site.bound() == set(fsids)
    assert site.device.opened == 1
    rest = site.device.read(DOMAIN, site.blob, READ_BYTES, 2 * READ_BYTES)
    assert rest == site.bytes[READ_BYTES : 2 * READ_BYTES]


def test_one_crash_after_the_other(site: Site) -> None:
    """What is kept for a successor is kept for the next one too, also for one that dies before it
    has left anything itself. (The snapshotter notices an end only once it has subscribed.)"""
    (fsid,) = site.bind(1)
    site.mount(fsid)
    gone: list[int] = []
    for place in range(3):
        site.snapshotter.logs("Subscribe daemon", place + 1)
        gone.append(site.running(*gone))
        os.kill(gone[-1], signal.SIGKILL)
        start = place * READ_BYTES
        data = site.device.read(DOMAIN, site.blob, start, start + READ_BYTES)
        assert data == site.bytes[start : start + READ_BYTES]
        site.running(*gone)


def test_a_successor_may_be_slow(site: Site) -> None:
    """On a busy machine: it listens before it can answer, and nobody gives up on it."""
    snapshotter = site.snapshotter
    (fsid,) = site.bind(1)
    site.mount(fsid)
    snapshotter.install(snapshotter.nydusd, slow_s=PATIENCE_S)
    gone: list[int] = []
    for place in range(2):
        snapshotter.logs("Subscribe daemon", place + 1)
        gone.append(site.running(*gone))
        os.kill(gone[-1], signal.SIGKILL)
        start = place * READ_BYTES
        data = site.device.read(DOMAIN, site.blob, start, start + READ_BYTES)
        assert data == site.bytes[start : start + READ_BYTES]
    assert site.bound() == {fsid} and site.device.opened == 1


def test_a_successor_that_is_too_late_takes_over_unasked(site: Site) -> None:
    """The snapshotter has given up on it and never asks again; its supervisor gives for longer."""
    snapshotter = site.snapshotter
    fsids = site.bind(2)
    site.mount(fsids[0])
    (pid,) = snapshotter.daemons()
    snapshotter.logs("Subscribe daemon")
    snapshotter.install(snapshotter.nydusd, late_s=PATIENCE_S)
    os.kill(pid, signal.SIGKILL)
    data = site.device.read(DOMAIN, site.blob, 0, READ_BYTES)
    assert data == site.bytes[:READ_BYTES]
    snapshotter.logs("daemon didn't reach state INIT")
    assert site.running(pid)
    assert site.bound() == set(fsids) and site.device.opened == 1


def test_a_hot_upgrade(site: Site) -> None:
    """The new program takes over under a reader; then it lies where the old one was."""
    fsids = site.bind(3)
    site.mount(fsids[0])
    (old,) = site.snapshotter.daemons()
    fresh = site.snapshotter.root / "nydusd.new"
    site.snapshotter.install(fresh)
    site.registry.open.clear()
    read = site.device.begin_read(DOMAIN, site.blob, 0, READ_BYTES)
    body = {"nydusd_path": str(fresh), "version": "2", "policy": "rolling"}
    site.snapshotter.system.put("/api/v1/daemons/upgrade", body)
    site.registry.open.set()
    assert site.device.end_read(DOMAIN, site.blob, read) == site.bytes[:READ_BYTES]
    new = site.running(old)
    site.snapshotter.logs("Subscribe daemon", 2)
    until(lambda: None if _alive(old) else True, "the old one does not end")
    assert site.bound() == set(fsids)
    assert not fresh.exists() and site.snapshotter.nydusd.exists()
    assert site.device.opened == 1
    os.kill(new, signal.SIGKILL)
    data = site.device.read(DOMAIN, site.blob, READ_BYTES, 2 * READ_BYTES)
    assert data == site.bytes[READ_BYTES : 2 * READ_BYTES]


def _alive(pid: int) -> bool:
    """Whether it is more than a process that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_after_a_hot_upgrade_a_snapshotter_finds_the_daemon(site: Site) -> None:
    """What it binds and unbinds goes to the socket of the daemon that it began with, and so does it
    when it starts again: 0.13.4 never learns another. A successor answers there too, and so does
    its own after a crash."""
    fsids = site.bind(1)
    site.mount(fsids[0])
    (old,) = site.snapshotter.daemons()
    first = site.snapshotter.socket
    fresh = site.snapshotter.root / "nydusd.new"
    site.snapshotter.install(fresh)
    body = {"nydusd_path": str(fresh), "version": "2", "policy": "rolling"}
    site.snapshotter.system.put("/api/v1/daemons/upgrade", body)
    new = site.running(old)
    site.snapshotter.logs("Subscribe daemon", 2)
    assert len(list(site.snapshotter.root.glob("r/socket/*/api*.sock"))) == 2
    os.kill(new, signal.SIGKILL)
    data = site.device.read(DOMAIN, site.blob, 0, READ_BYTES)
    assert data == site.bytes[:READ_BYTES]
    last = site.running(old, new)
    assert Client(str(first), 30.0).get("/api/v1/daemon")["state"] == "RUNNING"
    site.snapshotter.kill()
    site.snapshotter.start()
    site.snapshotter.logs("Subscribe daemon", 4)
    assert site.snapshotter.daemons() == [last] and site.bound() == set(fsids)


def test_a_snapshotter_that_is_killed_finds_the_daemon_again(site: Site) -> None:
    """The daemon goes on; the next snapshotter keeps its descriptors anew."""
    (fsid,) = site.bind(1)
    site.mount(fsid)
    (pid,) = site.snapshotter.daemons()
    site.snapshotter.kill()
    data = site.device.read(DOMAIN, site.blob, 0, READ_BYTES)
    assert data == site.bytes[:READ_BYTES]
    site.snapshotter.start()
    site.snapshotter.keeps(2)
    assert site.snapshotter.daemons() == [pid]
    site.snapshotter.logs("Subscribe daemon", 2)
    os.kill(pid, signal.SIGKILL)
    data = site.device.read(DOMAIN, site.blob, READ_BYTES, 2 * READ_BYTES)
    assert data == site.bytes[READ_BYTES : 2 * READ_BYTES]


def test_with_policy_restart_nobody_is_told_that_all_is_well(
    make: Callable[..., Snapshotter], device: Device, registry: Origin, built: Built
) -> None:
    """The device is gone with the daemon: readers get EIO, and a new daemon starts from nothing."""
    snapshotter = make("restart")
    snapshotter.start()
    snapshotter.logs("Subscribe daemon")
    site = Site(snapshotter, device, registry, built)
    (fsid,) = site.bind(1)
    site.mount(fsid)
    (pid,) = snapshotter.daemons()
    registry.open.clear()
    read = device.begin_read(DOMAIN, site.blob, 0, READ_BYTES)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError):
        device.end_read(DOMAIN, site.blob, read)
    registry.open.set()
    assert site.running(pid)
    assert device.opened == 2 and site.bound() == set()


def test_sigterm_is_obeyed_with_work_under_way(site: Site) -> None:
    """The snapshotter waits for it without a limit."""
    (fsid,) = site.bind(1)
    site.mount(fsid)
    site.registry.open.clear()
    site.device.begin_read(DOMAIN, site.blob, 0, READ_BYTES)
    (pid,) = site.snapshotter.daemons()
    site.snapshotter.kill()
    begun_s = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    until(lambda: None if _alive(pid) else True, "it does not end")
    assert time.monotonic() - begun_s < 5
    site.device.until_free()
    assert site.snapshotter.socket is None

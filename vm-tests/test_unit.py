"""Everything under the unit that is shipped for cachefiles: its one capability, its system calls,
its mount namespace, its socket, its watchdog. The other unit has fanotify in
`tests/native/test_package.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import disk, inspector, noise
from harness.daemon import API, SOCKET, drop_caches
from harness.guest import Guest
from harness.manager import Manager
from harness.node import Node
from harness.registry import Registry

UNIT = "fscached-cachefiles"
SERVICE, SOCKET_UNIT = f"{UNIT}.service", f"{UNIT}.socket"
DOCS = Path(__file__).resolve().parent.parent / "docs"
WATCHDOG = b"[Service]\nWatchdogSec=60\n"
"""A third of what is shipped: the daemon has half a minute to be heard."""
KERNEL = "6.12"
"""That of a run without `--long`."""
CAP_SYS_ADMIN = 1 << 21

IMAGE, OTHER = noise.CRASH
SHAPE = noise.IMAGES[IMAGE]
FILE_BLOCKS = SHAPE.file_bytes // noise.BLOCK_BYTES
WINDOW_BYTES = 1 << 20
"""Who has read one file has not had the next one fetched with it."""
MOUNT, OTHER_MOUNT = "/mnt/image", "/mnt/other"
PATIENCE_S = 120.0
REFUSED = ("Operation not permitted", "Permission denied", "Read-only file system", "Traceback")
"""What a call, a capability or a directory that is not allowed leaves in the log."""

pytestmark = pytest.mark.cachefiles


@pytest.fixture(scope="module")
def node(
    boot_guest: Callable[..., Guest],
    tmp_path_factory: pytest.TempPathFactory,
    kernel: str,
    long: bool,
) -> Iterator[Node]:
    """A node whose registry runs and whose daemon is systemd's."""
    if not long and kernel != KERNEL:
        pytest.skip(f"the unit is tried on {KERNEL}; here by --long")
    cache = disk.cache(tmp_path_factory.mktemp("disks") / "cache.ext4")
    guest = boot_guest(disks=[cache, noise.origin().disk])
    node = Node(guest, Registry(guest))
    node.registry.start()
    yield node
    node.registry.stop()


@pytest.fixture
def manager(node: Node) -> Iterator[Manager]:
    """systemd, the unit not started."""
    node.daemon.configure({"log": {"file": ""}, "fetch": {"window_limit_bytes": WINDOW_BYTES}})
    units = {name: (DOCS / name).read_bytes() for name in (SERVICE, SOCKET_UNIT)}
    manager = Manager(node.guest, UNIT, {**units, f"{SERVICE}.d/watchdog.conf": WATCHDOG})
    try:
        yield manager
    except BaseException:
        print(manager.journal())
        raise
    finally:
        manager.end()


def test_a_life_under_the_unit(node: Node, manager: Manager) -> None:
    """Started by who asks its API; mount, cold reads, `kill -9` of the daemon and its supervisor,
    an upgrade, a daemon that stands still, prefetch, trace, repair, culling: nothing is refused."""
    manager.start(SOCKET_UNIT)
    answering = _asked(manager)
    manager.start()
    assert node.daemon.pid() == answering
    supervisor, daemon = int(manager.property("MainPID")), node.daemon.pid()
    for pid in (supervisor, daemon):
        seen = manager.process(pid)
        assert int(seen["CapEff"], 16) == int(seen["CapBnd"], 16) == CAP_SYS_ADMIN
        assert (seen["Seccomp"], seen["NoNewPrivs"]) == ("2", "1")

    node.mount(IMAGE, MOUNT)
    first, second, third, last = names = noise.names(IMAGE)
    _assert_right(node, first)
    manager.kill(daemon)
    _assert_right(node, second)
    manager.reload()
    _assert_right(node, third)
    _assert_replaced_when_it_stands_still(node, manager)
    assert int(manager.property("MainPID")) == supervisor
    manager.kill(supervisor)
    _assert_right(node, last)
    manager.successor(supervisor)

    for words in (
        ("prefetch", "--wait", MOUNT),
        ("trace", "show", MOUNT),
        ("cache", "verify", "--repair"),
        ("umount", MOUNT),
        ("cache", "gc", "--all"),
        ("bugreport", "/run/report.tar.gz"),
    ):
        node.guest.run(["fscached", *words], timeout_s=PATIENCE_S)
    status = node.daemon.status()
    assert status["cache"]["culled_files"] > 0 and status["totals"]["reads_failed"] == 0
    node.mount(IMAGE, MOUNT)
    drop_caches(node.guest)
    _assert_right(node, *names)
    node.daemon.umount(MOUNT)
    manager.stop()
    assert manager.property("Result") == "success"
    manager.run("test", "-S", SOCKET)  # systemd's, who still listens
    journal = manager.journal()
    assert "running" in journal and not [word for word in REFUSED if word in journal], journal


def _assert_right(node: Node, *names: str) -> None:
    reader = inspector.start(node.guest, "stream", MOUNT, *names, timeout_s=PATIENCE_S)
    inspector.all_right([reader], len(names) * FILE_BLOCKS, timeout_s=PATIENCE_S)


def _assert_replaced_when_it_stands_still(node: Node, manager: Manager) -> None:
    """Who reads and who asks the API meanwhile waits for the next one."""
    node.mount(OTHER, OTHER_MOUNT)
    name, wedged = noise.names(OTHER)[0], node.daemon.pid()
    manager.kill(wedged, "STOP")
    reader = inspector.start(node.guest, "stream", OTHER_MOUNT, name, timeout_s=PATIENCE_S)
    assert _asked(manager) != wedged
    inspector.all_right([reader], FILE_BLOCKS, timeout_s=PATIENCE_S)
    assert "event loop stands still" in manager.journal()
    node.daemon.umount(OTHER_MOUNT)


def _asked(manager: Manager) -> int:
    """The process that answers."""
    status = manager.run("curl", "-sSf", "--unix-socket", SOCKET, f"{API}/api/v2/status")
    return int(json.loads(status)["pid"])

"""When nobody of ours is left: what a reader sees, and what the next daemon does about it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from fscached.transport import mount
from tests.native.conftest import Node, forget_pages, image_of, noise, until
from tests.native.origin import Origin

MIB = 1 << 20


def mounted_on(target: Path) -> bool:
    return any(point.target == str(target) for point in mount.mounted())


def test_sigterm_with_reads_waiting_fails_them(node: Node, registry: Origin) -> None:
    """The supervisor ends, and the image with it; who still has a file open gets EIO, and the
    last run of ours stays until nobody has."""
    files = noise(1, 2, MIB)
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    assert (target / "f0").read_bytes() == files["f0"]
    fd = os.open(target / "f1", os.O_RDONLY)
    registry.open.clear()
    failed: list[OSError] = []

    def read() -> None:
        try:
            os.pread(fd, 4096, 0)
        except OSError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: node.wait()["totals"]["reads_waiting"] or None, "nobody waits")
    ending = threading.Thread(target=node.stop)
    ending.start()
    reader.join()
    assert [error.errno for error in failed] == [errno.EIO]
    until(lambda: not mounted_on(target) or None, "it stays mounted")
    with pytest.raises(OSError):
        os.pread(fd, 4096, 8192)
    assert ending.is_alive()
    os.close(fd)
    ending.join()


def test_a_replaced_daemon_is_a_pause(node: Node, registry: Origin) -> None:
    """SIGHUP under a read that waits."""
    files = noise(2, 2, MIB)
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    registry.open.clear()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((target / "f1").read_bytes()))
    reader.start()
    until(lambda: node.wait()["totals"]["reads_waiting"] or None, "nobody waits")
    before = node.daemon_pid()
    os.kill(node.supervisor_pid, 1)
    until(lambda: node.daemon_pid() not in {0, before} or None, "no successor")
    registry.open.set()
    reader.join()
    assert read == [files["f1"]]


def test_loss_of_everything(node: Node, registry: Origin) -> None:
    """Holes read as zeros from the moment the last holder is gone: the kernel's own answer. The
    next daemon takes the image down, and whoever still has a file open gets EIO for holes."""
    files = noise(3, 3, MIB)
    reference = registry.add("app", image_of(files))
    node.start()
    target = node.mount(reference)
    assert (target / "f0").read_bytes() == files["f0"]
    node.lose()
    assert (target / "f1").read_bytes() == bytes(MIB)
    fd = os.open(target / "f2", os.O_RDONLY)
    node.start()
    assert not mounted_on(target)
    with pytest.raises(OSError) as caught:
        os.pread(fd, 4096, 0)
    assert caught.value.errno == errno.EIO
    refused = node.fscached("mount", reference, target, check=False)
    assert refused.returncode == 1 and "has it open" in refused.stderr
    os.close(fd)
    target = until(lambda: _mounted(node, reference, target), "it cannot be mounted again")
    forget_pages(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files


def _mounted(node: Node, reference: str, target: Path) -> Path | None:
    done = node.fscached("mount", reference, target, check=False)
    return node.mounted(target) if done.returncode == 0 else None


def test_complete_images_survive_the_loss(node: Node, registry: Origin) -> None:
    """They have no holes, so there is nothing to take down."""
    files = noise(4, 1, MIB)
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    assert (target / "f0").read_bytes() == files["f0"]
    node.lose()
    node.start()
    forget_pages(target)
    assert mounted_on(target) and (target / "f0").read_bytes() == files["f0"]


def test_it_does_not_run_without_a_holder(node: Node) -> None:
    """Only who says so gets a daemon whose crash is zeros."""
    done = node.fscached("run", check=False)
    assert done.returncode == 3
    assert "nobody would hold fanotify" in done.stderr and "--unsafe-no-supervisor" in done.stderr


def test_a_second_daemon_does_not_take_for_lost_what_is_served(
    node: Node, registry: Origin
) -> None:
    """It is refused before it looks at any file."""
    files = noise(6, 2, MIB)
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    assert (target / "f0").read_bytes() == files["f0"]
    done = node.fscached("run", "--unsafe-no-supervisor", check=False)
    assert done.returncode == 1 and "another daemon uses" in done.stderr
    assert mounted_on(target) and (target / "f1").read_bytes() == files["f1"]


def test_two_daemons_leave_each_other_alone(node: Node, registry: Origin, tmp_path: Path) -> None:
    """The same image of both is two mounts, and goes with the daemon it is of."""
    files = noise(7, 2, MIB)
    reference = registry.add("app", image_of(files))
    (tmp_path / "other").mkdir()
    other = Node(tmp_path / "other", registry.host)
    node.start()
    other.start()
    try:
        mine, theirs = node.mount(reference), other.mount(reference)
        assert (theirs / "f0").read_bytes() == files["f0"]
        assert other.stop() == 0
        assert not mounted_on(theirs)
    finally:
        other.end()
    assert mounted_on(mine) and (mine / "f1").read_bytes() == files["f1"]


def test_a_daemon_without_a_holder_leaves_by_itself(node: Node, registry: Origin) -> None:
    """Who said so gets one; its SIGTERM is the end of images with holes."""
    files = noise(5, 2, MIB)
    node.start("run", "--unsafe-no-supervisor")
    target = node.mount(registry.add("app", image_of(files)))
    assert (target / "f0").read_bytes() == files["f0"]
    assert node.stop() == 0
    assert not mounted_on(target)
    until(lambda: "taken down" in node.log.read_text() or None, "the log says nothing")

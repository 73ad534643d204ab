"""`fscached mount` and `fscached umount` against a daemon's API and a stand-in mount table."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fscached.cli import _daemon
from fscached.transport import ObjectKey, mount

Fscached = Callable[..., tuple[int, str, str]]
REFERENCE = "registry.test/app:1"


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    """Three directories to mount on."""
    found = [tmp_path / name for name in "abc"]
    for path in found:
        path.mkdir()
    return found


def test_the_first_mount(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """The image is registered, then mounted in its domain."""
    status, output, _ = fscached("mount", REFERENCE, directories[0])
    assert status == 0
    assert output == f"{REFERENCE} (sha256:00) mounted on {directories[0]}\n"
    assert daemon.happened == ["add", "mount"]
    [point] = mounts.table
    assert (point.fsid, point.domain_id, point.target) == ("f" * 64, "dom", str(directories[0]))


def test_a_new_image_is_mounted_twice_so_that_its_cache_survives_a_crash(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """An unlinked cache file is linked by its first CLOSE."""
    daemon.settled = False
    status, output, _ = fscached("mount", REFERENCE, directories[0])
    assert (status, len(mounts.table)) == (0, 1)
    assert daemon.happened == ["add", "mount", "unmount", "mount"]
    assert "linked by a first mount and umount" in output


def test_where_the_kernel_mounts_files(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """The daemon says which; one mount is enough, and a second mount point is bound."""
    daemon.files = True
    for directory in directories[:2]:
        assert fscached("mount", REFERENCE, directory)[0] == 0
    assert daemon.happened == ["add", "mount", "add", "bind"]
    assert {point.fsid for point in mounts.table} == {"f" * 64}
    for directory in directories[:2]:
        assert fscached("umount", directory)[0] == 0
    assert daemon.registered == {}


def test_a_second_mount_point_is_a_bind_mount(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """The kernel refuses the same fsid twice; the image is forgotten after its last umount."""
    daemon.settled = False
    for directory in directories:
        assert fscached("mount", REFERENCE, directory)[0] == 0
    assert daemon.happened.count("mount") == 2
    assert daemon.happened.count("bind") == 2
    # In any order: the first mount point has no privilege.
    for directory, left in [(0, "1 2"), (2, "1"), (1, "")]:
        status, output, _ = fscached("umount", directories[directory])
        assert status == 0
        others = ", ".join(str(directories[int(number)]) for number in left.split())
        still = f", still mounted on {others}" if left else ""
        assert output == f"unmounted {directories[directory]}{still}\n"
        assert bool(daemon.registered) == bool(left)


def test_mounting_where_it_is_mounted_changes_nothing(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """Asking twice is no error."""
    fscached("mount", REFERENCE, directories[0])
    status, output, _ = fscached("mount", REFERENCE, directories[0])
    assert (status, len(mounts.table)) == (0, 1)
    assert output.endswith(f"is mounted on {directories[0]} already\n")


def test_a_refused_mount_leaves_nothing_registered(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """The kernel's word and the remedy in one line."""
    mounts.refuse = True
    status, _, error = fscached("mount", REFERENCE, directories[0])
    assert status == 1
    assert error == f"fscached mount: mounting {'f' * 64}: I/O error: see the daemon's log\n"
    assert daemon.registered == {}


def test_what_a_dead_mount_holds_is_not_mounted(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """A bind mount of it, or an image that shares a blob with it, could not be read."""
    dead, shares, first = directories
    mounts.table.append(mount.Mount("e" * 64, "dom", str(dead), "0:8"))
    mounts.gone = frozenset(ObjectKey("dom", name) for name in ("e" * 64, "b" * 64))
    status, _, error = fscached("mount", REFERENCE, shares)
    assert (status, daemon.registered, daemon.happened) == (1, {}, ["add", "remove"])
    assert error == (
        f"fscached mount: {REFERENCE}: files of it are held by mounts whose daemon has ended, on "
        f"{dead}: unmount them first, all their reads fail\n"
    )
    mounts.gone = frozenset()
    assert fscached("mount", REFERENCE, first)[0] == 0
    mounts.gone = frozenset({ObjectKey("dom", "f" * 64)})
    for directory in (first, shares):
        status, _, error = fscached("mount", REFERENCE, directory)
        assert status == 1 and f"on {first}" in error
    assert "bind" not in daemon.happened


def test_an_image_forgotten_while_it_was_pulled_is_registered_again(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """Somebody's last umount came between."""

    def forgotten_once() -> None:
        daemon.registered.clear()
        daemon.after_pull = lambda: None

    daemon.after_pull = forgotten_once
    assert fscached("mount", REFERENCE, directories[0])[0] == 0
    assert daemon.happened == ["add", "add", "mount"]


def test_credentials_come_from_standard_input(
    daemon: Any,
    mounts: Any,
    fscached: Fscached,
    directories: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never from the command line, which everybody can read."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hunter2\n"))
    words = ["--username", "u", "--password-stdin", REFERENCE, directories[0]]
    assert fscached("mount", *words)[0] == 0
    assert (daemon.credentials.username, daemon.credentials.password) == ("u", "hunter2")


def test_what_is_no_directory_is_refused_before_anything_is_pulled(
    daemon: Any, mounts: Any, fscached: Fscached, tmp_path: Path
) -> None:
    """The line says what to do."""
    status, _, error = fscached("mount", REFERENCE, tmp_path / "none")
    assert status == 1
    assert error == f"fscached mount: {tmp_path / 'none'}: not a directory: make it first\n"
    assert daemon.happened == []


def test_the_daemons_refusal_is_shown(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """In its own words."""
    status, _, error = fscached("mount", "registry.test/absent", directories[0])
    assert status == 1
    assert error.startswith("fscached mount: registry.test/absent: no such image: ")
    assert mounts.table == []


def test_umount_of_what_is_not_ours(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """Nothing is unmounted that is no image."""
    status, _, error = fscached("umount", directories[0])
    assert status == 1
    assert error.startswith(f"fscached umount: {directories[0]}: no image is mounted there")
    assert daemon.happened == []


def test_umount_of_an_image_the_daemon_does_not_know(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path]
) -> None:
    """A daemon that lost its memory is no reason to fail."""
    fscached("mount", REFERENCE, directories[0])
    daemon.registered.clear()
    assert fscached("umount", directories[0])[0] == 0


def test_umount_without_a_daemon(mounts: Any, fscached: Fscached, directories: list[Path]) -> None:
    """The directory is free, and the status says that the daemon was not told."""
    mounts.mount_fsid(str(directories[0]), "f" * 64)
    status, _, error = fscached("umount", directories[0])
    assert (status, mounts.table) == (3, [])
    assert "no daemon answers" in error


def test_a_link_to_the_mount_points_parent_is_followed(
    daemon: Any, mounts: Any, fscached: Fscached, directories: list[Path], tmp_path: Path
) -> None:
    """The mount table has real paths."""
    (tmp_path / "link").symlink_to(tmp_path)
    assert fscached("mount", REFERENCE, tmp_path / "link" / "a")[0] == 0
    assert fscached("umount", directories[0])[0] == 0


def test_one_mount_or_umount_at_a_time(
    daemon: Any,
    mounts: Any,
    fscached: Fscached,
    directories: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who finds the lock taken says so and waits."""
    holder = os.open(tmp_path / "mounts.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    flock = fcntl.flock

    def released_on_wait(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            assert daemon.happened == ["add"]
            os.close(holder)
        flock(fd, operation)

    monkeypatch.setattr(_daemon.fcntl, "flock", released_on_wait)
    status, _, error = fscached("mount", REFERENCE, directories[0])
    assert (status, error) == (0, "waiting for another mount or umount to end\n")
    assert daemon.happened == ["add", "mount"]

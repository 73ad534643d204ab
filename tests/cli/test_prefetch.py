"""`fscached prefetch` against a daemon's API and a stand-in mount table."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from fscached.cli import _download, prefetch
from fscached.control.http import ApiError
from fscached.control.messages import PrefetchStatus
from fscached.prefetch.phase import Phase

Fscached = Callable[..., tuple[int, str, str]]
REFERENCE = "registry.test/app:1"
RUNNING = PrefetchStatus(Phase.RUNNING, "", 2, 1 << 20, 2 << 20, 1048576.0, 2.0)
DONE = PrefetchStatus(Phase.DONE, "", 3, 3 << 20, 0, 0.0, 0.0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the next look."""
    monkeypatch.setattr(prefetch, "POLL_S", 0.0)


@pytest.fixture
def mounted(daemon: Any, mounts: Any, fscached: Fscached, tmp_path: Path) -> Path:
    """Where the image is mounted."""
    (directory := tmp_path / "a").mkdir()
    assert fscached("mount", REFERENCE, directory)[0] == 0
    daemon.happened.clear()
    return directory


@pytest.mark.parametrize("by", ["reference", "directory"])
def test_a_mounted_image_is_ordered(
    daemon: Any, fscached: Fscached, mounted: Path, by: str
) -> None:
    """Without --wait it is over at once."""
    daemon.reports = [RUNNING]
    status, output, error = fscached("prefetch", REFERENCE if by == "reference" else mounted)
    assert (status, error) == (0, "")
    assert output.endswith(": running, 2.0 MiB left, 3 s\n")
    assert daemon.happened == ["prefetch"]


def test_waiting_shows_how_it_goes_on(daemon: Any, fscached: Fscached, mounted: Path) -> None:
    """Lines where no terminal is, one for each change."""
    daemon.reports = [RUNNING, RUNNING, RUNNING, DONE, DONE]
    status, output, error = fscached("prefetch", REFERENCE, "--wait")
    assert status == 0 and output.startswith(f"{REFERENCE}: done; 3.0 MiB brought in ")
    assert error.splitlines() == [
        f"{REFERENCE}: running, 2.0 MiB left, 3 s",
        f"{REFERENCE}: done",
    ]


def test_json(daemon: Any, fscached: Fscached, mounted: Path) -> None:
    """The last report and whose it is."""
    daemon.reports = [DONE]
    found = json.loads(fscached("prefetch", mounted, "--wait", "-o", "json")[1])
    assert (found["fsid"], found["phase"], found["brought_bytes"]) == ("f" * 64, "done", 3 << 20)


@pytest.mark.parametrize("end", [Phase.STOPPED, Phase.UNMOUNTED])
def test_what_does_not_come_is_a_failure(
    daemon: Any, fscached: Fscached, mounted: Path, end: Phase
) -> None:
    """Exit status 1, and why."""
    daemon.reports = [RUNNING, PrefetchStatus(end, "at most 4 % are free", left_bytes=1 << 20)]
    status, _, error = fscached("prefetch", REFERENCE, "--wait")
    assert status == 1 and "not all of it is here" in error and "4 % are free" in error


def test_waiting_has_an_end(daemon: Any, fscached: Fscached, mounted: Path) -> None:
    """--timeout."""
    daemon.reports = [RUNNING]
    assert fscached("prefetch", REFERENCE, "--wait", "--timeout", "0.001")[0] == 1
    assert fscached("prefetch", REFERENCE, "--timeout", "1")[0] == 2


def test_an_image_nobody_has_mounted_needs_somebody_who_waits(
    daemon: Any, mounts: Any, fscached: Fscached
) -> None:
    """Exit status 3 and what to do."""
    status, _, error = fscached("prefetch", REFERENCE)
    assert status == 3 and "--wait" in error and "fscached mount" in error
    assert daemon.happened == []


def test_it_is_mounted_for_as_long_as_somebody_waits(
    daemon: Any, mounts: Any, fscached: Fscached, tmp_path: Path
) -> None:
    """In a directory of ours; nothing is left of that."""
    daemon.reports = [RUNNING, DONE]
    assert fscached("prefetch", REFERENCE, "--wait")[0] == 0
    assert daemon.happened == ["add", "mount", "prefetch", "unmount", "remove"]
    assert mounts.table == [] and list((tmp_path / "prefetch").iterdir()) == []


def test_whoever_mounts_it_meanwhile_keeps_it(
    daemon: Any, mounts: Any, fscached: Fscached, tmp_path: Path
) -> None:
    """The image is not forgotten while another mount point is there."""
    (tmp_path / "b").mkdir()
    daemon.reports = [DONE]
    daemon.on_prefetch = lambda: mounts.bind(mounts.table[0].target, str(tmp_path / "b"))
    assert fscached("prefetch", REFERENCE, "--wait")[0] == 0
    assert [point.target for point in mounts.table] == [str(tmp_path / "b")]
    assert "remove" not in daemon.happened


def test_a_mount_that_fails_leaves_nothing(
    daemon: Any, mounts: Any, fscached: Fscached, tmp_path: Path
) -> None:
    """Its error is the error."""
    mounts.refuse = True
    status, _, error = fscached("prefetch", REFERENCE, "--wait")
    assert status == 1 and "I/O error" in error
    assert list((tmp_path / "prefetch").iterdir()) == []


def test_a_directory_without_an_image(daemon: Any, mounts: Any, fscached: Fscached) -> None:
    """Is said to be one."""
    status, _, error = fscached("prefetch", "/somewhere")
    assert status == 1 and "no image is mounted there" in error


def test_a_mounted_image_whose_daemon_was_replaced(
    daemon: Any, fscached: Fscached, mounted: Path
) -> None:
    """cachefiles says what is open when somebody misses something: nothing can be brought before,
    and a directory is no image's name to mount elsewhere."""

    def refuse() -> None:
        raise ApiError(HTTPStatus.CONFLICT, "the image is not open")

    daemon.on_prefetch = refuse
    status, _, error = fscached("prefetch", mounted, "--wait")
    assert status == 1 and "has not opened" in error and "read a file of it" in error
    assert daemon.happened == ["prefetch"]


def test_a_bar_where_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of what was left at first, and what holds it up."""
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(record=True, width=120, force_terminal=True))
    bar = _download.Bar(REFERENCE, progress)
    bar.show({"phase": "running", "why": "", "left_bytes": 300})
    bar.show({"phase": "paused", "why": "readers come first", "left_bytes": 100})
    [task] = progress.tasks
    assert (task.completed, task.total) == (200, 300)
    assert task.description == f"{REFERENCE} paused (readers come first)"

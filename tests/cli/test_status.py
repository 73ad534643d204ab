"""`fscached status`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fscached.cli import status

Fscached = Callable[..., tuple[int, str, str]]


def test_json_is_the_daemons_status_and_the_mount_points(
    daemon: Any, mounts: Any, fscached: Fscached, tmp_path: Path
) -> None:
    """Mount points come from the mount table, the rest from the daemon."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fscached("mount", "registry.test/app:1", tmp_path / name)
    found = json.loads(fscached("status", "-o", "json")[1])
    assert found["totals"]["reads"] == 6
    [image] = found["images"]
    assert image["mounts"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert image["blobs"][0]["resident_bytes"] is None


def test_text(daemon: Any, mounts: Any, fscached: Fscached, tmp_path: Path) -> None:
    """A line about the daemon, one about its work, and a table."""
    (tmp_path / "a").mkdir()
    fscached("mount", "registry.test/app:1", tmp_path / "a")
    lines = fscached("status")[1].splitlines()
    assert lines[0] == (
        "fscached 0.1.0 (cccccccccccc), pid 812, RUNNING for 1 h 2 min, transport cachefiles, "
        "40.0 MiB of memory"
    )
    assert lines[1].startswith("6 READs (1 failed, 0 waiting), 2 requests, 2.0 KiB received")
    cells = [line.split() for line in lines[3:]]
    assert cells[0] == list(status.COLUMNS)
    assert lines[4].startswith(f"registry.test/app:1 on {tmp_path / 'a'} ")
    assert cells[2][0] == "bootstrap"
    assert cells[3][:3] == ["blob", "b" * 12, "unknown"]
    assert lines[4].endswith("paused (readers come first), 3.0 MiB left, 1 min 5 s")
    assert len(set(map(len, lines[3:7]))) == 1
    assert lines[7] == "registry.test/app:1 given: 2.0 KiB by local peer"


def test_no_images(daemon: Any, mounts: Any, fscached: Fscached) -> None:
    """Says how to add one."""
    assert "no images; `fscached mount REF DIR` adds one" in fscached("status")[1]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 51, "2048.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    """Binary units."""
    assert status.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h"), (90_061, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    """Two units at most."""
    assert status.duration(seconds) == text

"""`fscached cache`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from fscached.control.messages import CacheFileInfo

Fscached = Callable[..., tuple[int, str, str]]


def file(cookie: str, **others: Any) -> CacheFileInfo:
    known: dict[str, Any] = {
        "volume": "dom",
        "kind": "blob",
        "state": "bound",
        "open": False,
        "size_bytes": 3 << 20,
        "allocated_bytes": 1 << 20,
        "used_s": time.time() - 3605,
        "path": "/var/cache/x",
        "images": ["registry.test/app:1"],
    }
    return CacheFileInfo(cookie=cookie, **known | others)


def test_the_listing_says_whose_files_they_are(daemon: Any, fscached: Fscached) -> None:
    """What they take, how long nobody used them, who needs them."""
    daemon.budget_bytes = 4 << 20
    daemon.cache_files = [
        file("b" * 64, open=True, path=""),
        file("c" * 64, kind="", state="orphan", images=[]),
    ]
    status, said, _ = fscached("cache", "ls")
    lines = said.splitlines()
    assert status == 0
    assert lines[0] == "/var/cache: 2 files take 3.0 MiB of 4.0 MiB"
    assert lines[3].split("  ")[0] == f"blob {'b' * 20}"
    assert "1 h 5 s ago" in lines[3] and "bound, open, no name yet" in lines[3]
    assert lines[4].startswith("unknown") and lines[4].endswith("none")
    found = json.loads(fscached("cache", "ls", "-o", "json")[1])
    assert [it["cookie"] for it in found["files"]] == ["b" * 64, "c" * 64]


def test_an_empty_cache_is_one_line(daemon: Any, fscached: Fscached) -> None:
    """Without a table."""
    assert fscached("cache", "ls")[1] == "/var/cache: 0 files take 3.0 MiB, no budget\n"


def test_what_was_deleted_is_said(daemon: Any, fscached: Fscached) -> None:
    """And what could not be; as people and as programs read it."""
    status, said, _ = fscached("cache", "gc")
    assert status == 0 and said.splitlines() == [
        f"orphan: {'b' * 20}, 2.0 MiB",
        f"in use: {'c' * 20}, 1.0 MiB",
        "1 files deleted, 2.0 MiB; the cache takes 1.0 MiB",
    ]
    assert "would be deleted" in fscached("cache", "gc", "--dry-run", "--all")[1]
    assert json.loads(fscached("cache", "gc", "-o", "json")[1])["used_bytes"] == 1 << 20
    assert daemon.happened == ["collect False False", "collect True True", "collect False False"]


def test_a_cache_that_stays_too_large_is_a_failure(daemon: Any, fscached: Fscached) -> None:
    """Scripts see it."""
    daemon.excess_bytes = 1 << 20
    status, said, _ = fscached("cache", "gc")
    assert status == 1 and "1.0 MiB too much" in said


def test_without_a_daemon_there_is_nothing_to_ask(fscached: Fscached) -> None:
    """A missing precondition."""
    status, _, said = fscached("cache", "ls")
    assert status == 3 and "no daemon answers" in said

"""The version text, which nydus-snapshotter reads."""

from __future__ import annotations

import re
from pathlib import Path

from fscached import __version__, version
from fscached.control.messages import Version


def test_the_commit_is_read_from_the_checkout(tmp_path: Path) -> None:
    """Detached, on a branch, packed, or no checkout at all."""
    assert version.git_commit(tmp_path) == f"unknown ({__version__})"
    (tmp_path / "HEAD").write_text("ab" * 20 + "\n")
    assert version.git_commit(tmp_path) == "ab" * 20
    (tmp_path / "HEAD").write_text("ref: refs/heads/main\n")
    assert version.git_commit(tmp_path).startswith("unknown")
    (tmp_path / "packed-refs").write_text("# pack-refs\n" + "cd" * 20 + " refs/heads/main\n")
    assert version.git_commit(tmp_path) == "cd" * 20
    (tmp_path / "refs" / "heads").mkdir(parents=True)
    (tmp_path / "refs" / "heads" / "main").write_text("ef" * 20 + "\n")
    assert version.git_commit(tmp_path) == "ef" * 20


def test_the_snapshotter_finds_the_commit() -> None:
    """Its regular expression matches, and what it finds equals what the API says."""
    found = re.search(r"Git Commit:\s*(.+)", version.text())
    assert found
    assert found[1] == Version().git_commit

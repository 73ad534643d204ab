"""Which fscached this is, in the words in which nydus-snapshotter asks a nydusd.

The snapshotter takes `Git Commit:\\s*(.+)` from `--version` and compares it with `git_commit` of
the running daemon's API: both come from here, and differ between releases.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from fscached import __version__

PROFILE = "release"
PYTHON = "Python {}.{}.{}".format(*sys.version_info[:3])


def git_commit(git: Path) -> str:
    """The commit of a checkout, given its .git; `unknown` and the version when there is none."""
    try:
        head = (git / "HEAD").read_text("ascii").strip()
        if not head.startswith("ref: "):
            return head
        return _commit_of(git, head.removeprefix("ref: "))
    except (OSError, UnicodeDecodeError, LookupError):
        return f"unknown ({__version__})"


def text() -> str:
    """What `fscached --version` prints: nydusd's lines, which other programs read."""
    return (
        f"Version: \tv{__version__}\n"
        f"Git Commit: \t{COMMIT}\n"
        f"Build Time: \t\n"
        f"Profile: \t{PROFILE}\n"
        f"Rustc: \t\tnone ({PYTHON})\n"
    )


def _commit_of(git: Path, ref: str) -> str:
    loose = git / ref
    if loose.is_file():
        return loose.read_text("ascii").strip()
    for line in (git / "packed-refs").read_text("ascii").splitlines():
        commit, _, name = line.partition(" ")
        if name == ref:
            return commit
    raise LookupError(ref)


def _own_commit() -> str:
    here = Path(__file__).parent
    packaged = here / "COMMIT"
    return (
        packaged.read_text("ascii").strip()
        if packaged.is_file()
        else git_commit(here.parent / ".git")
    )


COMMIT: Final = _own_commit()
"""Of what this process was started from: a package says it in a file, else it is a checkout."""

"""Where benches run, and what is said about it beside every figure."""

from __future__ import annotations

import datetime
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ":!benchmarks/results"


@dataclass(frozen=True)
class Options:
    """How a bench was called. `scratch` is an empty directory that goes away with the run. `only`
    names the parts of the bench that are wanted, empty: all; `long`: what takes very long too;
    `peer`: the command of another daemon to compare with, or nothing."""

    bench: str
    kernel: str
    repetitions: int
    scratch: Path
    only: tuple[str, ...] = ()
    long: bool = False
    peer: str = ""


def host(options: Options) -> dict[str, object]:
    """What every environment says about the machine below it and about the run."""
    return {
        "machine": _machine(),
        "command": shlex.join(["scripts/bench", *sys.argv[1:]]),
        "repetitions": options.repetitions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def _machine() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def commit() -> str:
    """The commit, marked when the tree differs from it in more than results."""
    git = ["git", "-C", str(ROOT)]
    status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", RESULTS]
    head = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(status, capture_output=True, text=True, check=False).stdout
    return (head.stdout.strip() or "unknown") + ("-dirty" if changed else "")

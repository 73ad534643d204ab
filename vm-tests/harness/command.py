"""Host commands that either work or say why they did not."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

OUTPUT_TAIL_BYTES = 4000


class CommandFailed(Exception):
    """A host command failed; the message carries the command and the end of what it printed."""


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 900,
) -> str:
    """Run `argv` and return its standard output.

    Raises CommandFailed when the program is missing, exits with an error, or exceeds `timeout_s`.
    """
    line = " ".join(map(str, argv))
    try:
        done = subprocess.run(
            [str(word) for word in argv],
            check=False,
            cwd=cwd,
            env=env,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise CommandFailed(f"{error.filename}: not found; scripts/setup installs it") from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{line}: no end after {timeout_s} s") from error
    if done.returncode != 0:
        tail = (done.stdout + done.stderr)[-OUTPUT_TAIL_BYTES:].strip()
        raise CommandFailed(f"{line}: exit status {done.returncode}\n{tail}")
    return done.stdout

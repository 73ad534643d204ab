"""Traces kept beside the cache: `IMAGE.trace` of complete runs, `IMAGE.NUMBER.run` of one that goes
on, which is joined to the others when it ends, or by the next daemon when this one is killed.

An image's name here is its bootstrap's sha256, which is the fsid of those that we pull ourselves:
a snapshotter's fsid is another one for each snapshot. Calls block for as long as a disk does.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

from fscached.prefetch.trace import TRACE_LIMIT_BYTES, Trace, TraceError, decode, encode, merge
from fscached.store import replace

log = logging.getLogger(__name__)

IMAGE_LIMIT: Final = 1024
"""Images of which traces are kept; those not recorded for longest go first."""


class Traces:
    """A directory that root alone can read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, image: str) -> Trace | None:
        """What is known of an image from runs that are over, or None."""
        return self._read(self._trace(image), image)

    def keep_run(self, run: Trace, number: str) -> None:
        """A run as far as it has come. Raises OSError."""
        self._write(self._directory / f"{run.fsid}.{number}.run", run)

    def settle(self, image: str, number: str) -> None:
        """A run is over. Raises OSError."""
        self._join(self._directory / f"{image}.{number}.run", image)
        self._prune()

    def recover(self) -> None:
        """Runs whose daemon did not live to settle them are over."""
        for path in self._directory.glob("*.run"):
            with suppress(OSError):
                self._join(path, path.name.partition(".")[0])

    def adopt(self, trace: Trace) -> None:
        """Add a trace from elsewhere to what is known. Raises OSError."""
        known = self.load(trace.fsid)
        self._write(self._trace(trace.fsid), merge([known, trace]) if known else trace)
        self._prune()

    def forget(self, image: str) -> bool:
        """Remove what is known of an image. False when nothing was. Raises OSError."""
        try:
            self._trace(image).unlink()
        except FileNotFoundError:
            return False
        return True

    def _trace(self, image: str) -> Path:
        return self._directory / f"{image}.trace"

    def _join(self, path: Path, image: str) -> None:
        run = self._read(path, image)
        if run is not None:
            self.adopt(run)
        path.unlink(missing_ok=True)

    def _read(self, path: Path, image: str) -> Trace | None:
        """What is no trace, or another image's, is as good as none."""
        try:
            with path.open("rb") as file:
                trace = decode(file.read(TRACE_LIMIT_BYTES + 1))
            if trace.fsid != image:
                raise TraceError(f"of image {trace.fsid[:12]}")
        except FileNotFoundError:
            return None
        except (OSError, TraceError) as error:
            log.warning("%s is of no use, and made anew: %s", path, error)
            return None
        return trace

    def _write(self, path: Path, trace: Trace) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace(path, encode(trace))

    def _prune(self) -> None:
        files = sorted(self._directory.glob("*.trace"), key=lambda path: path.stat().st_mtime)
        for path in files[: max(0, len(files) - IMAGE_LIMIT)]:
            path.unlink(missing_ok=True)

"""Traces as people name them: a file, an image, or where it is mounted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from fscached.cli import _daemon
from fscached.cli._layout import LAYOUT_PREFIX, machine_platform, open_layout
from fscached.cli._recommendation import read_trace
from fscached.control.client import DaemonError
from fscached.failure import Failure, Missing
from fscached.prefetch.files import uses
from fscached.prefetch.trace import FileUse, Trace, TraceError, decode
from fscached.store import unpack_bootstrap
from fscached.transport import mount
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.revision import bootstrap_descriptor

TRACES = "/api/v2/traces"


class Known(NamedTuple):
    """A trace, and the bootstrap of its image if that is at hand."""

    trace: Trace
    image: Bootstrap | None

    def files(self) -> tuple[FileUse, ...]:
        """What was read by name, first used first; empty when nobody knows the names."""
        if self.image is None:
            return self.trace.files
        return tuple(use.brief for use in uses(self.image, self.trace.accesses))


def known(arguments: argparse.Namespace, name: str, *, run: bool = False) -> Known:
    """The trace that somebody means; with `run`, of an image only the run that goes on.

    Raises Failure.
    """
    if name.startswith(("/", ".")) and not Path(name).exists():
        raise Missing(
            "no such file or directory", "export it with `fscached trace export`", where=name
        )
    if Path(name).is_file():
        return Known(read_trace(name), _image(arguments.image) if arguments.image else None)
    query = {"image": image_of(name)} | ({"run": "true"} if run else {})
    try:
        reply = _daemon.client(arguments).get(TRACES, **query)
    except DaemonError as error:
        if error.status == 404:
            raise Missing(error.what, "see `fscached status` for images, or name a file") from None
        raise
    return Known(_trace(reply), _bootstrap(Path(reply["bootstrap"])))


def image_of(name: str) -> str:
    """What the daemon knows an image by: its fsid when `name` is where it is mounted."""
    if not Path(name).is_dir():
        return name
    target = _daemon.location(name)
    fsids = [point.fsid for point in mount.mounted() if point.target == target]
    if not fsids:
        raise Missing("no image is mounted there", "see `fscached status`", where=target)
    return fsids[-1]


def _trace(reply: dict[str, Any]) -> Trace:
    try:
        return decode(json.dumps(reply["trace"]).encode())
    except TraceError as error:
        raise Failure("the daemon's trace", str(error)) from None


def _image(text: str) -> Bootstrap:
    if not text.startswith(LAYOUT_PREFIX):
        return _bootstrap(Path(text))
    try:
        layout, tag = open_layout(text)
        layer = bootstrap_descriptor(layout.image(tag, machine_platform()))
        with layout.open(layer) as file:
            return Bootstrap(unpack_bootstrap(file.read()))
    except ImageError as error:
        raise Failure(text, str(error)) from error


def _bootstrap(path: Path) -> Bootstrap:
    try:
        return Bootstrap(path.read_bytes())
    except FileNotFoundError:
        raise Missing(
            "no such file", f"name a bootstrap, or {LAYOUT_PREFIX}DIR", where=str(path)
        ) from None
    except ImageError as error:
        raise Failure(str(path), str(error)) from error

"""`fscached prefetch`: all of an image, now.

Of an image that is mounted the daemon brings the rest, whatever its settings; who waits for it sees
it come. The kernel's cache has files only for what is mounted, so an image that is not is mounted
on a directory of ours for as long as somebody waits: whoever mounts it meanwhile is bound to that.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fscached import config
from fscached.cli import Subparsers, Usage, _daemon, _download, add_output, umount
from fscached.cli import mount as mount_verb
from fscached.cli.status import prefetch as phrase
from fscached.control.client import Client, DaemonError
from fscached.failure import Failure, Missing
from fscached.transport import mount

PREFETCH = "/api/v2/prefetch"
NOT_FOUND, CONFLICT = 404, 409

ENDS = ("done", "stopped", "unmounted")
"""Phases that do not change by themselves, or not soon."""

POLL_S = 0.25


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "prefetch",
        help="bring all of an image into the cache",
        description="Bring all of an image into the cache. With --wait the image need not be "
        "mounted, and the exit status is 0 only when all of it is there.",
    )
    parser.add_argument(
        "reference",
        metavar="REF|DIR",
        help="an image, or the directory where one is mounted: with / or . in front",
    )
    parser.add_argument("--wait", action="store_true", help="until all of it is there")
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="with --wait: fail after so many seconds"
    )
    add_output(parser)
    mount_verb.add_credentials(parser)
    _daemon.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.timeout is not None and not (arguments.wait and arguments.timeout > 0):
        raise Usage("--timeout takes seconds, and needs --wait", "give both or neither")
    client = _daemon.client(arguments)
    place = _mounted_on(arguments.reference)
    fsid = place or _registered(client, arguments.reference)
    report = _order(client, fsid) if fsid else None
    if fsid and report is not None:
        return _followed(client, arguments, fsid, report)
    if place:
        raise Failure(
            "the kernel has not opened this image's blobs since its daemon was replaced",
            "read a file of it that is not in the cache, then try again",
            where=arguments.reference,
        )
    if not arguments.wait:
        raise Missing(
            "nobody has it mounted",
            "mount it with `fscached mount REF DIR`, or wait for it with --wait",
            where=arguments.reference,
        )
    with _private_mount(client, arguments) as fsid:
        report = _order(client, fsid)
        if report is None:
            raise Failure(
                "was unmounted at once", "see the daemon's log", where=arguments.reference
            )
        return _followed(client, arguments, fsid, report)


def _mounted_on(place: str) -> str:
    """The fsid of the image mounted on a directory; empty for what is no path."""
    if not place.startswith(("/", ".")):
        return ""
    target = _daemon.location(place)
    fsids = [point.fsid for point in mount.mounted() if point.target == target]
    if not fsids:
        raise Failure("no image is mounted there", "see `fscached status`", where=target)
    return fsids[-1]


def _registered(client: Client, reference: str) -> str:
    images = client.get(mount_verb.IMAGES)
    return next((image["fsid"] for image in images if image["reference"] == reference), "")


def _order(client: Client, fsid: str) -> dict[str, Any] | None:
    """How the prefetch of an image goes on that is mounted; None for one that is not."""
    try:
        report: dict[str, Any] = client.put(PREFETCH, {"fsid": fsid})
    except DaemonError as error:
        if error.status in (NOT_FOUND, CONFLICT):
            return None
        raise
    return report


@contextmanager
def _private_mount(client: Client, arguments: argparse.Namespace) -> Iterator[str]:
    """The image is mounted on a directory of ours; its fsid."""
    runtime = Path(config.load(arguments.config).paths.runtime_directory)
    target = runtime / "prefetch" / str(os.getpid())
    target.mkdir(mode=0o700, parents=True)
    try:
        image, _ = mount_verb.attach(client, arguments, str(target))
        try:
            yield image["fsid"]
        finally:
            umount.detach(client, arguments, str(target))
    finally:
        target.rmdir()


def _followed(
    client: Client, arguments: argparse.Namespace, fsid: str, report: dict[str, Any]
) -> int:
    """Wait if that is wished, and say what there is to say; the exit status."""
    name, began_s = arguments.reference, time.monotonic()
    if arguments.wait:
        with _download.shown(name) as show:
            report = _wait(client, arguments, fsid, show)
    seconds = time.monotonic() - began_s
    if arguments.output == "json":
        print(json.dumps({"reference": name, "fsid": fsid, **report, "seconds": seconds}))
    else:
        print(
            _download.summary(name, report, seconds)
            if arguments.wait
            else f"{name}: {phrase(report)}"
        )
    if arguments.wait and report["phase"] != "done":
        raise Failure(
            f"not all of it is here: {phrase(report)}", "mend that and try again", where=name
        )
    return 0


def _wait(
    client: Client, arguments: argparse.Namespace, fsid: str, show: _download.Show
) -> dict[str, Any]:
    """How it was in the end: done, stopped, unmounted, or out of time."""
    deadline_s = time.monotonic() + arguments.timeout if arguments.timeout else float("inf")
    while True:
        report: dict[str, Any] = client.get(PREFETCH, fsid=fsid)
        show(report)
        if report["phase"] in ENDS or time.monotonic() >= deadline_s:
            return report
        time.sleep(POLL_S)

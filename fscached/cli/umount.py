"""`fscached umount`: the counterpart of `fscached mount`."""

from __future__ import annotations

import argparse
import json

from fscached.cli import Subparsers, _daemon, add_output
from fscached.control.client import Client, DaemonError
from fscached.failure import Failure
from fscached.transport import mount


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "umount",
        help="unmount an image from a directory",
        description="Unmount an image from a directory; after its last one the daemon forgets the "
        "image. What is in the cache stays there.",
    )
    parser.add_argument("directory", metavar="DIR", help="where it is mounted")
    add_output(parser)
    _daemon.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    target = _daemon.location(arguments.directory)
    fsid, left = detach(_daemon.client(arguments), arguments, target)
    if arguments.output == "json":
        print(json.dumps({"fsid": fsid, "mount_point": target, "still_mounted_on": left}, indent=2))
        return 0
    print(f"unmounted {target}" + (f", still mounted on {', '.join(left)}" if left else ""))
    return 0


def detach(client: Client, arguments: argparse.Namespace, target: str) -> tuple[str, list[str]]:
    """Unmount an image from a directory, and forget it when that was its last; its fsid, and where
    it still is mounted."""
    with _daemon.mounts_lock(arguments):
        fsids = [point.fsid for point in mount.mounted() if point.target == target]
        if not fsids:
            raise Failure("no image is mounted there", "see `fscached status`", where=target)
        fsid = fsids[-1]  # mounts on one directory cover each other, the last is the visible one
        mount.unmount(target)
        left = [point.target for point in mount.mounted() if point.fsid == fsid]
        if not left:
            _forget(client, fsid)
    return fsid, left


def _forget(client: Client, fsid: str) -> None:
    try:
        client.delete("/api/v2/images", fsid=fsid)
    except DaemonError as error:
        if error.status != 404:
            raise

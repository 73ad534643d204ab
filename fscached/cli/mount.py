"""`fscached mount`: an image on a directory, its files to come.

The daemon pulls manifest and bootstrap and registers the image; mount(2) is called here, in the
caller's mount namespace. How often an image is mounted is read from the kernel's mount table and
kept nowhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from fscached.cli import Subparsers, Usage, _daemon, add_output
from fscached.control.client import Client
from fscached.failure import Failure
from fscached.transport import ObjectKey, mount

IMAGES = "/api/v2/images"


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "mount",
        help="mount an image on a directory",
        description="Mount an image on a directory. An image that is mounted already is bound to "
        "the second directory.",
    )
    parser.add_argument("reference", metavar="REF", help="host/repository:tag or @digest")
    parser.add_argument("directory", metavar="DIR", help="an existing directory")
    add_credentials(parser)
    add_output(parser)
    _daemon.add_options(parser)
    parser.set_defaults(run=run)


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """Who pulls an image."""
    parser.add_argument("--username", help="registry user; needs --password-stdin")
    parser.add_argument(
        "--password-stdin", action="store_true", help="read the password from standard input"
    )


def run(arguments: argparse.Namespace) -> int:
    target = _daemon.location(arguments.directory)
    if not os.path.isdir(target):
        raise Failure("not a directory", "make it first", where=target)
    client = _daemon.client(arguments)
    image, done = attach(client, arguments, target)
    if arguments.output == "json":
        print(json.dumps(_summary(image, target), indent=2))
    else:
        print(f"{image['reference']} ({image['manifest_digest']}) {done}")
    return 0


def _summary(image: dict[str, Any], target: str) -> dict[str, Any]:
    """`device` is the superblock's major:minor, the same at all of its mount points."""
    point = [point for point in mount.mounted() if point.target == target][-1]
    known = ("reference", "manifest_digest", "fsid", "domain_id")
    return {key: image[key] for key in known} | {"mount_point": target, "device": point.device}


def attach(
    client: Client, arguments: argparse.Namespace, target: str
) -> tuple[dict[str, Any], str]:
    """Pull and register the image `arguments` name, and mount it; the image and what was done."""
    body = _request(arguments)
    image = client.put(IMAGES, body)
    with _daemon.mounts_lock(arguments):
        # While the image was pulled its last mount point may have gone, and its registration.
        if all(known["fsid"] != image["fsid"] for known in client.get(IMAGES)):
            image = client.put(IMAGES, body)
        return image, _mount(client, image, target)


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    if bool(arguments.username) != arguments.password_stdin:
        raise Usage("--username and --password-stdin go together", "give both or neither")
    if not arguments.username:
        return {"reference": arguments.reference}
    password = sys.stdin.readline().rstrip("\r\n")
    credentials = {"username": arguments.username, "password": password}
    return {"reference": arguments.reference, "credentials": credentials}


def _mount(client: Client, image: dict[str, Any], target: str) -> str:
    """Mount or bind; says which."""
    fsid, domain_id = image["fsid"], image["domain_id"]
    # Another daemon may have mounted the same image from files of its own.
    points = [
        point.target
        for point in mount.mounted()
        if point.fsid == fsid and point.bootstrap in ("", image["bootstrap"])
    ]
    if points:
        _require_alive(image)
        if target in points:
            return f"is mounted on {target} already"
        mount.bind(points[0], target)
        return f"bound to {target}, a second mount point of {points[0]}"
    try:
        _require_alive(image)
        if image["devices"] is not None:
            mount.mount_files(target, image["bootstrap"], image["devices"])
            return f"mounted on {target}"
        mount.mount_fsid(target, fsid, domain_id)
        if image["settled"]:
            return f"mounted on {target}"
        # A new cache file is an unlinked O_TMPFILE until its first CLOSE (cachefiles), lost when
        # the host crashes. Mounted twice it is a file like any other.
        mount.unmount(target)
        mount.mount_fsid(target, fsid, domain_id)
        return f"mounted on {target}, its new cache files linked by a first mount and umount"
    except (OSError, Failure):
        with contextlib.suppress(Failure):
            client.delete(IMAGES, fsid=fsid)
        raise


def _require_alive(image: dict[str, Any]) -> None:
    """Raises Failure when part of the image is mounted from a cache that is gone."""
    volume = image["domain_id"] or image["fsid"]
    dead = mount.dead()
    if dead.isdisjoint(ObjectKey(volume, name) for name in (image["fsid"], *image["blobs"])):
        return
    targets = [point.target for point in mount.mounted() if point.key in dead]
    raise Failure(
        f"{image['reference']}: files of it are held by mounts whose daemon has ended, on "
        f"{', '.join(targets) or 'directories of other mount namespaces'}",
        "unmount them first, all their reads fail",
    )

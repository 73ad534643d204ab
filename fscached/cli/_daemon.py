"""What verbs that talk to the running daemon have in common: options, client, the mounts' lock."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fscached import config
from fscached.control.client import Client
from fscached.failure import Missing


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which daemon to talk to."""
    parser.add_argument("--config", metavar="FILE", help="the daemon's configuration file")
    parser.add_argument("--socket", metavar="PATH", help="the daemon's API socket")


def client(arguments: argparse.Namespace) -> Client:
    """The daemon that the options name. Raises ConfigError."""
    return Client(arguments.socket or config.load(arguments.config).api_socket)


@contextlib.contextmanager
def mounts_lock(arguments: argparse.Namespace) -> Iterator[None]:
    """One `mount` or `umount` at a time: between counting an image's mount points and acting on
    the count nobody may change it. Raises Missing when there is no runtime directory."""
    path = Path(config.load(arguments.config).paths.runtime_directory) / "mounts.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise Missing(
            "no such directory", "start the daemon, or name its --config", where=str(path.parent)
        ) from None
    with os.fdopen(fd, "r+"):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another mount or umount to end", file=sys.stderr)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def location(directory: str) -> str:
    """A mount point's path as the kernel's mount table has it. The directory itself is not looked
    at: it may be an image whose daemon is away."""
    parent, name = os.path.split(os.path.abspath(directory))
    return os.path.join(os.path.realpath(parent), name)

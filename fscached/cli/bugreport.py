"""`fscached bugreport`: what others need to know to help, in one file, without credentials."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import time
from contextlib import suppress

from fscached.cli import Subparsers, Usage, _daemon, add_output
from fscached.failure import Failure

STANDARD_OUTPUT = "-"


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bugreport",
        help="collect what others need to know to help",
        description="Collect configuration, status, preconditions, log and what the kernel says "
        "into one archive. Credentials are taken out; read it before you pass it on.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="a .tar.gz, or - for standard output; default: a name with the time, here",
    )
    parser.add_argument(
        "--log",
        metavar="FILE",
        help="the daemon's log, where its configuration does not name it; default: the journal",
    )
    parser.add_argument(
        "--lines", type=int, default=2000, metavar="N", help="of the log; default: 2000"
    )
    add_output(parser)
    _daemon.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fscached.cli._evidence import Evidence

    if arguments.file == STANDARD_OUTPUT and arguments.output == "json":
        raise Usage("the archive itself goes to standard output", "name a file for it")
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"fscached-bugreport-{moment}"
    lines = max(0, arguments.lines)
    evidence = Evidence(arguments.config, arguments.socket, arguments.log, lines)
    archive = _packed(name, evidence.collect())
    target = arguments.file or f"{name}.tar.gz"
    if target == STANDARD_OUTPUT:
        sys.stdout.buffer.write(archive)
        return 0
    _write(target, archive)
    if arguments.output == "json":
        print(json.dumps({"file": target, "bytes": len(archive)}, indent=2))
    else:
        print(f"{target}: {len(archive)} bytes; look through it before you pass it on")
    return 0


def _packed(name: str, parts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for part, text in parts.items():
            data = text.encode(errors="replace")
            member = tarfile.TarInfo(f"{name}/{part}")
            member.size, member.mode, member.mtime = len(data), 0o600, int(time.time())
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _write(target: str, data: bytes) -> None:
    """For its owner alone, and in nobody else's place."""
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Failure("is there already", "name another file", where=target) from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
    except OSError:
        with suppress(OSError):
            os.unlink(target)
        raise

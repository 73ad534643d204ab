"""`fscached run`: the daemon itself, in the foreground."""

from __future__ import annotations

import argparse

from fscached.cli import Subparsers


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run the daemon",
        description="Run the daemon in the foreground. When it dies, its mounts fail, unless "
        "`fscached supervise` or systemd's fd store holds the kernel's cache for its successor.",
    )
    parser.add_argument("--config", metavar="FILE", help="configuration file (TOML), or nydusd's")
    parser.add_argument(
        "--unsafe-no-supervisor",
        action="store_true",
        help="run on fanotify although nobody holds its group: readers get zeros if this dies",
    )
    parser.add_argument(
        "--leave",
        action="store_true",
        help="serve nobody: unmount images that have holes, and fail their reads until nobody has "
        "them open; what `fscached supervise` runs last",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fscached import config, standalone

    if arguments.leave:
        return standalone.leave(config.load(arguments.config))
    return standalone.main(config.load(arguments.config), arguments.unsafe_no_supervisor)

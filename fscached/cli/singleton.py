"""`fscached singleton`: nydusd's command line, as nydus-snapshotter starts it for fscache.

Its options may come before and after the word, as with nydusd.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

from fscached.cli import Subparsers, Usage
from fscached.log import LEVELS

THREADS_LIMIT: Final = 1024
DESCRIPTORS_LIMIT: Final = 1 << 30
ROTATION_LIMIT_MB: Final = 1 << 20
OF_FUSE: Final = (
    *("--bootstrap", "--mountpoint", "--thread-num", "--prefetch-files", "--failover-policy"),
    *("--backend-source", "--localfs-dir", "--virtual-mountpoint", "--shared-dir"),
)
"""Options of nydusd's other modes."""


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "singleton",
        help="run the daemon in nydusd's place",
        allow_abbrev=False,
        description="Run the daemon as nydus-snapshotter starts nydusd with fs_driver = "
        '"fscache". Settings that are not on this command line are those of '
        "/etc/fscached/fscached.toml, or of --config.",
    )
    _add_nydusds(parser)
    parser.add_argument("-F", "--fscache", required=True, metavar="DIR", help="the kernel's cache")
    parser.add_argument("--fscache-tag", metavar="TAG", help="the kernel's name for this cache")
    parser.add_argument(
        "--fscache-threads",
        type=_number(1, THREADS_LIMIT),
        metavar="N",
        help="taken and not needed: one thread reads the device",
    )
    for option in OF_FUSE:
        parser.add_argument(option, action=_Elsewhere, nargs="?", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


class _Elsewhere(argparse.Action):
    """An option that nydusd has, and not here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Usage(
            f"{self.option_strings[0]} is of nydusd's fuse mode, and fscached has none",
            f"see `{parser.prog} --help`",
        )


def _add_nydusds(parser: argparse.ArgumentParser) -> None:
    """The options that nydusd has in every mode."""
    parser.add_argument("-A", "--apisock", required=True, metavar="PATH", help="the API's socket")
    parser.add_argument(
        "-C",
        "--config",
        metavar="FILE",
        help="configuration file (TOML), or nydusd's, or its list of blobs to bind",
    )
    parser.add_argument("--id", help="this daemon's name with its supervisor")
    parser.add_argument("--supervisor", metavar="PATH", help="socket of whoever keeps the device")
    parser.add_argument("--upgrade", action="store_true", help="wait to be told to take over")
    levels = [level for level in LEVELS if level != "off"]
    parser.add_argument("-l", "--log-level", choices=levels, help="this and worse")
    parser.add_argument("-L", "--log-file", metavar="FILE", help="default: standard error")
    parser.add_argument(
        "--log-rotation-size",
        type=_number(0, ROTATION_LIMIT_MB),
        metavar="MB",
        help="a log file that is larger is put aside; 0: never",
    )
    parser.add_argument(
        "--rlimit-nofile",
        type=_number(0, DESCRIPTORS_LIMIT),
        metavar="N",
        help="open descriptors; 0: as it is; default: as many as are needed",
    )


def run(arguments: argparse.Namespace) -> int:
    from fscached.control import listener

    if (arguments.id is None) != (arguments.supervisor is None):
        raise Usage("--id and --supervisor need each other", "give both, or none")
    inherited = listener.inherited(arguments.apisock)

    from fscached import singleton  # takes its time, while connections wait already

    return singleton.main(
        singleton.Order(
            fscache=arguments.fscache,
            apisock=arguments.apisock,
            config=arguments.config,
            tag=arguments.fscache_tag,
            identity=arguments.id,
            supervisor=arguments.supervisor,
            upgrade=arguments.upgrade,
            log_level=arguments.log_level,
            log_file=arguments.log_file,
            log_rotation_mb=arguments.log_rotation_size,
            descriptors=arguments.rlimit_nofile,
        ),
        inherited,
    )


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isdecimal() or not least <= int(word) <= most:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number from {least} to {most}")
        return int(word)

    return number

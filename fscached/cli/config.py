"""`fscached config`: the configuration as the daemon would use it."""

from __future__ import annotations

import argparse
import sys

from fscached.cli import Subparsers


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "config",
        help="check and print the configuration",
        description="Check the configuration and print all of it, with meanings and limits.",
    )
    parser.add_argument("--config", metavar="FILE", help="configuration file (TOML), or nydusd's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fscached import config, manual

    sys.stdout.write(manual.explain(config.load(arguments.config)))
    return 0

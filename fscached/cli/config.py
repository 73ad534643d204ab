"""`fscached config`: the configuration as the daemon would use it."""

from __future__ import annotations

import argparse
import json
import sys

from fscached.cli import Subparsers, add_output


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "config",
        help="check and print the configuration",
        description="Check the configuration and print all of it, with meanings and limits; with "
        "-o json without credentials and meanings.",
    )
    add_output(parser)
    parser.add_argument("--config", metavar="FILE", help="configuration file (TOML), or nydusd's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fscached import config, manual

    settings = config.load(arguments.config)
    if arguments.output == "json":
        import msgspec

        print(json.dumps(msgspec.to_builtins(manual.shareable(settings)), indent=2))
    else:
        sys.stdout.write(manual.explain(settings))
    return 0

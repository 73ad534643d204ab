"""`fscached doctor`: what this machine lacks before images can be mounted, and what to do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from fscached.cli import Subparsers, add_output

if TYPE_CHECKING:
    from fscached.transport.host import Finding

EXIT_MISSING = 3


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check what the kernel and this machine must have",
        description="Check every precondition; exit status 3 when one is not met.",
    )
    add_output(parser)
    parser.add_argument("--config", metavar="FILE", help="configuration file (TOML), or nydusd's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fscached import config
    from fscached.transport import host, probe

    settings = config.load(arguments.config)
    findings = probe.survey(
        host.this_host(settings.kernel.device),
        settings.cache,
        settings.kernel,
        [arguments.config or str(config.DEFAULT_PATH), settings.paths.state_directory],
        settings.fetch,
    )
    if arguments.output == "json":
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print("\n".join(text(findings)))
    return 0 if all(finding.ok for finding in findings) else EXIT_MISSING


def text(findings: Iterable[Finding]) -> Iterator[str]:
    """The findings for people: a line each, and one below it for what to do."""
    for finding in findings:
        yield f"{'ok' if finding.ok else 'NO':<3} {finding.name:<20} {finding.found}"
        if finding.remedy:
            yield f"{'':<24} -> {finding.remedy}"

"""7 · The command line: one file per verb, and a file whose name begins with `_` is no verb.

A verb is a module with `add_parser(subparsers)`, which sets `run`, and `run(arguments)`, which
returns the exit status or raises Failure. Only the module of the verb that is used is imported, so
`fscached --version` costs next to nothing.

Exit status: 0 done; 1 it did not work; 2 it was asked wrongly (arguments, configuration); 3
something must be there first (a daemon, a kernel feature).
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from fscached import version
from fscached.failure import Failure

INTERRUPTED = 130
Subparsers = argparse._SubParsersAction


class Usage(Failure):
    """The arguments are wrong."""

    exit_code: ClassVar[int] = 2


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that says where to look."""

    def error(self, message: str) -> NoReturn:
        raise Usage(message, f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status. Errors are one line on standard error."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--version"], ["-V"]):
        sys.stdout.write(version.text())
        return 0
    known = {module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"}
    verb = words[0] if words[:1] and words[0] in known else ""
    try:
        arguments = _parser([verb] if verb else sorted(known)).parse_args(words)
        return int(arguments.run(arguments))
    except Failure as failure:
        return _say(verb, str(failure), failure.exit_code)
    except BrokenPipeError:
        # Whoever read our output has enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(verb, f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _say(verb, "interrupted", INTERRUPTED)


def _parser(verbs: Sequence[str]) -> Parser:
    parser = Parser("fscached", description="Container images whose files arrive when read.")
    parser.add_argument("-V", "--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for verb in verbs:
        importlib.import_module(f"{__name__}.{verb}").add_parser(subparsers)
    return parser


def _say(verb: str, message: str, exit_code: int) -> int:
    one_line = " ".join(message.split())
    print(f"fscached {verb}: {one_line}" if verb else f"fscached: {one_line}", file=sys.stderr)
    return exit_code

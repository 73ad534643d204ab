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
import itertools
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from fscached import version
from fscached.failure import Failure

NYDUSDS_MODES = ("fuse", "virtiofs", "nbd", "uffd")
"""What nydusd does beside fscache, and this daemon does not."""
Subparsers = argparse._SubParsersAction


class Usage(Failure):
    """The arguments are wrong."""

    exit_code: ClassVar[int] = 2


class Interrupted(Failure):
    """By the keyboard."""

    exit_code: ClassVar[int] = 130


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that says where to look."""

    def error(self, message: str) -> NoReturn:
        raise Usage(message, f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status. Errors are one line on standard error, JSON with `-o json`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--version"], ["-V"]):
        sys.stdout.write(version.text())
        return 0
    words = _verb_first(words)
    known = {module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"}
    verb = words[0] if words[:1] and words[0] in known else ""
    asked = _json_asked(words)
    try:
        if words[:1] and words[0] in NYDUSDS_MODES:
            raise Usage(
                f"{words[0]} is a mode of nydusd's that this daemon does not have",
                'its mode is singleton: set fs_driver = "fscache" in nydus-snapshotter',
            )
        arguments = _parser([verb] if verb else sorted(known)).parse_args(words)
        return int(arguments.run(arguments))
    except Failure as failure:
        return say(verb, failure, json=asked)
    except BrokenPipeError:
        # Whoever read our output has enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = str(error.filename or "")
        return say(verb, Failure(error.strerror or str(error), "", where), json=asked)
    except KeyboardInterrupt:
        return say(verb, Interrupted("interrupted", ""), json=asked)


def _verb_first(words: list[str]) -> list[str]:
    """nydusd's options may come before its mode; all of those but --upgrade have a value."""
    place = 0
    while place < len(words) and words[place].startswith("-"):
        option = words[place]
        apart = option != "--upgrade" and "=" not in option
        place += 2 if apart and (option.startswith("--") or len(option) == 2) else 1
    return [words[place], *words[:place], *words[place + 1 :]] if place < len(words) else words


def _parser(verbs: Sequence[str]) -> Parser:
    parser = Parser("fscached", description="Container images whose files arrive when read.")
    parser.add_argument("-V", "--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for verb in verbs:
        importlib.import_module(f"{__name__}.{verb}").add_parser(subparsers)
    return parser


def _json_asked(words: Sequence[str]) -> bool:
    """Whether the output is to be JSON, also where the words are none that could be parsed."""
    return any(
        word in ("-ojson", "--output=json") or (word in ("-o", "--output") and value == "json")
        for word, value in itertools.pairwise([*words, ""])
    )


def say(verb: str, failure: Failure, *, json: bool = False) -> int:
    """Say an error in one line on standard error; the exit status to end with."""
    said = " ".join(str(failure).split())
    line = f"fscached {verb}: {said}" if verb else f"fscached: {said}"
    if json:
        line = _as_json(verb, failure)
    print(line, file=sys.stderr)
    return failure.exit_code


def _as_json(verb: str, failure: Failure) -> str:
    from json import dumps

    return dumps(
        {
            "verb": verb,
            "where": failure.where,
            "what": failure.what,
            "remedy": failure.remedy,
            "exit_code": failure.exit_code,
        }
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """`-o json`, for scripts: one document on standard output, errors as one on standard error."""
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="default: text"
    )

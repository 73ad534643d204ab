"""`fscached supervise`: run the daemon, and the next one when it dies, without losing a mount."""

from __future__ import annotations

import argparse
import os

from fscached.cli import Subparsers, say
from fscached.failure import Failure


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "supervise",
        help="run the daemon, again and again",
        description="Run the daemon and hold the kernel's cache for it: when it dies the next one "
        "goes on where it stopped, and readers only notice a pause. SIGHUP replaces the daemon, "
        "for instance after an upgrade; SIGTERM and SIGINT end both.",
    )
    parser.add_argument("--config", metavar="FILE", help="configuration file (TOML), or nydusd's")
    parser.add_argument(
        "run_arguments", nargs="*", help="more arguments of `fscached run`, after --"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # What is inherited is held whatever the configuration says: readers wait until that is mended.
    if not _inherits() and (status := _checked(arguments.config)):
        return status
    # Nothing but the standard library here: this process stays small for as long as images live.
    from fscached import log
    from fscached.control import supervisor

    log.configure()
    config = ["--config", arguments.config] if arguments.config else []
    return supervisor.Supervisor(supervisor.command([*config, *arguments.run_arguments])).run()


def _inherits() -> bool:
    """Whether a service manager kept anything for us: more than the API's listener."""
    from fscached.control.notify import API

    return not {*os.environ.get("LISTEN_FDNAMES", "").split(":")} <= {"", API}


def _checked(path: str | None) -> int:
    """The exit status for a wrong configuration, which is said; else 0. A child reads it, and takes
    with it what it needs for that."""
    if child := os.fork():
        return abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    status = 1
    try:
        from fscached import config

        config.load(path)
        status = 0
    except Failure as failure:
        status = say("supervise", failure)
    except Exception:  # a bug of ours
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)

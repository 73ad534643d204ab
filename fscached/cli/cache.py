"""`fscached cache`: what is in the cache, whether it is right, and what of it may go."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

from fscached.cli import Subparsers, _daemon, add_output
from fscached.cli.status import duration, size, table

COLUMNS = ("FILE", "TAKES", "SIZE", "LAST USED", "STATE", "IMAGES")
SHORT = 20


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "cache",
        help="list cache files, compare them with their images, delete those nobody needs",
        description="Look after the cache files of the running daemon.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    listing = verbs.add_parser(
        "ls",
        help="list cache files",
        description="List all cache files, those used last first, and whose they are.",
    )
    listing.set_defaults(run=run_ls)
    collect = verbs.add_parser(
        "gc",
        help="delete cache files that no image needs",
        description="Delete the files of images that nobody knows any more, and what is over the "
        "budget. The daemon does so itself every [cache] sweep_interval_s. Exit status 1 when the "
        "cache stays over its budget.",
    )
    collect.add_argument(
        "--all", action="store_true", help="everything that no image needs which is bound now"
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would go")
    collect.set_defaults(run=run_gc)
    verify = verbs.add_parser(
        "verify",
        help="compare what is in the cache with its images",
        description="Compare every chunk that is in the cache with its digest, on the disk. Exit "
        "status 1 when one is wrong and was not repaired.",
    )
    verify.add_argument(
        "--repair",
        action="store_true",
        help="have wrong chunks fetched again; drops what the kernel has of all files in memory",
    )
    verify.set_defaults(run=run_verify)
    for verb in (listing, collect, verify):
        add_output(verb)
        _daemon.add_options(verb)


def run_ls(arguments: argparse.Namespace) -> int:
    listing = _daemon.client(arguments).get("/api/v2/cache")
    if arguments.output == "json":
        print(json.dumps(listing, indent=2))
    else:
        print("\n".join(_listed(listing, time.time())))
    return 0


def run_gc(arguments: argparse.Namespace) -> int:
    wanted = {"all_idle": arguments.all, "dry_run": arguments.dry_run}
    collected = _daemon.client(arguments).put("/api/v2/cache/gc", wanted)
    if arguments.output == "json":
        print(json.dumps(collected, indent=2))
    else:
        print("\n".join(_collected(collected, arguments.dry_run)))
    return 1 if collected["excess_bytes"] else 0


def run_verify(arguments: argparse.Namespace) -> int:
    from fscached.cli import _verify

    return _verify.run(arguments)


def _listed(listing: dict[str, Any], now_s: float) -> Iterator[str]:
    """The listing for people: lines."""
    files = listing["files"]
    budget = f" of {size(listing['budget_bytes'])}" if listing["budget_bytes"] else ", no budget"
    used = size(listing["used_bytes"])
    yield f"{listing['directory']}: {len(files)} files take {used}{budget}"
    if files:
        yield ""
        rows = [COLUMNS, *(_row(file, now_s) for file in files)]
        yield from (line.rstrip() for line in table(rows, left=(0, 5)))


def _row(file: dict[str, Any], now_s: float) -> tuple[str, ...]:
    ago = duration(max(0.0, now_s - file["used_s"]))
    state = f"{file['state']}, open" if file["open"] else file["state"]
    return (
        f"{file['kind'] or 'unknown'} {file['cookie'][:SHORT]}",
        size(file["allocated_bytes"]),
        size(file["size_bytes"]),
        f"{ago} ago",
        state if file["path"] else f"{state}, no name yet",
        ", ".join(file["images"]) or "none",
    )


def _collected(collected: dict[str, Any], dry_run: bool) -> Iterator[str]:
    culled, busy = collected["culled"], collected["busy"]
    for file in culled:
        yield f"{file['why']}: {file['cookie'][:SHORT]}, {size(file['allocated_bytes'])}"
    for file in busy:
        yield f"in use: {file['cookie'][:SHORT]}, {size(file['allocated_bytes'])}"
    freed = size(sum(file["allocated_bytes"] for file in culled))
    said = "would be deleted" if dry_run else "deleted"
    yield f"{len(culled)} files {said}, {freed}; the cache takes {size(collected['used_bytes'])}"
    if collected["excess_bytes"]:
        yield f"{size(collected['excess_bytes'])} too much, and all of it is in use"

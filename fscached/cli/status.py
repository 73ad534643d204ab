"""`fscached status`: what the daemon serves, how much of it is here, what it cost."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from typing import Any

from fscached.cli import Subparsers, _daemon, add_output
from fscached.transport import mount

COLUMNS = (
    "IMAGE",
    "RESIDENT",
    "IN-FLIGHT",
    "SIZE",
    "READS",
    "FAILED",
    "REQUESTS",
    "RECEIVED",
    "PREFETCH",
)


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "status",
        help="show images, what is resident, and what was asked and fetched",
        description="Show the daemon, its images, and how much of them is in the cache.",
    )
    add_output(parser)
    _daemon.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    status = _daemon.client(arguments).get("/api/v2/status")
    points = mount.mounted()
    for image in status["images"]:
        image["mounts"] = [point.target for point in points if point.fsid == image["fsid"]]
    print(json.dumps(status, indent=2) if arguments.output == "json" else "\n".join(text(status)))
    return 0


def text(status: dict[str, Any]) -> Iterator[str]:
    """The status for people: lines."""
    yield (
        f"fscached {status['version']} ({status['git_commit'][:12]}), pid {status['pid']}, "
        f"{status['state']} for {duration(status['uptime_s'])}, transport {status['transport']}, "
        f"{size(status['rss_bytes'])} of memory"
    )
    totals = status["totals"]
    yield (
        f"{totals['reads']} READs ({totals['reads_failed']} failed, {totals['reads_waiting']} "
        f"waiting), {totals['requests']} requests, {size(totals['received_bytes'])} received, "
        f"{totals['source_errors']} source errors, {totals['bad_chunks']} bad chunks"
    )
    givers = [f"{size(count)} by {name}" for name, count in status["given"].items() if count]
    if givers:
        yield f"given: {', '.join(givers)}".replace("_", " ")
    if not status["images"]:
        yield "no images; `fscached mount REF DIR` adds one"
        return
    yield ""
    yield from table([COLUMNS, *(row for image in status["images"] for row in _rows(image))])
    yield from filter(None, map(_sources, status["images"]))


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least one: 1536 is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds as the two largest of days, hours, minutes, seconds."""
    left, parts = int(seconds), list[str]()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _rows(image: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    mounts = ", ".join(image["mounts"]) or "not mounted"
    objects = [image["bootstrap"], *image["blobs"]]
    yield _row(f"{image['reference']} on {mounts}", objects, prefetch(image["prefetch"]))
    yield _row("  bootstrap", [image["bootstrap"]], "")
    for blob in image["blobs"]:
        yield _row(f"  blob {blob['id'][:12]}", [blob], "")


def prefetch(report: dict[str, Any]) -> str:
    """How prefetch goes on, in a few words: `running, 12.0 MiB left, 3 s`."""
    words = [report["phase"]]
    if report["why"]:
        words[0] += f" ({report['why'][:60]})"
    if report["left_bytes"]:
        words.append(f"{size(report['left_bytes'])} left")
    if report["eta_s"]:
        words.append(duration(report["eta_s"] + 1))
    return ", ".join(words)


def _sources(image: dict[str, Any]) -> str:
    """Who gave an image's bytes."""
    given: Counter[str] = Counter()
    for blob in image["blobs"]:
        given.update(blob["given"])
    words = [f"{size(count)} by {name}" for name, count in given.items() if count]
    return f"{image['reference']} given: {', '.join(words)}".replace("_", " ") if words else ""


def _row(name: str, objects: list[dict[str, Any]], last: str) -> tuple[str, ...]:
    resident = [item["resident_bytes"] for item in objects]
    known = sum(count for count in resident if count is not None)
    return (
        name,
        "unknown" if all(count is None for count in resident) else size(known),
        size(_sum(objects, "in_flight_bytes")),
        size(_sum(objects, "size_bytes")),
        str(_sum(objects, "reads")),
        str(_sum(objects, "reads_failed")),
        str(_sum(objects, "requests")),
        size(_sum(objects, "received_bytes")),
        last,
    )


def _sum(objects: Iterable[dict[str, Any]], key: str) -> int:
    return sum(item[key] for item in objects)


def table(rows: list[tuple[str, ...]], left: Container[int] = (0,)) -> Iterator[str]:
    """Lines with the columns below each other; those in `left` begin where the others end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:<{width}}" if number in left else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells)

"""`fscached cache verify`: every resident chunk against its image, on the disk."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fscached import config
from fscached.cli import _daemon
from fscached.cli.status import size
from fscached.control.client import Client, DaemonError
from fscached.culling.inspection import (
    Part,
    Verdict,
    Watch,
    inspect,
    parts_of_blob,
    parts_of_bootstrap,
)
from fscached.source import SourceError
from fscached.source.nobody import Nobody
from fscached.store import Image, Store
from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap

SHOWN_MAX = 5


@dataclass
class Report:
    """What became of one file. `unknown` says why nothing could be compared; `remedy` what became
    of its bad chunks when it was to be repaired."""

    volume: str
    cookie: str
    kind: str
    right: int = 0
    bad: list[int] = field(default_factory=list)
    unvouched: int = 0
    unknown: str = ""
    remedy: str = ""
    repaired: bool = False


def run(arguments: argparse.Namespace) -> int:
    client = _daemon.client(arguments)
    settings = config.load(arguments.config)
    files = client.get("/api/v2/cache")["files"]
    store = Store(Path(settings.paths.state_directory))
    with _shown(sum(file["size_bytes"] for file in files)) as watch:
        reports = [_report(file, store, watch) for file in files]
        if arguments.repair:
            for report in filter(lambda report: report.bad, reports):
                _repair(client, report)
    if arguments.output == "json":
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        print("\n".join(_text(reports)))
    return 1 if any(report.bad and not report.repaired for report in reports) else 0


def _report(file: dict[str, Any], store: Store, watch: Watch) -> Report:
    report = Report(file["volume"], file["cookie"], file["kind"])
    try:
        verdict = _verdict(file, store, watch)
    except (ImageError, SourceError, OSError) as error:
        report.unknown = str(error)
    else:
        report.right, report.unvouched = verdict.right, verdict.unvouched
        report.bad = list(verdict.bad)
    return report


def _verdict(file: dict[str, Any], store: Store, watch: Watch) -> Verdict:
    """Raises ImageError, SourceError, OSError: what is needed for a comparison is not there."""
    if not file["path"]:
        raise OSError("it has no name before it is closed: unmount and mount its images once")
    if not file["kind"]:
        raise ImageError("no image here has it: `fscached cache gc` deletes it in time")
    return inspect(file["path"], _parts(file, store), watch)


def _parts(file: dict[str, Any], store: Store) -> Iterable[Part]:
    if file["kind"] == "bootstrap":
        return parts_of_bootstrap(file["bootstrap"])
    path = Path(file["bootstrap"])
    data = path.read_bytes()
    blobs = Bootstrap(data).blobs
    image = Image(file["images"][0], "", "", path, len(data), blobs)
    entry = next((entry for entry in blobs if entry.blob_id == file["cookie"]), None)
    if entry is None:
        raise ImageError(f"{path} does not name it any more")
    chunks = asyncio.run(
        store.chunks(
            image, entry, Nobody("its chunks are not known here: nobody has read it yet"), True, 1.0
        )
    )
    return parts_of_blob(chunks)


def _repair(client: Client, report: Report) -> None:
    body = {"volume": report.volume, "cookie": report.cookie, "offsets": report.bad}
    try:
        done = client.put("/api/v2/cache/repair", body)
    except DaemonError as error:
        report.remedy = error.what
        return
    report.repaired = True
    report.remedy = (
        "deleted, to be fetched when it is read"
        if done["culled"]
        else f"{done['chunks']} chunks fetched again"
    )


def _text(reports: list[Report]) -> Iterator[str]:
    for report in reports:
        name = f"{report.kind or 'unknown'} {report.cookie[:20]}"
        if report.unknown:
            yield f"{name}: not compared: {report.unknown}"
        elif report.bad:
            places = ", ".join(map(str, report.bad[:SHOWN_MAX]))
            more = ", …" if len(report.bad) > SHOWN_MAX else ""
            remedy = f"; {report.remedy}" if report.remedy else "; --repair has them fetched again"
            yield f"{name}: {len(report.bad)} chunks are wrong, at bytes {places}{more}{remedy}"
    yield _summary(reports)


def _summary(reports: list[Report]) -> str:
    totals: dict[str, int] = defaultdict(int)
    for report in reports:
        totals["right"] += report.right
        totals["bad"] += len(report.bad)
        totals["unvouched"] += report.unvouched
        totals["unknown"] += bool(report.unknown)
    said = f"{len(reports)} files: {totals['right']} chunks right, {totals['bad']} wrong"
    if totals["unvouched"]:
        said += f", {totals['unvouched']} without a digest"
    return f"{said}, {totals['unknown']} files not compared" if totals["unknown"] else said


@contextmanager
def _shown(total_bytes: int) -> Iterator[Watch]:
    """A bar on a terminal; else one line at the begin, on standard error."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
        except ImportError:
            pass
        else:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
            console = Console(stderr=True)
            with Progress(*columns, console=console, transient=True) as progress:
                bar = progress.add_task("", total=total_bytes)
                yield lambda count: progress.advance(bar, count)
            return
    print(f"comparing up to {size(total_bytes)}", file=sys.stderr)
    yield lambda count: None

"""What the verbs of `fscached trace` do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fscached.cli import Usage, _daemon
from fscached.cli._known import TRACES, Known, image_of, known
from fscached.cli._recommendation import read_trace
from fscached.cli.status import size
from fscached.failure import Failure
from fscached.prefetch.files import Use, news
from fscached.prefetch.trace import FileUse, Trace, TraceError, encode, merge
from rafs_v6 import ImageError


def record(arguments: argparse.Namespace) -> int:
    wanted = {"image": image_of(arguments.image), "prefetch": arguments.prefetch}
    reply = _daemon.client(arguments).put(f"{TRACES}/record", wanted)
    if arguments.output == "json":
        print(json.dumps(reply, indent=2))
        return 0
    here = reply["resident_bytes"]
    print(f"{reply['reference'] or reply['fsid']}: a new run is recorded until its last umount")
    if here:
        print(
            f"{size(here)} of its data are here already: reads of these may go unseen",
            file=sys.stderr,
        )
    return 0


def show(arguments: argparse.Namespace) -> int:
    found = known(arguments, arguments.trace, run=arguments.present)
    files = _named(found)
    if arguments.plot:
        from fscached.cli import _plot

        _plot.draw(found.trace, found.image, Path(arguments.plot))
    if arguments.output == "json":
        print(json.dumps(_summary(found.trace) | {"files": list(map(_use, files))}, indent=2))
        return 0
    print("\n".join(_table(found.trace, files)))
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """1 says that something is new, so what cannot be compared is 2, or 3 when it is not there."""
    try:
        base = known(arguments, arguments.base)
        run = known(arguments, arguments.trace, run=True)
        found = _new(base, run)
    except Failure as failure:
        if failure.exit_code != 1:
            raise
        raise Usage(failure.what, failure.remedy, failure.where) from failure
    if arguments.output == "json":
        print(json.dumps([_use(use) | {"twins": twins} for use, twins in found], indent=2))
    else:
        for use, twins in found:
            print(_line(use) + (f", or another of {twins} files with this data" * bool(twins)))
        print(f"{len(found)} files were never read before", file=sys.stderr)
    return 1 if found else 0


def export(arguments: argparse.Namespace) -> int:
    _require_file(arguments)
    found = known(arguments, arguments.trace, run=arguments.present)
    _write(found.trace._replace(files=_named(found)), arguments)
    return 0


def adopt(arguments: argparse.Namespace) -> int:
    client = _daemon.client(arguments)
    done = []
    for name in arguments.files:
        trace = read_trace(name)
        client.put(TRACES, json.loads(encode(trace)))
        done.append({"file": name} | _summary(trace))
        if arguments.output == "text":
            print(f"{name}: {_of(trace)}, {len(trace.accesses)} chunks")
    if arguments.output == "json":
        print(json.dumps(done, indent=2))
    return 0


def join(arguments: argparse.Namespace) -> int:
    _require_file(arguments)
    try:
        _write(merge(map(read_trace, arguments.files)), arguments)
    except TraceError as error:
        raise Usage(str(error), "see `fscached trace show FILE`") from None
    return 0


def forget(arguments: argparse.Namespace) -> int:
    image = image_of(arguments.image)
    _daemon.client(arguments).delete(TRACES, image=image)
    if arguments.output == "json":
        print(json.dumps({"forgotten": image}, indent=2))
    else:
        print(f"{arguments.image}: what was known of earlier runs is forgotten")
    return 0


VERBS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "record": record,
    "show": show,
    "diff": diff,
    "export": export,
    "import": adopt,
    "merge": join,
    "forget": forget,
}


def shown(path: bytes) -> str:
    """A name as a terminal may show it: what could move its cursor is written as an escape."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _new(base: Known, run: Known) -> list[tuple[FileUse, int]]:
    """Files that are new, and how many others each may have been. By chunks where both are of the
    same blobs and the image is at hand, else by names."""
    image = run.image or base.image
    if image is not None and {blob.blob_id for blob in image.blobs} & {
        access.blob_id for access in base.trace.accesses
    }:
        found: list[Use] = news(image, base.trace.accesses, run.trace.accesses)
        return [(use.brief, use.twins) for use in found]
    before = {use.path for use in _named(base)}
    return [(use, 0) for use in _named(run) if use.path not in before]


def _named(found: Known) -> tuple[FileUse, ...]:
    try:
        files = found.files()
    except ImageError as error:
        raise Failure("the image of the trace", str(error)) from error
    if not files and any(access.demanded for access in found.trace.accesses):
        raise Failure(
            f"nobody knows the names of the files in the trace of {_of(found.trace)}",
            "say its --image",
        )
    return files


def _of(trace: Trace) -> str:
    return trace.reference or trace.fsid


def _require_file(arguments: argparse.Namespace) -> None:
    if arguments.output == "json" and arguments.to is None:
        raise Usage("the trace itself goes to standard output", "name a file with --to")


def _write(trace: Trace, arguments: argparse.Namespace) -> None:
    if arguments.to is None:
        sys.stdout.buffer.write(encode(trace))
        sys.stdout.buffer.flush()
        return
    Path(arguments.to).write_bytes(encode(trace))
    if arguments.output == "json":
        print(json.dumps({"file": arguments.to} | _summary(trace), indent=2))


def _summary(trace: Trace) -> dict[str, Any]:
    read = [access for access in trace.accesses if access.demanded]
    return {
        "reference": trace.reference,
        "fsid": trace.fsid,
        "cold_runs": trace.runs,
        "chunks_read": len(read),
        "bytes_read": _bytes(trace, True),
        "chunks_prefetched": len(trace.accesses) - len(read),
        "bytes_prefetched": _bytes(trace, False),
    }


def _bytes(trace: Trace, demanded: bool) -> int:
    return sum(
        access.end - access.start for access in trace.accesses if access.demanded is demanded
    )


def _use(use: FileUse) -> dict[str, Any]:
    return {
        "path": shown(use.path),
        "after_s": use.after_s,
        "chunks_read": use.chunks_read,
        "chunks": use.chunk_count,
    }


def _table(trace: Trace, files: Iterable[FileUse]) -> Iterator[str]:
    known = _summary(trace)
    yield (
        f"{_of(trace)}: {known['cold_runs']} cold runs, {size(known['bytes_read'])} read in "
        f"{known['chunks_read']} chunks, {size(known['bytes_prefetched'])} only prefetched"
    )
    yield from map(_line, files)


def _line(use: FileUse) -> str:
    return f"{use.after_s:9.3f} s  {use.chunks_read:>5} of {use.chunk_count:<5} {shown(use.path)}"

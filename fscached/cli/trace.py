"""`fscached trace`: what runs of an image read first, in which order, how soon."""

from __future__ import annotations

import argparse

from fscached.cli import Subparsers, _daemon, add_output

WHICH = "FILE of `trace export`; an image's reference or fsid; or DIR where it is mounted"


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "trace",
        help="record, show, compare and move what runs of an image read first",
        description="The daemon records what each run of an image reads first. A trace says what "
        "to prefetch, what to place first in an image, and what was never read before.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_record(verbs)
    _add_show(verbs)
    _add_diff(verbs)
    _add_export(verbs)
    _add_import(verbs)
    _add_merge(verbs)
    _add_forget(verbs)


def _add_record(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    record = _verb(
        verbs,
        "record",
        "begin a new run of a mounted image",
        "Begin a new run of a mounted image, without prefetch, so that every first read is seen; "
        "what was recorded so far is kept as a run of its own. The run ends with the last umount.",
    )
    record.add_argument("image", metavar="REF|DIR", help="a mounted image")
    record.add_argument(
        "--prefetch", action="store_true", help="let prefetch go on; what it brings is not seen"
    )
    add_output(record)
    _daemon.add_options(record)


def _add_show(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    show = _verb(
        verbs,
        "show",
        "list the files that were read, first used first",
        "List the files that were read, first used first, and how much of each.",
    )
    show.add_argument("trace", metavar="TRACE", help=WHICH)
    _add_run(show)
    show.add_argument(
        "--plot",
        metavar="FILE.svg",
        help="draw time against blob offset too, readers and prefetch in two colours",
    )
    add_output(show)
    _add_image(show)


def _add_diff(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    diff = _verb(
        verbs,
        "diff",
        "list files that a run read and BASE never did",
        "List the files that RUN read and BASE never did. Exit status: 0 none, 1 some, 2 or 3 it "
        "could not be said. Only first reads are seen: docs/decisions/traces.md has the limits.",
    )
    diff.add_argument("base", metavar="BASE", help=WHICH)
    diff.add_argument("trace", metavar="RUN", help="the same; of a mounted image its present run")
    add_output(diff)
    _add_image(diff)


def _add_export(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    export = _verb(
        verbs,
        "export",
        "write a trace, with the names of the files, to a file",
        "Write a trace to standard output or a file, for `trace import` on other nodes and for "
        "`image convert` and `image optimize`.",
    )
    export.add_argument("trace", metavar="TRACE", help=WHICH)
    _add_run(export)
    add_output(export)
    _add_to(export)
    _add_image(export)


def _add_import(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    importer = _verb(
        verbs,
        "import",
        "give the daemon a trace from elsewhere",
        "Give the daemon a trace. It joins what is known of the image and serves from its next "
        "mount on; the image need not be on this node yet.",
    )
    importer.add_argument("files", metavar="FILE", nargs="+", help="what `trace export` wrote")
    add_output(importer)
    _daemon.add_options(importer)


def _add_merge(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    merge = _verb(
        verbs,
        "merge",
        "make one trace of several of one image",
        "Make one trace of several of the same image. Needs no daemon.",
    )
    merge.add_argument("files", metavar="FILE", nargs="+", help="what `trace export` wrote")
    add_output(merge)
    _add_to(merge)


def _add_forget(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    forget = _verb(
        verbs,
        "forget",
        "forget what earlier runs of an image read",
        "Forget what earlier runs of an image read; a run that goes on is kept.",
    )
    forget.add_argument("image", metavar="REF|DIR", help="an image's reference, fsid or mount")
    add_output(forget)
    _daemon.add_options(forget)


def _verb(
    verbs: Subparsers[argparse.ArgumentParser], name: str, short: str, long: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=short, description=long)
    parser.set_defaults(run=run, verb=name)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", dest="present", action="store_true", help="only the run that goes on"
    )


def _add_to(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="FILE", help="default: standard output")


def _add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        metavar="IMAGE",
        help="the image of a trace in a file, for the names: a bootstrap, or oci:DIR[:TAG]",
    )
    _daemon.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from fscached.cli import _trace

    return _trace.VERBS[arguments.verb](arguments)

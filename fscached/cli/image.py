"""`fscached image`: make RAFS v6 images, improve them, and say what is wrong with one."""

from __future__ import annotations

import argparse

from fscached.cli import Subparsers, add_output


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "image",
        help="convert images to RAFS v6, optimize and check them",
        description="Make images whose files arrive when read, and check them.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_convert(verbs)
    _add_optimize(verbs)
    check = verbs.add_parser(
        "check",
        help="say everything that is wrong with an image",
        description="Check a RAFS v6 image: all of its bootstrap, and the blobs that are there.",
    )
    check.add_argument(
        "image", metavar="IMAGE", help="oci:DIR[:TAG], or a bootstrap file beside its blobs"
    )
    add_output(check)
    check.set_defaults(run=run_check)


def _add_convert(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    convert = verbs.add_parser(
        "convert",
        help="convert a directory or an OCI image to RAFS v6",
        description="Convert an image. The same source gives the same bytes.",
    )
    convert.add_argument(
        "source", metavar="SRC", nargs="?", help="a directory, or an image layout oci:DIR[:TAG]"
    )
    convert.add_argument(
        "target", metavar="DST", help="oci:DIR[:TAG], or a registry's HOST[:PORT]/REPOSITORY:TAG"
    )
    convert.add_argument(
        "--layer",
        metavar="DIR",
        action="append",
        default=[],
        help="instead of SRC: a layer, lowest first; whiteouts as in OCI layers or overlayfs",
    )
    convert.add_argument("--platform", metavar="OS/ARCH", help="of SRC; default: this machine's")
    convert.add_argument(
        "--compressor", choices=("zstd", "lz4_block", "none"), default="zstd", help="default: zstd"
    )
    convert.add_argument(
        "--digester", choices=("blake3", "sha256"), default="blake3", help="default: blake3"
    )
    convert.add_argument(
        "--chunk-size",
        metavar="SIZE",
        default="1M",
        help="power of two from 4K to 16M; default: 1M",
    )
    convert.add_argument(
        "--prefetch",
        metavar="PATH",
        action="append",
        default=[],
        help="a file or directory whose data comes first in its blob",
    )
    convert.add_argument(
        "--trace",
        metavar="FILE",
        help="what was read of an earlier image (`fscached trace export`): comes first too",
    )
    convert.add_argument("--config", metavar="FILE", help="configuration file, for its [source]")
    add_output(convert)
    convert.set_defaults(run=run_convert)


def _add_optimize(verbs: Subparsers[argparse.ArgumentParser]) -> None:
    optimize = verbs.add_parser(
        "optimize",
        help="give an image a prefetch table that follows a trace",
        description="Give a RAFS v6 image another prefetch table. All its blobs stay as they are, "
        "so nothing is stored or fetched twice, unless there shall be a --hot-blob.",
    )
    optimize.add_argument("source", metavar="SRC", help="oci:DIR[:TAG], or a registry's reference")
    optimize.add_argument(
        "target",
        metavar="DST",
        help="oci:DIR[:TAG], or a registry's reference: another tag of SRC's repository",
    )
    optimize.add_argument("--trace", metavar="FILE", help="what `fscached trace export` wrote")
    optimize.add_argument(
        "--prefetch",
        metavar="PATH",
        action="append",
        default=[],
        help="a file or directory to come before what the trace says",
    )
    optimize.add_argument(
        "--hot-blob",
        action="store_true",
        help="put what comes first into a blob of its own too, in that order: it is fetched in a "
        "few requests, and stored twice; SRC must be a layout",
    )
    optimize.add_argument("--config", metavar="FILE", help="configuration file, for its [source]")
    add_output(optimize)
    optimize.set_defaults(run=run_optimize)


def run_convert(arguments: argparse.Namespace) -> int:
    from fscached.cli import _convert

    return _convert.run(arguments)


def run_optimize(arguments: argparse.Namespace) -> int:
    from fscached.cli import _optimize

    return _optimize.run(arguments)


def run_check(arguments: argparse.Namespace) -> int:
    from fscached.cli import _check

    return _check.run(arguments)

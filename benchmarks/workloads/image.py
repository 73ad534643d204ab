"""Images without a daemon: converting a tree, opening a bootstrap of many files.

Converting is compared with `tar -c | zstd -3` of the same tree, by the processors' time of all that
took part and by the wall's: one compresses chunks and takes their digests, the other compresses a
stream. What is converted is Debian's /usr with Python. A bootstrap of 200,000 files is opened as
the daemon does, with its chunk table, and walked, beside dump.erofs, which counts its files.
"""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import NamedTuple

from environments import ROOT, Options, local
from environments.native import described
from harness import command, store
from harness.content import content
from report import Report, Result, result

from rafs_v6.blob import ChunkMap
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.pack import Format

REPETITIONS = 3
FILES = 200_000
FOLDER_FILES = 1000
FSID = "many"

MB = 1e6


class Used(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_s: float


Figures = dict[str, list[float]]


def run_native(options: Options) -> Report:
    """Both in turns, on this machine."""
    tree = content().tree / "usr"
    tree_bytes = int(command.run(["du", "-sb", tree]).split()[0])
    bootstrap = _many()
    figures: Figures = defaultdict(list)
    for _ in range(options.repetitions):
        _convert(tree, options.scratch, figures)
        _open(bootstrap, options.scratch, figures)
    environment = {**described(options), "tree_mib": tree_bytes >> 20, "files": FILES}
    return Report(options.bench, environment, list(_results(figures, tree_bytes)))


def _convert(tree: Path, scratch: Path, figures: Figures) -> None:
    target = scratch / "converted"
    convert = [sys.executable, "-m", "fscached", "image", "convert", str(tree), f"oci:{target}"]
    pack = 'tar -C "$0" -c . | zstd -q -3 > "$1"'
    archive = ["bash", "-o", "pipefail", "-c", pack, str(tree), str(scratch / "archive")]
    # Both find the tree in memory.
    command.run(["tar", "-C", str(tree), "-cf", str(scratch / "archive"), "."])
    for name, argv in (("ours", convert), ("other", archive)):
        used = _used(argv)
        figures[f"{name} wall"].append(used.seconds)
        figures[f"{name} cpu"].append(used.cpu_s)
    stored = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    figures["ours bytes"].append(stored)
    figures["other bytes"].append((scratch / "archive").stat().st_size)
    shutil.rmtree(target)


def _used(argv: Sequence[str]) -> Used:
    before, began = getrusage(RUSAGE_CHILDREN), time.monotonic()
    command.run(argv, cwd=ROOT)
    after, seconds = getrusage(RUSAGE_CHILDREN), time.monotonic() - began
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Used(seconds, cpu_s)


def _open(bootstrap: Path, scratch: Path, figures: Figures) -> None:
    gc.collect()
    began = time.monotonic()
    opened = Bootstrap(bootstrap.read_bytes())
    [blob] = opened.blobs
    chunks = ChunkMap.from_chunk_table(blob, opened.chunk_table(blob.blob_index))
    figures["open"].append(time.monotonic() - began)
    began = time.monotonic()
    walked = sum(1 for _ in opened.walk())
    figures["walk"].append(time.monotonic() - began)
    if walked < FILES or chunks.count != FILES:
        raise SystemExit(f"{walked} files of {FILES}, {chunks.count} chunks")
    device = scratch / "device"
    device.touch()
    figures["dump"].append(
        _used(["dump.erofs", "-S", f"--device={device}", str(bootstrap)]).seconds
    )


def _many() -> Path:
    """The bootstrap, kept: files of a few bytes each, none like another."""

    def build(directory: Path) -> None:
        folders = {
            b"d%04d" % number: local.folder(
                {
                    b"f%04d" % each: local.small_file(b"%d of %d\n" % (each, number))
                    for each in range(FOLDER_FILES)
                }
            )
            for number in range(FILES // FOLDER_FILES)
        }
        local.write(directory, FSID, [local.folder(folders)], Format())

    key = store.key(FILES, FOLDER_FILES, Path(local.__file__).read_bytes())
    return store.kept("bench-many", key, build, keep=1) / FSID


def _results(figures: Figures, tree_bytes: int) -> Iterator[Result]:
    def speeds(name: str) -> list[float]:
        return [tree_bytes / MB / seconds for seconds in figures[name]]

    yield result("convert_cpu", "s", "lower", figures["ours cpu"], figures["other cpu"])
    yield result("convert_wall", "MB/s", "higher", speeds("ours wall"), speeds("other wall"))
    yield result("convert_stored", "bytes", "lower", figures["ours bytes"], figures["other bytes"])
    yield result("bootstrap_open", "s", "lower", figures["open"])
    yield result("bootstrap_walk", "s", "lower", figures["walk"], figures["dump"])

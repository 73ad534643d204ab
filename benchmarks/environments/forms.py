"""What guests compare forms of a tree with: the tree and an image of it on one disk, and on another
the programs that read it, which guests do not have; kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from harness import command, debian, disk, store
from harness.apt import Archive, codename
from harness.disk import Disk

from environments import local
from rafs_v6.layout import Compressor
from rafs_v6.pack import Format
from rafs_v6.tree import read_directory

FORMS, TOOLS = "/srv/forms", "/srv/tools"
FSID = "forms"
SOURCE = "libtomcrypt"
"""Debian's: some 400 small units of C, and a makefile that needs nothing else."""
PACKAGES = ("fio", "gcc", "libc6-dev", "make", "mount")


class Forms(NamedTuple):
    """`forms` has `tree` (with `data` and `sources`) and `image`, its RAFS form in a directory."""

    forms: Disk
    tools: Disk
    sources_bytes: int


def forms(data_bytes: int) -> Forms:
    """With a file of so many bytes that cannot be compressed; none for 0."""
    sources = store.kept("bench-source", store.key(codename(), SOURCE), _unpack, keep=1) / "sources"

    def build(directory: Path) -> None:
        tree = directory / "disk" / "tree"
        shutil.copytree(sources, tree / "sources", symlinks=True)
        if data_bytes:
            make = 'head -c "$0" /dev/urandom > "$1"'
            command.run(["sh", "-c", make, str(data_bytes), tree / "data"])
        layers = [read_directory(tree)]
        local.write(directory / "disk" / "image", FSID, layers, Format(Compressor.NONE))
        disk.from_tree(directory / "forms.ext4", directory / "disk")
        shutil.rmtree(directory / "disk")

    key = store.key(sources.parent.name, data_bytes, Path(__file__).read_bytes())
    kept = store.kept("bench-forms", key, build, keep=2)
    shown = command.run(["du", "-sb", sources])
    tools = Disk(_tools() / "tools.ext4", "tools", TOOLS)
    return Forms(Disk(kept / "forms.ext4", "forms", FORMS), tools, int(shown.split()[0]))


def _tools() -> Path:
    def build(directory: Path) -> None:
        debian.make(directory / "tree", PACKAGES, debian.UNREAD)
        disk.from_tree(directory / "tools.ext4", directory / "tree")
        shutil.rmtree(directory / "tree")

    return store.kept("bench-tools", store.key(debian.RELEASE, PACKAGES), build, keep=1)


def _unpack(directory: Path) -> None:
    archive = Archive(sources=True)
    archive.refresh()
    description = archive.download_source(SOURCE, directory)
    target = directory / "sources"
    command.run(["dpkg-source", "--no-check", "-x", description, target])

"""The tree that benches on this machine read, and an image of it at a registry; kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from harness import command, registry, store
from harness.apt import Archive, codename

from environments import ROOT

DATA_BYTES = 1 << 30
NAME = "bench/linux:latest"

PARTS = (
    *("Kbuild", "Makefile", "arch/x86", "block", "certs", "crypto", "drivers/base", "drivers/char"),
    *("fs", "include", "init", "io_uring", "ipc", "kernel", "lib", "mm", "net", "scripts"),
    *("security", "tools/include", "usr", "virt"),
)
"""What a build for x86 needs: 17,000 files. passthrough_ll keeps each of them open, and the limit
of open files may be as low as 20,000."""


@dataclass(frozen=True)
class Linux:
    """`tree`: much of Debian's Linux sources, data that cannot be compressed, and a first file that
    nobody reads, without which an image of it is never complete. `storage`: a registry's."""

    tree: Path
    storage: Path
    source: str = "linux"
    data: str = "data"


def linux() -> Linux:
    """Made in some minutes; about 3 GB."""
    key = store.key(codename(), Path(__file__).read_bytes())
    kept = store.kept("linux", key, _build, keep=1)
    return Linux(kept / "tree", kept / "registry")


def _build(directory: Path) -> None:
    tree, storage = directory / "tree", directory / "registry"
    (tree / "linux").mkdir(parents=True)
    storage.mkdir()
    _unpack(directory, tree / "linux")
    for name, size_bytes in (("0-nobody-reads-this", 4096), ("data", DATA_BYTES)):
        command.run(["sh", "-c", 'head -c "$0" /dev/urandom > "$1"', str(size_bytes), tree / name])
    with registry.on_host(storage) as address:
        convert = ["-m", "fscached", "image", "convert", str(tree), f"{address}/{NAME}"]
        command.run([sys.executable, *convert], cwd=ROOT)


def _unpack(directory: Path, target: Path) -> None:
    """The sources of this release's own kernel."""
    archive = Archive()
    archive.refresh()
    newest = [found for found in archive.versions("linux-source") if "bpo" not in found.version][-1]
    [name] = [name for name in archive.depends(newest) if name.startswith("linux-source-")]
    [package] = archive.download([name], directory)
    pipeline = (
        'dpkg-deb --fsys-tarfile "$0" | tar -xO "./usr/src/$1.tar.xz" | xz -dc -T0 '
        '| tar -x -C "$2" --strip-components=1 --wildcards "${@:3}"'
    )
    wanted = ["*/Kconfig*", *(f"{name}/{part}" for part in PARTS)]
    bash = ["bash", "-o", "pipefail", "-c", pipeline]
    command.run([*bash, str(package), name, str(target), *wanted])
    package.unlink()

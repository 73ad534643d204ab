"""One large file of real content, as images at an origin; kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import command, image, store
from harness.content import content
from harness.image import Origin

FILE = "data"


def images(size_bytes: int, options: Mapping[str, Sequence[str]]) -> Origin:
    """Images of that file alone, by name and options of their conversion."""
    tree = archive(size_bytes).parent
    conversions = {name: [*words, str(tree)] for name, words in options.items()}
    return image.kept(conversions, tree.name)


def archive(size_bytes: int) -> Path:
    """A tar of Debian's /usr, some of it compressed already, over and over: each time at another
    place in its chunks, so that no chunk is there twice."""
    source = content().tree

    def build(directory: Path) -> None:
        tar = 'tar -C "$1" --sort=name -c usr 2> /dev/null'
        pack = f'while {tar}; do :; done | head -c "$2" > "$3"; [ $(stat -c %s "$3") = "$2" ]'
        command.run(["sh", "-c", pack, "sh", source, str(size_bytes), directory / FILE])

    key = store.key(source.parent.name, size_bytes)
    return store.kept("bench-files", key, build, keep=2) / FILE

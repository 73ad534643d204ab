"""What a node's containers are made of, at one origin: two programs that share a layer, noise, and
many tiny images."""

from __future__ import annotations

import hashlib
from pathlib import Path

from harness import image, noise, small, store

APPS = (small.ONE, small.TWO)
"""Both have `small.PROGRAM`, from a layer that they share."""

NOISE = (noise.COLD, noise.CRASH[0])
TINY = tuple(f"tiny/{number}:latest" for number in range(40))


def origin() -> image.Origin:
    """All of them, kept."""
    key = store.key(Path(__file__).read_bytes())
    tiny = store.kept("tiny", key, _build, keep=2)
    conversions = small.conversions(APPS) | noise.conversions(NOISE)
    conversions |= {name: [str(tiny / _stem(name))] for name in TINY}
    return image.kept(conversions, key)


def _stem(name: str) -> str:
    return name.partition(":")[0].replace("/", "-")


def _build(directory: Path) -> None:
    for name in TINY:
        tree = directory / _stem(name)
        tree.mkdir()
        (tree / "name").write_bytes(name.encode() + b"\n")
        (tree / "noise").write_bytes(hashlib.shake_128(name.encode()).digest(9000))

"""Small images for scenarios: kept content, in layers that images share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness import image, listing, store
from harness.qemu import BUSYBOX

ONE = "small/one:latest"
TWO = "small/two:latest"
PAIR = "small/pair:latest"
LONE = tuple(f"small/lone-{number}:latest" for number in range(6))
"""Nothing of these is in any other image: cold for whoever comes first."""

IMAGES = {
    ONE: ("base", "one"),
    TWO: ("base", "two"),
    PAIR: ("left", "right"),
    **{name: (f"lone-{number}",) for number, name in enumerate(LONE)},
}
"""The layers of each image, lowest first. No file is in two layers."""

PROGRAM = "bin/busybox"
"""In layer `base`: statically linked."""

OPTIONS = ("--chunk-size", "256K")
TAR_HEADER_BYTES = 512
TIME = 1_600_000_000


@dataclass(frozen=True)
class Small:
    """The images at an origin, and the layers they were made of."""

    origin: image.Origin
    layers: dict[str, Path]

    def content(self, path: str) -> bytes:
        """The bytes of a file of whichever layer has it."""
        return next((at / path).read_bytes() for at in self.layers.values() if (at / path).exists())

    def files(self, name: str) -> dict[str, str]:
        """Every file of an image with its sha256."""
        entries = [entry for layer in IMAGES[name] for entry in listing.entries(self._at(layer))]
        return {entry["path"]: entry["sha256"] for entry in entries if entry["type"] == "file"}

    def once_bytes(self, name: str) -> dict[str, int]:
        """What each blob of an image costs when all of it is fetched once: its file without the
        tar header between the chunks' data and what says where they are."""
        sizes = self.origin.layer_bytes(name)
        return {blob_id: sizes[blob_id] - TAR_HEADER_BYTES for blob_id in sizes}

    def _at(self, layer: str) -> str:
        return str(self.layers[layer])


def noise(name: str) -> list[str]:
    """The files of an image's last layer that take many chunks and cannot be compressed."""
    return [f"{IMAGES[name][-1]}/noise-{number}" for number in range(2)]


def text(name: str) -> str:
    """A file of that layer that takes many chunks and compresses well."""
    return f"{IMAGES[name][-1]}/text"


def small() -> Small:
    """Content and images, kept. About 60 MB and 800 files."""
    key, layers = _layers()
    return Small(image.kept(conversions(IMAGES), key), layers)


def conversions(images: Iterable[str]) -> dict[str, list[str]]:
    """What makes each of these images, as `image.kept` takes it."""
    _, layers = _layers()
    return {
        name: [*OPTIONS, *(word for of in IMAGES[name] for word in ("--layer", str(layers[of])))]
        for name in images
    }


def _layers() -> tuple[str, dict[str, Path]]:
    key = store.key(Path(__file__).read_bytes(), BUSYBOX.read_bytes())
    kept = store.kept("small", key, _build, keep=2)
    return key, {path.name: path for path in sorted(kept.iterdir())}


def _build(directory: Path) -> None:
    for layer in sorted({layer for layers in IMAGES.values() for layer in layers}):
        _fill(directory / layer / layer)
    _write(directory / "base" / PROGRAM, BUSYBOX.read_bytes(), mode=0o755)
    for number in range(300):
        _write(directory / f"base/many/{number:03}", b"%d\n" % number * (number + 1))
    for path in directory.rglob("*"):
        os.utime(path, (TIME, TIME))


def _fill(directory: Path) -> None:
    """What every layer has: files of many chunks and of one, none with whole pages."""
    seed = directory.name
    for number in range(2):
        _write(directory / f"noise-{number}", _noise(f"{seed} {number}", (2 << 20) + 5))
    lines = (f"line {number} of {seed}\n" for number in range(60_000))
    _write(directory / "text", "".join(lines).encode())
    for number in range(40):
        _write(directory / f"few/{number:02}", _noise(f"{seed} few {number}", number * 99))


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _noise(seed: str, size: int) -> bytes:
    """Incompressible bytes, the same for a seed every time."""
    return hashlib.shake_128(seed.encode()).digest(size)

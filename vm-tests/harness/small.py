"""Small images for scenarios: kept content, in layers that images share."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from harness import image, listing, store
from harness.qemu import BUSYBOX

ONE = "small/one:latest"
TWO = "small/two:latest"
CROWD = "small/crowd:latest"

IMAGES = {ONE: ("base", "one"), TWO: ("base", "two"), CROWD: ("crowd",)}
"""The layers of each image, lowest first. No file is in two layers."""

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


def small() -> Small:
    """Content and images, kept. About 30 MB and 400 files."""
    key = store.key(Path(__file__).read_bytes(), BUSYBOX.read_bytes())
    kept = store.kept("small", key, _build, keep=2)
    layers = {path.name: path for path in sorted(kept.iterdir())}
    conversions = {
        name: [word for layer in of for word in ("--layer", str(layers[layer]))]
        for name, of in IMAGES.items()
    }
    return Small(image.kept(conversions, key), layers)


def _build(directory: Path) -> None:
    base, one, two, crowd = (directory / name for name in ("base", "one", "two", "crowd"))
    _write(base / "bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for number in range(300):
        _write(base / f"many/{number:03}", b"%d\n" % number * (number + 1))
    for number in range(3):
        _write(base / f"shared/noise-{number}", _noise(f"base{number}", (3 << 20) + 4095 * number))
    _write(base / "shared/text", b"".join(b"line %d of a text\n" % n for n in range(200_000)))
    for layer in (one, two):
        for number in range(50):
            _write(
                layer / f"{layer.name}/few/{number:02}",
                _noise(f"{layer.name}{number}", number * 99),
            )
        _write(layer / f"{layer.name}/noise", _noise(layer.name, (5 << 20) + 1))
    for name in ("together", "spread"):
        _write(crowd / name, _noise(name, (4 << 20) + 5))
    for path in directory.rglob("*"):
        os.utime(path, (TIME, TIME))


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _noise(seed: str, size: int) -> bytes:
    """Incompressible bytes, the same for a seed every time."""
    return hashlib.shake_128(seed.encode()).digest(size)

"""Images of noise whose every block says where it belongs: a reader needs no table to find a wrong
byte, and no two blocks of an origin are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from harness.image import Origin

BLOCK_BYTES = 4096
MIB = 1 << 20


class Shape(NamedTuple):
    """An image: so many files of one size, a multiple of the chunk size.

    Nothing is compressed and no chunk is padded, so a byte of the cache file has the same offset
    in the blob at the origin.
    """

    files: int
    file_bytes: int
    chunk_bytes: int

    @property
    def blob_bytes(self) -> int:
        """Of its only cache file."""
        return self.files * self.file_bytes

    @property
    def chunks(self) -> int:
        return self.blob_bytes // self.chunk_bytes


OUTAGE = tuple(f"noise/outage-{number}:latest" for number in range(8))
CRASH = ("noise/crash-a:latest", "noise/crash-b:latest")
COLD = "noise/cold:latest"
LINKS = tuple(f"noise/link-{number}:latest" for number in range(5))

IMAGES = {
    **dict.fromkeys(OUTAGE, Shape(4, 4 * MIB, MIB)),
    **dict.fromkeys(CRASH, Shape(4, 4 * MIB, MIB // 16)),
    COLD: Shape(6, 8 * MIB, MIB // 4),
    **dict.fromkeys(LINKS, Shape(3, 10 * MIB, MIB // 4)),
}


def names(image: str) -> list[str]:
    """The files of an image, by their paths in it."""
    stem = image.partition(":")[0]
    return [f"{stem}/{number}" for number in range(IMAGES[image].files)]


def block(name: str, number: int) -> bytes:
    """The bytes of a file's n-th block."""
    noise = hashlib.shake_128(f"{name} {number}".encode())
    return noise.hexdigest(BLOCK_BYTES // 2).encode()


def origin() -> Origin:
    """All images at one origin, kept."""
    from harness import image

    return image.kept(conversions(IMAGES), _key())


def conversions(images: Iterable[str]) -> dict[str, list[str]]:
    """What makes each of these images, as `image.kept` takes it."""
    from harness import store

    kept = store.kept("noise", _key(), _build, keep=2)
    return {name: _conversion(kept, name) for name in images}


def _key() -> str:
    # Guests import this file for `block` alone and have no tools for images.
    from harness import store

    return store.key(Path(__file__).read_bytes())


def _conversion(kept: Path, name: str) -> list[str]:
    chunk = f"{IMAGES[name].chunk_bytes >> 10}K"
    return ["--compressor", "none", "--chunk-size", chunk, str(kept / name.replace("/", "-"))]


def _build(directory: Path) -> None:
    for image, shape in IMAGES.items():
        for name in names(image):
            path = directory / image.replace("/", "-") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for number in range(shape.file_bytes // BLOCK_BYTES):
                    file.write(block(name, number))

"""`load DIRECTORY SECONDS SEED`: read an image of noise at random, look at every byte, print JSON.

Blocks say where they belong (`harness.noise`), so no table is needed to find a wrong one. Half of
the reads are by pread, half through a mapping, where what cannot be read ends this by SIGBUS.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "vm-tests"))

from harness.noise import BLOCK_BYTES, block

LONGEST_BYTES = 256 << 10
SAMPLES = 5000


class Said(TypedDict):
    """What is printed: `errors` by their names, `seconds` of a sample of the reads."""

    reads: int
    bytes: int
    errors: dict[str, int]
    wrong: list[str]
    longest_s: float
    seconds: list[float]


def main(directory: str, seconds: str, seed: str) -> None:
    top = Path(directory)
    files = sorted(path for path in top.rglob("*") if path.is_file())
    rng = random.Random(seed)
    took: list[float] = []
    errors: Counter[str] = Counter()
    wrong: list[str] = []
    read_bytes = 0
    end = time.monotonic() + float(seconds)
    while (began := time.monotonic()) < end:
        path = rng.choice(files)
        start = rng.randrange(path.stat().st_size)
        try:
            data = _read(path, start, rng.randint(1, LONGEST_BYTES), mapped=rng.random() < 0.5)
        except OSError as error:
            errors[os.strerror(error.errno or 0)] += 1
            data = b""
        took.append(time.monotonic() - began)
        read_bytes += len(data)
        if not _is_right(str(path.relative_to(top)), start, data):
            wrong.append(f"{path} at {start}, {len(data)} bytes")
    said = Said(
        reads=len(took),
        bytes=read_bytes,
        errors=errors,
        wrong=wrong[:10],
        longest_s=max(took, default=0.0),
        seconds=rng.sample(took, min(len(took), SAMPLES)),
    )
    print(json.dumps(said))


def _read(path: Path, start: int, count: int, *, mapped: bool) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        if not mapped:
            return os.pread(file, count, start)
        with mmap.mmap(file, 0, prot=mmap.PROT_READ) as memory:
            return memory[start : start + count]
    finally:
        os.close(file)


def _is_right(name: str, start: int, data: bytes) -> bool:
    first = start // BLOCK_BYTES
    last = (start + len(data) - 1) // BLOCK_BYTES
    expected = b"".join(block(name, number) for number in range(first, last + 1))
    inside = start - first * BLOCK_BYTES
    return data == expected[inside : inside + len(data)]


if __name__ == "__main__":
    main(*sys.argv[1:])

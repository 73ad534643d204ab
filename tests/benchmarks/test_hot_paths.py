"""What is done for every message, READ and chunk costs no more than it did.

A figure is a ratio to a calibration loop that takes turns with it, the least of each: so it depends
neither on the machine nor on what else that does. To record anew, for a reason that belongs in
docs/decisions: `pytest tests/benchmarks/test_hot_paths.py --record-hot-paths`.
"""

from __future__ import annotations

import io
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fscached.cache.blob import Blob, Run
from fscached.cache.extents import Extents
from fscached.cache.planner import Planner
from fscached.transport import Wanted
from rafs_v6.blob import ChunkMap
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.build import ImageBuilder
from rafs_v6.codec import compress, decompress_into, digest
from rafs_v6.layout import Compressor, Digest
from rafs_v6.pack import Format
from rafs_v6.tree import read_directory
from tests.transport.device import OBJECT, Kernel, open_message, read_message

RECORDED = Path(__file__).parent / "hot_paths.json"
LIMIT = 1.5
ROUNDS = 200
"""Of about 1 ms: some of them fit between two turns of whatever else runs."""

PAGE = 4096
CHUNKS = 128
WINDOW_BYTES = 16 * PAGE
TEXT = b"".join(b"line %d of what a package has in its documentation\n" % n for n in range(4000))
PACKED = zlib.compress(TEXT)

Loop = Callable[[], object]


def interpreted() -> int:
    """What our own loops are made of: calls, attributes, small numbers, a dict and a list."""
    known: dict[int, list[int]] = {}
    for number in range(2000):
        known.setdefault(number & 63, []).append(number)
    return sum(len(found) for found in known.values())


def inflated() -> bytes:
    """Decoding by the standard library: C as well, and scalar as zstd is."""
    return zlib.decompress(PACKED)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> ChunkMap:
    """Of a blob of chunks of one page."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "file").write_bytes(b"".join(n.to_bytes(PAGE, "little") for n in range(CHUNKS)))
    builder = ImageBuilder(Format(compressor=Compressor.NONE, chunk_bytes=PAGE))
    builder.add(read_directory(tree), io.BytesIO())
    bootstrap = Bootstrap(builder.finish().bootstrap)
    return ChunkMap.from_chunk_table(bootstrap.blobs[0], bootstrap.chunk_table())


def extents() -> Loop:
    """What SEEK_DATA tells of a file with many holes, and what is asked of it."""
    ranges = [(start, start + 3 * PAGE) for start in range(0, CHUNKS * 4 * PAGE, 4 * PAGE)]

    def work() -> bool:
        known = Extents(ranges)
        return all(known.covers(start, end) for start, end in ranges)

    assert work()
    return work


def planner() -> Loop:
    """Random readers and sequential ones, whose windows land."""

    def work() -> None:
        plan = Planner(WINDOW_BYTES, 8 * WINDOW_BYTES)
        for chunk in range(0, 8000, 50):
            stream = plan.miss(chunk)
            plan.fetched(stream, chunk + 50)
            for at in (chunk + 10, chunk + 30):
                plan.seen(at)

    return work


def lookup(chunks: ChunkMap) -> Loop:
    """Which chunks a READ is about, and where they are."""

    def work() -> int:
        found = 0
        for index in range(CHUNKS):
            start = index * PAGE
            for at in chunks.overlapping(start, start + 2 * PAGE):
                found += chunks.remote_offset(at) + chunks.padded_end(at)
        return found

    return work


def decisions(chunks: ChunkMap) -> Loop:
    """A whole blob by READs of a page: what to fetch, what has landed, who wakes."""

    def work() -> Blob:
        blob = Blob(chunks, Planner(WINDOW_BYTES, WINDOW_BYTES), 30.0, 1.0)
        for index in range(CHUNKS):
            start = index * PAGE
            for fetch in blob.want(index, start, start + PAGE, 0.0).fetches:
                for at in range(fetch.first, fetch.end):
                    blob.arrived(fetch, at)
                run = Run(fetch.first, fetch.end)
                blob.completing(run)
                blob.landed(run)
        return blob

    assert work().complete
    return work


def messages(kernel: Kernel) -> Loop:
    """READs as the device brings them, without the system call, which is the machine's."""
    kernel.send(open_message(kernel.object_fd()))
    [opened] = kernel.transport.drain()
    kernel.transport.open_ok(OBJECT, CHUNKS * PAGE)
    texts = [read_message(number * PAGE, PAGE, number) for number in range(CHUNKS)]
    parse = kernel.transport._event

    def work() -> list[object]:
        return [parse(text) for text in texts]

    assert all(isinstance(event, Wanted) for event in work()), opened
    return work


def decoding() -> Loop:
    """A chunk that compresses well: decompressed into place, its digest taken."""
    packed = compress(Compressor.ZSTD, TEXT)
    assert packed is not None
    target = memoryview(bytearray(len(TEXT)))

    def work() -> bytes:
        decompress_into(Compressor.ZSTD, packed, target)
        return digest(Digest.BLAKE3, target)

    assert work() == digest(Digest.BLAKE3, TEXT)
    return work


@pytest.fixture
def loop(name: str, chunks: ChunkMap, tmp_path: Path) -> Iterator[Loop]:
    """One of the above by its name."""
    kernel = Kernel(tmp_path)
    loops: dict[str, Callable[[], Loop]] = {
        "extents": extents,
        "planner": planner,
        "lookup": lambda: lookup(chunks),
        "decisions": lambda: decisions(chunks),
        "messages": lambda: messages(kernel),
        "decoding": decoding,
    }
    yield loops[name]()
    kernel.hang_up()
    kernel.transport.close()


@pytest.mark.parametrize(
    "name", ["extents", "planner", "lookup", "decisions", "messages", "decoding"]
)
def test_a_hot_path_is_as_fast_as_it_was(
    name: str, loop: Loop, benchmark: BenchmarkFixture, pytestconfig: pytest.Config
) -> None:
    """At most LIMIT times what is recorded, beside the calibration loop of its kind."""
    calibration = inflated if name == "decoding" else interpreted
    least_s = float("inf")

    def calibrate() -> None:
        nonlocal least_s
        began = time.perf_counter()
        calibration()
        least_s = min(least_s, time.perf_counter() - began)

    benchmark.pedantic(loop, setup=calibrate, rounds=ROUNDS, warmup_rounds=3)
    found = benchmark.stats.stats.min / least_s
    recorded = json.loads(RECORDED.read_text())
    benchmark.extra_info.update(ratio=found, recorded=recorded.get(name))
    if pytestconfig.option.record_hot_paths:
        recorded[name] = round(found, 3)
        RECORDED.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
    assert found <= recorded[name] * LIMIT, f"{found:.3f} of the calibration loop"

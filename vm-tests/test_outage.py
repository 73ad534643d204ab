"""What readers see when the origin or the cache disk fails, and that nothing stays broken."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from harness import disk, link, noise
from harness.daemon import drop_caches
from harness.guest import Guest, Process
from harness.inspector import Seen
from harness.node import Node
from harness.registry import Registry

MOUNT = "/mnt/image"
FILES = noise.names(noise.OUTAGE)
SHAPE = noise.IMAGES[noise.OUTAGE]
CHUNK_BLOCKS = SHAPE.chunk_bytes // noise.BLOCK_BYTES
FILE_BLOCKS = SHAPE.file_bytes // noise.BLOCK_BYTES

DEADLINE_S = 3.0
PATIENCE_S = 60.0
"""For what takes a moment; nothing here should come near it."""

FULL = f"{disk.CACHE_MOUNT}/full"
SLOW_BYTES_PER_S = 2 << 20

FLIP = """
import sys
path, offset = sys.argv[1], int(sys.argv[2])
with open(path, "r+b") as file:
    file.seek(offset)
    byte = file.read(1)[0]
    file.seek(offset)
    file.write(bytes([byte ^ 1]))
"""

FILL = f"""
import os
free = os.statvfs("{disk.CACHE_MOUNT}")
with open("{FULL}", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
"""


@pytest.fixture(scope="module")
def guest(boot_guest: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory) -> Guest:
    cache = disk.cache(tmp_path_factory.mktemp("disks") / "cache.ext4")
    return boot_guest(disks=[cache, noise.origin().disk])


@pytest.fixture(scope="module")
def registry(guest: Guest) -> Registry:
    return Registry(guest)


@pytest.fixture
def node(guest: Guest, registry: Registry) -> Iterator[Node]:
    """Cold, with a short deadline; the image is mounted."""
    registry.start()
    node = Node(guest, registry)
    node.begin({"fetch": {"deadline_s": DEADLINE_S}})
    node.mount(noise.OUTAGE, MOUNT)
    yield node
    node.end()
    registry.stop()


def test_a_registry_that_stays_away_is_eio(node: Node) -> None:
    """Stopped in the middle of a cold read, it fails the reader after the deadline, and the file
    reads fine once it is back."""
    with link.shaped(node.guest, bytes_per_s=SLOW_BYTES_PER_S):
        reader = _start(node, "stream", *FILES)
        _await_bytes(node)
        node.registry.stop()
        seen = _result(reader)
    assert (seen["error"], seen["wrong"]) == ("EIO", [])
    assert 0 < seen["blocks"] < FILE_BLOCKS * len(FILES)
    assert seen["slowest_s"] < 2 * DEADLINE_S
    node.registry.start()
    _await_right(node, *FILES)


def test_a_registry_that_returns_in_time_is_a_pause(node: Node) -> None:
    """Stopped in the middle of a cold read and back before the deadline, it costs time alone."""
    node.end()
    node.begin({"fetch": {"deadline_s": PATIENCE_S}})
    node.mount(noise.OUTAGE, MOUNT)
    with link.shaped(node.guest, bytes_per_s=SLOW_BYTES_PER_S):
        reader = _start(node, "stream", *FILES)
        _await_bytes(node)
        node.registry.stop()
        _await(lambda: node.daemon.status()["totals"]["reads_waiting"] > 0)
        node.registry.start()
    seen = _result(reader)
    assert (seen["error"], seen["wrong"]) == (None, [])
    assert seen["blocks"] == FILE_BLOCKS * len(FILES)
    assert node.daemon.status()["totals"]["reads_failed"] == 0


@pytest.mark.parametrize("known", [True, False], ids=["known blob", "unknown blob"])
def test_a_failure_takes_one_deadline(node: Node, known: bool) -> None:
    """However often the kernel asks: a read and a page fault, within a chunk and across two, of a
    blob whose chunks are known and of one whose are not."""
    if known:
        assert _seen(node, "call", FILES[7], 0, 1)["error"] is None
    node.registry.stop()
    seen = {
        "read": _seen(node, "call", FILES[0], 0, 1),
        "read across": _seen(node, "call", FILES[1], CHUNK_BLOCKS - 16, 32),
        "fault": _seen(node, "fault", FILES[2], 100),
        "fault across": _seen(node, "fault", FILES[3], CHUNK_BLOCKS),
    }
    assert {name: it["error"] for name, it in seen.items()} == {
        "read": "EIO",
        "read across": "EIO",
        "fault": "SIGBUS",
        "fault across": "SIGBUS",
    }
    late = {name: it["slowest_s"] for name, it in seen.items() if it["slowest_s"] > 2 * DEADLINE_S}
    assert not late
    node.registry.start()
    _await_right(node, *FILES[:4])


def test_a_corrupted_chunk_is_never_served(node: Node) -> None:
    """One flipped bit at the origin is EIO and a log line; the chunks around it are served, and it
    is served itself once it is mended."""
    [blob_id] = noise.origin().blob_ids(noise.OUTAGE)
    flip = [node.registry.blob(f"sha256:{blob_id}"), str(SHAPE.chunk_bytes + 12345)]
    node.guest.python(FLIP, *flip)
    seen = _seen(node, "stream", FILES[0])
    assert (seen["error"], seen["wrong"]) == ("EIO", [])
    assert seen["blocks"] == CHUNK_BLOCKS
    assert _seen(node, "call", FILES[0], CHUNK_BLOCKS, 1)["error"] == "EIO"
    assert _seen(node, "call", FILES[0], 2 * CHUNK_BLOCKS, 32)["error"] is None
    assert "chunk 1 from" in node.daemon.log()
    assert node.blob(blob_id)["bad_chunks"] > 0
    node.guest.python(FLIP, *flip)
    _await_right(node, FILES[0])


def test_a_full_cache_disk_heals(node: Node) -> None:
    """Resident data is read without asking; what is not fails, says why, and works again once
    there is room, without a restart."""
    assert _seen(node, "stream", FILES[0])["error"] is None
    before = node.daemon.pid()
    node.guest.python(FILL)
    drop_caches(node.guest)
    node.guest.reset_cachefiles_counts()
    seen = _seen(node, "stream", FILES[0])
    assert (seen["error"], seen["wrong"], seen["blocks"]) == (None, [], FILE_BLOCKS)
    assert node.guest.cachefiles_counts()["read"] == 0
    seen = _seen(node, "stream", FILES[2])
    assert (seen["error"], seen["wrong"]) == ("EIO", [])
    assert seen["slowest_s"] < DEADLINE_S
    assert "free space on the cache file system" in node.daemon.log()
    node.guest.run(["rm", FULL])
    _await_right(node, *FILES)
    assert node.daemon.pid() == before


def _start(node: Node, kind: str, *words: object) -> Process:
    command = ["/usr/bin/python3", "-m", "harness.inspector", kind, MOUNT, *map(str, words)]
    return node.guest.start(command, cwd="/run", timeout_s=PATIENCE_S * 2)


def _result(reader: Process) -> Seen:
    done = reader.wait(PATIENCE_S * 3)
    assert done.returncode == 0, done.stderr
    seen: Seen = json.loads(done.stdout)
    return seen


def _seen(node: Node, kind: str, *words: object) -> Seen:
    return _result(_start(node, kind, *words))


def _await_bytes(node: Node) -> None:
    """Wait until more than one chunk has come and a reader waits for another."""

    def under_way() -> bool:
        totals = node.daemon.status()["totals"]
        return totals["received_bytes"] > 2 * SHAPE.chunk_bytes and totals["reads_waiting"] > 0

    _await(under_way)


def _await_right(node: Node, *names: str) -> None:
    """Files read right, once the moment has passed in which a chunk that failed is refused."""

    def right() -> bool:
        seen = _seen(node, "stream", *names)
        assert not seen["wrong"]
        return seen["error"] is None and seen["blocks"] == FILE_BLOCKS * len(names)

    _await(right)


def _await(come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.05)

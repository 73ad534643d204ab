"""What readers see when the origin or the cache disk fails, and that nothing stays broken.

Every test has an image of its own, so that all of it is cold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from harness import disk, inspector, link, noise
from harness.daemon import drop_caches
from harness.guest import Guest, Process
from harness.inspector import Seen
from harness.node import Node
from harness.registry import Registry

AWAY, SLOW, KNOWN, UNKNOWN, DAMAGED, FILLED, LATE, OUTLASTED = noise.OUTAGE
SHAPE = noise.IMAGES[AWAY]
CHUNK_BLOCKS = SHAPE.chunk_bytes // noise.BLOCK_BYTES
FILE_BLOCKS = SHAPE.file_bytes // noise.BLOCK_BYTES
IMAGE_BLOCKS = SHAPE.blob_bytes // noise.BLOCK_BYTES

DEADLINE_S = 3.0
PATIENCE_S = 60.0
"""For what takes a moment; nothing here should come near it."""

FETCH_FAILED = "a fetch failed"
SLOW_BYTES_PER_S = 1 << 20
FULL = f"{disk.CACHE_MOUNT}/full"
OVER = "/run/over"

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
def hasty(guest: Guest) -> Iterator[Node]:
    """A node with a short deadline, and windows of one chunk: who has read one file has not had
    the next one fetched with it."""
    node = Node(guest, Registry(guest))
    node.registry.start()
    node.begin({"fetch": {"deadline_s": DEADLINE_S, "window_limit_bytes": SHAPE.chunk_bytes}})
    yield node
    node.end()
    node.registry.stop()


@pytest.fixture
def node(hasty: Node) -> Iterator[Node]:
    """The same, whose registry runs when the test begins."""
    yield hasty
    hasty.registry.stop()
    hasty.registry.start()


def test_a_registry_that_stays_away_is_eio(node: Node) -> None:
    """Stopped in the middle of a cold read, it fails the reader after the deadline, and the files
    read fine once it is back."""
    mount = _mount(node, AWAY)
    with link.shaped(node.guest, bytes_per_s=SLOW_BYTES_PER_S):
        reader = _reader_under_way(node, mount, *noise.names(AWAY))
        node.registry.stop()
        seen = inspector.seen(reader, timeout_s=PATIENCE_S * 3)
    assert (seen["error"], seen["wrong"]) == ("EIO", [])
    assert 0 < seen["blocks"] < IMAGE_BLOCKS
    assert seen["slowest_s"] < 2 * DEADLINE_S
    node.registry.start()
    _await_right(node, mount, AWAY)


@pytest.mark.either
def test_a_slow_link_is_no_outage(node: Node) -> None:
    """Bytes that keep coming are waited for, also when the window they are part of takes longer
    than the deadline of a chunk."""
    mount = _mount(node, SLOW)
    with link.shaped(node.guest, bytes_per_s=SLOW_BYTES_PER_S):
        seen = _seen(node, "stream", mount, *noise.names(SLOW))
    assert (seen["error"], seen["wrong"], seen["blocks"]) == (None, [], IMAGE_BLOCKS)


@pytest.mark.parametrize("image", [KNOWN, UNKNOWN], ids=["known", "unknown"])
def test_a_failure_takes_one_deadline(node: Node, image: str) -> None:
    """However often the kernel asks: a read and a page fault, within a chunk and across two, of a
    blob whose chunks are known and of one whose are not."""
    mount, names = _mount(node, image), noise.names(image)
    if image == KNOWN:
        assert _seen(node, "call", mount, names[0], FILE_BLOCKS - 1, 1)["error"] is None
    node.registry.stop()
    seen = {
        "read": _seen(node, "call", mount, names[0], 0, 1),
        "read across": _seen(node, "call", mount, names[1], CHUNK_BLOCKS - 16, 32),
        "fault": _seen(node, "fault", mount, names[2], 100),
        "fault across": _seen(node, "fault", mount, names[3], CHUNK_BLOCKS),
    }
    assert {name: it["error"] for name, it in seen.items()} == {
        "read": "EIO",
        "read across": "EIO",
        "fault": "SIGBUS",
        "fault across": "SIGBUS",
    }
    slowest = {name: it["slowest_s"] for name, it in seen.items()}
    assert max(slowest.values()) < 2 * DEADLINE_S, slowest
    node.registry.start()
    _await_right(node, mount, image)


@pytest.mark.either
def test_a_corrupted_chunk_is_never_served(node: Node) -> None:
    """One flipped bit at the origin is EIO and a log line; the chunks around it are served, and it
    is served itself once it is mended."""
    mount, [name, *_] = _mount(node, DAMAGED), noise.names(DAMAGED)
    with _damaged(node, DAMAGED, SHAPE.chunk_bytes + 12345):
        seen = _seen(node, "stream", mount, name)
        assert (seen["error"], seen["wrong"], seen["blocks"]) == ("EIO", [], CHUNK_BLOCKS)
        assert _seen(node, "call", mount, name, CHUNK_BLOCKS, 1)["error"] == "EIO"
        assert _seen(node, "call", mount, name, 2 * CHUNK_BLOCKS, 32)["error"] is None
    assert "its digest is not the one the image names" in node.daemon.log()
    assert node.daemon.status()["totals"]["bad_chunks"] > 0
    _await_right(node, mount, DAMAGED)


def test_a_full_cache_disk_heals(node: Node) -> None:
    """It fills up in the middle of a cold read: that fails and says why, who reads what is there
    does not notice and has nothing fetched, and all works again once there is room, without a
    restart."""
    mount, [first, *others] = _mount(node, FILLED), noise.names(FILLED)
    assert _seen(node, "stream", mount, first)["error"] is None
    before = node.daemon.pid()
    resident = inspector.start(node.guest, "again", mount, OVER, first, timeout_s=PATIENCE_S * 3)
    with link.shaped(node.guest, bytes_per_s=SLOW_BYTES_PER_S):
        reader = _reader_under_way(node, mount, *others)
        node.guest.python(FILL)
        seen = inspector.seen(reader, timeout_s=PATIENCE_S * 2)
    assert (seen["error"], seen["wrong"]) == ("EIO", [])
    assert 0 < seen["blocks"] < len(others) * FILE_BLOCKS
    assert seen["slowest_s"] < 2 * DEADLINE_S
    assert "free space on the cache file system" in node.daemon.log()
    asked, received = node.daemon.asked(), node.daemon.status()["totals"]["received_bytes"]
    drop_caches(node.guest)
    seen = _seen(node, "stream", mount, first)
    assert (seen["error"], seen["wrong"], seen["blocks"]) == (None, [], FILE_BLOCKS)
    # fanotify asks about every read of a file that has holes anywhere.
    assert node.daemon.asked() == asked or not node.guest.kernel.traced
    assert node.daemon.status()["totals"]["received_bytes"] == received
    node.guest.run(["rm", FULL])
    _await_right(node, mount, FILLED)
    node.guest.run(["touch", OVER])
    seen = inspector.seen(resident, timeout_s=PATIENCE_S)
    assert (seen["error"], seen["wrong"]) == (None, []) and seen["blocks"] > FILE_BLOCKS
    assert node.daemon.pid() == before


@pytest.mark.either
def test_a_registry_that_returns_in_time_is_a_pause(hasty: Node) -> None:
    """Stopped in the middle of a cold read and back before the deadline, it costs time alone."""
    hasty.daemon.configure({"fetch": {"deadline_s": PATIENCE_S}})
    hasty.daemon.replace()
    mount = _mount(hasty, LATE)
    with link.shaped(hasty.guest, bytes_per_s=SLOW_BYTES_PER_S):
        reader = _reader_under_way(hasty, mount, *noise.names(LATE))
        hasty.registry.stop()
        _await(lambda: bool(hasty.daemon.status()["totals"]["reads_waiting"]))
        hasty.registry.start()
    seen = inspector.seen(reader, timeout_s=PATIENCE_S * 3)
    assert (seen["error"], seen["wrong"], seen["blocks"]) == (None, [], IMAGE_BLOCKS)
    assert hasty.daemon.status()["totals"]["reads_failed"] == 0


@pytest.mark.either
def test_readers_outlast_a_registry_that_is_away(hasty: Node) -> None:
    """Told to wait, a reader and a page fault wait for many deadlines, below the limit, however
    often the kernel would ask, and go on; once the limit is over they fail as ever."""
    wait = {"on_source_outage": "wait", "deadline_s": DEADLINE_S, "outage_limit_s": PATIENCE_S}
    hasty.daemon.configure({"fetch": wait})
    hasty.daemon.replace()
    mount, names = _mount(hasty, OUTLASTED), noise.names(OUTLASTED)
    assert _seen(hasty, "call", mount, names[0], 0, 1)["error"] is None
    hasty.registry.stop()
    failed = hasty.daemon.log().count(FETCH_FAILED)
    kinds = (("call", names[1], 0, 1), ("fault", names[2], 100))
    readers = [
        inspector.start(hasty.guest, kind, mount, *words, timeout_s=PATIENCE_S)
        for kind, *words in kinds
    ]
    _await(lambda: hasty.daemon.status()["totals"]["reads_waiting"] >= len(readers))
    _await(lambda: hasty.daemon.log().count(FETCH_FAILED) >= failed + 2 * len(readers))
    hasty.registry.start()
    for reader in readers:
        seen = inspector.seen(reader, timeout_s=PATIENCE_S)
        assert (seen["error"], seen["wrong"]) == (None, []) and seen["slowest_s"] > DEADLINE_S
    assert hasty.daemon.status()["totals"]["reads_failed"] == 0
    hasty.registry.stop()
    hasty.daemon.configure({"fetch": wait | {"outage_limit_s": 2 * DEADLINE_S}})
    hasty.daemon.replace()
    seen = _seen(hasty, "call", mount, names[3], 0, 1)
    assert seen["error"] == "EIO" and 2 * DEADLINE_S <= seen["slowest_s"] < 4 * DEADLINE_S
    hasty.registry.start()


def _mount(node: Node, image: str) -> str:
    """Where an image is mounted now."""
    directory = "/mnt/" + image.partition(":")[0].rpartition("/")[2]
    node.mount(image, directory)
    return directory


@contextmanager
def _damaged(node: Node, image: str, offset: int) -> Iterator[None]:
    """One bit of the image's blob is another one at the origin."""
    [blob_id] = noise.origin().blob_ids(image)
    flip = [node.registry.blob(f"sha256:{blob_id}"), str(offset)]
    node.guest.python(FLIP, *flip)
    try:
        yield
    finally:
        node.guest.python(FLIP, *flip)


def _seen(node: Node, kind: str, mount: str, *words: object) -> Seen:
    reader = inspector.start(node.guest, kind, mount, *words, timeout_s=PATIENCE_S)
    return inspector.seen(reader, timeout_s=PATIENCE_S * 2)


def _reader_under_way(node: Node, mount: str, *names: str) -> Process:
    """A reader of these files that has got its first chunks and waits for another."""
    before = node.daemon.status()["totals"]["received_bytes"]
    reader = inspector.start(node.guest, "stream", mount, *names, timeout_s=PATIENCE_S * 2)

    def under_way() -> bool:
        totals = node.daemon.status()["totals"]
        came = totals["received_bytes"] - before
        return bool(came > 2 * SHAPE.chunk_bytes and totals["reads_waiting"])

    _await(under_way)
    return reader


def _await_right(node: Node, mount: str, image: str) -> None:
    """All files read right, once the moment has passed in which a chunk that failed is refused."""

    def right() -> bool:
        seen = _seen(node, "stream", mount, *noise.names(image))
        assert not seen["wrong"]
        return seen["error"] is None and seen["blocks"] == IMAGE_BLOCKS

    _await(right)


def _await(come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.05)

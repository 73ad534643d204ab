"""Reads of mounted images: right bytes, fetched once, and asked for only while they are absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from harness import content, disk, image, listing
from harness.daemon import drop_caches
from harness.guest import Guest
from harness.node import Node
from harness.registry import Registry
from harness.small import LONE, ONE, PAIR, PROGRAM, TWO, Small, noise, small, text

from rafs_v6.bootstrap import Bootstrap
from rafs_v6.layout import BLOCK_BYTES, FileType, align_up

MOUNT = "/mnt/image"
OTHER = "/mnt/other"
THIRD = "/mnt/third"
DEBIAN_PORT = 5001
DEBIAN_STORAGE = "/var/lib/debian-registry"
READERS = 64
PREFETCHED = 1.05
"""How often an origin may send a byte, on average, where readers meet prefetches."""
LISTING_TIMEOUT_S = 300.0
CROWD, MAPPED, SCATTERED = LONE[:3]
STATE = f"{disk.CACHE_MOUNT}/state"


@dataclass(frozen=True)
class Passes:
    """What two readings of the whole Debian image came to, and what they cost."""

    expected: str
    cold: str
    again: dict[str, str]
    prefetched: bool
    cold_reads: int
    hit_reads: int
    discrepancies: dict[str, tuple[int, int]]
    sent: dict[str, int]


@pytest.fixture(scope="module")
def images() -> Small:
    return small()


@pytest.fixture(scope="module")
def debian() -> image.Origin:
    return image.debian()


@pytest.fixture(scope="module")
def guest(
    boot_guest: Callable[..., Guest],
    images: Small,
    debian: image.Origin,
    tmp_path_factory: pytest.TempPathFactory,
) -> Guest:
    cache = disk.cache(tmp_path_factory.mktemp("disks") / "cache.ext4")
    second = dataclasses.replace(debian.disk, serial="debian", mount=DEBIAN_STORAGE)
    return boot_guest(disks=[cache, images.origin.disk, second])


@pytest.fixture(scope="module")
def started(guest: Guest) -> Iterator[Node]:
    registry = Registry(guest)
    registry.start()
    node = Node(guest, registry)
    node.begin()
    yield node
    node.end()


@pytest.fixture
def node(started: Node) -> Iterator[Node]:
    """A node where nothing is mounted; each scenario reads images that no other has read. At its
    end the daemon's counts must still be the kernel's and the origin's."""
    yield started
    started.unmount()
    assert started.discrepancies() == {}


@pytest.fixture(scope="module")
def passes(guest: Guest) -> Passes:
    """The whole Debian image, read cold and read again after its pages are forgotten.

    Where the kernel asks by fanotify it goes on asking until a blob is whole, so prefetch has to
    bring what no file of the image has any more.
    """
    registry = Registry(guest, storage=DEBIAN_STORAGE, port=DEBIAN_PORT)
    registry.start()
    node = Node(guest, registry)
    asks_about_holes = not guest.kernel.traced
    node.begin({"prefetch": {"enabled": asks_about_holes}})
    node.mount(image.NAME, MOUNT)
    cold = node.listing(MOUNT)
    if asks_about_holes:
        node.await_whole()
    cold_reads = node.daemon.asked()
    drop_caches(guest)
    again = digests(guest, MOUNT)
    hit_reads = node.daemon.asked() - cold_reads
    discrepancies = node.discrepancies()
    sent = node.blob_bytes()
    node.end()
    registry.stop()
    expected = listing.dump(str(content.content().tree))
    counts = cold_reads, hit_reads, discrepancies, sent
    return Passes(expected, cold, again, asks_about_holes, *counts)


def digests(guest: Guest, directory: str) -> dict[str, str]:
    """Every file of a tree, read by a program that is not ours and quick."""
    command = f"cd {directory} && find . -type f -print0 | xargs -0 sha256sum -z"
    rows = guest.run(command, timeout_s=LISTING_TIMEOUT_S).stdout.rstrip("\0").split("\0")
    pairs = (row.split("  ./", 1) for row in rows)
    return {path: digest for digest, path in pairs}


def bootstrap(node: Node, directory: str) -> Bootstrap:
    fsid = node.fsid(directory)
    return Bootstrap(node.guest.get(f"{STATE}/images/{fsid}/image.boot"))


def test_cold_read_of_every_file(passes: Passes) -> None:
    """Content, mode, owner, time and xattrs of every file of a Debian image are its source's."""
    assert len(passes.expected.splitlines()) > 5000
    assert listing.differences(passes.expected, passes.cold) == []
    assert passes.cold_reads > 0


def test_hit_asks_nobody(passes: Passes) -> None:
    """With every page forgotten all files read right again, and the kernel asks 0 times."""
    entries = [json.loads(line) for line in passes.expected.splitlines()]
    files = {entry["path"]: entry["sha256"] for entry in entries if entry["type"] == "file"}
    assert passes.again == files
    assert passes.hit_reads == 0


def test_counts_are_those_of_kernel_and_origin(passes: Passes) -> None:
    """OPENs, READs and CLOSEs, requests and bytes: what the daemon says is what happened."""
    assert passes.discrepancies == {}


def test_no_blob_costs_more_than_its_size(passes: Passes, debian: image.Origin) -> None:
    """The origin sent each byte of a blob once; where prefetch was at work, few of the image twice:
    what was on the link when a reader took over."""
    sizes = debian.layer_bytes(image.NAME)
    assert len(passes.sent) == 3
    if passes.prefetched:
        assert sum(passes.sent.values()) <= PREFETCHED * sum(sizes.values()), passes.sent
    else:
        assert [blob for blob, sent in passes.sent.items() if sent > sizes[blob]] == []


def test_crowd_on_one_cold_file(node: Node, images: Small) -> None:
    """64 readers at once get the right bytes, from one place or from everywhere in the file, and
    each chunk is fetched once."""
    node.mount(CROWD, MOUNT)
    for path, stride in zip(noise(CROWD), (0, 100_003), strict=True):
        data = images.content(path)
        starts = [number * stride % len(data) for number in range(READERS)]
        expected = [hashlib.sha256(data[start:] + data[:start]).hexdigest() for start in starts]
        assert node.read("crowd", f"{MOUNT}/{path}", READERS, stride) == expected
    node.digests(MOUNT, images.files(CROWD))
    assert node.blob_bytes().items() >= images.once_bytes(CROWD).items()


def test_pages_in_any_order(node: Node, images: Small) -> None:
    """Cold pages that are mapped, or read 4 KiB at a time, hold the right bytes."""
    node.mount(MAPPED, MOUNT)
    node.mount(SCATTERED, OTHER)
    for name, kind, directory in ((MAPPED, "mapped", MOUNT), (SCATTERED, "scattered", OTHER)):
        before = node.daemon.asked()
        for path in (*noise(name), text(name)):
            expected = hashlib.sha256(images.content(path)).hexdigest()
            assert node.read(kind, f"{directory}/{path}", 20) == expected
        assert node.daemon.asked() > before


def test_last_byte_of_every_blob(node: Node, images: Small) -> None:
    """The last page of a cookie can be read, also when nothing else of it is there."""
    node.mount(PAIR, MOUNT)
    there = bootstrap(node, MOUNT)
    last = last_bytes(there)
    assert len(last) == len(there.blobs) == 2
    before = node.daemon.asked()
    words = [word for path, at in last for word in (f"{MOUNT}/{path}", at)]
    assert node.read("bytes_at", *words) == [images.content(path)[at] for path, at in last]
    assert node.daemon.asked() - before == len(last)


def last_bytes(there: Bootstrap) -> list[tuple[str, int]]:
    """For each blob a file and the offset in it of the last byte of the blob's last chunk."""
    found = []
    for path, inode in there.walk():
        if inode.type is not FileType.REGULAR:
            continue
        for position, chunk in enumerate(there.chunks(inode)):
            end = min(inode.size, (position + 1) * there.chunk_bytes)
            length = align_up(end - position * there.chunk_bytes)
            size = there.blobs[chunk.blob_index].uncompressed_size
            if chunk.start_block * BLOCK_BYTES + length == align_up(size):
                found.append((path.decode().removeprefix("/"), end - 1))
    return found


def test_images_of_a_domain_share_blobs(node: Node, images: Small) -> None:
    """What two images have in common is fetched once, whoever reads it, also when the image that
    brought it goes while the other is mounted, twice."""
    node.mount(ONE, MOUNT)
    node.mount(TWO, OTHER)
    node.read("bytes_at", f"{MOUNT}/{PROGRAM}", 0)
    node.mount(TWO, THIRD)
    node.daemon.umount(MOUNT)
    assert node.digests(THIRD, images.files(TWO)) == images.files(TWO)
    node.mount(ONE, MOUNT)
    assert node.digests(MOUNT, images.files(ONE)) == images.files(ONE)
    once = images.once_bytes(ONE) | images.once_bytes(TWO)
    assert len(once) == 3
    assert node.blob_bytes().items() >= once.items()

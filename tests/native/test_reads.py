"""Reads of an image on this machine's kernel, through fanotify."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fscached import config
from tests.native.conftest import Node, forget_pages, image_of, noise, until
from tests.native.origin import Origin

MIB = 1 << 20
READ = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
MAP = """
import mmap, sys
with open(sys.argv[1]) as file:
    sys.stdout.buffer.write(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
"""


def content(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir()}


def fetched_twice(registry: Origin, blob_ids: list[str]) -> list[tuple[str, int]]:
    """Bytes of a blob that were sent again, by the megabyte; chunk maps are not among them."""
    seen: set[tuple[str, int]] = set()
    twice = []
    for sent in registry.asked(blob_ids):
        for at in range(-(-sent.start // MIB), sent.end // MIB):
            if (sent.blob_id, at) in seen:
                twice.append((sent.blob_id, at))
            seen.add((sent.blob_id, at))
    return twice


def test_cold_reads_bring_the_right_bytes_and_hits_ask_nobody(node: Node, registry: Origin) -> None:
    """Every byte comes once; after that the blob is read without a mark, and without an event."""
    files = noise(1, 6, 700_000)
    built = image_of(files)
    node.start()
    target = node.mount(registry.add("app", built))
    assert content(target) == files
    status = node.wait()
    assert status["transport"] == "fanotify" and status["totals"]["reads_failed"] == 0
    assert status["images"][0]["blobs"][0]["resident_bytes"] >= 6 * 700_000
    asked, reads = len(registry.sent), status["totals"]["reads"]
    forget_pages(target)
    assert content(target) == files
    assert (len(registry.sent), node.wait()["totals"]["reads"]) == (asked, reads)
    said = "complete, and read without asking"
    until(lambda: said in node.log.read_text() or None, "the log says nothing")


def test_a_complete_image_needs_no_daemon_and_a_second_mount_is_counted(
    node: Node, registry: Origin
) -> None:
    """Its mounts outlive everything of ours; the last umount forgets it."""
    files = noise(2, 2, 100_000)
    reference = registry.add("app", image_of(files))
    node.start()
    first, second = node.mount(reference), node.mount(reference, "again")
    assert content(first) == files
    assert node.stop() == 0
    for target in (first, second):
        forget_pages(target)
        assert content(target) == files
    node.start()
    assert node.wait()["images"] == []
    node.fscached("umount", first)
    assert content(second) == files
    assert "not mounted" not in node.fscached("status").stdout
    node.fscached("umount", second)
    assert list(second.iterdir()) == []


def test_images_share_a_blob(node: Node, registry: Origin) -> None:
    """It has one file, and every byte of it comes once."""
    shared, own = noise(3, 3, MIB), noise(4, 1, MIB)
    one, two = image_of(shared), image_of(shared, {"own": own["f0"]})
    node.start()
    first = node.mount(registry.add("one", one))
    second = node.mount(registry.add("two", two), "second")
    (blob_id,) = one.blobs
    assert content(first) == shared
    assert content(second) == shared | {"own": own["f0"]}
    assert fetched_twice(registry, [*two.blobs]) == []
    assert len(list(node.cache.glob(f"files/*/{blob_id}"))) == 1
    node.fscached("umount", first)
    forget_pages(second)
    assert content(second)["f0"] == shared["f0"]


def test_many_readers_of_one_file(node: Node, registry: Origin) -> None:
    """Sixty-four at once: nobody waits for ever, nothing comes twice."""
    files = noise(5, 1, 3 * MIB)
    built = image_of(files, {"other": noise(6, 1, 4096)["f0"]})
    node.start()
    target = node.mount(registry.add("app", built))
    wrong: list[str] = []

    def read() -> None:
        if (target / "f0").read_bytes() != files["f0"]:
            wrong.append("read")

    threads = [threading.Thread(target=read) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and fetched_twice(registry, [*built.blobs]) == []


def test_a_restart_fetches_nothing_twice(node: Node, registry: Origin) -> None:
    """What is resident is told by the file, to a successor and to a daemon without a past."""
    files = noise(7, 4, MIB)
    built = image_of(files)
    reference = registry.add("app", built)
    node.start()
    target = node.mount(reference)
    assert (target / "f0").read_bytes() == files["f0"]
    before = node.daemon_pid()
    node.kill()
    until(lambda: node.daemon_pid() not in {0, before} or None, "no successor")
    assert (target / "f1").read_bytes() == files["f1"]
    node.fscached("umount", target)
    assert node.stop() == 0
    node.start()
    target = node.mount(reference)
    forget_pages(target)
    assert content(target) == files
    assert fetched_twice(registry, [*built.blobs]) == []


def test_an_image_that_was_never_read_whole_comes_back(node: Node, registry: Origin) -> None:
    """Its files were marked, and are again; what had come is not fetched again."""
    files = noise(11, 4, MIB)
    built = image_of(files)
    reference = registry.add("app", built)
    node.start()
    for _ in range(3):
        target = node.mount(reference)
        assert (target / "f0").read_bytes() == files["f0"]
        node.fscached("umount", target)
    target = node.mount(reference)
    assert content(target) == files
    assert fetched_twice(registry, [*built.blobs]) == []


@pytest.mark.timeout(180)
def test_a_registry_that_is_gone_fails_reads_for_as_long(
    node: Node, registry: Origin, long: bool
) -> None:
    """EIO after the deadline, at every try; then the same read is right, by the same daemon. With
    --long it is gone for a minute, and the deadlines and pauses are those of the defaults."""
    files = noise(8, 2, MIB)
    fetch, source = config.Fetch(), config.Source()
    if long:
        node.configure(
            fetch={"deadline_s": fetch.deadline_s, "refusal_s": fetch.refusal_s},
            source={"retry_pause_limit_s": source.retry_pause_limit_s},
        )
    else:
        node.configure(fetch={"deadline_s": 0.5, "refusal_s": 0.0}, source={"retries": 0})
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    assert (target / "f0").read_bytes() == files["f0"]
    daemon, back_s = node.daemon_pid(), time.monotonic() + (60 if long else 0)
    registry.down = True
    while True:
        with pytest.raises(OSError) as caught:
            (target / "f1").read_bytes()
        assert caught.value.errno == errno.EIO
        if time.monotonic() >= back_s:
            break
    registry.down = False
    right = until(lambda: _tried(target / "f1"), "it stays unreadable")
    assert right == files["f1"] and node.daemon_pid() == daemon


def test_readers_outlast_a_registry_that_is_gone(node: Node, registry: Origin) -> None:
    """One that reads and one that maps: neither fails, both go on when it is back."""
    files = noise(8, 3, MIB)
    outage = {"on_source_outage": "wait", "outage_limit_s": 60.0, "deadline_s": 0.5}
    node.configure(fetch=outage)
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    assert (target / "f0").read_bytes() == files["f0"]
    registry.down = True
    programs = [
        [sys.executable, "-c", READ, target / "f1"],
        [sys.executable, "-c", MAP, target / "f2"],
    ]
    readers = [subprocess.Popen(words, stdout=subprocess.PIPE) for words in programs]
    until(lambda: _waiting(node) >= 2 or None, "two READs wait")
    until(
        lambda: "readers wait for its source" in node.log.read_text() or None, "they go on waiting"
    )
    assert [reader.poll() for reader in readers] == [None, None]
    registry.down = False
    for reader, name in zip(readers, ("f1", "f2"), strict=True):
        assert reader.communicate(timeout=20)[0] == files[name] and reader.returncode == 0
    assert node.client.get("/api/v2/status")["totals"]["reads_failed"] == 0


def _waiting(node: Node) -> int:
    return int(node.client.get("/api/v2/status")["totals"]["reads_waiting"])


def test_a_corrupted_chunk_is_never_served(node: Node, registry: Origin) -> None:
    """EIO while the registry lies, the right bytes once it does not."""
    files = noise(9, 3, MIB)
    built = image_of(files)
    node.start()
    target = node.mount(registry.add("app", built))
    assert (target / "f0").read_bytes() == files["f0"]  # the chunk map is known from here on
    (registry.flip,) = built.blobs
    with pytest.raises(OSError) as caught:
        (target / "f2").read_bytes()
    assert caught.value.errno == errno.EIO
    registry.flip = ""
    right = until(lambda: _tried(target / "f2"), "it stays unreadable")
    assert right == files["f2"]
    assert node.wait()["totals"]["bad_chunks"] > 0


def _tried(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def test_no_space_is_an_error_and_no_zeros(node: Node, registry: Origin) -> None:
    """The floor of free space is kept by the daemon: below it nothing is written."""
    files = noise(10, 2, MIB)
    node.configure(
        cache={
            "block_stop_percent": 97,
            "block_cull_percent": 98,
            "block_run_percent": 99,
            "directory": str(node.cache),
        }
    )
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    with pytest.raises(OSError) as caught:
        (target / "f0").read_bytes()
    assert caught.value.errno == errno.EIO
    until(lambda: "free space" in node.log.read_text() or None, "the log says nothing")

"""The daemon killed under load: readers pause, and no byte is wrong."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fscached.transport.slots import SLOT_BYTES
from tests.native.conftest import Node, Readers, image_of, noise, until
from tests.native.manager import Manager
from tests.native.origin import Origin

KINDS = ["READ"] * 6 + ["RANDOM"] * 5 + ["MAP"] * 5
"""Sixteen readers: with readahead, without it, and by page faults."""

CHUNK_BYTES = 64 << 10
LIFE_S = 1.2
"""The longest life of a daemon; half of it is starting."""


def outstanding(node: Node) -> int:
    """How many events were read and not answered: what the supervisor's copy of the slots says."""
    for path in Path(f"/proc/{node.supervisor_pid}/fd").iterdir():
        if "fscached-slots" in str(path.readlink()):
            words = memoryview(path.read_bytes()).cast("Q")
            return sum(1 for word in words[:: SLOT_BYTES // 8] if word)
    return 0


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.mark.timeout(3600)
def test_kill_nine_under_load(
    node: Node, registry: Origin, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """At moments nobody chose, with events outstanding: nobody reads a wrong byte, nobody hangs,
    and nobody gets an error."""
    kills, seed = (request.config.getoption(name) for name in ("kills", "kill_seed"))
    _kill_under_load(node, registry, tmp_path, kills, seed, node.kill)


@pytest.mark.timeout(3600)
def test_every_process_killed_under_load(
    node: Node, registry: Origin, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The supervisor too: the service manager's store is the last holder, and readers wait."""
    losses, seed = (request.config.getoption(name) for name in ("losses", "kill_seed"))
    node.manager = Manager(tmp_path / "notify")

    def lose() -> None:
        node.lose()
        node.start()

    _kill_under_load(node, registry, tmp_path, losses, seed, lose)


def _kill_under_load(
    node: Node, registry: Origin, tmp_path: Path, kills: int, seed: int, kill: Callable[[], None]
) -> None:
    rng = random.Random(seed)
    files = noise(3, 8, (kills + 40) * 160 << 10)
    built = image_of(files, {"never-read": noise(4, 1, 9 << 20)["f0"]}, chunk_bytes=CHUNK_BYTES)
    node.configure(
        fetch={"window_bytes": CHUNK_BYTES, "window_limit_bytes": CHUNK_BYTES, "deadline_s": 60.0}
    )
    registry.pause_s = 0.1
    node.start()
    target = node.mount(registry.add("app", built))
    expected = write_files(tmp_path / "expected", files)
    load = Readers(target, expected, seed, KINDS)
    counts: Counter[int] = Counter()
    for _ in range(kills):
        time.sleep(rng.uniform(0, LIFE_S))
        counts[outstanding(node)] += 1
        kill()
    report = load.seen()
    print(f"outstanding at the kills: {sorted(counts.items())}; {report}")
    assert (report["wrong"], report["failed"]) == ([], [])
    assert report["reads"] > 0 and sum(counts) > 0
    assert node.wait()["totals"]["reads_waiting"] == 0


def test_prefetch_goes_on_after_a_crash(node: Node, registry: Origin) -> None:
    """Though nobody reads: the successor gets a descriptor to fill the file with by a read of its
    own."""
    built = image_of(noise(5, 4, 2 << 20))
    node.configure(prefetch={"enabled": True, "range_bytes": 1 << 20})
    registry.pause_s = 0.1
    node.start()
    target = node.mount(registry.add("app", built))
    (blob_id,) = built.blobs
    until(lambda: len(registry.asked([blob_id])) > 3 or None, "no prefetch")
    node.kill()
    until(lambda: "complete, and read" in node.log.read_text() or None, "no more prefetch")
    assert (target / "f3").read_bytes() == noise(5, 4, 2 << 20)["f3"]
    assert node.wait()["totals"]["reads"] == 0

"""The daemon killed under load: readers pause, and no byte is wrong. And readers killed while they
wait, of whom nothing stays.

`vm-tests/test_crash.py` kills on this kernel too, while an image is read once to its end. Readers
here (`reader.py`) go on until the last kill: what is resident is asked for as well as long as its
file is marked, so kills meet answers as often as fills. And here all processes of ours can be lost,
since the service manager is a stand-in.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import killer, record

from fscached.transport.slots import SLOT_BYTES
from tests.native.conftest import PATIENCE_S, Node, Readers, image_of, noise, until
from tests.native.manager import Manager
from tests.native.origin import Origin
from tests.native.test_reads import MAP, READ

KINDS = ["READ"] * 6 + ["RANDOM"] * 5 + ["MAP"] * 5
"""Sixteen readers: with readahead, without it, and by page faults."""

CHUNK_BYTES = 64 << 10
KILLS_ALL, LOSSES_ALL = 200, 50
"""The whole counts, of `scripts/test --long`: a run of so many is kept in benchmarks/results."""

LIFE_S = 1.2
"""The longest life of a daemon; half of it is starting."""


IDLE_MAX = 20
"""So many kills, and as many as are to count, may find nothing outstanding."""


class Outstanding:
    """Events that were read and not answered: what the memory of the slots says, which is the same
    for all daemons of a node."""

    def __init__(self, node: Node) -> None:
        fds = Path(f"/proc/{node.supervisor_pid}/fd").iterdir()
        slots = next(fd for fd in fds if "fscached-slots" in str(fd.readlink()))
        self._file = slots.open("rb", buffering=0)

    def count(self) -> int:
        self._file.seek(0)
        words = memoryview(self._file.read()).cast("Q")
        return sum(1 for word in words[:: SLOT_BYTES // 8] if word)

    def close(self) -> None:
        self._file.close()


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
    facts = _kill_under_load(node, registry, tmp_path, kills, seed, node.kill)
    _record("kills_under_load", seed, kills, KILLS_ALL, facts)


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

    facts = _kill_under_load(node, registry, tmp_path, losses, seed, lose)
    _record("losses_under_load", seed, losses, LOSSES_ALL, facts)


def _kill_under_load(
    node: Node, registry: Origin, tmp_path: Path, kills: int, seed: int, kill: Callable[[], None]
) -> dict[str, object]:
    """So many kills with events outstanding; what is to be said of them."""
    rng = random.Random(seed)
    files = noise(3, 8, (kills + 40) * 160 << 10)
    # The first of its blob, whose windows go forward: it stays a hole, and the file marked.
    never = {"a-never-read": noise(4, 1, CHUNK_BYTES)["f0"]}
    built = image_of(never | files, chunk_bytes=CHUNK_BYTES)
    node.configure(
        fetch={"window_bytes": CHUNK_BYTES, "window_limit_bytes": CHUNK_BYTES, "deadline_s": 60.0}
    )
    registry.pause_s = 0.1
    node.start()
    outstanding = Outstanding(node)
    target = node.mount(registry.add("app", built))
    expected = write_files(tmp_path / "expected", files)
    load = Readers(target, expected, seed, KINDS)
    counts: Counter[int] = Counter()
    while counts.total() - counts[0] < kills:
        assert counts[0] < kills + IDLE_MAX, "hardly ever is anything outstanding"
        time.sleep(rng.uniform(0, LIFE_S))
        node.halt()
        counts[outstanding.count()] += 1
        kill()
    outstanding.close()
    report = load.seen()
    print(f"outstanding at the kills: {sorted(counts.items())}; {report}")
    assert (report["wrong"], report["failed"]) == ([], [])
    assert report["reads"] > 0
    assert node.wait()["totals"]["reads_waiting"] == 0
    return {
        "idle_and_not_counted": counts.pop(0, 0),
        "reads": report["reads"],
        "longest_pause_s": round(report["longest_s"], 2),
        "kills_by_events_outstanding": dict(sorted(counts.items())),
    }


def _record(name: str, seed: int, count: int, of: int, facts: dict[str, object]) -> None:
    """Kept when it is the whole count."""
    record.counted("native", seed, name, count, of, facts, keep=count >= of)


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


def test_readers_killed_while_they_wait(node: Node, registry: Origin) -> None:
    """One that reads and one that maps, with an event outstanding each: they end at once, though
    nobody answers. When the source goes on, their events' slots and descriptors are free again, and
    those who waited beside them have right bytes."""
    files = noise(6, 8, 1 << 20)  # more than is read: the file of a whole blob is closed
    node.configure(fetch={"window_limit_bytes": 1 << 20})
    node.start()
    target = node.mount(registry.add("app", image_of(files)))
    assert (target / "f0").read_bytes() == files["f0"]
    outstanding, held = Outstanding(node), event_descriptors(node)
    registry.open.clear()
    killed = [reading(READ, target / "f1"), reading(MAP, target / "f2")]
    for reader in killed:
        until(lambda reader=reader: waits(reader.pid) or None, "it does not wait for an answer")
    others = {name: reading(READ, target / name) for name in ("f1", "f2")}
    until(lambda: outstanding.count() >= len(killed) or None, "their events are not read")
    for reader in killed:
        reader.kill()
        assert reader.wait(PATIENCE_S) == -signal.SIGKILL
    assert outstanding.count() >= len(killed) and event_descriptors(node) > held
    registry.open.set()
    for name, reader in others.items():
        assert reader.communicate(timeout=PATIENCE_S)[0] == files[name]
    assert (target / "f3").read_bytes() == files["f3"]
    until(lambda: outstanding.count() == 0 or None, "slots stay taken")
    until(lambda: event_descriptors(node) == held or None, "descriptors stay open")
    outstanding.close()
    assert node.wait()["totals"]["reads_waiting"] == 0
    assert "bug" not in node.log.read_text() and "ERROR" not in node.log.read_text()


def reading(program: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)


def waits(pid: int) -> bool:
    return Path(f"/proc/{pid}/wchan").read_text().startswith(killer.WAITING)


def event_descriptors(node: Node) -> int:
    """How many descriptors of cache files the daemon has: its own are always as many."""
    count = 0
    for fd in Path(f"/proc/{node.daemon_pid()}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += fd.readlink().is_relative_to(node.cache)
    return count

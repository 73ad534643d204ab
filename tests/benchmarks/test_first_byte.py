"""Which bytes are read first, and by what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from environments import nginx
from environments.programs import HERE
from workloads.first_byte import STEP_BYTES, Target, targets


@pytest.mark.parametrize("chunk_bytes", [64 << 10, 1 << 20])
def test_a_window_never_brings_the_next_target(chunk_bytes: int) -> None:
    """A window begins with the chunk of a target and is a step long."""
    size_bytes = 8 * STEP_BYTES
    chunks = [(offset, offset // 2, 100) for offset in range(0, size_bytes, chunk_bytes)]
    found = targets(chunks, size_bytes)
    assert len(found) == 8
    starts = [target.offset // chunk_bytes * chunk_bytes for target in found]
    assert [target.start for target in found] == [start // 2 for start in starts]
    for start, following in zip(starts, found[1:], strict=False):
        assert start + STEP_BYTES <= following.offset


def test_the_least_is_a_round_trip_and_a_transfer() -> None:
    """50 ms, and 10 MB/s."""
    assert Target(0, 500_000, 1_000_000).ideal_s == pytest.approx(0.1)


@pytest.mark.parametrize("way", ["read", "map"])
def test_single_reads_are_timed(tmp_path: Path, way: str) -> None:
    """One figure for every offset."""
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert len(_probe("single", way, tmp_path / "file", 0, 4096, 0, 65536)) == 3


def test_a_client_asks_for_ranges(tmp_path: Path) -> None:
    """Of a server that closes nothing: a body that came short would never end."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "blob").write_bytes(bytes(1 << 20))
    nginx.certificates(tmp_path)
    with nginx.on_host(tmp_path, nginx.files(tmp_path / "files")) as ports:
        assert (
            len(
                _probe("ranges", f"{ports.address}:{ports.http}", "/blob", 0, "0-1048576", "5-4096")
            )
            == 2
        )


def _probe(*words: object) -> list[float]:
    argv = [sys.executable, str(HERE / "probes.py"), *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    return [float(line) for line in done.stdout.split()]

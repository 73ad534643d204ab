"""The programs that are compared move the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import nginx
from environments.nginx import Ports
from workloads import data_plane
from workloads.data_plane import CASES, RANGE_BYTES, Bench, curl_script

SIZE_BYTES = 3 * RANGE_BYTES + 5000


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One with a small blob that ends in the middle of a range and of a block."""
    bench = Bench(tmp_path_factory.mktemp("bench"), SIZE_BYTES)
    with bench.served():
        yield bench


@pytest.mark.parametrize("case", [case for case in CASES if case.in_flight == 4])
def test_a_case_is_measured_whole(bench: Bench, case: data_plane.Case) -> None:
    """By both programs; either would fail for bytes that do not come."""
    bench.take(case, reverse=False)
    for program in ("ours", "other"):
        [moved] = bench.figures[case.name, program]
        assert moved.seconds > 0


def test_the_c_program_moves_all_bytes(bench: Bench, tmp_path: Path) -> None:
    """With more connections than ranges. What follows the blob is the rest of a block."""
    [case] = [case for case in CASES if (case.medium, case.in_flight) == ("ext4", 16)]
    target = tmp_path / "target"
    bench.fetch(case, target)
    moved = target.read_bytes()
    assert moved[:SIZE_BYTES] == bench.blob.read_bytes()
    assert not any(moved[SIZE_BYTES:])


def test_curl_is_asked_for_every_byte_once() -> None:
    """The last range is short."""
    script = curl_script("https://a/b", Path("/ca"), Path("/parts"), SIZE_BYTES)
    found = re.findall(r"^range = (\d+)-(\d+)$", script, re.MULTILINE)
    ranges = [(int(start), int(last) + 1) for start, last in found]
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == SIZE_BYTES


def test_blobs_come_from_storage_and_the_rest_from_the_registry() -> None:
    """Only a whole digest is a blob's."""
    text = nginx.configuration("/d", Ports(1, 2), nginx.registry("127.0.0.1:5000", "/storage"))
    [pattern] = re.findall(r'location ~ "(.+)"', text)
    digest = "ab" + "0" * 62
    assert re.search(pattern, f"/v2/a/b/blobs/sha256:{digest}")
    assert not re.search(pattern, f"/v2/a/b/blobs/sha256:{digest}0")
    assert not re.search(pattern, "/v2/a/b/manifests/latest")

"""What a bench makes of what it has measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from environments import native
from environments.trace import Trace
from hypothesis import given
from hypothesis import strategies as st
from plots.bars import grouped
from report import Report, percentile, result, table
from runners.usage import Usage

from fscached.control.messages import Totals

TRACE = """\
# tracer: nop
          daemon-214     [000] .....    11.279485: cachefiles_ondemand_open: o=00000001 mid=0 oid=0
           mount-216     [001] .....    11.289312: cachefiles_ondemand_read: o=00000001 mid=0 oid=0
          daemon-214     [000] .....    11.298122: cachefiles_ondemand_cread: o=00000001 mid=1
          daemon-214     [001] .....    11.316954: cachefiles_ondemand_open: o=00000002 mid=0 oid=0
         python3-220     [001] .....    11.750168: cachefiles_ondemand_read: o=00000002 mid=0 oid=0
           mount-216     [001] .....    11.750200: cachefiles_ondemand_read: o=00000001 mid=0 oid=0
          daemon-214     [000] .....    11.750300: cachefiles_ondemand_cread: o=00000001 mid=2
          daemon-214     [001] .....    11.753916: cachefiles_ondemand_cread: o=00000002 mid=4
         python3-220     [000] .....    11.761627: cachefiles_ondemand_read: o=00000002 mid=0 oid=0
"""


def test_reads_are_timed_by_the_object_opened_last() -> None:
    """Not those of the bootstrap, and none that has no answer yet."""
    trace = Trace()
    trace.text = TRACE
    assert trace.read_times_us() == [pytest.approx(3748)]


def test_a_ratio_is_ours_to_the_other_programs() -> None:
    """Medians, not means; the spread is from end to end."""
    found = result("read", "us", "lower", [30.0, 10.0, 20.0], [5.0, 8.0, 100.0])
    assert (found.median, found.spread, found.baseline, found.ratio) == (20, 20, 8, 2.5)


def test_nothing_to_compare_with_is_no_ratio() -> None:
    """Such a figure has neither baseline nor ratio, and is still shown."""
    found = result("start", "s", "lower", [0.25])
    assert (found.baseline, found.ratio) == (None, None)
    assert "start (s)" in table(Report("miss", {}, [found]))


@given(st.lists(st.floats(0, 1e9), min_size=1), st.floats(1, 100))
def test_a_percentile_is_a_value_that_was_measured(values: list[float], percent: float) -> None:
    """The smallest that so many do not exceed."""
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-6
    assert sum(value < found for value in values) < len(values) * percent / 100 + 1e-6


def test_bars_are_speeds_in_groups() -> None:
    """Half the time is twice the speed; what has nothing to be compared with has no bar."""
    found = [
        result("read_cold_ext4", "MB/s", "higher", [100.0]),
        result("read_cold_loop", "MB/s", "higher", [150.0], [100.0]),
        result("make_loop", "s", "lower", [30.0], [60.0]),
    ]
    assert grouped(Report("hit", {}, found)) == {"read_cold": {"loop": 1.5}, "make": {"loop": 2.0}}


@pytest.mark.parametrize("unified", [True, False])
def test_memory_is_limited_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unified: bool
) -> None:
    """By either kind of control group: a limit, then none; commands join the group."""
    monkeypatch.setattr(native, "CONTROL_GROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    if unified:
        (tmp_path / "cgroup.controllers").touch()
    directory = tmp_path / native.GROUP if unified else tmp_path / "memory" / native.GROUP
    with native.memory_group() as group:
        limit = directory / ("memory.max" if unified else "memory.limit_in_bytes")
        with group.limited(4096):
            assert limit.read_text() == "4096"
        assert limit.read_text() == ("max" if unified else "-1")
        said = subprocess.run(group.within(["echo", "inside"]), capture_output=True, check=True)
        assert said.stdout == b"inside\n"
        assert (directory / "cgroup.procs").read_text() == "0\n"


def test_usage_is_a_daemons_own() -> None:
    """utime and stime, not those of its children; a name may hold anything."""
    totals = Totals(requests=7, received_bytes=4096)
    before = Usage.read(totals, "12 (a) S ) S 1 2 3 4 5 6 7 8 9 10 150 50 900 900 20 0")
    assert before == Usage(2.0, 7, 4096)
    totals = Totals(requests=9, received_bytes=4096)
    after = Usage.read(totals, "12 (a) S ) S 1 2 3 4 5 6 7 8 9 10 250 50 900 900 20 0")
    assert after.since(before) == Usage(1.0, 2, 0)


def test_processors_are_given_for_a_while() -> None:
    """Programs that are started meanwhile have as many."""
    allowed = os.sched_getaffinity(0)
    with native.processors(1):
        said = subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout
        assert said == "1\n"
    assert os.sched_getaffinity(0) == allowed

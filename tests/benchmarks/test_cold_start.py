"""What the bench of cold starts makes of what it has measured, and what it asks containerd for."""

from __future__ import annotations

from pathlib import Path

import pytest
from environments import Options
from harness.containerd import pull_request
from report import Report, Result
from runners.launched import Launched
from workloads import cold_start
from workloads.cold_start import Measured, charts

MACHINE = {"kernel": "6.12", "cpus": 2, "emulation": "tcg", "repetitions": 1}


def options(*only: str, long: bool = False) -> Options:
    return Options("cold-start", "6.12", 1, Path("/nowhere"), only, long)


def measured() -> list[Result]:
    """A server whose full pull takes eight seconds to its reply, a cold start four."""
    full = Measured(Launched(5.0, 6.0, 7.0, 8.0), 10 << 20)
    cold = Measured(Launched(1.0, 2.0, 3.0, 4.0), 5 << 20)
    return cold_start._results("1ms_server", {"full": [full], "cold": [cold]})


def test_everything_stands_beside_the_full_pull() -> None:
    """Step by step; the full pull itself beside nothing."""
    found = {each.name: (each.median, each.ratio) for each in measured()}
    assert found["1ms_server_full_pull"] == (5, None)
    assert found["1ms_server_cold_pull"] == (1, 0.2)
    assert found["1ms_server_cold_ready"] == (3, 0.4286)
    assert found["1ms_server_cold_origin"] == (5, 0.5)


def test_a_server_is_there_at_its_first_reply() -> None:
    """Not when it says that it is ready."""
    of = charts(measured())["1ms"]["server"]
    assert of["cold"].name == "1ms_server_cold_reply"
    assert (of["full"].median, of["cold"].ratio) == (8, 0.5)


def test_parts_are_chosen_by_name() -> None:
    """Of each kind all, unless some of it are named."""
    names, links, scenarios = cold_start._chosen(options("node", "1ms"))
    assert names == ["node"]
    assert [link.name for link in links] == ["1ms"]
    assert scenarios == list(cold_start.SCENARIOS)
    assert "rust" not in cold_start._chosen(options())[0]
    assert "rust" in cold_start._chosen(options(long=True))[0]


def test_a_part_that_is_none_is_refused() -> None:
    """Before anything is started, with the names there are."""
    with pytest.raises(SystemExit, match="--only pyhton: none of python, node"):
        cold_start._chosen(options("pyhton"))


def test_the_chart_has_a_bar_for_each_scenario_and_says_its_ratio(tmp_path: Path) -> None:
    """Text stays text in the SVG."""
    cold_start.draw(Report("cold-start", MACHINE, measured()), tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert "origin 1ms away" in drawn
    assert "full pull" in drawn
    assert "×0.50" in drawn


def test_containerd_is_asked_as_a_kubelet_asks() -> None:
    """gRPC's frame around PullImageRequest{image: ImageSpec{image: NAME}}."""
    assert pull_request("a:1") == b"\0\0\0\0\x07\x0a\x05\x0a\x03a:1"

"""A build says how long it takes, and when that is too short to say much."""

from __future__ import annotations

import pytest
from report import Report, result
from workloads import make


@pytest.mark.parametrize(("build_s", "enough"), [(59.0, False), (60.0, True)])
def test_a_short_build_is_reported_as_one(
    build_s: float, enough: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what it takes on ext4, which the others are compared with."""
    results = [result(f"make_{tree}", "s", "lower", [build_s]) for tree in ("ext4", "complete")]
    noted = make.noted(Report("make", {"cpus": 2}, results))
    assert noted.environment == {"cpus": 2, "build_s": build_s, "long_enough": enough}
    assert ("59 s on ext4, less than 60 s" in capsys.readouterr().err) is not enough

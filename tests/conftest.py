"""What all tests can be told."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=6, help="of the daemon under load (default: %(default)s)"
    )
    parser.addoption(
        "--losses",
        type=int,
        default=5,
        help="of the daemon and its supervisor under load (default: %(default)s)",
    )
    parser.addoption("--kill-seed", type=int, default=1, help="of the moments of both")
    parser.addoption(
        "--record-hot-paths", action="store_true", help="what they cost now is the baseline"
    )
    parser.addoption("--long", action="store_true", help="minutes of what seconds are a sample of")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether to take the time that a full proof takes."""
    asked: bool = request.config.option.long
    return asked

"""What all tests can be told."""

from __future__ import annotations

import pytest


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

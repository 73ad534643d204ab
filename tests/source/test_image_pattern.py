"""Which credential is meant for which image."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source.image_pattern import covers, fitting


@pytest.mark.parametrize(
    ("pattern", "image", "fits"),
    [
        # The examples of kubelet's documentation of matchImages.
        ("123456789.dkr.ecr.us-east-1.amazonaws.com", None, True),
        ("*.azurecr.io", "team.azurecr.io/app", True),
        ("gcr.io", "gcr.io/project/app", True),
        ("*.*.registry.io", "eu.west.registry.io/app", True),
        ("registry.io:8080/path", "registry.io:8080/path/app", True),
        ("*.io", "registry.io/app", True),
        ("*.io", "eu.registry.io/app", False),
        ("*.registry.io", "registry.io/app", False),
        ("app*.registry.io", "app-eu.registry.io/app", True),
        ("registry.io", "registry.io:8080/app", False),
        ("registry.io:8080", "registry.io/app", False),
        ("registry.io/path", "registry.io/other", False),
        ("registry.io/*", "registry.io/other", False),
        ("https://Registry.IO/v2/", "registry.io/app", True),
        ("https://index.docker.io/v1/", "registry-1.docker.io/library/app", True),
        ("[::1]:5000", "[::1]:5000/app", True),
        ("[::1]:5000", "[::1]/app", False),
    ],
)
def test_patterns(pattern: str, image: str | None, fits: bool) -> None:
    """Labels of the host one by one, equal ports, a beginning of the path."""
    assert covers(pattern, image or f"{pattern}/app") is fits


def test_the_most_particular_comes_first() -> None:
    """A host before a wildcard, a longer path before a shorter one."""
    patterns = ["*.registry.io/app/part", "eu.registry.io", "us.registry.io", "eu.registry.io/app"]
    assert fitting(patterns, "eu.registry.io/app/part") == [
        "eu.registry.io/app",
        "eu.registry.io",
        "*.registry.io/app/part",
    ]


@given(st.text(), st.text())
def test_any_text(pattern: str, image: str) -> None:
    """Whatever stands in a file, nothing raises; a text without a wildcard covers itself."""
    covers(pattern, image)
    assert covers(image, image)

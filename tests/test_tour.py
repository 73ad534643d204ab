"""The documents say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
TOUR = (HOUSE / "docs" / "tour.md").read_text()
README = (HOUSE / "README.md").read_text()
CODE = "\n".join(
    path.read_text()
    for package in ("fscached", "rafs_v6")
    for path in (HOUSE / package).rglob("*.py")
)
DEFINED = set(re.findall(r"^\s*(?:async )?(?:def|class) (\w+)", CODE, re.MULTILINE))
DEFINED |= set(re.findall(r"^(\w+)(?:: \w+)? = ", CODE, re.MULTILINE))
WORDS = {"want"}


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:fscached|rafs_v6|tests)/\S+\.py)`", TOUR)))
)
def test_every_file_of_the_tour_is_there(path):
    """A stop names a file that exists."""
    assert (HOUSE / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Za-z_.]+)`", TOUR))))
def test_every_name_of_the_tour_is_defined(name):
    """A stop names a class, a method or a function that exists."""
    for part in name.split("."):
        assert part in DEFINED or part in {"Wanted", "restore", "deadline_s"}, name


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http|#)([^)]+)\)", README))))
def test_every_link_of_the_readme_leads_somewhere(link):
    """A path in the README exists."""
    assert (HOUSE / link).exists()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"scripts/[a-z-]+", README))))
def test_every_script_of_the_readme_can_be_run(command):
    """A script in the README exists and is executable."""
    assert (HOUSE / command).stat().st_mode & 0o111


def test_every_verb_of_the_readme_is_one():
    """`fscached VERB` in the README is a verb of the command line."""
    verbs = {path.stem for path in (HOUSE / "fscached" / "cli").glob("[a-z]*.py")}
    assert set(re.findall(r"`fscached ([a-z]+)", README)) <= verbs

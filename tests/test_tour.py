"""The documents say what is there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from fscached.cli import main

HOUSE = Path(__file__).parent.parent
TOUR = (HOUSE / "docs" / "tour.md").read_text()
README = (HOUSE / "README.md").read_text()
CODE = "\n".join(
    path.read_text()
    for package in ("cdefs", "fscached", "rafs_v6")
    for path in (HOUSE / package).rglob("*.py")
)
DEFINED = set(re.findall(r"^\s*(?:async )?(?:def|class) (\w+)", CODE, re.MULTILINE))
DEFINED |= set(re.findall(r"^(\w+)(?:: \w+)? = ", CODE, re.MULTILINE))
DOCUMENTS = [
    path.relative_to(HOUSE)
    for path in (HOUSE / "README.md", HOUSE / "CHANGELOG.md", *sorted(HOUSE.glob("docs/**/*.md")))
]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"`fscached\s([^`]+)`")
OPTION = re.compile(r"--?[a-z][a-z-]*")


def text(document):
    return (HOUSE / document).read_text()


COMMANDS = sorted(
    {
        " ".join(command.split())
        for document in DOCUMENTS
        for command in COMMAND.findall(text(document))
    }
)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:cdefs|fscached|rafs_v6|tests)/\S+\.py)`", TOUR)))
)
def test_every_file_of_the_tour_is_there(path):
    """A stop names a file that exists."""
    assert (HOUSE / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Za-z_.]+)`", TOUR))))
def test_every_name_of_the_tour_is_defined(name):
    """A stop names a class, a method or a function that exists."""
    for part in name.split("."):
        assert part in DEFINED or part in {"Wanted", "restore", "deadline_s"}, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_leads_somewhere(document):
    """A path beside the document exists, and the heading that an anchor names is there."""
    lost = [link for link in LINK.findall(text(document)) if not leads_somewhere(document, link)]
    assert lost == []


def leads_somewhere(document, link):
    path, _, anchor = link.partition("#")
    target = (HOUSE / document).parent / path if path else HOUSE / document
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


def anchors(markdown):
    """What GitHub calls a document's headings."""
    headings = HEADING.findall(FENCED.sub("", markdown))
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", sorted(set(re.findall(r"scripts/[a-z-]+", README))))
def test_every_script_of_the_readme_can_be_run(command):
    """A script in the README exists and is executable."""
    assert (HOUSE / command).stat().st_mode & 0o111


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one(command, capsys):
    """`fscached VERB VERB --option` in a document is understood by the command line."""
    words = command.split()
    verbs = [*itertools.takewhile(re.compile("[a-z]+").fullmatch, words)]
    with pytest.raises(SystemExit) as over:
        main([*verbs, "--help"])
    assert over.value.code == 0
    assert {*filter(OPTION.fullmatch, words)} <= {*OPTION.findall(capsys.readouterr().out)}

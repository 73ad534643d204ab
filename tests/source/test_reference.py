"""Names of images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source.reference import Reference, ReferenceError

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("nginx", Reference("docker.io", "library/nginx", "latest", "")),
        ("nginx:1.25", Reference("docker.io", "library/nginx", "1.25", "")),
        ("me/app", Reference("docker.io", "me/app", "latest", "")),
        ("docker.io/nginx", Reference("docker.io", "library/nginx", "latest", "")),
        ("index.docker.io/me/app", Reference("docker.io", "me/app", "latest", "")),
        ("localhost/app", Reference("localhost", "app", "latest", "")),
        ("localhost:5000/a/b:v1", Reference("localhost:5000", "a/b", "v1", "")),
        ("[::1]:5000/a:v1", Reference("[::1]:5000", "a", "v1", "")),
        ("r.example.org/a__b/c-d.e:T", Reference("r.example.org", "a__b/c-d.e", "T", "")),
        (f"r.example.org/a@{DIGEST}", Reference("r.example.org", "a", "", DIGEST)),
        (f"r.example.org/a:v@{DIGEST}", Reference("r.example.org", "a", "v", DIGEST)),
    ],
)
def test_names(text: str, parsed: Reference) -> None:
    """docker's defaults are filled in, and the whole name reads back as the same image."""
    assert Reference.parse(text) == parsed
    assert Reference.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "Nginx",
        "a//b",
        "a/../b",
        "a:",
        "a:b:c",
        "a@",
        "a@sha256:00",
        f"a@{DIGEST.upper()}",
        "r.example.org/",
        "user:pass@r.example.org/a",
        "r.example.org:x/a",
        "a\n",
        "a?b",
        "a/" * 200 + "b",
    ],
)
def test_no_names(text: str) -> None:
    """What docker would refuse is refused, with what a name looks like."""
    with pytest.raises(ReferenceError, match="write"):
        Reference.parse(text)


@given(st.text())
def test_any_text(text: str) -> None:
    """A name that is taken can stand in a URL as it is and reads back the same."""
    try:
        reference = Reference.parse(text)
    except ReferenceError:
        return
    assert Reference.parse(str(reference)) == reference
    assert all(part.isascii() and part.isprintable() for part in (reference.host, reference.name))


def test_what_is_asked_for() -> None:
    """The digest before the tag, and Docker Hub at its own host."""
    reference = Reference.parse(f"nginx:1@{DIGEST}")
    assert reference.name == DIGEST and reference.registry == "registry-1.docker.io"
    assert Reference.parse("r.example.org/a:b").name == "b"

"""What a URL's origin is, and whom we may speak to without TLS."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from fscached.source import SourceError
from fscached.source.origin import Trust, is_inward, is_loopback, origin_of, scheme_of


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Example.ORG/a?b#c", "https://example.org:443"),
        ("http://example.org:8080", "http://example.org:8080"),
        ("http://[::1]/x", "http://[::1]:80"),
    ],
)
def test_origins(url: str, origin: str) -> None:
    """Scheme, host and port, whatever is left out."""
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "ftp://example.org/",
        "https:///x",
        "https://user:hush@example.org/",
        "https://example.org:99999/",
        "https://example.org/\r\nX: y",
        "https://example.org/a b",
        "https://exämple.org/",
        "http://[::1/",
    ],
)
def test_no_origins(url: str) -> None:
    """Anything else is refused, and not repeated in the error."""
    with pytest.raises(SourceError) as caught:
        origin_of(url)
    assert "hush" not in str(caught.value)


@given(st.text())
def test_any_text(text: str) -> None:
    """A hostile URL raises nothing but SourceError."""
    is_inward(text)
    is_loopback(text)
    with suppress(SourceError):
        assert origin_of(text).startswith("http")


@pytest.mark.parametrize(
    ("host", "loopback", "inward"),
    [
        ("127.0.0.1:5000", True, True),
        ("127.8.9.1", True, True),
        ("[::1]:5000", True, True),
        ("localhost:5000", True, True),
        ("localhost.example.org", False, False),
        ("10.0.0.1", False, True),
        ("169.254.169.254", False, True),
        ("[fe80::1]:80", False, True),
        ("8.8.8.8", False, False),
        ("registry.example.org:443", False, False),
    ],
)
def test_where_a_host_is(host: str, loopback: bool, inward: bool) -> None:
    """Only names of this machine itself do without TLS unless configured."""
    assert (is_loopback(host), is_inward(host)) == (loopback, inward)
    assert scheme_of(host, insecure=False) == ("http" if loopback else "https")
    assert scheme_of(host, insecure=True) == "http"


def test_authorities(tmp_path: Path) -> None:
    """There is always a file of authorities: the system's, and the given ones beside them."""
    assert Path(Trust().bundle).is_file()
    authority = trustme.CA().cert_pem
    authority.write_to_path(tmp_path / "ca.pem")
    bundle = Path(Trust(ca_files=(str(tmp_path / "ca.pem"),)).bundle).read_bytes()
    assert authority.bytes() in bundle and Path(Trust().bundle).read_bytes() in bundle


def test_authorities_that_are_none(tmp_path: Path) -> None:
    """The error names the file, before anything is asked."""
    (tmp_path / "empty.pem").touch()
    for name, says in (("absent.pem", "No such file"), ("empty.pem", "no certificate")):
        with pytest.raises(SourceError, match=f"{name}: {says}"):
            _ = Trust(ca_files=(str(tmp_path / name),)).bundle

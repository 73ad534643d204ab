"""`fscached doctor`: output and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fscached.cli import main
from fscached.transport import probe
from fscached.transport.probe import Finding

GOOD = Finding("kernel", True, "6.12.0")
BAD = Finding("device", False, "no /dev/cachefiles", "modprobe cachefiles")


def surveyed(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> list[object]:
    """What the survey was asked about."""
    asked: list[object] = []

    def survey(
        host: object, cache: object, _: object, paths: list[str], fetch: object
    ) -> list[Finding]:
        asked.extend([host, cache, *paths, fetch])
        return list(findings)

    monkeypatch.setattr(probe, "survey", survey)
    return asked


def test_text_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each precondition, a remedy below what is missing, exit status 3."""
    surveyed(monkeypatch, GOOD, BAD)
    assert main(["doctor"]) == 3
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split() == ["ok", "kernel", "6.12.0"]
    assert second.split() == ["NO", "device", "no", "/dev/cachefiles"]
    assert third.split() == ["->", "modprobe", "cachefiles"]


def test_json_is_for_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as a list of objects; exit status 0 when nothing is missing."""
    surveyed(monkeypatch, GOOD)
    assert main(["doctor", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "kernel", "ok": True, "found": "6.12.0", "remedy": ""}
    ]


def test_the_configuration_decides_what_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Device, cache, state and how long reads wait come from the file that was named."""
    path = tmp_path / "fscached.toml"
    path.write_text(
        '[kernel]\ndevice = "/dev/other"\n[cache]\ndirectory = "/elsewhere"\n'
        '[paths]\nstate_directory = "/state"\n[fetch]\non_source_outage = "wait"\n'
    )
    asked = surveyed(monkeypatch)
    assert main(["doctor", "--config", str(path)]) == 0
    host, cache, *paths, fetch = asked
    assert host.device == Path("/dev/other")  # type: ignore[attr-defined]
    assert cache.directory == "/elsewhere"  # type: ignore[attr-defined]
    assert paths == [str(path), "/state"]
    assert fetch.on_source_outage == "wait"  # type: ignore[attr-defined]


def test_a_bad_configuration_is_an_error(tmp_path: Path) -> None:
    """Exit status 2, as for every verb."""
    assert main(["doctor", "--config", str(tmp_path / "missing")]) == 2

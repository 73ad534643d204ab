"""What the harness decides by itself, without a guest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from harness import apt, content, listing, qemu, record, registry, rounds
from harness.inspector import Seen
from harness.killer import Kill, Report

DEB822 = """\
# made by the installer
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main # ours
deb http://vendor.example/apt stable main
deb-src http://mirror.example/debian bookworm main
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    monkeypatch.setattr(apt, "HOST_SOURCES", tmp_path)
    monkeypatch.setattr(apt, "codename", lambda: "bookworm")
    return tmp_path


def test_mirror_is_read_from_deb822(sources: Path) -> None:
    """Every suite of an enabled stanza becomes an entry with its key."""
    (sources / "sources.list.d/debian.sources").write_text(DEB822)
    assert [str(entry) for entry in apt.mirror()] == [
        f"deb [signed-by=/usr/share/keyrings/debian.gpg] http://mirror.example/debian {suite} "
        "main contrib"
        for suite in ("bookworm", "bookworm-updates")
    ]


def test_mirror_is_read_from_one_line_format(sources: Path) -> None:
    """Comments, source packages and other vendors' entries stay out."""
    (sources / "sources.list").write_text(ONE_LINE)
    options = "[arch=amd64 signed-by=/k.gpg]"
    assert apt.mirror() == [apt.Entry(options, "http://mirror.example/debian", "bookworm", "main")]


def test_missing_mirror_says_what_to_add(sources: Path) -> None:
    """Without an entry for the host's release there is nothing to guess."""
    with pytest.raises(apt.NoMirror, match="no entry for Debian bookworm"):
        apt.mirror()


@pytest.mark.parametrize(
    ("flags", "accelerator"), [("fpu vmx sse", "kvm"), ("fpu svm", "kvm"), ("fpu vmxnot", "tcg")]
)
def test_cpu_flags_decide_the_accelerator(
    flags: str, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A /dev/kvm that opens is not enough."""
    monkeypatch.delenv("FSCACHED_VM_ACCEL", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert qemu.acceleration(flags)[1].split(",")[0] == accelerator


def test_environment_overrides_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSCACHED_VM_ACCEL wins, and a misspelled one is an error."""
    monkeypatch.setenv("FSCACHED_VM_ACCEL", "tcg")
    assert qemu.acceleration("vmx")[1].startswith("tcg")
    monkeypatch.setenv("FSCACHED_VM_ACCEL", "qvm")
    with pytest.raises(ValueError, match="qvm"):
        qemu.acceleration("vmx")


def test_access_log_is_parsed_and_the_rest_is_not() -> None:
    """Only lines of the combined format are requests."""
    log = (
        'time="2026-01-01T00:00:00Z" level=error msg="no such thing"\n'
        '127.0.0.1 - - [01/Jan/2026:00:00:00 +0000] "GET /v2/a/blobs/sha256:b HTTP/1.1" 206 4096 '
        '"" "fscached/0.1"\n'
    )
    assert registry.requests(log) == [registry.Request("GET", "/v2/a/blobs/sha256:b", 206, 4096)]


def test_difference_makes_whiteouts(tmp_path: Path) -> None:
    """Removed names get one whiteout each, at the top; changed and opaque paths come whole."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for tree, files in (
        (lower, {"kept": "1", "changed": "1", "gone/deep/file": "1", "opaque/old": "1"}),
        (upper, {"kept": "1", "changed": "2", "opaque/new": "1", "was/file": "1"}),
    ):
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
    (lower / "was").write_text("a file")
    for path in (lower / "kept", upper / "kept"):
        os.utime(path, (1, 1))
    content.difference(lower, upper, tmp_path / "layer", {"opaque"})
    assert content.paths(tmp_path / "layer") == [
        ".",
        ".wh.gone",
        "changed",
        "opaque",
        "opaque/.wh..wh..opq",
        "opaque/new",
        "was",
        "was/file",
    ]


def test_listing_tells_every_difference(tmp_path: Path) -> None:
    """A changed byte, a missing and a surplus entry are one sentence each."""
    for name in ("same", "changed", "missing"):
        (tmp_path / name).write_text(name)
    os.utime(tmp_path / "changed", (1, 1))
    expected = listing.dump(str(tmp_path))
    assert listing.differences(expected, expected) == []
    (tmp_path / "changed").write_text("CHANGED")
    os.utime(tmp_path / "changed", (1, 1))
    (tmp_path / "missing").rename(tmp_path / "surplus")
    os.utime(tmp_path, (1, 1))
    told = [
        line.split(":")[0] for line in listing.differences(expected, listing.dump(str(tmp_path)))
    ]
    assert told == ["'.'", "'changed'", "'missing' is missing", "'surplus' should not be there"]


def test_kills_are_counted_until_there_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds go on from what counted before, each with a seed of its own; each leaves the count."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    asked = []

    def play(seed: int, left: int) -> tuple[Report, list[Seen]]:
        asked.append((seed, left))
        kill = Kill(at_s=0.0, unanswered={"read": len(asked), "open": 0}, resident=[])
        pause_s = 1.5 / len(asked)
        seen = [Seen(blocks=1, wrong=[], error=None, slowest_s=s) for s in (0.1, pause_s)]
        return Report(kills=[kill] * 2, idle=1), seen

    rounds.until(3, play, "6.12", 7, keep=True, more=lambda: {"rounds": len(asked)})
    assert asked == [(7, 3), (9, 1)]
    kept = json.loads((tmp_path / "crash-6.12.json").read_text())["kills"]
    assert {name: kept[name] for name in ("seed", "count", "of", "rounds")} == {
        "seed": 7,
        "count": 4,
        "of": 3,
        "rounds": 2,
    }
    assert kept["idle_and_not_counted"] == 2 and kept["longest_pause_s"] == 1.5
    assert kept["kills_by_unanswered_reads"] == {"1": 2, "2": 2}

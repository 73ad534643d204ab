"""All benches as one: which, once each, and what their report says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import pytest
import suite
from report import Report, read, result

ENVIRONMENT = {
    "machine": "a machine",
    "command": "scripts/bench hit",
    "repetitions": 3,
    "date": "2026-11-25",
    "commit": "0123456789ab",
    "kernel": "6.12",
    "cpus": 2,
    "memory_mib": 2048,
}
REPORT = Report(
    "hit",
    ENVIRONMENT,
    [
        result("read_loop", "MB/s", "higher", [90.0], [100.0]),
        result("start", "s", "lower", [0.25]),
    ],
)


@pytest.fixture
def benches() -> dict[str, ModuleType]:
    """One that runs everywhere and one that does not."""
    both, guest = ModuleType("hit", "What is read.\n\nMore."), ModuleType("miss", "What is not.")
    vars(both).update(run=None, run_native=None)
    vars(guest).update(run=None)
    return {"hit": both, "miss": guest}


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ([], ["hit", "hit-native", "miss"]),
        (["hit"], ["hit", "hit-native"]),
        (["hit-native", "miss"], ["hit-native", "miss"]),
    ],
)
def test_a_bench_runs_in_every_environment_it_has(
    benches: dict[str, ModuleType], only: list[str], names: list[str]
) -> None:
    """Or those that are named."""
    assert [run.name for run in suite.runs(benches, only)] == names


def test_a_name_that_is_no_benchs_is_an_error(benches: dict[str, ModuleType]) -> None:
    """Which says what there is."""
    with pytest.raises(SystemExit, match=r"miss-native: no bench; there are hit, hit-native, miss"):
        suite.runs(benches, ["miss-native"])


@pytest.mark.parametrize(("now", "asked"), [("0123456789ab", 0), ("ba9876543210", 1)])
def test_what_is_there_of_this_commit_is_not_run_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    benches: dict[str, ModuleType],
    now: str,
    asked: int,
) -> None:
    """Of another one it is; what fails is in the report, and the others are all the same."""
    program = tmp_path / "scripts" / "bench"
    program.parent.mkdir()
    calls = tmp_path / "calls"
    program.write_text(f"#!/bin/sh\necho $1 >> {calls}\necho it is broken >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "commit", lambda: now)
    (tmp_path / "hit.json").write_text(json.dumps(dataclasses.asdict(REPORT)))
    wanted = suite.runs(benches, ["hit"])
    assert suite.run(wanted, tmp_path, [], long=False) == 1
    assert calls.read_text().split() == ["hit"] * (1 + asked)
    text = (tmp_path / suite.DOCUMENT).read_text()
    assert "**No result.** it is broken" in text
    assert ("| read_loop (MB/s) | 90 | 0 | 100 | 0.9 | higher |" in text) == (not asked)


def test_what_a_bench_says_is_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benches: dict[str, ModuleType]
) -> None:
    """Its last line; a picture only if it has drawn one."""
    program = tmp_path / "scripts" / "bench"
    program.parent.mkdir()
    (tmp_path / "said").write_text(f"a table\n{json.dumps(dataclasses.asdict(REPORT))}\n")
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/said\n")
    program.chmod(0o755)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert suite.run(suite.runs(benches, ["miss"]), tmp_path / "report", [], long=False) == 0
    kept = tmp_path / "report" / "miss.json"
    assert read(kept.read_text()) == REPORT
    text = (tmp_path / "report" / suite.DOCUMENT).read_text()
    assert "What is not." in text
    assert "| start (s) | 0.25 | 0 |  |  | lower |" in text
    assert "![" not in text

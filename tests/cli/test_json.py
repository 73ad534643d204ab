"""`-o json` of verbs that do something: what was done, and errors, for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fscached.cli import main
from fscached.prefetch.trace import Trace, decode, encode
from tests.control.conftest import StandInTraces

Fscached = Callable[..., tuple[int, str, str]]
REFERENCE, FSID = "registry.test/app:1", "f" * 64


@pytest.fixture
def told(fscached: Fscached) -> Callable[..., Any]:
    """What one verb that succeeds says with `-o json`."""

    def run(verb: str, *words: Any) -> Any:
        status, said, _ = fscached(verb, *words, "-o", "json")
        assert status == 0
        return json.loads(said)

    return run


def test_mount_and_umount(
    daemon: Any, mounts: Any, told: Callable[..., Any], tmp_path: Path
) -> None:
    """Which image, where, and as which device; who else has it."""
    for name in "ab":
        (tmp_path / name).mkdir()
        assert told("mount", REFERENCE, tmp_path / name) == {
            "reference": REFERENCE,
            "manifest_digest": "sha256:00",
            "fsid": FSID,
            "domain_id": "dom",
            "mount_point": str(tmp_path / name),
            "device": "0:9",
        }
    left = {"fsid": FSID, "mount_point": str(tmp_path / "a"), "still_mounted_on": [f"{tmp_path}/b"]}
    assert told("umount", tmp_path / "a") == left


def test_config_has_no_credentials(config_file: str, told: Callable[..., Any]) -> None:
    """Names of headers, not what they hold; the rest as the daemon would use it."""
    with open(config_file, "a") as file:
        file.write("[[source.mirrors]]\nhost = 'http://m'\nheaders = { X-Key = 'hunter2' }\n")
    said = told("config")
    assert said["source"]["mirrors"][0]["headers"] == {"X-Key": "***"}
    assert said["fetch"]["deadline_s"] == 30.0
    assert "hunter2" not in json.dumps(said)


def test_bugreport(told: Callable[..., Any], fscached: Fscached, tmp_path: Path) -> None:
    """The file; an archive on standard output leaves no room for JSON."""
    file = tmp_path / "report.tar.gz"
    assert told("bugreport", file) == {"file": str(file), "bytes": file.stat().st_size}
    assert fscached("bugreport", "-", "-o", "json")[0] == 2


def test_trace(daemon: Any, told: Callable[..., Any], fscached: Fscached, tmp_path: Path) -> None:
    """Each verb says what it did; a trace on standard output is JSON of its own."""
    traces = daemon.traces = StandInTraces(str(tmp_path / "image.boot"))
    traces.traces[REFERENCE] = Trace(FSID, REFERENCE, 2, ())
    file = tmp_path / "t"
    file.write_bytes(encode(traces.traces[REFERENCE]))
    summary = {"reference": REFERENCE, "fsid": FSID, "cold_runs": 2, "chunks_read": 0}
    assert told("trace", "record", REFERENCE)["reference"] == REFERENCE
    [adopted] = told("trace", "import", file)
    assert adopted.items() >= (summary | {"file": str(file)}).items()
    exported = told("trace", "export", file, "--to", tmp_path / "e")
    assert exported.items() >= (summary | {"file": str(tmp_path / "e")}).items()
    assert fscached("trace", "export", file, "-o", "json")[0] == 2
    assert told("trace", "forget", REFERENCE) == {"forgotten": REFERENCE}


def test_merged_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a daemon."""
    one, both = str(tmp_path / "one"), str(tmp_path / "both")
    Path(one).write_bytes(encode(Trace(FSID, REFERENCE, 2, ())))
    assert main(["trace", "merge", one, one, "--to", both, "-o", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["file"], said["cold_runs"]) == (both, decode(Path(both).read_bytes()).runs)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["umount", "/none", "-o", "json"],
            ("umount", "/none", "no image is mounted there", "see `fscached status`", 1),
        ),
        (
            ["status", "--output=json", "--nonsense"],
            ("status", "", "unrecognized arguments: --nonsense", "see `fscached --help`", 2),
        ),
        (
            ["trace", "diff", "/none", "/nor", "-ojson"],
            ("trace", "/none", "no such file or directory", "", 3),
        ),
        (["config", "--output", "json", "--config", "/none"], ("config", "/none", "", "", 2)),
    ],
)
def test_an_error_is_one_object(
    mounts: Any,
    daemon: Any,
    config_file: str,
    words: list[str],
    error: tuple[Any, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of every verb, with its exit status; also where the words could not be parsed."""
    own = [] if "--config" in words else ["--config", config_file]
    assert main([*words, *own]) == error[-1]
    output, said = capsys.readouterr()
    assert output == ""
    found = json.loads(said)
    assert list(found) == ["verb", "where", "what", "remedy", "exit_code"]
    for value, expected in zip(found.values(), error, strict=True):
        assert expected in ("", value)

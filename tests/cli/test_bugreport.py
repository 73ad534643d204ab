"""`fscached bugreport`: everything that helps, and no credential wherever one may be."""

from __future__ import annotations

import base64
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fscached import log
from fscached.cli import main
from fscached.control import messages

Fscached = Callable[..., tuple[int, str, str]]

PLANTED = {
    place: f"planted-{number}-{place}"
    for number, place in enumerate(
        (
            *("header", "docker-password", "docker-token", "bearer", "basic", "url-password"),
            *("signature", "log-key", "log-json", "environment", "event", "reference", "aws"),
        )
    )
}


def basic(password: str) -> str:
    return base64.b64encode(f"ann:{password}".encode()).decode()


LOG = f"""\
time=1 level=info event="plain line that helps"
time=2 level=info event="GET https://ann:{PLANTED["url-password"]}@host/v2/" status=401
time=3 level=info event="redirected to http://s3/b?X-Amz-Signature={PLANTED["signature"]}&x=1"
time=4 level=info event=x registry_token={PLANTED["log-key"]} blobs=3
time=5 level=error event="body was {{\\"auth\\": \\"{PLANTED["log-json"]}\\", \\"host\\": \\"h\\"}}"
time=6 level=info event="sent Authorization: Bearer {PLANTED["bearer"]}"
time=7 level=info event="sent Basic {basic(PLANTED["basic"])}"
time=8 level=info event="docker gave {PLANTED["docker-password"]} and {PLANTED["header"]}"
time=9 level=info event="aws_secret_access_key = {PLANTED["aws"]}"
"""


@pytest.fixture
def planted(
    daemon: Any,
    mounts: Any,
    config_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that has credentials in every place that a report looks at."""
    docker = {
        "auths": {
            "host": {"auth": basic(PLANTED["docker-password"])},
            "other": {"identitytoken": PLANTED["docker-token"]},
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(docker))
    (tmp_path / "daemon.log.1").write_text("time=0 level=info event=older\n")
    (tmp_path / "daemon.log").write_text(LOG)
    with open(config_file, "a") as file:
        file.write(f"state_directory = '{tmp_path}'\n[cache]\ndirectory = '{tmp_path}'\n")
        file.write(f"[log]\nfile = '{tmp_path}/daemon.log'\n")
        file.write(f"[source]\ndocker_config = '{tmp_path}/config.json'\n")
        file.write("[[source.mirrors]]\nhost = 'http://mirror:80'\n")
        file.write(f"headers = {{ X-Key = '{PLANTED['header']}' }}\n")
    log.recent_errors.lines.append(f"event=x token={PLANTED['event']}")
    monkeypatch.setenv("REGISTRY_PASSWORD", PLANTED["environment"])
    reference = f"http://ann:{PLANTED['reference']}@host/app:1"
    daemon.registered["f"] = messages.ImageInfo(reference, "f" * 64, "", "", [], True)


def parts(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as opened:
        return {
            Path(member.name).name: opened.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in opened
        }


def test_no_planted_credential_is_in_it(planted: None, fscached: Fscached, tmp_path: Path) -> None:
    """Not as it is, not in base64; and what helps is still there."""
    target = tmp_path / "report.tar.gz"
    status, said, _ = fscached("bugreport", target)
    assert status == 0 and "look through it" in said
    assert target.stat().st_mode & 0o777 == 0o600
    found = parts(target)
    everything = "\n".join(found.values())
    for place, secret in PLANTED.items():
        assert secret not in everything, place
        assert basic(secret) not in everything, place
    assert "plain line that helps" in found["log.txt"] and "event=older" in found["log.txt"]
    assert "status=401" in found["log.txt"] and "blobs=3" in found["log.txt"]
    assert 'host = "http://mirror:80"' in found["config.toml"]
    assert json.loads(found["status.json"])["totals"]["reads"] == 6
    assert "privilege" in found["doctor.txt"] and "Linux" in found["kernel.txt"]


def test_without_a_daemon_there_is_a_report_all_the_same(
    fscached: Fscached, tmp_path: Path
) -> None:
    """Each part says why it is empty."""
    status, _, _ = fscached("bugreport", tmp_path / "report.tar.gz")
    found = parts(tmp_path / "report.tar.gz")
    assert status == 0
    assert found["status.json"].startswith("nothing: DaemonAway")
    assert "[fetch]" in found["config.toml"]


def test_a_configuration_that_is_none_is_part_of_it(tmp_path: Path) -> None:
    """It may be what the report is about."""
    (tmp_path / "bad.toml").write_text("[cache]\nbudget = 'x'\n")
    target = tmp_path / "report.tar.gz"
    assert main(["bugreport", str(target), "--config", str(tmp_path / "bad.toml")]) == 0
    assert "budget" in parts(target)["config.toml"]


def test_nothing_is_overwritten(fscached: Fscached, tmp_path: Path) -> None:
    """Not even by accident."""
    (tmp_path / "mine").write_text("mine")
    status, _, said = fscached("bugreport", tmp_path / "mine")
    assert status == 1 and "is there already" in said
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_log_can_be_named(fscached: Fscached, tmp_path: Path) -> None:
    """nydus-snapshotter names it on the daemon's command line only; the last lines will do."""
    (tmp_path / "other.log").write_text("".join(f"line {number}\n" for number in range(10)))
    target = tmp_path / "report.tar.gz"
    fscached("bugreport", target, "--log", tmp_path / "other.log", "--lines", 2)
    assert parts(target)["log.txt"] == "line 8\nline 9\n"


def test_environment_is_not_listed(fscached: Fscached, tmp_path: Path) -> None:
    """Nobody asked for it."""
    target = tmp_path / "report.tar.gz"
    fscached("bugreport", target)
    assert os.environ["PATH"] not in "\n".join(parts(target).values())

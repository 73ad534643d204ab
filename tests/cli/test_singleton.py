"""nydusd's command line: every order in which it may be given, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fscached import config, log_writer, singleton
from fscached.cli import main
from fscached.singleton import Order


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[Order]:
    """What the daemon would be told, had it been started."""
    given: list[Order] = []
    monkeypatch.setattr(singleton, "main", lambda order, inherited: given.append(order) or 0)
    return given


SNAPSHOTTERS = (
    "singleton --fscache /r/cache --fscache-threads 4 --upgrade --id dc2a --apisock /r/api1.sock "
    "--log-level info --log-rotation-size 100 --supervisor /r/s.sock --log-file /r/logs/nydusd.log"
)
ORDER = Order(
    fscache="/r/cache",
    apisock="/r/api1.sock",
    identity="dc2a",
    supervisor="/r/s.sock",
    upgrade=True,
    log_level="info",
    log_file="/r/logs/nydusd.log",
    log_rotation_mb=100,
)


def test_the_snapshotters_command_line(orders: list[Order]) -> None:
    """As 0.13.4 writes it, in its order."""
    assert main(SNAPSHOTTERS.split()) == 0
    assert orders == [ORDER]


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_options_in_any_order_on_both_sides_of_the_mode(
    data: st.DataObject, orders: list[Order]
) -> None:
    """With a space or with `=`, long or short."""
    short = {"--apisock": "-A", "--log-level": "-l", "--log-file": "-L", "--fscache": "-F"}
    pairs = [
        ("--fscache", "/r/cache"),
        ("--id", "dc2a"),
        ("--apisock", "/r/api1.sock"),
        ("--log-level", "info"),
        ("--log-rotation-size", "100"),
        ("--supervisor", "/r/s.sock"),
        ("--log-file", "/r/logs/nydusd.log"),
    ]
    groups = [["--upgrade"]]
    for name, value in pairs:
        forms = [[name, value], [f"{name}={value}"]]
        if name in short:
            forms += [[short[name], value], [short[name] + value]]
        groups.append(data.draw(st.sampled_from(forms)))
    groups = data.draw(st.permutations(groups))
    place = data.draw(st.integers(0, len(groups)))
    groups.insert(place, ["singleton"])
    orders.clear()
    assert main([word for group in groups for word in group]) == 0
    assert orders == [ORDER]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("singleton --apisock /a", "arguments are required: -F/--fscache"),
        ("singleton --fscache /c", "arguments are required: -A/--apisock"),
        ("singleton -F /c -A /a --mountpoint /m", "--mountpoint is of nydusd's fuse mode"),
        ("singleton -F /c -A /a --prefetch-files=/x", "--prefetch-files is of nydusd's fuse mode"),
        ("singleton -F /c -A /a --nonsense", "unrecognized arguments: --nonsense"),
        ("singleton -F /c -A /a --fscach /d", "unrecognized arguments: --fscach /d"),
        ("singleton -F /c -A /a --id x", "--id and --supervisor need each other"),
        ("singleton -F /c -A /a --supervisor /s", "--id and --supervisor need each other"),
        ("singleton -F /c -A /a --log-level loud", "invalid choice: 'loud'"),
        ("singleton -F /c -A /a --fscache-threads 0", "not a number from 1 to 1024"),
        ("singleton -F /c -A /a --fscache-threads 1025", "not a number from 1 to 1024"),
        ("singleton -F /c -A /a --log-rotation-size ten", "not a number from 0"),
        ("fuse --mountpoint /m", "fuse is a mode of nydusd's that this daemon does not have"),
        ("--apisock /a uffd", "uffd is a mode of nydusd's that this daemon does not have"),
    ],
)
def test_what_is_refused(
    orders: list[Order], capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    """One line, exit status 2, and nothing is started."""
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and orders == []


def test_no_such_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is opened or made, in the log file too."""
    log = tmp_path / "made" / "for" / "it.log"
    words = ["singleton", "-F", str(tmp_path / "no"), "-A", str(tmp_path / "a"), "-L", str(log)]
    assert main(words) == 3
    assert f"--fscache {tmp_path}/no: no such directory" in capsys.readouterr().err
    assert log_writer.flush() and "no such directory" in log.read_text()


def test_the_machines_own_settings_hold(tmp_path: Path) -> None:
    """The command line says where; how patient to be is said in the configuration."""
    (file := tmp_path / "f.toml").write_text(
        "[fetch]\ndeadline_s = 7\n[cache]\ntag = 'mine'\ndirectory = '/elsewhere'\n"
        "[kernel]\ntransport = 'fanotify'\n"
    )
    found, entries = singleton.configured(ORDER._replace(config=str(file)))
    assert (found.fetch.deadline_s, found.cache.tag, entries) == (7, "mine", [])
    assert (found.cache.directory, found.kernel.transport) == ("/r/cache", "cachefiles")
    assert (found.api_socket, found.log.file) == ("/r/api1.sock", "/r/logs/nydusd.log")
    assert found.log.rotate_bytes == 100 << 20


def test_a_list_of_blobs_is_bound_at_the_start(tmp_path: Path) -> None:
    """nydusd's `--config` in this mode."""
    body = {
        "type": "bootstrap",
        "id": "f",
        "config": {
            "backend_type": "localfs",
            "backend_config": {"dir": "/b"},
            "cache_config": {"work_dir": "/w"},
            "metadata_path": "/w/image.boot",
        },
    }
    (file := tmp_path / "blobs.json").write_text(json.dumps({"blobs": [body]}))
    found, (entry,) = singleton.configured(ORDER._replace(config=str(file)))
    assert (entry.id, entry.domain_id, found.fetch) == ("f", "f", config.load().fetch)
    file.write_text(json.dumps({"blobs": [body | {"id": "a/b"}]}))
    with pytest.raises(config.ConfigError, match=r"blobs\.json: .*\$\.id"):
        singleton.configured(ORDER._replace(config=str(file)))

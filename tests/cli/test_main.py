"""What all verbs have in common: laziness, exit statuses, one line per error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fscached import version
from fscached.cli import main
from fscached.config import Config
from fscached.manual import explain

Fscached = Callable[..., tuple[int, str, str]]


def modules(*words: str) -> set[str]:
    """The modules that `fscached WORDS` imports."""
    code = f"""
import sys
from fscached.cli import main
try:
    main({list(words)!r})
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def test_the_version_imports_next_to_nothing() -> None:
    """Not one verb, and nothing that is not in the standard library."""
    found = modules("--version")
    assert not [name for name in found if name.startswith("fscached.cli.")]
    heavy = {"msgspec", "asyncio", "httpx", "rich", "pycurl", "uvloop", "h11", "cffi", "socket"}
    assert heavy.isdisjoint(found)


def test_the_version_takes_less_than_its_budget() -> None:
    """150 ms with the interpreter's own start, the best of five."""
    taken_s = []
    for _ in range(5):
        begun_s = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fscached", "--version"], check=True)
        taken_s.append(time.perf_counter() - begun_s)
    assert min(taken_s) < 0.150


def test_a_verb_imports_itself_alone() -> None:
    """`supervise` stays small: no other verb, no configuration, no event loop."""
    found = modules("supervise", "--help")
    assert {name for name in found if name.startswith("fscached.cli.")} == {
        "fscached.cli.supervise"
    }
    assert {"msgspec", "asyncio"}.isdisjoint(found)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Both spellings print nydusd's lines."""
    assert (main(["--version"]), main(["-V"])) == (0, 0)
    assert capsys.readouterr().out == version.text() * 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["status", "--nonsense"], "fscached status: unrecognized arguments: --nonsense: see "),
        (["mount", "only"], "fscached mount: the following arguments are required: DIR: see "),
        (["status", "-o", "xml"], "fscached status: argument -o/--output: invalid choice: 'xml'"),
        (["mount", "r", "/", "--username", "u"], "fscached mount: --username and --password-std"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse's usage text is for --help."""
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(error)


def test_a_wrong_configuration_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the file, the key and the nearest right one."""
    (path := tmp_path / "f.toml").write_text("[fetch]\nwindow_byte = 4096")
    for verb in ("run", "config", "status"):
        assert main([verb, "--config", str(path)]) == 2
        what = f"{path}: [fetch] window_byte: unknown key: did you mean window_bytes?"
        assert capsys.readouterr().err == f"fscached {verb}: {what}\n"


def test_config_prints_the_whole_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the daemon would use it."""
    (path := tmp_path / "f.toml").touch()
    assert main(["config", "--config", str(path)]) == 0
    assert capsys.readouterr().out == explain(Config())


def test_no_daemon_is_status_3(fscached: Fscached) -> None:
    """The line says what to start."""
    status, _, error = fscached("status")
    assert status == 3
    assert error.startswith("fscached status: no daemon answers on ")
    assert error.endswith("start it with `fscached supervise`, or name its socket with --socket\n")


def test_a_reader_that_has_enough_is_no_trace(tmp_path: Path) -> None:
    """`fscached config | head -1` ends quietly."""
    command = f"{sys.executable} -m fscached config | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("#", "")


@pytest.mark.parametrize("names", ["", "api"])
def test_a_supervised_run_with_a_wrong_configuration_ends(tmp_path: Path, names: str) -> None:
    """One line and the status of a wrong configuration, before anything starts."""
    (path := tmp_path / "f.toml").write_text("[fetch]\nwindow_byte = 4096")
    done = subprocess.run(
        [sys.executable, "-m", "fscached", "supervise", "--config", str(path)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env=os.environ | {"LISTEN_FDNAMES": names},
    )
    what = f"{path}: [fetch] window_byte: unknown key: did you mean window_bytes?"
    assert (done.returncode, done.stderr) == (2, f"fscached supervise: {what}\n")


def test_a_supervisor_holds_what_it_was_given_whatever_the_configuration(tmp_path: Path) -> None:
    """Ending would close the kernel's cache, for want of a key."""
    (path := tmp_path / "f.toml").write_text("[fetch]\nwindow_byte = 4096")
    command = f"{sys.executable} -m fscached supervise --config {path}"
    given = "export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=given; exec 3</dev/null; exec "
    with subprocess.Popen(["sh", "-c", given + command], stderr=subprocess.PIPE, text=True) as held:
        assert held.stderr is not None
        assert any("readers wait for its successor" in line for line in held.stderr)
        held.terminate()

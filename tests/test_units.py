"""The units that are shipped: what one has the other has too, and what must not be is not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fscached.config import Config
from fscached.control.notify import API
from fscached.control.supervisor import SILENCE_LIMIT_S

HOUSE = Path(__file__).parent.parent
UNITS = ("fscached.service", "fscached-cachefiles.service")
SOCKETS = ("fscached.socket", "fscached-cachefiles.socket")
HUNG_TASK_S = 120.0
"""kernel.hung_task_timeout_secs as Debian has it."""
NAMESPACES = {
    *("ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts"),
    *("ProtectControlGroups", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables"),
    *("ProtectProc", "ProcSubset", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths"),
    *("BindPaths", "TemporaryFileSystem", "RootDirectory", "RootImage", "MountFlags"),
}
"""Settings of systemd.exec(5) that give a unit a mount namespace of its own."""


def settings(unit: str) -> list[tuple[str, str]]:
    lines = (HOUSE / "docs" / unit).read_text().splitlines()
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#["]
    return [(name, value) for name, _, value in pairs]


def test_the_unit_for_all_transports_has_no_mount_namespace() -> None:
    """With fanotify the daemon unmounts for everybody, or readers get zeros."""
    assert NAMESPACES.isdisjoint(name for name, _ in settings(UNITS[0]))


def test_the_stricter_unit_is_stricter() -> None:
    """Whatever the other one forbids it forbids too; it adds the namespace, and takes away the
    calls of a transport that it does not serve."""
    differ = {"Description", "Conflicts", "SystemCallFilter"}
    common = {pair for pair in settings(UNITS[0]) if pair[0] not in differ}
    assert common <= set(settings(UNITS[1]))
    more = {name for name, _ in settings(UNITS[1])} - {name for name, _ in settings(UNITS[0])}
    assert more and more <= NAMESPACES
    assert "umount2" not in str(settings(UNITS[1]))


def test_every_capability_has_its_reason_in_the_readme() -> None:
    """And there is one only."""
    granted = dict(settings(UNITS[0]))["CapabilityBoundingSet"].split()
    readme = (HOUSE / "README.md").read_text()
    assert granted == ["CAP_SYS_ADMIN"] and "| CAP_SYS_ADMIN, the only capability |" in readme


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_the_unit(unit: str, tmp_path: Path) -> None:
    """Nothing in it is unknown but what is younger than this systemd."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze (apt-get install systemd)")
    directory = tmp_path / "usr/lib/systemd/system"
    directory.mkdir(parents=True)
    for name in UNITS:
        shutil.copy(HOUSE / "docs" / name, directory)
    command = ["systemd-analyze", "security", "--offline=yes", f"--root={tmp_path}", unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [
        line
        for line in done.stderr.splitlines()
        if unit in line and "FileDescriptorStorePreserve" not in line  # 254
    ]
    assert complaints == []


@pytest.mark.parametrize("unit", UNITS)
def test_a_daemon_that_stands_still_is_replaced_before_its_readers_are_hung_tasks(
    unit: str,
) -> None:
    """The supervisor gives it half of what it is given itself: what it does without a unit too."""
    limit_s = float(dict(settings(unit))["WatchdogSec"]) / 2
    assert limit_s == SILENCE_LIMIT_S < HUNG_TASK_S


@pytest.mark.parametrize("unit", SOCKETS)
def test_the_sockets_listen_where_clients_ask(unit: str) -> None:
    """For root alone, under the name that the daemon looks for; one of them at a time."""
    said = dict(settings(unit))
    assert said["ListenStream"] == Config().api_socket and said["FileDescriptorName"] == API
    assert (said["SocketMode"], said["DirectoryMode"]) == ("0600", "0700")
    [other] = set(SOCKETS) - {unit}
    assert said["Conflicts"] == other


def test_the_package_has_all_units_and_purges_them() -> None:
    """Whatever lies in docs; a service is reloaded, a socket cannot be."""
    shipped = {
        path.name
        for kind in ("service", "socket")
        for path in Path(HOUSE, "docs").glob(f"*.{kind}")
    }
    assert shipped == {*UNITS, *SOCKETS}
    assert "docs/fscached{,-cachefiles}.{service,socket}" in (HOUSE / "scripts/package").read_text()
    named = {
        script: set(" ".join(re.findall('^[A-Z]+="(.*)"$', text, re.MULTILINE)).split())
        for script in ("postinst", "prerm", "postrm")
        if (text := (HOUSE / "packaging" / script).read_text())
    }
    assert named == {"postinst": set(UNITS), "prerm": shipped, "postrm": shipped}


@pytest.mark.parametrize("script", ["postinst", "prerm", "postrm"])
def test_maintainer_scripts_are_shell(script: str) -> None:
    """No shell would stop at them."""
    subprocess.run(["sh", "-n", HOUSE / "packaging" / script], check=True)

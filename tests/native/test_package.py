"""The Debian package on real systemd: installed, upgraded and downgraded under a cold read, purged.

It is built first, which takes most of a minute, so `--long` runs this (`scripts/test --long`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native import machine
from tests.native.conftest import image_of, noise, until
from tests.native.machine import Machine
from tests.native.origin import Origin

HOUSE = Path(__file__).parent.parent.parent
MIB = 1 << 20
READER = """
import hashlib, json, os, sys, time
digest, longest, before = hashlib.sha256(), 0.0, time.monotonic()
fd = os.open(sys.argv[1], os.O_RDONLY)
while data := os.read(fd, 65536):
    digest.update(data)
    now = time.monotonic()
    longest, before = max(longest, now - before), now
print(json.dumps({"sha256": digest.hexdigest(), "longest_s": longest}))
"""
CAP_SYS_ADMIN = 1 << 21
REFUSED = ("Operation not permitted", "Permission denied", "Read-only file system", "Traceback")
"""What a call, a capability or a directory that is not allowed leaves in the log."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def packages(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Path, Path]:
    """One as it is built, and the same as if it were the next."""
    if not request.config.option.long:
        pytest.skip("the package is built and installed with --long")
    if reason := machine.lacking():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("packages")
    build = [HOUSE / "scripts/package", "--output", directory, "--version", "1.0"]
    built = subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True)
    first, second = Path(built.stdout.split()[-1]), directory / "second.deb"
    tree = directory / "tree"
    subprocess.run(["dpkg-deb", "-R", first, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("Version: 1.0\n", "Version: 2.0\n"))
    [commit] = tree.glob("usr/lib/fscached/lib/*/site-packages/fscached/COMMIT")
    commit.write_text("the-next-one\n")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", tree, second], check=True)
    return first, second


@pytest.fixture
def computer(tmp_path: Path) -> Iterator[Machine]:
    """A machine without the package."""
    found = Machine(tmp_path)
    try:
        yield found
    except BaseException:
        print(found.console())
        raise
    finally:
        found.end()


def configure(computer: Machine, registry: Origin) -> None:
    text = (
        "[kernel]\ntransport = 'fanotify'\n"
        f"[source]\ninsecure_registries = ['{registry.host}']\n"
        "[prefetch]\nenabled = false\n[fetch]\nwindow_bytes = 65536\nwindow_limit_bytes = 65536\n"
    )
    write = f"cat >/etc/fscached/fscached.toml <<'EOF'\n{text}\nEOF"
    computer.run("sh", "-c", write)


def daemon(computer: Machine) -> dict[str, object]:
    """The status of whoever answers now."""

    def asked() -> dict[str, object] | None:
        done = computer.run("fscached", "status", "-o", "json", check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else None

    found = until(asked, "nobody answers")
    assert isinstance(found, dict)
    return found


def start_reading(computer: Machine, path: str) -> subprocess.Popen[str]:
    program = [*computer.inside(), "/usr/bin/python3", "-S", "-c", READER, path]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)


def process(computer: Machine, pid: int) -> dict[str, str]:
    lines = computer.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_life_of_the_package(
    packages: tuple[Path, Path], computer: Machine, registry: Origin, capsys
) -> None:
    """Installed without a network; started by who asks its API; the server is what was started;
    sandboxed; a newer one and then the older one again under a cold read; nothing is refused; and
    nothing is left of it."""
    first, second = packages
    computer.run("dpkg", "-i", computer.put(first), network=False)
    assert "v0.1.0" in computer.run("fscached", "--version").stdout
    assert not computer.run("dpkg", "-V", "fscached").stdout
    configure(computer, registry)
    computer.run("systemctl", "start", "fscached-cachefiles", check=False)
    assert "in a mount namespace of its own" in computer.console()
    assert computer.status("fscached-cachefiles", "ActiveState") != "active"
    computer.run("systemctl", "stop", "fscached-cachefiles")
    computer.run("systemctl", "enable", "--now", "fscached.socket")
    asked = daemon(computer)
    computer.run("systemctl", "start", "fscached")
    assert daemon(computer)["pid"] == asked["pid"]

    supervisor = int(computer.status("fscached", "MainPID"))
    assert process(computer, supervisor)["Name"] == "fscached"
    status = daemon(computer)
    assert status["transport"] == "fanotify"
    for pid in (supervisor, status["pid"]):
        seen = process(computer, int(str(pid)))
        assert int(seen["CapEff"], 16) == int(seen["CapBnd"], 16) == CAP_SYS_ADMIN
        assert (seen["Seccomp"], seen["NoNewPrivs"]) == ("2", "1")

    # Not /proc/PID/oom_score_adj: there are kernels that refuse every value (EIO).
    assert computer.status("fscached", "OOMScoreAdjust") == "-900"

    files = noise(90, 2, 32 * MIB)
    reference = registry.add("app", image_of(files, chunk_bytes=65536))
    computer.run("mkdir", "/images")
    computer.run("fscached", "mount", reference, "/images")
    pauses = {}
    for name, package, commit in (("f0", second, "the-next-one"), ("f1", first, "")):
        before, inner = daemon(computer), computer.put(package)
        registry.pause_s = 0.3
        reader = start_reading(computer, f"/images/{name}")
        asked = len(registry.sent)
        until(lambda asked=asked: len(registry.sent) > asked + 5 or None, "nobody reads")
        began_s = time.monotonic()
        computer.run("dpkg", "-i", inner, network=False)
        installed_s = time.monotonic() - began_s
        assert reader.poll() is None, "the read was over before the package was there"
        registry.pause_s = 0.0
        said, _ = reader.communicate(timeout=120)
        assert reader.returncode == 0, said
        seen = json.loads(said)
        assert seen["sha256"] == hashlib.sha256(files[name]).hexdigest()
        after = daemon(computer)
        assert (
            after["pid"] != before["pid"]
            and int(computer.status("fscached", "MainPID")) == supervisor
        )
        assert after["git_commit"] != before["git_commit"]
        assert not commit or after["git_commit"] == commit
        assert dict(after["totals"])["reads_failed"] == 0  # type: ignore[call-overload]
        pauses[package.name] = (installed_s, seen["longest_s"])

    computer.run("mkdir", "/others")
    other = registry.add("other", image_of(noise(91, 1, MIB), chunk_bytes=65536))
    for words in (
        ("mount", other, "/others"),
        ("prefetch", "--wait", "/others"),
        ("trace", "show", "/images"),
        ("cache", "verify", "--repair"),
        ("umount", "/others"),
        ("cache", "gc", "--all"),
        ("bugreport", "/run/report.tar.gz"),
    ):
        computer.run("fscached", *words)
    journal = computer.run("journalctl", "-u", "fscached", "-o", "cat").stdout
    assert "running" in journal and not [word for word in REFUSED if word in journal], journal
    computer.run("dpkg", "-P", "fscached")
    assert computer.run("findmnt", "-rn", "-t", "erofs", check=False).stdout == ""
    left = [path for path in computer.upper.rglob("*fscached*") if not path.is_char_device()]
    assert left == [computer.upper / "var/lib/fscached"]  # where the disk is mounted
    assert not computer.run("sh", "-c", "ls -d /run/fscached || true").stdout
    assert list(computer.data.iterdir()) == []
    assert computer.status("fscached", "LoadState") == "not-found"
    assert "fscached" not in computer.run("ps", "-eo", "comm").stdout
    with capsys.disabled():
        for name, (installed_s, longest_s) in pauses.items():
            print(f"\n{name}: installed in {installed_s:.1f} s, longest read {longest_s:.2f} s")

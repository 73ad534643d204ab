"""fscached on this machine's own kernel: a daemon, an image, and mounts that nobody else sees."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cdefs import fanotify
from fscached.control.client import Client, DaemonAway
from fscached.transport import mount
from rafs_v6.pack import Format
from tests.native.manager import Manager
from tests.native.origin import Origin, origin
from tests.rafs_v6.trees import Built, build, directory, regular

PATIENCE_S = 20.0
ROOT = Path(__file__).resolve().parent.parent.parent
READER = Path(__file__).with_name("reader.py")
sys.path.append(str(ROOT / "vm-tests"))
"""Long counts are kept as scenarios keep theirs: the harness is found as programs find it."""

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000

SUPERVISE = """
import sys
from fscached import log
from fscached.control import supervisor
supervisor.BACKOFF_S = (0.0,)
log.configure()
sys.exit(supervisor.Supervisor(supervisor.command(sys.argv[1:])).run())
"""
"""`fscached supervise` without the pauses for daemons that keep dying: here they are killed."""


def lacking(directory: Path) -> str:
    """What this machine lacks; empty: nothing."""
    if os.geteuid() != 0:
        return "not root"
    if "\terofs\n" not in Path("/proc/filesystems").read_text():
        return "no erofs (modprobe erofs)"
    try:
        group_fd = fanotify.init()
    except OSError as error:
        return f"no fanotify before content is read: {error}"
    try:
        with open(directory / "trial", "wb") as file:
            fanotify.mark(group_fd, file.fileno())
    except OSError as error:
        return f"{directory} cannot be watched (Linux 6.14 on ext4, xfs or btrfs): {error}"
    finally:
        os.close(group_fd)
    return ""


@pytest.fixture(scope="session", autouse=True)
def namespace(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This process' mounts are its own from now on."""
    if reason := lacking(tmp_path_factory.mktemp("native")):
        pytest.skip(reason)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWNS) == 0
    assert libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None) == 0


@pytest.fixture
def registry() -> Iterator[Origin]:
    """The origin of all images."""
    with origin() as served:
        yield served


def noise(seed: int, files: int, size_bytes: int) -> dict[str, bytes]:
    """Files that do not compress, by name."""
    rng = random.Random(seed)
    return {f"f{number}": rng.randbytes(size_bytes) for number in range(files)}


def image_of(*layers: dict[str, bytes], chunk_bytes: int = 1 << 20) -> Built:
    """An image with one blob for each layer."""
    trees = (
        directory({name.encode(): regular(data) for name, data in files.items()})
        for files in layers
    )
    return build(*trees, form=Format(chunk_bytes=chunk_bytes))


class Node:
    """The daemon of one test below `root`, and the mounts made with it."""

    def __init__(self, root: Path, host: str) -> None:
        self.root = root
        self.log = root / "log"
        self.config = root / "fscached.toml"
        self.cache = root / "cache"
        self.manager: Manager | None = None
        """Whoever starts the supervisor and holds what it stores."""
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self._mounts: list[Path] = []
        self.configure()

    def configure(self, **tables: dict[str, Any]) -> None:
        """Write the configuration for the next start."""
        defaults: dict[str, dict[str, Any]] = {
            "paths": {
                "runtime_directory": str(self.root / "run"),
                "state_directory": str(self.root / "state"),
            },
            "cache": {"directory": str(self.cache)},
            "kernel": {"transport": "fanotify"},
            "fetch": {"deadline_s": 20.0, "refusal_s": 0.1},
            "source": {"insecure_registries": [self._host], "retry_pause_limit_s": 0.2},
            "prefetch": {"enabled": False},
        }
        for name, table in tables.items():
            defaults.setdefault(name, {}).update(table)
        lines = []
        for name, table in defaults.items():
            lines.append(f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        self.config.write_text("\n".join(lines))

    @property
    def program(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "fscached"]

    @property
    def client(self) -> Client:
        return Client(str(self.root / "run/api.sock"), 10.0)

    @property
    def supervisor_pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *words: str) -> None:
        """A daemon that answers: supervised, or by these words of the command line."""
        program = ["-m", "fscached", *words] if words else ["-c", SUPERVISE]
        self.start_as([sys.executable, *program, "--config", str(self.config)])

    def start_as(self, command: list[str]) -> None:
        """A daemon that answers, by this command."""
        with self.log.open("ab") as log:
            if self.manager is not None:
                self._process = self.manager.start(command, log)
            else:
                self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait()

    def wait(self) -> dict[str, Any]:
        """Until it answers; its status."""
        try:
            return dict(until(self._status, "the daemon does not answer"))
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.log.read_text()[-3000:]}") from None

    def _status(self) -> dict[str, Any] | None:
        with contextlib.suppress(DaemonAway):
            return dict(self.client.get("/api/v2/status"))
        return None

    def daemon_pid(self) -> int:
        """0 while there is none."""
        path = Path(f"/proc/{self.supervisor_pid}/task/{self.supervisor_pid}/children")
        return int((path.read_text().split() or ["0"])[0])

    def halt(self) -> None:
        """The daemon, if there is one, does nothing more: no thread of it."""
        if pid := self.daemon_pid():
            os.kill(pid, signal.SIGSTOP)
            until(lambda: stands_still(pid) or None, "it goes on")

    def kill(self) -> None:
        """`kill -9` of the daemon."""
        if pid := self.daemon_pid():
            os.kill(pid, signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the supervisor, and its daemon with it; the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        status = self._process.wait(20)
        self._process = None
        return status

    def lose(self) -> None:
        """`kill -9` of the daemon and of the supervisor, which starts no other one meanwhile."""
        daemon = self.daemon_pid()
        os.kill(self.supervisor_pid, signal.SIGSTOP)
        os.kill(daemon, signal.SIGKILL)
        self.stop(signal.SIGKILL)
        until(lambda: not Path(f"/proc/{daemon}/fd").exists() or None, "the daemon lives on")

    def fscached(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One verb of the command line."""
        command = [*self.program, *map(str, words), "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, check=check, timeout=30)

    def mount(self, reference: str, name: str = "mnt") -> Path:
        """Mount an image on a new directory."""
        target = self.root / name
        target.mkdir(exist_ok=True)
        done = self.fscached("mount", reference, target, check=False)
        assert done.returncode == 0, done.stderr + self.log.read_text()[-3000:]
        return self.mounted(target)

    def mounted(self, target: Path) -> Path:
        """Something is mounted there, to be unmounted at the end."""
        self._mounts.append(target)
        return target

    def end(self) -> None:
        """Whatever is left. Nobody may be waiting in a read by now."""
        for target in reversed(self._mounts):
            with contextlib.suppress(mount.MountError):
                mount.unmount(str(target), lazy=True)
        if self._process is not None:
            self.stop()
        if self.manager is not None:
            self.manager.end()


@pytest.fixture
def node(tmp_path: Path, registry: Origin) -> Iterator[Node]:
    """A node, its daemon not started."""
    found = Node(tmp_path, registry.host)
    yield found
    found.end()


def until(look: Callable[[], Any], otherwise: str) -> Any:
    """What `look` finds at last, when it is not None."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        if (found := look()) is not None:
            return found
        time.sleep(0.005)
    raise TimeoutError(otherwise)


def stands_still(pid: int) -> bool:
    """Whether all threads of a process have stopped or are dead (proc(5)). One that waits for what
    it reads itself, as a lure does, is D, and stops as soon as it has that."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    try:
        states = [thread.read_text().rpartition(")")[2].split()[0] for thread in threads]
    except OSError:  # one has ended meanwhile
        return False
    return all(state in "TDZX" for state in states)


def forget_pages(directory: Path) -> None:
    """Reads of these files go to the cache file again."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Readers:
    """Readers, each in a process of its own: a page fault holds up all threads of Python."""

    def __init__(self, target: Path, expected: Path, seed: int, kinds: Sequence[str]) -> None:
        command = [sys.executable, "-S", str(READER), str(target), str(expected)]
        self._processes = [
            subprocess.Popen(
                [*command, str(seed + number), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for number, kind in enumerate(kinds)
        ]

    def seen(self, timeout_s: float = 60) -> dict[str, Any]:
        """Have them end; what they saw, together. Raises TimeoutExpired when one of them hangs."""
        reports = []
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None  # or else communicate() would flush it
        for process in self._processes:
            output, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, f"a reader died: {process.returncode}"
            reports.append(json.loads(output))
        return {
            "reads": sum(report["reads"] for report in reports),
            "wrong": [what for report in reports for what in report["wrong"]],
            "failed": [what for report in reports for what in report["failed"]],
            "longest_s": max(report["longest_s"] for report in reports),
        }

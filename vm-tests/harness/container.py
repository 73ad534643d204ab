"""This machine's own kernel for a guest: processes with mounts, network and pids of their own.

The same root, disks and agent as in a virtual machine, and nothing of it is left when it ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness.disk import Disk
from harness.qemu import GUEST_FILES, GuestLost, GuestPanic

HERE = Path(__file__).resolve().parent


class Container:
    """Running processes. `agent` is the host's end of the wire."""

    def __init__(self, disks: Sequence[Disk], console: Path) -> None:
        self._console = console
        self._scratch = Path(tempfile.mkdtemp(prefix="fscached-native-"))
        tree = self._scratch / "harness"
        tree.mkdir()
        for name in GUEST_FILES:
            shutil.copy2(HERE / name, tree / name)
        mounts = (
            f"{disk.image} {disk.mount} {disk.file_system} {disk.options} "
            f"{'own' if disk.own else 'shared'}\n"
            for disk in disks
        )
        (self._scratch / "mounts").write_text("".join(mounts))
        self.agent, theirs = socket.socketpair()
        namespaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
        argv = ["unshare", *namespaces, str(HERE / "init-native"), str(self._scratch)]
        # Dies with us, as a virtual machine does.
        argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        with theirs, console.open("wb") as output:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "AGENT_FD": str(theirs.fileno())},
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> GuestPanic | GuestLost:
        """Why the agent fell silent."""
        said = self._console.read_text(errors="replace")[-4000:]
        return GuestLost(f"the processes have ended or fell silent; {self._console}: {said}")

    def panicked(self) -> bool:
        """Never: it would be this machine's kernel."""
        return False

    def wait(self, timeout_s: float) -> None:
        """Wait until all has ended by itself, then clean up. Raises GuestLost at the timeout."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise GuestLost(f"still running {timeout_s} s after it should have ended") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End every process at once; mounts go with the last of them. Twice is no error."""
        if self.running:
            # unshare's only child is the first process of the pid namespace: all others go with it.
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        self._process.wait()
        self.agent.close()
        self._clean_up()

    def _clean_up(self) -> None:
        """The mount namespace lets go of the scratch directory a moment after its processes."""
        for _ in range(100):
            shutil.rmtree(self._scratch, ignore_errors=True)
            if not self._scratch.exists():
                return
            time.sleep(0.02)

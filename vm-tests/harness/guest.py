"""A booted guest: run commands in it, move files, count what its kernel asked the daemon."""

from __future__ import annotations

import itertools
import queue
import re
import shlex
import signal as signals
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Self

from harness import disk, kernel
from harness.command import CommandFailed
from harness.container import Container
from harness.disk import Disk
from harness.qemu import Qemu
from harness.wire import Header, encode, receive

BOOT_TIMEOUT_S = 120.0
"""From QEMU's start to the agent's first word; boots take 3 to 6 s, more on a loaded machine."""

# What the host waits beyond a command's own timeout, which the guest enforces.
GRACE_S = 20.0
QUICK_S = 60.0

TRACING = "/sys/kernel/tracing/events/cachefiles"
OUTPUT_SHOWN = 4000


class GuestTimeout(CommandFailed):
    """A command in the guest did not end in time and was killed."""


class Process:
    """A command running in the guest."""

    def __init__(self, guest: Guest, argv: Sequence[str], number: int) -> None:
        self.argv = list(argv)
        self._guest = guest
        self._number = number
        self._result: CompletedProcess[str] | None = None
        self._timed_out = False
        self.pid: int = guest._answer(number, QUICK_S)[0]["pid"]

    def wait(self, timeout_s: float = QUICK_S) -> CompletedProcess[str]:
        """Its result. Raises GuestTimeout when it still runs after `timeout_s`, or was killed at
        the deadline given to `start`."""
        if self._result is None:
            header, payload = self._guest._answer(self._number, timeout_s)
            text = [part.decode(errors="surrogateescape") for part in _split(header, payload)]
            self._timed_out = header["timed_out"]
            self._result = CompletedProcess(self.argv, header["returncode"], *text)
            self._guest._forget(self._number)
        if self._timed_out:
            raise GuestTimeout(f"killed at its deadline: {_describe(self._result)}")
        return self._result

    def signal(self, number: int = signals.SIGTERM) -> None:
        """Send it a signal; no error when it has ended."""
        self._guest._ask("signal", target=self._number, signal=int(number))


def _split(header: Header, payload: bytes) -> tuple[bytes, bytes]:
    return payload[: header["split"]], payload[header["split"] :]


def _describe(done: CompletedProcess[str]) -> str:
    shown = f"{' '.join(done.args)[:500]}: exit status {done.returncode}"
    return f"{shown}\n{done.stdout[-OUTPUT_SHOWN:]}{done.stderr[-OUTPUT_SHOWN:]}"


class Guest:
    """A virtual machine with an agent that answers. Every method may be called from any thread.

    Any method raises GuestPanic or GuestLost when the guest is gone. As a context manager it waits
    for the agent at the start and ends QEMU at the end. QEMU dies with the thread that made the
    Guest: make it in one that outlives it.
    """

    def __init__(
        self,
        name: str,
        console: Path,
        *,
        disks: Sequence[Disk] = (),
        memory_mib: int = 1024,
        cpus: int = 2,
    ) -> None:
        """Start kernel `name` with root, project and `disks`; the serial console goes to a file.
        `native` is this machine's own, and no virtual machine: memory and CPUs are the host's."""
        self.kernel = kernel.prepared(name)
        self.console = console
        attached = [disk.root(), disk.site(), *disks]
        self._machine: Qemu | Container
        if name == kernel.NATIVE:
            self._machine = Container(attached, console)
        else:
            self._machine = Qemu(self.kernel, attached, console, memory_mib=memory_mib, cpus=cpus)
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.Queue[tuple[Header, bytes] | None]] = {0: queue.Queue()}
        self._lock = threading.Lock()
        self._gone = False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def panicked(self) -> bool:
        """Whether its kernel has died."""
        return self._machine.panicked()

    def __enter__(self) -> Self:
        try:
            self.wait_for_agent()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_for_agent(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until the agent has said its first word. Raises GuestTimeout when it does not."""
        self._answer(0, timeout_s)

    # -- commands -------------------------------------------------------------------------------

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float = QUICK_S,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        input: bytes = b"",
        check: bool = True,
    ) -> CompletedProcess[str]:
        """Run a program, or a bash script (a string; it ends at its first error), to its end.

        Raises GuestTimeout, and CommandFailed unless `check` is false.
        """
        process = self.start(command, timeout_s=timeout_s, env=env, cwd=cwd, input=input)
        done = process.wait(timeout_s + GRACE_S)
        if check and done.returncode != 0:
            raise CommandFailed(f"in the guest: {_describe(done)}")
        return done

    def python(self, source: str, *argv: str, timeout_s: float = QUICK_S) -> CompletedProcess[str]:
        """Run Python source in the guest, where the project can be imported."""
        return self.run(["/usr/bin/python3", "-c", source, *argv], timeout_s=timeout_s)

    def start(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        input: bytes = b"",
        log: str | None = None,
    ) -> Process:
        """Start a program or a bash script in a session of its own and return while it runs.

        Its output goes to the end of `log`, a file in the guest, or else into the result.
        """
        bash = ["/bin/bash", "-euo", "pipefail", "-c"]
        argv = [*bash, command] if isinstance(command, str) else list(command)
        options = {"argv": argv, "env": dict(env or {}), "cwd": cwd, "log": log}
        number = self._send("run", input, timeout_s=timeout_s, **options)
        return Process(self, argv, number)

    def await_answer(
        self, server: Process, *curl: str, within: Sequence[str] = (), timeout_s: float
    ) -> None:
        """Wait until a server that was started answers curl, asked with these arguments.

        Raises CommandFailed when it does not in time, at once when it has ended.
        """
        ask = shlex.join([*within, "curl", "-sf", "-o", "/dev/null", *curl])
        # curl's own --retry waits a second, then two, then four.
        self.run(
            f"while kill -0 {server.pid} && (( SECONDS < {timeout_s:.0f} )); do "
            f"{ask} && exit 0; sleep 0.05; done; exit 1",
            timeout_s=timeout_s * 2,
        )

    # -- files ----------------------------------------------------------------------------------

    def put(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Write a file; its directories are made."""
        self._ask("put", content, path=path, mode=mode)

    def get(self, path: str) -> bytes:
        """Read a file. Raises OSError as the guest's open or read did."""
        return self._ask("get", path=path)[1]

    # -- what the kernel asked ------------------------------------------------------------------

    def reset_cachefiles_counts(self) -> None:
        """Count the kernel's cachefiles_ondemand_* tracepoints from zero, losing none. A kernel
        that has none is left alone."""
        if not self.kernel.traced:
            return
        self.run(
            f"for trigger in {TRACING}/cachefiles_ondemand_*/trigger; do "
            'grep -q "^hist" "$trigger" && echo "!hist:keys=common_type" > "$trigger"; '
            'echo "hist:keys=common_type" > "$trigger"; done'
        )

    def cachefiles_counts(self) -> dict[str, int]:
        """Hits of each tracepoint since the reset, by its name without `cachefiles_ondemand_`:
        open, read and close are the kernel's messages; copen, cread and fd_write the answers."""
        shown = self.run(f"grep -H Hits: {TRACING}/cachefiles_ondemand_*/hist").stdout
        rows = re.findall(r"cachefiles_ondemand_(\w+)/hist:\s+Hits: (\d+)", shown)
        return {name: int(hits) for name, hits in rows}

    # -- its end --------------------------------------------------------------------------------

    def kill(self) -> None:
        """Cut the power: QEMU ends by SIGKILL. Lasting disks keep what reached them."""
        self._machine.kill()

    def power_off(self, timeout_s: float = QUICK_S) -> None:
        """Sync, power off, and wait for QEMU's end."""
        if self._machine.running:
            self._send("power_off")
            self._machine.wait(timeout_s)

    # -- the wire -------------------------------------------------------------------------------

    def _send(self, operation: str, payload: bytes = b"", **header: object) -> int:
        number = next(self._numbers)
        message = encode({"id": number, "op": operation, **header}, payload)
        with self._lock:
            if self._gone:
                raise self._machine.failure()
            self._answers[number] = queue.Queue()
            try:
                self._machine.agent.sendall(message)
            except OSError:
                raise self._machine.failure() from None
        return number

    def _ask(self, operation: str, payload: bytes = b"", **header: object) -> tuple[Header, bytes]:
        number = self._send(operation, payload, **header)
        try:
            return self._answer(number, QUICK_S)
        finally:
            self._forget(number)

    def _answer(self, number: int, timeout_s: float) -> tuple[Header, bytes]:
        """The next answer to request `number`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._answers[number].get(timeout=min(1.0, timeout_s))
                break
            except queue.Empty:
                if self._machine.panicked():
                    raise self._machine.failure() from None
                if time.monotonic() > deadline:
                    raise GuestTimeout(f"request {number}: no answer in {timeout_s} s") from None
        if answer is None:
            raise self._machine.failure()
        if "error" in answer[0]:
            raise OSError(answer[0]["errno"], answer[0]["error"], answer[0]["path"])
        return answer

    def _forget(self, number: int) -> None:
        with self._lock:
            self._answers.pop(number, None)

    def _listen(self) -> None:
        stream = self._machine.agent.makefile("rb")
        try:
            while (message := receive(stream)) is not None:
                with self._lock:
                    waiting = self._answers.get(message[0]["id"])
                if waiting is not None:
                    waiting.put(message)
        except OSError:
            pass
        with self._lock:
            self._gone = True
            for waiting in self._answers.values():
                waiting.put(None)

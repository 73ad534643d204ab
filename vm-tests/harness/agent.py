"""The guest's end of the wire: runs commands and moves files for the host. PID 1 starts it.

The wire is a virtio-serial port, or the descriptor $AGENT_FD where there is no virtual machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from harness.wire import PORT, Header, encode, receive

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

# A process killed at its deadline may be stuck in the kernel; the host hears of it after this.
UNKILLABLE_S = 5.0

# include/uapi/linux/reboot.h
RB_POWER_OFF = 0x4321FEDC


class Agent:
    """Serves one host: every request in a thread of its own, so that none waits for another."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sending = threading.Lock()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._operations: dict[str, Callable[[Header, bytes], None]] = {
            "run": self._run,
            "signal": self._signal,
            "put": self._put,
            "get": self._get,
            "power_off": self._power_off,
        }

    def serve(self, stream: BinaryIO) -> None:
        self._reply({"id": 0, "release": os.uname().release})
        while (message := receive(stream)) is not None:
            threading.Thread(target=self._handle, args=message, daemon=True).start()

    def _handle(self, header: Header, payload: bytes) -> None:
        try:
            self._operations[header["op"]](header, payload)
        except OSError as error:
            reply = {"errno": error.errno, "error": error.strerror, "path": error.filename}
            self._reply({"id": header["id"], **reply})

    def _reply(self, header: Header, payload: bytes = b"") -> None:
        message = memoryview(encode(header, payload))
        with self._sending:
            while message:
                message = message[os.write(self._port, message) :]

    def _run(self, header: Header, payload: bytes) -> None:
        with contextlib.ExitStack() as stack:
            given, output, errors = (stack.enter_context(_anonymous()) for _ in range(3))
            log = stack.enter_context(open(header["log"], "ab")) if header["log"] else None
            given.write(payload)
            given.seek(0)
            process = subprocess.Popen(
                header["argv"],
                stdin=given,
                stdout=log or output,
                stderr=log or errors,
                cwd=header["cwd"] or "/",
                env={**ENVIRONMENT, **header["env"]},
                start_new_session=True,
            )
            self._processes[header["id"]] = process
            self._reply({"id": header["id"], "pid": process.pid})
            timed_out = _await(process, header["timeout_s"])
            del self._processes[header["id"]]
            status = {"returncode": process.returncode, "timed_out": timed_out}
            stdout, stderr = _content(output), _content(errors)
            self._reply({"id": header["id"], **status, "split": len(stdout)}, stdout + stderr)

    def _signal(self, header: Header, payload: bytes) -> None:
        process = self._processes.get(header["target"])
        if process is not None:
            process.send_signal(header["signal"])
        self._reply({"id": header["id"], "sent": process is not None})

    def _put(self, header: Header, payload: bytes) -> None:
        path = Path(header["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
        path.chmod(header["mode"])
        self._reply({"id": header["id"]})

    def _get(self, header: Header, payload: bytes) -> None:
        self._reply({"id": header["id"]}, Path(header["path"]).read_bytes())

    def _power_off(self, header: Header, payload: bytes) -> None:
        os.sync()
        ctypes.CDLL(None).reboot(RB_POWER_OFF)


def _anonymous() -> BinaryIO:
    """A file for a command's input or output. A child that outlives it would keep a pipe open."""
    return os.fdopen(os.memfd_create("agent"), "w+b")


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _await(process: subprocess.Popen[bytes], timeout_s: float | None) -> bool:
    """Wait for the end; at the deadline kill the whole session. Returns whether that was it."""
    try:
        process.wait(timeout_s)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(UNKILLABLE_S)
    return True


def _port() -> Path:
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT:
            return Path("/dev") / name.parent.name
    raise SystemExit(f"no virtio-serial port {PORT}")


def main() -> None:
    # The port may be opened once only, so both directions share the descriptor.
    given = os.environ.pop("AGENT_FD", None)
    port = os.open(_port(), os.O_RDWR | os.O_CLOEXEC) if given is None else int(given)
    os.set_inheritable(port, False)
    Agent(port).serve(os.fdopen(port, "rb"))


if __name__ == "__main__":
    main()

"""One QEMU: how a stock Debian kernel is started so that it runs well, and how its end is told."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from harness import command
from harness.disk import Disk
from harness.kernel import Kernel
from harness.wire import PORT

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
BUSYBOX = Path("/bin/busybox")
GUEST_FILES = (
    *("__init__.py", "wire.py", "agent.py", "listing.py", "reader.py"),
    *("noise.py", "inspector.py", "proxy.py", "killer.py", "tracepoints.py"),
)

# oops=panic, panic=-1 and -no-reboot: a broken guest ends its QEMU instead of limping on.
KERNEL_ARGUMENTS = "console=ttyS0 loglevel=5 panic=-1 oops=panic nokaslr mitigations=off"

# `-cpu max` crashes 6.12 in QEMU 7.2's multi-threaded emulation every time; with cmpxchg16b 2 of 5
# boots panicked, without it 0 of 8. With erms a copy of 1 MiB takes 6.2 ms, without it 0.9 ms.
EMULATED_CPU = "Haswell-v4,-cx16,-erms"

PANIC = re.compile(r"Kernel panic|Oops:|BUG: unable|general protection fault")


class GuestPanic(Exception):
    """The guest's kernel died: under emulation an infrastructure failure, worth one retry."""


class GuestLost(Exception):
    """The guest ended, or no longer answers, without a panic."""


def with_one_retry(work: Callable[[], T]) -> T:
    """Under emulation a guest's kernel now and then dies of the emulator: then once more."""
    try:
        return work()
    except GuestPanic as panic:
        print(f"the guest's kernel died, once more: {panic}", file=sys.stderr, flush=True)
        return work()


def acceleration(cpu_flags: str | None = None) -> list[str]:
    """QEMU's options for the CPU. $FSCACHED_VM_ACCEL (kvm or tcg) overrides what the flags say.

    The flags decide, not /dev/kvm: without vmx or svm the device opens but a kernel hangs in it.
    """
    if cpu_flags is None:
        cpu_flags = Path("/proc/cpuinfo").read_text()
    able = re.search(r"\b(vmx|svm)\b", cpu_flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)
    chosen = os.environ.get("FSCACHED_VM_ACCEL") or ("kvm" if able else "tcg")
    if chosen == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    if chosen == "tcg":
        return ["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU]
    raise ValueError(f"FSCACHED_VM_ACCEL={chosen}: must be kvm or tcg")


class Qemu:
    """A running QEMU. `agent` is the host's end of the wire."""

    def __init__(
        self,
        kernel: Kernel,
        disks: Sequence[Disk],
        console: Path,
        *,
        memory_mib: int,
        cpus: int,
    ) -> None:
        self._console = console
        self._scratch = Path(tempfile.mkdtemp(prefix="fscached-vm-"))
        initramfs = self._scratch / "initramfs"
        _pack_initramfs(kernel, disks, initramfs)
        self.agent, theirs = socket.socketpair()
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]
        argv += ["-display", "none", *acceleration(), "-smp", str(cpus), "-m", f"{memory_mib}M"]
        argv += ["-kernel", str(kernel.vmlinuz), "-initrd", str(initramfs)]
        argv += ["-append", KERNEL_ARGUMENTS, "-serial", f"file:{console}"]
        argv += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
        argv += ["-chardev", f"socket,id=agent,fd={theirs.fileno()}"]
        argv += ["-device", f"virtserialport,chardev=agent,name={PORT}"]
        for number, disk in enumerate(disks):
            argv += _drive(number, disk)
        # Dies with us: a guest must not outlive an interrupted test run.
        argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        with theirs:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=(self._scratch / "stderr").open("wb"),
                pass_fds=[theirs.fileno()],
                env={**os.environ, "TMPDIR": str(self._scratch)},
            )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> GuestPanic | GuestLost:
        """Why the agent fell silent, with the end of the console. Gives a panic time to show."""
        deadline = time.monotonic() + 5
        while self.running and not self.panicked() and time.monotonic() < deadline:
            time.sleep(0.05)
        tail = "\n".join(self.console().splitlines()[-30:])
        stderr = self._stderr()
        message = f"console {self._console} ends with:\n{tail}\n{stderr}"
        if self.panicked():
            return GuestPanic(f"the guest's kernel panicked; {message}")
        return GuestLost(f"the guest ended or fell silent without a panic; {message}")

    def panicked(self) -> bool:
        return PANIC.search(self.console()) is not None

    def console(self) -> str:
        """What the guest wrote to its serial console so far."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def _stderr(self) -> str:
        """What QEMU itself had to say, without its regrets about the chosen CPU."""
        errors = self._scratch / "stderr"
        lines = errors.read_text(errors="replace").splitlines() if errors.exists() else []
        return "\n".join(line for line in lines if "TCG doesn't support" not in line)

    def wait(self, timeout_s: float) -> None:
        """Wait until QEMU has ended by itself, then clean up. Raises GuestLost at the timeout."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise GuestLost(f"QEMU still runs {timeout_s} s after it should have ended") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End QEMU by SIGKILL, as a power cut would; twice is no error."""
        self._process.kill()
        self._process.wait()
        self.agent.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _drive(number: int, disk: Disk) -> list[str]:
    # Thrown away with the guest: no point in flushing. A lasting disk keeps real flushes.
    mode = "cache=writeback" if disk.lasting else "snapshot=on,cache=unsafe"
    drive = f"file={disk.image},format=raw,if=none,id=disk{number},discard=unmap,{mode}"
    device = f"virtio-blk-pci,drive=disk{number},serial={disk.serial}"
    return ["-drive", drive, "-device", device]


def _pack_initramfs(kernel: Kernel, disks: Sequence[Disk], initramfs: Path) -> None:
    """Pack busybox, the modules, the agent, `init` and its list of mounts."""
    tree = initramfs.with_name("initramfs-tree")
    for directory in ("bin", "dev", "proc", "sys", "root", "harness"):
        (tree / directory).mkdir(parents=True)
    shutil.copy2(BUSYBOX, tree / "bin/busybox")
    shutil.copy2(HERE / "init", tree / "init")
    (tree / "init").chmod(0o755)
    for name in GUEST_FILES:
        shutil.copy2(HERE / name, tree / "harness" / name)
    shutil.copytree(kernel.modules, tree / "lib/modules" / kernel.release)
    mounts = (f"{disk.serial} {disk.mount} {disk.file_system} {disk.options}\n" for disk in disks)
    (tree / "mounts").write_text("".join(mounts))
    pack = 'cd "$1" && find . | cpio --quiet -o -H newc -R 0:0 > "$2"'
    command.run(["sh", "-c", pack, "sh", tree, initramfs])
    shutil.rmtree(tree)

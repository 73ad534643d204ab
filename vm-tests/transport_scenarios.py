"""What happens in the guest of test_transport.py: a daemon that answers from memory, and readers.

Each scenario runs in a process of its own, binds the device anew, mounts one image, and returns
what the host asserts. The image is RAFS v6 without compression, every file whole blocks long: its
blob file begins with its cache file.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import io
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar
from unittest import mock

from cdefs.cachefiles import read_complete
from fscached.config import Cache, Kernel
from fscached.transport import (
    Closed,
    NotReady,
    ObjectId,
    ObjectKey,
    Opened,
    OutOfSpace,
    Wanted,
    mount,
    probe,
)
from fscached.transport import cachefiles as module
from fscached.transport.cachefiles import Cachefiles, Culling
from fscached.transport.host import Finding, this_host
from rafs_v6.build import ImageBuilder
from rafs_v6.layout import Compressor
from rafs_v6.pack import Format
from rafs_v6.tree import read_directory

CACHE = "/var/lib/fscached/cache"
TARGET = "/mnt"
FSID = "image"
DOMAIN = "domain"
MIB = 1 << 20
SIZES = {"small": 8192, "large": 3 * MIB + 4096}

T = TypeVar("T")

Seen = dict[str, object]
"""What the host asserts, as JSON can say it."""


def content(name: str) -> bytes:
    """The bytes of a file of the image: no two blocks of it are the same."""
    words = (b"%s %d " % (name.encode(), block) for block in range(SIZES[name] // 4096))
    return b"".join((word * (4096 // len(word) + 1))[:4096] for word in words)


@functools.cache
def image() -> dict[str, bytes]:
    """Cache files by cookie: the bootstrap's and the blob's."""
    with tempfile.TemporaryDirectory() as tree:
        for name in SIZES:
            Path(tree, name).write_bytes(content(name))
        output = io.BytesIO()
        builder = ImageBuilder(Format(compressor=Compressor.NONE))
        builder.add(read_directory(tree), output)
        built = builder.finish()
    [blob] = built.blobs
    return {FSID: built.bootstrap, blob.blob_id: output.getvalue()[: blob.uncompressed_size]}


class Daemon:
    """Answers every message from memory in a thread, until told otherwise by `on_want`."""

    def __init__(self, device_fd: int | None = None) -> None:
        self.files = image()
        self.names: dict[ObjectId, str] = {}
        self.opened: list[tuple[str, str]] = []
        self.wanted: list[tuple[str, int, int]] = []
        self.closed: list[str] = []
        self.on_want: Callable[[str, Wanted], bool] = lambda name, wanted: False
        """Whether it has answered this READ itself."""
        if device_fd is None:
            os.makedirs(CACHE, exist_ok=True)
            self.transport = Cachefiles.open(CACHE)
            self.transport.bind("test", Culling(), Culling())
        else:
            self.transport = Cachefiles.adopt(device_fd, CACHE)
            self.transport.restore()
        self.on_open: Callable[[ObjectId, int], None] = self.transport.open_ok
        self._stop_reader, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.transport.fileno(), select.POLLIN)
        poll.register(self._stop_reader, select.POLLIN)
        while True:
            if any(fd == self._stop_reader for fd, _ in poll.poll()):
                return
            for event in self.transport.drain():
                match event:
                    case Opened(object, key) if key.cookie in self.files:
                        self.names[object] = key.cookie
                        self.opened.append((key.volume, key.cookie))
                        self.on_open(object, len(self.files[key.cookie]))
                    case Opened(object, _):
                        self.transport.open_failed(object, errno.ENOENT)
                    case Wanted(object, start, end, _):
                        self.wanted.append((self.names[object], start, end))
                        if not self.on_want(self.names[object], event):
                            self.answer(event, start, end)
                    case Closed(object):
                        self.closed.append(self.names.pop(object))

    def answer(self, wanted: Wanted, start: int, end: int) -> None:
        """Write [start, end), and let the reader look."""
        if start < end:
            file = self.files[self.names[wanted.object]]
            memory = mmap.mmap(-1, end - start)
            memory.write(file[start:end].ljust(end - start, b"\0"))
            self.transport.write(wanted.object, start, memoryview(memory))
        self.transport.done(wanted.object, wanted.ticket)

    def blob_wants(self) -> list[tuple[int, int]]:
        return [(start, end) for name, start, end in self.wanted if name != FSID]

    def stop(self) -> None:
        os.write(self._stop, b"x")
        self._thread.join()
        self.transport.close()
        os.close(self._stop)
        os.close(self._stop_reader)


@contextlib.contextmanager
def serving() -> Iterator[Daemon]:
    """A daemon on a cache where nothing is resident."""
    subprocess.run(["rm", "-rf", CACHE], check=True)
    daemon = Daemon()
    try:
        yield daemon
    finally:
        daemon.stop()


@contextlib.contextmanager
def mounted() -> Iterator[None]:
    mount.mount_fsid(TARGET, FSID, DOMAIN)
    try:
        yield
    finally:
        mount.unmount(TARGET)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def failure(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def right(name: str) -> bool:
    return Path(TARGET, name).read_bytes() == content(name)


def transcript() -> list[Seen]:
    """Two mounts with reads, and all that went over the device and the objects' descriptors."""
    lines: list[Seen] = [{"kernel": os.uname().release, "cookies": {}}]
    device = -1
    read, write = os.read, os.write

    def tee_read(fd: int, count: int) -> bytes:
        data = read(fd, count)
        if fd == device and data:
            lines.append({"message": data.hex()})
        return data

    def tee_write(fd: int, data: bytes) -> int:
        if fd == device:
            lines.append({"command": data.decode()})
        return write(fd, data)

    def tee_complete(fd: int, msg_id: int) -> None:
        lines.append({"read_complete": msg_id})
        read_complete(fd, msg_id)

    with (
        mock.patch.object(os, "read", tee_read),
        mock.patch.object(os, "write", tee_write),
        mock.patch.object(module, "read_complete", tee_complete),
        serving() as daemon,
    ):
        device = daemon.transport.fileno()
        lines[0]["cookies"] = {cookie: len(file) for cookie, file in daemon.files.items()}
        for _ in range(2):
            with mounted():
                assert right("small") and right("large")
            drop_caches()
    return lines


def life() -> Seen:
    """Mount, read, umount; and the same again with everything resident."""
    with serving() as daemon:
        blob = next(cookie for cookie in daemon.files if cookie != FSID)
        with mounted():
            first = right("small") and right("large")
            wants = daemon.blob_wants()
            target = next(id for id, name in daemon.names.items() if name == blob)
            resident = daemon.transport.resident(target, len(daemon.files[blob]))
        daemon.wanted.clear()
        drop_caches()
        with mounted():
            second = right("small") and right("large")
        return {
            "restore": daemon.transport.supports_restore,
            "right": [first, second],
            "opened": daemon.opened == [(DOMAIN, FSID), (DOMAIN, blob)] * 2,
            "closed": sorted(daemon.closed) == sorted([FSID, blob] * 2),
            "wants": wants,
            "again": daemon.blob_wants(),
            "resident": resident,
            "size": len(daemon.files[blob]),
            "counts": asdict(daemon.transport.counts),
        }


def before_copen() -> Seen:
    """An object that is not answered yet neither seeks nor takes bytes."""
    with serving() as daemon:
        said: list[str] = []
        transport, answer = daemon.transport, daemon.on_open

        def try_first(object: ObjectId, size_bytes: int) -> None:
            memory = memoryview(mmap.mmap(-1, 4096))
            said.append(failure(lambda: transport.resident(object, size_bytes)))
            said.append(failure(lambda: transport.write(object, 0, memory)))
            answer(object, size_bytes)

        daemon.on_open = try_first
        with mounted():
            pass
        return {"said": [line.split(":")[0] for line in said], "expected": NotReady.__name__}


def partly(*, prefix: bool) -> Seen:
    """The first block or the last of each range is filled, not the rest."""
    with serving() as daemon:

        def answer(name: str, wanted: Wanted) -> bool:
            if name == FSID or wanted.end - wanted.start == 4096:
                return False
            half = (
                (wanted.start, wanted.start + 4096) if prefix else (wanted.end - 4096, wanted.end)
            )
            daemon.answer(wanted, *half)
            return True

        daemon.on_want = answer
        with mounted():
            return {"right": right("small"), "wants": daemon.blob_wants()}


def never() -> Seen:
    """READs are completed without bytes; afterwards the daemon has recovered."""
    with serving() as daemon:

        def fail(name: str, wanted: Wanted) -> bool:
            if name != FSID:
                daemon.transport.failed(wanted.object, wanted.ticket, errno.EIO)
            return name != FSID

        daemon.on_want = fail
        with mounted():
            said = failure(lambda: right("small"))
            wants = daemon.blob_wants()
            daemon.on_want = lambda name, wanted: False
            return {"said": said, "wants": wants, "right": right("small")}


def killed_reader() -> Seen:
    """A reader dies while its READ is out; the answer comes afterwards."""
    with serving() as daemon:
        out = threading.Event()
        held: list[Wanted] = []

        def hold(name: str, wanted: Wanted) -> bool:
            if name == FSID:
                return False
            held.append(wanted)
            out.set()
            return True

        daemon.on_want = hold
        with mounted():
            reader = subprocess.Popen(["cat", f"{TARGET}/small"], stdout=subprocess.DEVNULL)
            out.wait(30)
            reader.kill()
            reader.wait()
            daemon.on_want = lambda name, wanted: False
            for wanted in held:
                daemon.answer(wanted, wanted.start, wanted.end)
            return {"gone": daemon.transport.counts.readers_gone, "right": right("small")}


def full_disk() -> Seen:
    """Below the floor nothing is stored; with space again everything works."""
    with serving() as daemon, mounted():
        right("small")
        state = os.statvfs(CACHE)
        filler = f"{CACHE}/../filler"
        size = (state.f_bavail - state.f_blocks // 200) * state.f_bsize
        fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
        errors: list[str] = []

        def write(name: str, wanted: Wanted) -> bool:
            try:
                daemon.answer(wanted, wanted.start, wanted.end)
            except OutOfSpace as error:
                errors.append(errno.errorcode[error.errno or 0])
                daemon.transport.failed(wanted.object, wanted.ticket, errno.EIO)
            return True

        daemon.on_want = write
        try:
            os.posix_fallocate(fd, 0, size)
            said = failure(lambda: right("large"))
            low = [finding.name for finding in survey() if not finding.ok]
        finally:
            os.close(fd)
            os.unlink(filler)
        return {"said": said, "errors": sorted(set(errors)), "low": low, "right": right("large")}


def survey() -> list[Finding]:
    return probe.survey(this_host(), Cache(directory=CACHE), Kernel(transport="cachefiles"))


def machine() -> Seen:
    """The survey of a machine that can do everything, free and in use."""
    free = [finding.name for finding in survey() if not finding.ok]
    with serving(), mounted():
        return {"free": free, "second": in_a_process(second)}


def second() -> str:
    """What another process that wants the device is told."""
    try:
        Cachefiles.open(CACHE)
    except OSError as error:
        return probe.explain_open_failure(error)
    return "it got the device"


def inheritance() -> Seen:
    """What a program that was started by the daemon has open."""
    with serving(), mounted():
        right("small")
        listing = ["sh", "-c", "ls -l /proc/self/fd"]
        return {"open": subprocess.check_output(listing, text=True)}


def mounts() -> Seen:
    """Second mounts, bind mounts, unknown images, nobody to ask."""
    other = Path("/tmp/other")
    other.mkdir(exist_ok=True)
    said: Seen = {}
    with serving():
        with mounted():
            said["again"] = failure(lambda: mount.mount_fsid(str(other), FSID, DOMAIN))
            mount.bind(TARGET, str(other))
            said["table"] = [point[:3] for point in mount.mounted()]
            with open(other / "small"):
                said["busy"] = failure(lambda: mount.unmount(str(other)))
                mount.unmount(str(other), lazy=True)
        said["unknown"] = failure(lambda: mount.mount_fsid(TARGET, "nobody", DOMAIN))
        said["missing"] = failure(lambda: mount.mount_fsid("/nowhere", FSID, DOMAIN))
        said["left"] = len(mount.mounted())
    said["nobody"] = failure(lambda: mount.mount_fsid(TARGET, FSID, DOMAIN))
    said["not mounted"] = failure(lambda: mount.unmount(TARGET))
    return said


def takeover() -> Seen:
    """A daemon is killed in the middle of a READ while somebody else holds the device."""
    subprocess.run(["rm", "-rf", CACHE], check=True)
    os.makedirs(CACHE)
    device = os.open("/dev/cachefiles", os.O_RDWR)
    holder = Cachefiles.adopt(device, CACHE)
    holder.bind()
    asked_reader, asked = os.pipe()
    pid = os.fork()
    if pid == 0:
        daemon = Daemon(device)
        daemon.on_want = lambda name, wanted: name != FSID and bool(os.write(asked, b"x"))
        signal.pause()
    while not (ready := mountable()):
        time.sleep(0.01)
    reader = subprocess.Popen(["cmp", f"{TARGET}/small", "-"], stdin=subprocess.PIPE)
    os.read(asked_reader, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    started = time.monotonic()
    successor = Daemon(device)
    assert reader.stdin is not None
    reader.stdin.write(content("small"))
    reader.stdin.close()
    same = reader.wait() == 0
    seconds = time.monotonic() - started
    mount.unmount(TARGET)
    result = {"ready": ready, "same": same, "seconds": seconds, "opened": successor.opened}
    successor.stop()
    return result


def culling() -> Seen:
    """Cache files while they are nameless, in use, and left over."""
    with serving() as daemon:
        files = daemon.transport.files
        said: Seen = {"cwd": os.getcwd()}
        keys = [ObjectKey(DOMAIN, cookie) for cookie in image()]
        with mounted():
            right("large")
            said["new"] = [str(file.key) for file in files.listed()]
        settled(lambda: len(list(files.listed())) == len(keys))
        said["listed"] = sorted((file.key, file.path) for file in files.listed())
        said["computed"] = sorted((key, files.path(key)) for key in keys)
        with mounted():
            right("small")
            said["in use"] = in_a_thread(lambda: [files.cull(key) for key in keys])
            in_a_thread(lambda: files.tidy(DOMAIN))
            said["still right"] = right("large")
            said["spoiled"], said["asked again"] = spoiled(daemon)
        settled(lambda: in_a_thread(lambda: all(files.cull(key) for key in keys)))
        said["left"] = [file.path for file in files.listed()]
        said["again"] = in_a_thread(lambda: [files.cull(key) for key in keys])
        settled(lambda: in_a_thread(lambda: files.tidy(DOMAIN)) or not volumes())
        said["volumes"] = volumes()
        said["graves"] = os.listdir(f"{CACHE}/graveyard")
        with mounted():
            said["cold again"] = right("small")
        said["cwd after"] = os.getcwd()
        return said


def spoiled(daemon: Daemon) -> tuple[bool, bool]:
    """A block of an open file rots on the disk, is read, and is made a hole: what readers get."""
    [(object, name)] = [(object, name) for object, name in daemon.names.items() if name != FSID]
    path = daemon.transport.files.path(ObjectKey(DOMAIN, name))
    with open(path, "r+b") as file:
        [(start, _), *_] = daemon.transport.resident(object, len(image()[name]))
        for block in range(start, start + (1 << 20), 4096):
            file.seek(block)
            file.write(b"rot")
        os.fsync(file.fileno())
    drop_caches()
    before = right("small") and right("large")
    assert daemon.transport.discard(object, start, start + (1 << 20))
    drop_caches()
    return before, right("small") and right("large")


def volumes() -> list[str]:
    return os.listdir(f"{CACHE}/cache")


def settled(done: Callable[[], bool]) -> None:
    """The kernel closes some milliseconds after an umount."""
    deadline = time.monotonic() + 10
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


def in_a_thread(task: Callable[[], T]) -> T:
    """As the daemon does: a thread has its own working directory."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(task).result()


def mountable() -> bool:
    try:
        mount.mount_fsid(TARGET, FSID, DOMAIN)
    except mount.MountError:
        return False
    return True


SCENARIOS: dict[str, Callable[[], object]] = {
    "life": life,
    "before copen": before_copen,
    "prefix": functools.partial(partly, prefix=True),
    "suffix": functools.partial(partly, prefix=False),
    "never": never,
    "killed reader": killed_reader,
    "full disk": full_disk,
    "machine": machine,
    "inheritance": inheritance,
    "mounts": mounts,
    "takeover": takeover,
    "culling": culling,
    "transcript": transcript,
}
SCENARIO_TIMEOUT_S = 60


def in_a_process(scenario: Callable[[], object]) -> object:
    """The scenario's result, or the traceback that ended it as a string."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(SCENARIO_TIMEOUT_S)
        try:
            result = scenario()
        except BaseException:
            result = traceback.format_exc()
        with os.fdopen(writer, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(text) if text else f"ended with {status}"


if __name__ == "__main__":
    image()
    json.dump({name: in_a_process(SCENARIOS[name]) for name in sys.argv[1:]}, sys.stdout)

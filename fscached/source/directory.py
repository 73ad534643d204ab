"""Blobs as files of a local directory, named by their ids."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from fscached.source import Answer, Fault, Priority, SourceError

PIECE_BYTES: Final = 1 << 20
OPEN_FILES_LIMIT: Final = 256
_BLOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class _File:
    """An open blob; the last reader to leave a file that was put aside closes it."""

    __slots__ = ("fd", "size")

    def __init__(self, path: Path) -> None:
        # O_NONBLOCK: opening a FIFO somebody put there must not wait for its writer.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.fd)
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else -1

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Directory:
    """A source whose blobs are files, in `path` or else in one of `others`; a `path` that is no
    directory is the only blob. Reads run in `threads` threads of its own, except read_now.

    An open file is remembered: a blob that is replaced meanwhile is noticed by its digests.
    """

    def __init__(self, path: Path, others: Sequence[Path] = (), *, threads: int = 2) -> None:
        self.name = str(path)
        self._path = path
        self._paths = (path, *others)
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._threads = ThreadPoolExecutor(threads, "fscached-directory")
        self._buffers: list[mmap.mmap] = []

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        """See Source."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        buffer = self._buffers.pop() if self._buffers else mmap.mmap(-1, PIECE_BYTES)
        view = memoryview(buffer)
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                for position in range(start, end, PIECE_BYTES):
                    piece = view[: min(PIECE_BYTES, end - position)]
                    reading = loop.run_in_executor(
                        self._threads, self._fill, blob_id, position, piece
                    )
                    await reading
                    feed(piece)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise SourceError(
                f"{self._path}/{blob_id}: not read within {deadline_s:g} s: "
                "look at the disk or file system below it",
                Fault.DEADLINE,
            ) from None
        # Only a buffer nobody reads into any more: a cancelled read's thread may still do.
        self._buffers.append(buffer)
        return Answer(self.name, 0, end - start, loop.time() - began)

    def read_now(self, blob_id: str, start: int, end: int, into: memoryview) -> int:
        """Fill `into` with bytes [start, end), here and now: for ranges so small that a thread
        would cost more than the read. Returns their number. Raises SourceError (LOCAL)."""
        return self._fill(blob_id, start, into[: end - start])

    def distrust(self, blob_id: str, start: int, end: int) -> bool:
        """See Source: there is nobody else to ask."""
        return False

    async def close(self) -> None:
        """Wait for reads under way and close all files."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self._files.clear()
        self._buffers.clear()

    def _fill(self, blob_id: str, start: int, view: memoryview) -> int:
        file = self._open(blob_id)
        position = 0
        try:
            while position < len(view):
                size = os.preadv(file.fd, [view[position:]], start + position)
                if size == 0:
                    raise self._fault(
                        blob_id, f"has {file.size} bytes, {start + len(view)} are needed"
                    )
                position += size
        except OSError as error:
            raise self._fault(blob_id, str(error.strerror)) from None
        return position

    def _open(self, blob_id: str) -> _File:
        file = self._files.get(blob_id)
        if file is not None:
            return file
        if not _BLOB_ID.fullmatch(blob_id):
            raise SourceError(f"{blob_id[:128]!r} is no id of a blob", Fault.PROTOCOL)
        try:
            file = _File(self._find(blob_id))
        except OSError as error:
            raise self._fault(blob_id, str(error.strerror)) from None
        if file.size < 0:
            raise self._fault(blob_id, "is not a regular file")
        self._files[blob_id] = file
        if len(self._files) > OPEN_FILES_LIMIT:
            self._files.popitem(last=False)
        return file

    def _find(self, blob_id: str) -> Path:
        """Where a blob is: a directory may be there before its blobs are."""
        if self._path.is_file():
            return self._path
        files = [path / blob_id for path in self._paths]
        return next((file for file in files if file.exists()), files[0])

    def _fault(self, blob_id: str, what: str) -> SourceError:
        return SourceError(
            f"{self._path}/{blob_id}: {what}: put the image's blobs there", Fault.LOCAL
        )

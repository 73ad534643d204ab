"""Images on a stand-in kernel with a prefetch service, and a clock that a test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fscached.config import Prefetch
from fscached.prefetch.service import Means, Service
from fscached.prefetch.traces import Traces
from fscached.store import Image
from fscached.transport import ObjectKey
from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, Scene, scene  # noqa: F401

IMAGE = ObjectKey(KEY.volume, "f" * 64)


class Clock:
    """Time goes on when everybody waits for it, and then at once."""

    def __init__(self) -> None:
        self.time_s = 1000.0
        self.slept_s: list[float] = []
        self.held = False
        """Sleepers stay asleep."""

    def now(self) -> float:
        return self.time_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        wakes_s = self.time_s + seconds
        await asyncio.sleep(0)
        while self.held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        self.time_s = max(self.time_s, wakes_s)


class Desk:
    """A prefetch service over a scene, wired as the daemon wires it."""

    def __init__(self, here: Scene, directory: Path, means: dict[str, object], **settings: object):
        self.here = here
        self.clock = Clock()
        self.traces = Traces(directory / "traces")
        self.settings = msgspec.structs.replace(Prefetch(policies=("whole",)), **settings)
        entry = here.remote.entry
        self.image = Image("host/app:1", "", IMAGE.cookie, directory / "none", 4096, (entry,))
        means = {"deadline_s": 60.0, "concurrency": 2, "bandwidth_bytes_per_s": 0} | means
        self.service = Service(Means(**means), self.traces, self.clock)  # type: ignore[arg-type]
        here.objects.on_blob = self.opened

    def opened(self, key, blob) -> None:
        self.service.begin(IMAGE, self.image, self.settings, key.cookie, blob)

    @property
    def report(self):
        return self.service.report(IMAGE, self.settings)

    async def complete(self) -> None:
        """The whole blob is resident; the test's own time limit bounds it."""
        size_bytes = len(self.here.remote.content)
        while self.here.kernel.resident_bytes(KEY) < size_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def close(self) -> None:
        await self.service.close()
        self.here.close()


@pytest.fixture
def desk(scene, tmp_path):  # noqa: F811
    """Make desks; call it inside the running loop, and close what it gives."""

    def make(
        sizes: list[int],
        means: dict[str, object] | None = None,
        limits: dict[str, float] | None = None,
        **settings: object,
    ) -> Desk:
        here = scene(sizes, Compressor.NONE, **(limits or {}))
        return Desk(here, tmp_path, means or {}, **settings)

    return make


Make = Callable[..., Desk]

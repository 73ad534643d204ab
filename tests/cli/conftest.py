"""A daemon's API on a real socket in a thread, and a mount table in place of the kernel's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import pytest

from fscached import config
from fscached.cli import main
from fscached.control import api, http, messages
from fscached.control.state import State
from fscached.prefetch.phase import Phase
from fscached.transport import ObjectKey, mount

FSID = "f" * 64
BLOB = "b" * 64


class StandInService:
    """Stands in for the daemon: registers any image at once, and remembers what happened."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.registered: dict[str, messages.ImageInfo] = {}
        self.credentials: messages.Credentials | None = None
        self.settled = True
        self.files = False
        why = "readers come first"
        self.prefetched = messages.PrefetchStatus(Phase.PAUSED, why, left_bytes=3 << 20, eta_s=64.5)
        self.reports = [self.prefetched]
        self.on_prefetch: Callable[[], None] = lambda: None
        self.cache_files: list[messages.CacheFileInfo] = []
        self.budget_bytes = 0
        self.excess_bytes = 0
        self.repaired: list[messages.RepairFile] = []
        self.repair_error: http.ApiError | None = None
        self.after_pull: Callable[[], None] = lambda: None

    def prefetch(self, fsid: str) -> messages.PrefetchStatus:
        self.happened.append("prefetch")
        self.on_prefetch()
        return self.prefetch_status(fsid)

    def prefetch_status(self, fsid: str) -> messages.PrefetchStatus:
        return self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]

    def images(self) -> list[messages.ImageInfo]:
        return list(self.registered.values())

    async def add_image(
        self, reference: str, credentials: messages.Credentials | None
    ) -> messages.ImageInfo:
        if "absent" in reference:
            raise http.ApiError(HTTPStatus.BAD_GATEWAY, f"{reference}: no such image")
        self.happened.append("add")
        self.credentials = credentials
        image = messages.ImageInfo(
            reference,
            FSID,
            "dom",
            "sha256:00",
            [BLOB],
            self.settled,
            f"/state/images/{FSID}/image.boot",
            [f"/cache/files/dom/{BLOB}"] if self.files else None,
        )
        self.registered[FSID] = image
        self.after_pull()
        return image

    async def remove_image(self, fsid: str) -> bool:
        self.happened.append("remove")
        return self.registered.pop(fsid, None) is not None

    @property
    def cache(self) -> StandInService:
        return self

    async def listing(self) -> messages.CacheListing:
        return messages.CacheListing("/var/cache", 3 << 20, self.budget_bytes, self.cache_files)

    async def collect(self, wanted: messages.CollectGarbage) -> messages.Collected:
        self.happened.append(f"collect {wanted.all_idle} {wanted.dry_run}")
        gone = [messages.CulledFile("dom", BLOB, 2 << 20, "orphan")]
        busy = [messages.CulledFile("dom", "c" * 64, 1 << 20, "")]
        return messages.Collected(gone, busy, 1 << 20, self.excess_bytes)

    async def repair(self, spoiled: messages.RepairFile) -> messages.Repaired:
        if self.repair_error is not None:
            raise self.repair_error
        self.repaired.append(spoiled)
        return messages.Repaired(len(spoiled.offsets), False)

    def status(self) -> messages.Status:
        blob = messages.ObjectStatus(
            BLOB, 3 << 20, None, 5, requests=2, received_bytes=2048, given={"local_peer": 2048}
        )
        boot = messages.ObjectStatus(FSID, 4096, 4096, reads=1, reads_failed=1)
        return messages.Status(
            version="0.1.0",
            git_commit="c" * 40,
            pid=812,
            state=State.RUNNING,
            transport="cachefiles",
            cache_directory="/var/cache",
            uptime_s=3725.0,
            rss_bytes=40 << 20,
            totals=messages.Totals(reads=6, reads_failed=1, requests=2, received_bytes=2048),
            images=[
                messages.ImageStatus(
                    image.reference,
                    image.fsid,
                    "dom",
                    "sha256:00",
                    True,
                    boot,
                    [blob],
                    self.prefetched,
                )
                for image in self.registered.values()
            ],
        )


class StandInMounts:
    """Stands in for the kernel's mount table, which needs root and an on-demand kernel."""

    def __init__(self, happened: list[str]) -> None:
        self.table: list[mount.Mount] = []
        self.gone: frozenset[ObjectKey] = frozenset()
        self.refuse = False
        self._happened = happened

    def mount_fsid(self, target: str, fsid: str, domain_id: str = "") -> None:
        self._happened.append("mount")
        if self.refuse:
            raise mount.MountError(f"mounting {fsid}: I/O error", "see the daemon's log", 5)
        self.table.append(mount.Mount(fsid, domain_id, target, "0:9"))

    def mount_files(self, target: str, bootstrap: str, devices: list[str]) -> None:
        self._happened.append("mount")
        fsid = bootstrap.split("/")[-2]
        self.table.append(mount.Mount(fsid, "", target, "0:9", bootstrap))

    def bind(self, source: str, target: str) -> None:
        self._happened.append("bind")
        [first] = [point for point in self.table if point.target == source]
        self.table.append(first._replace(target=target))

    def unmount(self, target: str, lazy: bool = False) -> None:
        self._happened.append("unmount")
        self.table.remove([point for point in self.table if point.target == target][-1])

    def mounted(self) -> list[mount.Mount]:
        return list(self.table)

    def dead(self) -> frozenset[ObjectKey]:
        return self.gone


@pytest.fixture
def service() -> StandInService:
    """The daemon's stand-in."""
    return StandInService()


@pytest.fixture
def mounts(service: StandInService, monkeypatch: pytest.MonkeyPatch) -> StandInMounts:
    """The mount table's stand-in, in place of the real one."""
    found = StandInMounts(service.happened)
    for name in ("mount_fsid", "mount_files", "bind", "unmount", "mounted", "dead"):
        monkeypatch.setattr(mount, name, getattr(found, name))
    return found


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """A configuration whose runtime directory is the test's."""
    (path := tmp_path / "fscached.toml").write_text(f"[paths]\nruntime_directory = '{tmp_path}'\n")
    return str(path)


@pytest.fixture
def daemon(service: StandInService, config_file: str) -> Iterator[StandInService]:
    """The stand-in's API, on the socket that the configuration names."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    settings = config.load(config_file)
    handler = api.routes(cast(api.Life, None), lambda: cast(api.Service, service))
    server = http.Server(settings.api_socket, handler, settings.api)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
    yield service
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


@pytest.fixture
def fscached(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs one verb with the test's configuration: exit status, standard output and error."""

    def run(verb: str, *words: Any) -> tuple[int, str, str]:
        status = main([verb, *map(str, words), "--config", config_file])
        return status, *capsys.readouterr()

    return run

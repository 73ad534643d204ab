"""The configuration: one frozen tree, read from TOML. Every key has a default, a unit and a limit.
nydusd's own files are read as well (`fscached.nydusd`).

`docs/fscached.toml` is its defaults and descriptions, printed by `fscached.manual`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from fscached import config_text
from fscached.config_source import Mirror as Mirror
from fscached.config_source import Peer as Peer
from fscached.config_source import Proxy as Proxy
from fscached.config_source import Source as Source
from fscached.config_table import ABSOLUTE, ABSOLUTE_OR_EMPTY, GIB, MIB
from fscached.config_table import KIB as KIB
from fscached.config_table import Table as Table
from fscached.config_text import ConfigError

DEFAULT_PATH: Final = Path("/etc/fscached/fscached.toml")

# A name of the kernel's: no slash (it becomes a directory name), no comma (a mount option's end).
_NAME: Final = r"^[A-Za-z0-9_.-]+\Z"
_NAME_OR_EMPTY: Final = r"^[A-Za-z0-9_.-]*\Z"


class Paths(Table, frozen=True):
    """Directories of the daemon; both are made when missing, readable by root alone."""

    runtime_directory: Annotated[
        str, Meta(pattern=ABSOLUTE, description="API socket and locks; lost at reboot.")
    ] = "/run/fscached"
    state_directory: Annotated[
        str, Meta(pattern=ABSOLUTE, description="Verified bootstraps and blob metas.")
    ] = "/var/lib/fscached/state"


class Cache(Table, frozen=True):
    """The kernel's cache. The percentages are of the free blocks and files of its file system."""

    directory: Annotated[
        str,
        Meta(
            pattern=ABSOLUTE,
            description="On ext4, xfs or btrfs: direct I/O, SEEK_HOLE, O_TMPFILE, user xattrs.",
        ),
    ] = "/var/lib/fscached/cache"
    tag: Annotated[
        str,
        Meta(pattern=_NAME, max_length=64, description="The kernel's name for this cache."),
    ] = "fscached"
    domain_id: Annotated[
        str,
        Meta(
            pattern=_NAME_OR_EMPTY,
            max_length=128,
            description="Images of one domain share their blobs (kernel 6.1); empty: no sharing.",
        ),
    ] = "fscached"
    block_run_percent: Annotated[
        int, Meta(ge=0, lt=100, description="More free blocks than this: no culling is wanted.")
    ] = 7
    block_cull_percent: Annotated[
        int, Meta(ge=0, lt=100, description="Fewer free blocks than this: culling is wanted.")
    ] = 5
    block_stop_percent: Annotated[
        int,
        Meta(
            ge=1,
            lt=100,
            description="Fewer free blocks than this: nothing is stored, new reads fail.",
        ),
    ] = 1
    file_run_percent: Annotated[
        int, Meta(ge=0, lt=100, description="More free files than this: no culling is wanted.")
    ] = 7
    file_cull_percent: Annotated[
        int, Meta(ge=0, lt=100, description="Fewer free files than this: culling is wanted.")
    ] = 5
    file_stop_percent: Annotated[
        int,
        Meta(
            ge=1,
            lt=100,
            description="Fewer free files than this: nothing is stored, new mounts fail.",
        ),
    ] = 1
    budget_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 60,
            description="What all cache files together may take of the disk; above it go whole"
            " files that no image needs, those not used for longest first. 0: no budget.",
        ),
    ] = 0
    orphan_age_s: Annotated[
        float,
        Meta(
            ge=0,
            le=31_536_000,
            description="Files of no image that is known are deleted when not used for this long.",
        ),
    ] = 3600.0
    sweep_interval_s: Annotated[
        float, Meta(ge=1, le=86_400, description="Between looks at budget, free space, orphans.")
    ] = 60.0
    images: Annotated[int, Meta(ge=1, le=100_000, description="Images registered at once.")] = 2048
    open_objects: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Objects the kernel may have open at once.")
    ] = 16_384

    def __post_init__(self) -> None:
        # The kernel's own rule: cachefiles_daemon_range_error in fs/cachefiles/daemon.c.
        if not self.block_stop_percent < self.block_cull_percent < self.block_run_percent:
            raise ValueError("Expected block_stop_ < block_cull_ < block_run_percent")
        if not self.file_stop_percent < self.file_cull_percent < self.file_run_percent:
            raise ValueError("Expected file_stop_ < file_cull_ < file_run_percent")


class Kernel(Table, frozen=True):
    """How the kernel asks."""

    device: Annotated[
        str, Meta(pattern=ABSOLUTE, description="The cachefiles device; one opener at a time.")
    ] = "/dev/cachefiles"
    transport: Annotated[
        Literal["auto", "cachefiles", "fanotify"],
        Meta(
            description="cachefiles: EROFS over fscache, Linux 5.19 to 7.1. fanotify: EROFS over"
            " plain files, Linux 6.14 and later. auto: the first the kernel has."
        ),
    ] = "auto"
    unanswered_reads: Annotated[
        int,
        Meta(
            ge=16,
            le=1_000_000,
            description="fanotify: reads that wait at once; more wait in the kernel's queue.",
        ),
    ] = 2048


class Fetch(Table, frozen=True):
    """Misses become ranged reads of a source."""

    window_bytes: Annotated[
        int,
        Meta(
            ge=4 * KIB,
            le=64 * MIB,
            multiple_of=4 * KIB,
            description="The least to fetch around a miss.",
        ),
    ] = 1 * MIB
    window_limit_bytes: Annotated[
        int,
        Meta(
            ge=4 * KIB,
            le=256 * MIB,
            multiple_of=4 * KIB,
            description="The window doubles up to this while access is sequential, or to what"
            " the link brings in 0.5 s.",
        ),
    ] = 8 * MIB
    deadline_s: Annotated[
        float, Meta(gt=0, le=3600, description="A chunk not there after this: its readers get EIO.")
    ] = 30.0
    on_source_outage: Annotated[
        Literal["eio", "wait"],
        Meta(
            description="No source can be reached: readers get EIO as for any other fault, or wait"
            " for one to return."
        ),
    ] = "eio"
    outage_limit_s: Annotated[
        float,
        Meta(
            gt=0,
            le=86_400,
            description="So long, with wait; then EIO. Keep it below the kernel's"
            " hung_task_timeout_secs (fscached doctor compares).",
        ),
    ] = 100.0
    refusal_s: Annotated[
        float,
        Meta(ge=0, le=60, description="A chunk that failed fails at once for this long."),
    ] = 1.0
    workers: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="Threads that decompress, verify and write; 0: one per processor.",
        ),
    ] = 0
    buffer_pool_bytes: Annotated[
        int,
        Meta(ge=16 * MIB, le=64 * GIB, description="Memory for chunks on their way to the cache."),
    ] = 64 * MIB
    verify: Annotated[
        bool, Meta(description="Check every chunk's digest before it is written. Leave it on.")
    ] = True

    def __post_init__(self) -> None:
        if self.window_bytes > self.window_limit_bytes:
            raise ValueError("Expected window_bytes <= window_limit_bytes")
        if self.on_source_outage == "wait" and self.outage_limit_s < self.deadline_s:
            raise ValueError("Expected deadline_s <= outage_limit_s")


class Prefetch(Table, frozen=True):
    """What is brought of a mounted image before anybody asks. Demand counts to the bandwidth."""

    enabled: Annotated[bool, Meta(description="Bring anything before it is asked for.")] = True
    policies: Annotated[
        tuple[Literal["trace", "table", "patterns", "sequential", "whole"], ...],
        Meta(
            max_length=8,
            description="In this order always. trace: what earlier runs read first; table: the"
            " image's own list; patterns: yours; sequential: what follows where somebody reads on;"
            " whole: the rest.",
        ),
    ] = ("trace", "table", "patterns", "sequential", "whole")
    patterns: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^/[^\x00-\x1f]*\Z", max_length=1024)], ...],
        Meta(
            max_length=256,
            description="Paths in images, a directory for all below it; * ? [] within a name, **"
            " for any number of directories.",
        ),
    ] = ()
    range_bytes: Annotated[
        int,
        Meta(ge=64 * KIB, le=1 * GIB, multiple_of=4 * KIB, description="Of one request."),
    ] = 4 * MIB
    ahead_bytes: Annotated[
        int,
        Meta(ge=64 * KIB, le=1 * GIB, description="How far sequential is ahead of a reader."),
    ] = 16 * MIB
    threads: Annotated[
        int,
        Meta(ge=0, le=1024, description="Requests at once for one image; 0: as many as may be."),
    ] = 0
    bandwidth_bytes_per_s: Annotated[
        int, Meta(ge=0, le=1 << 40, description="Of all images together; 0: no limit.")
    ] = 0
    image_bandwidth_bytes_per_s: Annotated[
        int, Meta(ge=0, le=1 << 40, description="Of one image; 0: no limit.")
    ] = 0
    quiet_s: Annotated[
        float,
        Meta(
            ge=0,
            le=60,
            description="On a slow link: no demand for this long before prefetch goes on.",
        ),
    ] = 0.02
    disk_margin_percent: Annotated[
        int,
        Meta(
            ge=0,
            le=99,
            description="Prefetch stops this much above the cache's block_stop_percent.",
        ),
    ] = 3
    record: Annotated[
        bool, Meta(description="Keep what each run of an image reads first, for the next one.")
    ] = True
    record_s: Annotated[
        float, Meta(ge=1, le=366 * 86_400, description="After an image's first READ no longer.")
    ] = 3600.0


class Api(Table, frozen=True):
    """The control API: HTTP on a unix socket, for root alone."""

    socket: Annotated[
        str,
        Meta(
            pattern=ABSOLUTE_OR_EMPTY,
            max_length=100,
            description="Empty: api.sock in the runtime directory.",
        ),
    ] = ""
    header_limit_bytes: Annotated[
        int, Meta(ge=1 * KIB, le=1 * MIB, description="Request line and headers.")
    ] = 16 * KIB
    body_limit_bytes: Annotated[
        int, Meta(ge=4 * KIB, le=64 * MIB, description="Of a request; a trace has up to 16 MiB.")
    ] = 16 * MIB
    connections: Annotated[
        int, Meta(ge=1, le=65_536, description="At once; a silent one is never closed.")
    ] = 256


class Log(Table, frozen=True):
    """One line per event, key=value."""

    level: Annotated[
        Literal["off", "error", "warn", "info", "debug", "trace"],
        Meta(description="This and worse."),
    ] = "info"
    file: Annotated[str, Meta(pattern=ABSOLUTE_OR_EMPTY, description="Empty: standard error.")] = ""
    rotate_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 50,
            description="A file that would become larger is put aside as FILE.1; 0: never, and a"
            " file that others move is opened anew.",
        ),
    ] = 0
    rotated_files: Annotated[
        int, Meta(ge=1, le=1000, description="How many are kept beside it.")
    ] = 5
    slow_read_s: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="A READ that took longer has a line that says what it waited for; 0: none.",
        ),
    ] = 1.0


class Config(Table, frozen=True):
    """The whole configuration."""

    paths: Paths = Paths()
    cache: Cache = Cache()
    kernel: Kernel = Kernel()
    fetch: Fetch = Fetch()
    source: Source = Source()
    prefetch: Prefetch = Prefetch()
    api: Api = Api()
    log: Log = Log()
    ignored: tuple[str, ...] = ()
    """Keys of nydusd's file that are nothing here; none of ours."""

    @property
    def api_socket(self) -> str:
        """Path of the control API's socket."""
        return self.api.socket or os.path.join(self.paths.runtime_directory, "api.sock")

    @property
    def fetch_workers(self) -> int:
        """How many worker threads, with 0 resolved: one per processor this process may use."""
        return self.fetch.workers or len(os.sched_getaffinity(0))


TABLES: Final[dict[str, type[Table]]] = {
    field.name: field.type
    for field in msgspec.structs.fields(Config)
    if isinstance(field.type, type) and issubclass(field.type, Table)
}


def load(path: str | os.PathLike[str] | None = None) -> Config:
    """Read the configuration. Without a path: DEFAULT_PATH if it exists, else the defaults.

    Raises ConfigError.
    """
    if path is None:
        if not DEFAULT_PATH.exists():
            return Config()
        path = DEFAULT_PATH
    return parse(config_text.read(path), str(path))


def parse(text: str, origin: str) -> Config:
    """The configuration in a text: our TOML, or nydusd's JSON or TOML. `origin` is its name in
    errors. Raises ConfigError."""
    raw = config_text.decode(text, origin)
    if config_text.is_json(text) or "version" in raw:
        from fscached import nydusd  # few daemons read one

        found = nydusd.translate(raw, origin)
        config = _convert(found.tables, origin, found.origins)
        return msgspec.structs.replace(config, ignored=tuple(found.ignored))
    config_text.refuse_unknown(raw, TABLES, origin)
    return _convert(raw, origin, {})


def _convert(raw: dict[str, Any], origin: str, names: Mapping[str, str]) -> Config:
    """`names` are what keys are called in the file, where that is not our name."""
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        path = path.strip(".`")
        place = names.get(path.partition("[")[0]) or config_text.place(path)
        remedy = config_text.what_would_do(path, TABLES)
        raise ConfigError(f"{place}: {what}", remedy, where=origin) from None

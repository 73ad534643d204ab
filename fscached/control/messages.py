"""What goes over the control API: one struct per request and reply, shared by daemon and client."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fscached import __version__, version
from fscached.control.state import State
from fscached.prefetch.phase import Phase

REFERENCE_PATTERN: Final = (
    r"^[A-Za-z0-9\[][A-Za-z0-9._:/\[\]-]*(@[A-Za-z0-9_+.-]+:[0-9a-fA-F]{32,})?\Z"
)
"""Characters of an image reference (docker's grammar, IPv6 hosts too); no place for a user name.
Whoever resolves it checks the rest."""


class Version(msgspec.Struct, frozen=True):
    """nydusd's `version` object; its Go client needs a string in each."""

    package_ver: str = __version__
    git_commit: str = version.COMMIT
    build_time: str = ""
    profile: str = version.PROFILE
    rustc: str = f"none ({version.PYTHON})"


class DaemonInfo(msgspec.Struct, frozen=True):
    """Reply of `GET /api/v1/daemon`."""

    state: State
    id: str | None = None
    supervisor: str | None = None
    version: Version = Version()
    backend_collection: None = None


class LogLevel(msgspec.Struct, frozen=True):
    """Body of `PUT /api/v1/daemon`."""

    log_level: str


class Events(msgspec.Struct, frozen=True):
    """Reply of `GET /api/v1/daemon/events`: the last errors. Sizes are in characters."""

    max_errors: int
    total_errors: int
    max_size: int
    total_size: int
    errors: list[str]


class Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who pulls an image; kept in memory and with the supervisor, never on a disk."""

    username: Annotated[str, Meta(max_length=1024)]
    password: Annotated[str, Meta(max_length=65_536)]

    def __repr__(self) -> str:
        return "Credentials(***)"


class RegistryAuth(msgspec.Struct, frozen=True):
    """Body of `PUT /api/v1/config`: base64 of user:password."""

    registry_auth: Annotated[str, Meta(max_length=100_000)]

    def __repr__(self) -> str:
        return "RegistryAuth(***)"


class AddImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /api/v2/images`."""

    reference: Annotated[str, Meta(min_length=1, max_length=1024, pattern=REFERENCE_PATTERN)]
    credentials: Credentials | None = None


class ImageInfo(msgspec.Struct, frozen=True):
    """A registered image. Mount it with `fsid` and, when not empty, `domain_id`; or, when there are
    `devices`, mount the file `bootstrap` with these, in this order.

    `settled` is false while a cache file of it may still be an unlinked temporary file, which a
    crash of the host would lose: mount, umount and mount again.
    """

    reference: str
    fsid: str
    domain_id: str
    manifest_digest: str
    blobs: list[str]
    settled: bool
    bootstrap: str = ""
    devices: list[str] | None = None


class PrefetchStatus(msgspec.Struct, frozen=True):
    """How the prefetch of an image goes on, since it was mounted: see `fscached.prefetch.job`.

    `why` says more about a phase that is not running; `left_bytes` of cache files are to come (an
    upper bound where only part of the image is wanted), which takes `eta_s` at the present speed,
    None when nobody can say.
    """

    phase: Phase
    why: str = ""
    requests: int = 0
    brought_bytes: int = 0
    left_bytes: int = 0
    bytes_per_s: float = 0.0
    eta_s: float | None = None


class ImageOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /api/v2/prefetch`: bring all of a mounted image."""

    fsid: Annotated[str, Meta(min_length=1, max_length=200)]


class LatencyCounts(msgspec.Struct, frozen=True):
    """How often something took at most as long as each of `fscached.fill.tally.LATENCIES_S`, or
    longer than all, and all seconds together."""

    counts: tuple[int, ...] = (0,) * 8
    seconds: float = 0.0


class SourceStatus(msgspec.Struct, frozen=True):
    """What was read of one source since the daemon started. `by_size`: ranges that came, by the
    bounds of `fscached.fill.tally.SIZES_BYTES`."""

    requests: int = 0
    received_bytes: int = 0
    failures: int = 0
    by_size: tuple[LatencyCounts, ...] = (LatencyCounts(),) * 8


class ObjectStatus(msgspec.Struct, frozen=True):
    """One object of the kernel: a bootstrap or a blob. Counts are since the daemon started.

    `resident_bytes` is None until the kernel has said what it holds, `in_flight_bytes` are on their
    way for readers or prefetch; `requests` are HTTP requests sent for it, `received_bytes` their
    bodies' bytes, `given` the useful ones by who gave them
    (`fscached.source.Giver`).
    """

    id: str
    size_bytes: int
    resident_bytes: int | None = None
    reads: int = 0
    reads_failed: int = 0
    requests: int = 0
    received_bytes: int = 0
    bad_chunks: int = 0
    given: dict[str, int] = {}
    in_flight_bytes: int = 0


class DemandStatus(msgspec.Struct, frozen=True):
    """How READs fared and what was asked for them, since the daemon started. For `hits` the bytes
    had come meanwhile, for `joined` they were on their way, for `misses` something was asked for.
    `latencies` are of all of them; `sources` are by name, prefetch's ranges among them."""

    hits: int = 0
    joined: int = 0
    misses: int = 0
    failed: int = 0
    latencies: LatencyCounts = LatencyCounts()
    sources: dict[str, SourceStatus] = {}


class ImageStatus(msgspec.Struct, frozen=True):
    """An image and its objects. A blob that images share is counted in each of them."""

    reference: str
    fsid: str
    domain_id: str
    manifest_digest: str
    settled: bool
    bootstrap: ObjectStatus
    blobs: list[ObjectStatus]
    prefetch: PrefetchStatus = PrefetchStatus(Phase.OFF)
    last_demand_s: float = 0.0
    """From its binding here (again, after a restart) to the last time that a reader had to wait for
    something to be fetched; 0: never."""
    demand: DemandStatus = DemandStatus()


class Totals(msgspec.Struct, frozen=True):
    """Counts of the whole daemon since it started; every READ and request exactly once."""

    opens: int = 0
    closes: int = 0
    open_objects: int = 0
    reads: int = 0
    reads_waiting: int = 0
    reads_failed: int = 0
    reads_slow: int = 0
    requests: int = 0
    received_bytes: int = 0
    written_bytes: int = 0
    bad_chunks: int = 0
    prefetches_stopped: int = 0
    source_errors: int = 0


class CacheStatus(msgspec.Struct, frozen=True):
    """What the cache takes of the disk, as the last look found it, and what was deleted since the
    daemon started. `budget_bytes` 0 is none; `excess_bytes` are too much and in use;
    `culls_waiting` are cookies whose files are deleted when nobody has them in use."""

    used_bytes: int = 0
    budget_bytes: int = 0
    excess_bytes: int = 0
    files: int = 0
    culled_files: int = 0
    culled_bytes: int = 0
    culls_waiting: int = 0


class CacheFileInfo(msgspec.Struct, frozen=True):
    """One cache file. `state`: `bound` (an image that is bound needs it), `idle` (an image that was
    pulled here does, and may be mounted again) or `orphan`. An empty `path`: it has no name before
    its first CLOSE. `images` are references, or fsids of images that a snapshotter bound;
    `bootstrap` is the file of one of them. `used_s`: seconds since 1970."""

    volume: str
    cookie: str
    kind: Literal["bootstrap", "blob", ""]
    state: Literal["bound", "idle", "orphan"]
    open: bool
    size_bytes: int
    allocated_bytes: int
    used_s: float
    path: str
    images: list[str]
    bootstrap: str = ""


class CacheListing(msgspec.Struct, frozen=True):
    """Reply of `GET /api/v2/cache`: all cache files, those used last first."""

    directory: str
    used_bytes: int
    budget_bytes: int
    files: list[CacheFileInfo]


class CollectGarbage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /api/v2/cache/gc`. `all_idle`: everything that no bound image needs, not only
    orphans and what is over the budget. `dry_run`: only say what would go."""

    all_idle: bool = False
    dry_run: bool = False


class CulledFile(msgspec.Struct, frozen=True):
    """A cache file that is gone. `why`: `asked for`, `orphan` or `budget`."""

    volume: str
    cookie: str
    allocated_bytes: int
    why: str


class RepairFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /api/v2/cache/repair`: bytes of a cache file that are wrong, by the offset of
    their chunk."""

    volume: str
    cookie: str
    offsets: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1_000_000)]


class Repaired(msgspec.Struct, frozen=True):
    """Its reply. Of a file that is open `chunks` were fetched again; any other is `culled`, whole,
    and fetched when it is read."""

    chunks: int
    culled: bool


class Collected(msgspec.Struct, frozen=True):
    """Reply of `PUT /api/v2/cache/gc`. `busy` files stay: somebody has them open."""

    culled: list[CulledFile]
    busy: list[CulledFile]
    used_bytes: int
    excess_bytes: int


class Status(msgspec.Struct, frozen=True):
    """Reply of `GET /api/v2/status`: what `fscached status` prints. `given` are all bytes of blobs
    by who gave them."""

    version: str
    git_commit: str
    pid: int
    state: State
    transport: str
    cache_directory: str
    uptime_s: float
    rss_bytes: int
    totals: Totals
    images: list[ImageStatus]
    given: dict[str, int] = {}
    cache: CacheStatus = CacheStatus()
    demand: DemandStatus = DemandStatus()


class KnownTrace(msgspec.Struct, frozen=True):
    """Reply of `GET /api/v2/traces`: what was read of an image, as `fscached.prefetch.trace` has it
    in a file; `bootstrap` is where its names can be looked up."""

    fsid: str
    reference: str
    bootstrap: str
    trace: msgspec.Raw


class RecordTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /api/v2/traces/record`: a new run of an image (reference or fsid) begins."""

    image: Annotated[str, Meta(min_length=1, max_length=1024)]
    prefetch: bool = False


class Recorded(msgspec.Struct, frozen=True):
    """Reply to it. What is resident may be read unseen."""

    fsid: str
    reference: str
    resident_bytes: int


class ErrorBody(msgspec.Struct, frozen=True):
    """Body of every reply that is not a success."""

    code: str
    message: str

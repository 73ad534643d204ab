"""The control API's routes: nydusd's paths where nydusd has one, our own beside them in /api/v2.

Statuses are nydusd's: 400 for what was asked wrongly (a wrong method too), 404 for no such path or
metric, 501 for what a daemon without a FUSE file system does not do, 500 for the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, Protocol, TypeVar

import msgspec

from fscached import log
from fscached.control import entry, metrics, nydusd_metrics
from fscached.control.http import ApiError, Handler, Reply, Request
from fscached.control.messages import (
    AddImage,
    CacheListing,
    Collected,
    CollectGarbage,
    Credentials,
    DaemonInfo,
    Events,
    ImageInfo,
    ImageOrder,
    ImageStatus,
    KnownTrace,
    LogLevel,
    PrefetchStatus,
    Recorded,
    RecordTrace,
    RegistryAuth,
    Repaired,
    RepairFile,
    Status,
)
from fscached.control.state import WrongState
from fscached.malformed import MALFORMED
from fscached.source import SourceError

ENTRY_NOT_FOUND: Final = "blob_cache: cache entry not found"
"""nydus-snapshotter looks for exactly this in the message to tell a harmless failed unbind."""

NOT_A_FUSE_DAEMON: Final = "Unsupported: fscached serves images by fsid, not by mount point"

_T = TypeVar("_T")
_Route = TypeVar("_Route")


class Traces(Protocol):
    """What the routes need to know of how images are read. `image` is a reference or an fsid."""

    async def known(self, image: str, *, run: bool) -> KnownTrace:
        """What all runs read, or only the one that goes on. ApiError 404 when there is none."""
        ...

    async def adopt(self, body: bytes) -> None:
        """Take over a trace. ApiError 400 when it is none."""
        ...

    async def record(self, wanted: RecordTrace) -> Recorded:
        """Begin a new run. ApiError 404 for an unknown image, 409 for one that is not mounted or
        not recorded."""
        ...

    async def forget(self, image: str) -> None:
        """Forget earlier runs. ApiError 404 when nothing was known."""
        ...


class Life(Protocol):
    """The states of the daemon. Everything is called on the event loop, and may raise what a
    Service may."""

    def info(self) -> DaemonInfo:
        """Who is this, and in which state."""
        ...

    async def take_over(self) -> None:
        """INIT becomes READY."""
        ...

    async def start(self) -> None:
        """READY becomes RUNNING."""
        ...

    async def send_fd(self) -> None:
        """Leave what a successor needs with the supervisor; nothing without one."""
        ...

    async def exit(self) -> None:
        """Stop reading the device before this returns; end after the reply has gone out."""
        ...


class Cache(Protocol):
    """The cache files. Everything is called on the event loop, and may raise what a Service may."""

    def cull(self, blob_id: str) -> None:
        """Have the files of a blob or bootstrap deleted as soon as nobody needs them. Nothing found
        is no error."""
        ...

    async def listing(self) -> CacheListing:
        """All files."""
        ...

    async def collect(self, wanted: CollectGarbage) -> Collected:
        """Delete what need not be there."""
        ...

    async def repair(self, spoiled: RepairFile) -> Repaired:
        """Have what is wrong in a file fetched again. ApiError 409: it is in use, and its chunks
        cannot be replaced."""
        ...


class Service(Protocol):
    """What the daemon does for people and tools. Everything is called on the event loop.

    Any method may raise ApiError for what it refuses (with the status to answer), WrongState
    (400) or SourceError (502); anything else is a bug and becomes 500 with the trace in the log.
    """

    @property
    def traces(self) -> Traces:
        """Whoever knows how images are read."""
        ...

    @property
    def cache(self) -> Cache:
        """What lies on the disk."""
        ...

    def status(self) -> Status:
        """Everything that is counted."""
        ...

    async def bind_blob_entry(self, entry: entry.BlobEntry) -> None:
        """Register a bootstrap that is on the local disk, with the source of its blobs. The same
        entry again is no error; only credentials and sources are taken over from it."""
        ...

    async def update_auth(self, name: str, auth: str) -> bool:
        """Other credentials (base64 of user:password) for the images of that name, from now on.
        False when there is none."""
        ...

    async def unbind(self, domain_id: str, blob_id: str) -> bool:
        """Forget an entry, or with an empty `blob_id` all entries of the domain. Open objects
        keep working. False when there was none."""
        ...

    async def add_image(self, reference: str, credentials: Credentials | None) -> ImageInfo:
        """Pull manifest and bootstrap, register; the same image again is no error."""
        ...

    def prefetch(self, fsid: str) -> PrefetchStatus:
        """Bring all of an image that is mounted, whatever its settings (404: not known, 409: not
        mounted)."""
        ...

    def prefetch_status(self, fsid: str) -> PrefetchStatus:
        """How that goes on (404)."""
        ...

    def images(self) -> list[ImageInfo]:
        """All registered images."""
        ...

    async def remove_image(self, fsid: str) -> bool:
        """Forget an image. It comes right after the last umount, so CLOSEs of its objects may
        still be on their way: open objects keep working. False when there was none."""
        ...


def routes(life: Life, service: Callable[[], Service | None]) -> Handler:
    """The handler of a `http.Server` that gives every request to `life` or to `service`, which is
    None in all states but RUNNING."""

    async def handle(request: Request) -> Reply:
        if (methods := LIFE.get(request.path)) is not None:
            return await _route(methods, request)(life, request)
        if (others := ROUTES.get(request.path)) is None:
            raise ApiError(HTTPStatus.NOT_FOUND, f"NoRoute: there is no {request.path}")
        route = _route(others, request)
        if (present := service()) is None:
            state = life.info().state
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, f"NotReady: the daemon is {state}")
        return await route(present, request)

    async def answer(request: Request) -> Reply:
        try:
            return await handle(request)
        except WrongState as error:
            raise _bad(f"Configure(DaemonAbnormal({error}))") from None
        except SourceError as error:
            raise ApiError(HTTPStatus.BAD_GATEWAY, str(error)) from error

    return answer


def _route(methods: Mapping[str, _Route], request: Request) -> _Route:
    if request.method not in methods:
        raise _bad(f"BadRequest: {request.path} takes {', '.join(methods)}")
    return methods[request.method]


async def _info(life: Life, request: Request) -> Reply:
    return _json(life.info())


async def _configure(life: Life, request: Request) -> Reply:
    wanted = _parsed(request, LogLevel)
    try:
        log.set_level(wanted.log_level)
    except ValueError as error:
        raise _bad(f"BadRequest: {error}") from None
    return Reply()


async def _events(life: Life, request: Request) -> Reply:
    errors = log.recent_errors
    lines = list(errors.lines)
    return _json(
        Events(
            max_errors=errors.MAX_ERRORS,
            total_errors=errors.total_errors,
            max_size=errors.MAX_ERRORS * errors.MAX_LINE_CHARACTERS,
            total_size=sum(map(len, lines)),
            errors=lines,
        )
    )


def _turn(what: Callable[[Life], Awaitable[None]]) -> Callable[[Life, Request], Awaitable[Reply]]:
    """A route without a body, there and back."""

    async def route(life: Life, request: Request) -> Reply:
        _no_body(request)
        await what(life)
        return Reply()

    return route


async def _bind(service: Service, request: Request) -> Reply:
    try:
        found = entry.parse(request.body)
    except entry.InvalidEntry as error:
        raise _bad(f"BadRequest: {error}") from None
    await service.bind_blob_entry(found)
    return Reply()


async def _unbind(service: Service, request: Request) -> Reply:
    domain_id, blob_id = request.query.get("domain_id", ""), request.query.get("blob_id", "")
    if not domain_id and not blob_id:
        raise _bad("QueryString: give domain_id, blob_id, or both")
    if not domain_id:
        service.cache.cull(blob_id)
    elif not await service.unbind(domain_id, blob_id) and blob_id:
        raise ApiError(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            f"DeleteBlobObject(DaemonAbnormal({ENTRY_NOT_FOUND}: {domain_id}/{blob_id}))",
        )
    return Reply()


async def _bound(service: Service, request: Request) -> Reply:
    domain_id, blob_id = request.query.get("domain_id", ""), request.query.get("blob_id", "")
    return _json(
        [
            image
            for image in service.images()
            if domain_id in ("", image.domain_id) and blob_id in ("", image.fsid, *image.blobs)
        ]
    )


async def _renew(service: Service, request: Request) -> Reply:
    wanted, name = _parsed(request, RegistryAuth), _queried(request, "id").removeprefix("/")
    if not await service.update_auth(name, wanted.registry_auth):
        raise ApiError(HTTPStatus.NOT_FOUND, f"NotFound: no image with id {name}")
    return Reply()


async def _renewable(service: Service, request: Request) -> Reply:
    """What `_renew` may be asked for; what is in use now is nobody's business."""
    _image(service.status(), request)
    return _json({"registry_auth": None})


async def _backend_metrics(service: Service, request: Request) -> Reply:
    return _json(nydusd_metrics.backend(_image(service.status(), request)))


async def _blobcache_metrics(service: Service, request: Request) -> Reply:
    status = service.status()
    return _json(nydusd_metrics.blobcache(_image(status, request), status.cache_directory))


async def _file_system_metrics(service: Service, request: Request) -> Reply:
    """The snapshotter's system controller asks without an id for what it tells of a daemon."""
    status = service.status()
    if not request.query.get("id", ""):
        return _json(nydusd_metrics.file_system(status, status.demand))
    image = _image(status, request)
    return _json(nydusd_metrics.file_system(status, image.demand, image.fsid))


async def _fuse_metrics(service: Service, request: Request) -> Reply:
    raise ApiError(HTTPStatus.NOT_FOUND, "NotFound: no FUSE file system here, see GET /metrics")


async def _unsupported(service: Service, request: Request) -> Reply:
    raise ApiError(HTTPStatus.NOT_IMPLEMENTED, NOT_A_FUSE_DAEMON)


async def _add_image(service: Service, request: Request) -> Reply:
    wanted = _parsed(request, AddImage)
    return _json(await service.add_image(wanted.reference, wanted.credentials))


async def _images(service: Service, request: Request) -> Reply:
    return _json(service.images())


async def _remove_image(service: Service, request: Request) -> Reply:
    fsid = _queried(request, "fsid")
    if not await service.remove_image(fsid):
        raise ApiError(HTTPStatus.NOT_FOUND, f"NotFound: no image with fsid {fsid}")
    return Reply()


async def _order_prefetch(service: Service, request: Request) -> Reply:
    return _json(service.prefetch(_parsed(request, ImageOrder).fsid))


async def _prefetch_status(service: Service, request: Request) -> Reply:
    return _json(service.prefetch_status(_queried(request, "fsid")))


async def _trace(service: Service, request: Request) -> Reply:
    run = request.query.get("run", "false")
    if run not in ("true", "false"):
        raise _bad(f"QueryString: run is true or false, not {run[:80]!r}")
    return _json(await service.traces.known(_queried(request, "image"), run=run == "true"))


async def _adopt_trace(service: Service, request: Request) -> Reply:
    await service.traces.adopt(request.body)
    return Reply()


async def _forget_trace(service: Service, request: Request) -> Reply:
    await service.traces.forget(_queried(request, "image"))
    return Reply()


async def _record_trace(service: Service, request: Request) -> Reply:
    return _json(await service.traces.record(_parsed(request, RecordTrace)))


async def _cache(service: Service, request: Request) -> Reply:
    return _json(await service.cache.listing())


async def _collect(service: Service, request: Request) -> Reply:
    return _json(await service.cache.collect(_parsed(request, CollectGarbage)))


async def _repair(service: Service, request: Request) -> Reply:
    return _json(await service.cache.repair(_parsed(request, RepairFile)))


async def _status(service: Service, request: Request) -> Reply:
    return _json(service.status())


async def _prometheus(service: Service, request: Request) -> Reply:
    return Reply(metrics.prometheus(service.status()), metrics.PROMETHEUS)


LIFE: Final[Mapping[str, Mapping[str, Callable[[Life, Request], Awaitable[Reply]]]]] = {
    "/api/v1/daemon": {"GET": _info, "PUT": _configure},
    "/api/v1/daemon/events": {"GET": _events},
    "/api/v1/daemon/start": {"PUT": _turn(lambda life: life.start())},
    "/api/v1/daemon/exit": {"PUT": _turn(lambda life: life.exit())},
    "/api/v1/daemon/fuse/sendfd": {"PUT": _turn(lambda life: life.send_fd())},
    "/api/v1/daemon/fuse/takeover": {"PUT": _turn(lambda life: life.take_over())},
    "/api/v2/daemon": {"GET": _info, "PUT": _configure},
}
"""What can be asked in every state."""

Route = Callable[[Service, Request], Awaitable[Reply]]

ROUTES: Final[Mapping[str, Mapping[str, Route]]] = {
    "/api/v1/daemon/backend": {"GET": _unsupported},
    "/api/v1/config": {"GET": _renewable, "PUT": _renew},
    "/api/v1/mount": {"POST": _unsupported, "PUT": _unsupported, "DELETE": _unsupported},
    "/api/v1/metrics": {"GET": _file_system_metrics},
    "/api/v1/metrics/files": {"GET": _fuse_metrics},
    "/api/v1/metrics/pattern": {"GET": _fuse_metrics},
    "/api/v1/metrics/inflight": {"GET": _unsupported},
    "/api/v1/metrics/backend": {"GET": _backend_metrics},
    "/api/v1/metrics/blobcache": {"GET": _blobcache_metrics},
    "/api/v2/blobs": {"GET": _bound, "PUT": _bind, "DELETE": _unbind},
    "/api/v2/images": {"GET": _images, "PUT": _add_image, "DELETE": _remove_image},
    "/api/v2/prefetch": {"GET": _prefetch_status, "PUT": _order_prefetch},
    "/api/v2/cache": {"GET": _cache},
    "/api/v2/cache/gc": {"PUT": _collect},
    "/api/v2/cache/repair": {"PUT": _repair},
    "/api/v2/status": {"GET": _status},
    "/api/v2/traces": {"GET": _trace, "PUT": _adopt_trace, "DELETE": _forget_trace},
    "/api/v2/traces/record": {"PUT": _record_trace},
    "/metrics": {"GET": _prometheus},
}


def _image(status: Status, request: Request) -> ImageStatus:
    """The image `id` names, or the only one. The snapshotter puts a slash before the id."""
    fsid = request.query.get("id", "").removeprefix("/")
    found = [image for image in status.images if fsid in ("", image.fsid)]
    if len(found) != 1:
        what = f"no image with id {fsid}" if fsid else f"{len(found)} images: give id=<fsid>"
        raise ApiError(HTTPStatus.NOT_FOUND, f"NotFound: {what}")
    return found[0]


def _json(value: Any) -> Reply:
    return Reply(msgspec.json.encode(value))


def _parsed(request: Request, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(request.body, type=kind)
    except MALFORMED as error:
        raise _bad(f"ParseBody({error})") from None


def _queried(request: Request, name: str) -> str:
    if not (value := request.query.get(name, "")):
        raise _bad(f"QueryString: {name} is missing")
    return value


def _no_body(request: Request) -> None:
    if request.body:
        raise _bad(f"BadRequest: {request.method} {request.path} takes no body")


def _bad(message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message)

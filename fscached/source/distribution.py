"""Manifests and whole small blobs of OCI registries, pulled and pushed (distribution spec 1.1)."""

from __future__ import annotations

import asyncio
import hashlib
import platform
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, BinaryIO, Final, NamedTuple, TypeVar

import msgspec

from fscached.malformed import MALFORMED
from fscached.source import Fault, Refusal, SourceError
from fscached.source.auth import Authorization, Keychain, Tokens
from fscached.source.exchange import Exchange, Response
from fscached.source.origin import Traffic, origin_of, scheme_of
from fscached.source.patience import RETRIED_STATUSES, Busy, Patience, retry_after_s
from fscached.source.redirect import REDIRECT_STATUSES, Route, follow
from fscached.source.reference import Reference

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES: Final = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
# What nydusify puts in `os.features` of an index's entry for the image in RAFS.
NYDUS_FEATURE: Final = "nydus.remoteimage.v1"

_ANSWER_LIMIT_BYTES: Final = 64 << 10
_PIECE_BYTES: Final = 1 << 20
_REFUSALS_LIMIT: Final = 2
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}

T = TypeVar("T")


class Manifest(NamedTuple):
    """`digest` is that of `body`, whose bytes were checked against it."""

    media_type: str
    digest: str
    body: bytes


class Platform(msgspec.Struct, rename={"os_features": "os.features"}):
    """Of an index's entry."""

    os: str = ""
    architecture: str = ""
    os_features: list[str] = []


class Descriptor(msgspec.Struct, rename={"media_type": "mediaType"}):
    """An index's entry."""

    digest: str
    media_type: str = ""
    platform: Platform | None = None


class Document(msgspec.Struct, rename={"media_type": "mediaType"}):
    """What manifests and indexes have in common."""

    media_type: str = ""
    manifests: list[Descriptor] | None = None
    layers: list[dict[str, Any]] | None = None


class Distribution:
    """Registries, for everything but ranges of blobs. Registries named in `insecure`
    (`host[:port]`) are spoken to by http; each request is tried as `patience` has it."""

    def __init__(
        self,
        *,
        exchange: Exchange,
        tokens: Tokens,
        keychain: Keychain,
        insecure: Collection[str] = (),
        patience: Patience,
        manifest_limit_bytes: int,
        traffic: Traffic | None = None,
    ) -> None:
        self.traffic = traffic if traffic is not None else Traffic()
        self._exchange = exchange
        self._tokens = tokens
        self._keychain = keychain
        self._insecure = frozenset(insecure)
        self._patience = patience
        self._manifest_limit_bytes = manifest_limit_bytes
        self._authorizations: dict[tuple[str, str, str], Authorization] = {}

    async def pull_manifest(self, reference: Reference, architecture: str = "") -> Manifest:
        """The image's manifest. Of an index, the entry for linux and `architecture` (this
        machine's by default), the one in RAFS before the others.

        Raises SourceError: PROTOCOL when it is not what its digest says, or no manifest.
        """
        manifest = await self._pull_manifest(reference, reference.name)
        if manifest.media_type not in INDEXES:
            return manifest
        machine = platform.machine()
        wanted = architecture or _ARCHITECTURES.get(machine, machine)
        entry = _choose(reference, manifest, wanted)
        manifest = await self._pull_manifest(reference, entry)
        if manifest.media_type in INDEXES:
            raise SourceError(f"{reference}: an index within an index", Fault.PROTOCOL)
        return manifest

    async def pull_blob(self, reference: Reference, digest: str, limit_bytes: int) -> bytes:
        """A whole blob of the reference's repository, checked against its digest.

        Raises SourceError: PROTOCOL when it is longer than `limit_bytes` or has another digest.
        """
        url = f"{self._base(reference)}/blobs/{_checked(reference, digest)}"
        response = await self._get(reference, url, {}, limit_bytes)
        found = await asyncio.to_thread(_digest_of, response.body)
        if found != digest:
            raise SourceError(f"{reference}: blob {digest} came as {found}", Fault.PROTOCOL)
        return response.body

    async def require_blob(self, reference: Reference, digest: str) -> None:
        """Ask whether the reference's repository has a blob and lets us have it.

        Raises SourceError: Refusal when it has not, or does not.
        """
        url = f"{self._base(reference)}/blobs/{_checked(reference, digest)}"

        async def ask() -> None:
            # Where a redirect leads only what it was made for is answered, and that is a GET.
            answer = await self._send(reference, "HEAD", url, follows=False)
            if answer.status not in REDIRECT_STATUSES:
                _expect(answer, 200, f"blob {digest}")

        await self._patiently(reference, ask)

    async def push_blob(
        self, reference: Reference, digest: str, size: int, open_reader: Callable[[], BinaryIO]
    ) -> None:
        """Upload a blob of `size` bytes that `open_reader` opens for each try, if it is not there.

        Raises SourceError.
        """
        there = f"{self._base(reference)}/blobs/{_checked(reference, digest)}"

        async def upload() -> None:
            if (await self._send(reference, "HEAD", there)).status == 200:
                return
            begin = f"{self._base(reference)}/blobs/uploads/"
            begun = await self._send(reference, "POST", begin, push=True)
            _expect(begun, 202, "the beginning of an upload")
            home = Route(begin, origin_of(begin), 0, float("inf"))
            location = follow(home, begun.headers.get("location", ""), 0, 0).url
            ended = await self._send(
                reference,
                "PUT",
                f"{location}{'&' if '?' in location else '?'}digest={digest}",
                headers={
                    "Content-Length": str(size),
                    "Content-Type": "application/octet-stream",
                },
                content=lambda: _pieces(open_reader, size),
                push=True,
            )
            _expect(ended, 201, f"blob {digest}")

        await self._patiently(reference, upload)

    async def push_manifest(self, reference: Reference, media_type: str, body: bytes) -> str:
        """Upload a manifest under the reference's name; returns its digest. Raises SourceError."""
        url = f"{self._base(reference)}/manifests/{reference.name}"

        async def upload() -> None:
            headers = {"Content-Type": media_type}
            ended = await self._send(
                reference, "PUT", url, headers=headers, content=lambda: body, push=True
            )
            _expect(ended, 201, f"manifest {reference.name}")

        await self._patiently(reference, upload)
        return _digest_of(body)

    async def ping(self, reference: Reference) -> None:
        """Ask the reference's registry, once, whether it is one. Raises SourceError."""
        url = f"{self._registry(reference)}/v2/"
        response = await self._exchange.send(
            "GET", url, {}, self.traffic, limit_bytes=_ANSWER_LIMIT_BYTES
        )
        if response.status not in (200, 401):
            raise Refusal(f"{url} answered {response.status}: no registry there", Fault.ORIGIN)

    async def _pull_manifest(self, reference: Reference, name: str) -> Manifest:
        url = f"{self._base(reference)}/manifests/{name}"
        headers = {"Accept": ", ".join([OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST])}
        response = await self._get(reference, url, headers, self._manifest_limit_bytes)
        digest = _digest_of(response.body)
        promised = name if ":" in name else response.headers.get("docker-content-digest", digest)
        if digest != promised:
            raise SourceError(
                f"{reference}: manifest {promised[:71]} came as {digest}", Fault.PROTOCOL
            )
        return Manifest(_media_type(reference, response), digest, response.body)

    async def _get(
        self, reference: Reference, url: str, headers: dict[str, str], limit_bytes: int
    ) -> Response:
        async def get() -> Response:
            response = await self._send(
                reference, "GET", url, headers=headers, limit_bytes=limit_bytes
            )
            _expect(response, 200, url.removeprefix(self._registry(reference)))
            return response

        return await self._patiently(reference, get)

    async def _patiently(self, reference: Reference, attempt: Callable[[], Awaitable[T]]) -> T:
        failures = 0
        while True:
            try:
                return await attempt()
            except SourceError as error:
                failures += 1
                pause_s = self._patience.pause_after(error, failures)
                if pause_s is None:
                    raise SourceError(f"{reference}: {error}", error.fault) from None
            await asyncio.sleep(pause_s)
            await self._exchange.respites.again(origin_of(self._registry(reference)))

    async def _send(
        self,
        reference: Reference,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        content: Callable[[], bytes | AsyncIterator[bytes]] | None = None,
        limit_bytes: int = _ANSWER_LIMIT_BYTES,
        push: bool = False,
        follows: bool = True,
    ) -> Response:
        """One answer that is no question for a login and, if it `follows` them, no redirect.

        Raises SourceError, Busy for an answer that will be another one later.
        """
        authorization = self._authorization(reference, "pull,push" if push else "pull")
        home = origin_of(self._registry(reference))
        route, refusals = Route(url, origin_of(url), 0, float("inf")), 0
        while True:
            sent = await authorization.header() if route.origin == home else None
            permit = {"Authorization": sent.reveal()} if sent is not None else {}
            response = await self._exchange.send(
                method,
                route.url,
                (headers or {}) | permit,
                self.traffic,
                limit_bytes=limit_bytes,
                content=content() if content is not None else None,
            )
            status = response.status
            if status in (401, 403) and route.origin == home and refusals < _REFUSALS_LIMIT:
                refusals += 1
                await authorization.refused(response.headers.get("www-authenticate", ""), sent)
            elif follows and status in REDIRECT_STATUSES and "location" in response.headers:
                route = follow(route, response.headers["location"], 0, 0)
            elif status in RETRIED_STATUSES:
                wait_s = retry_after_s(response.headers)
                raise Busy(f"{route.origin} answered {status}", wait_s, route.origin)
            else:
                return response

    def _authorization(self, reference: Reference, actions: str) -> Authorization:
        host, repository = reference.registry, reference.repository
        known = self._authorizations.get((host, repository, actions))
        if known is None:
            registry = origin_of(self._registry(reference))
            scope = f"repository:{repository}:{actions}"
            image = f"{host}/{repository}"
            known = Authorization(registry, image, scope, self._keychain, self._tokens)
            self._authorizations[host, repository, actions] = known
        return known

    def _registry(self, reference: Reference) -> str:
        host = reference.registry
        return f"{scheme_of(host, host in self._insecure)}://{host}"

    def _base(self, reference: Reference) -> str:
        return f"{self._registry(reference)}/v2/{reference.repository}"


def _expect(response: Response, status: int, what: str) -> None:
    if response.status == status:
        return
    fault = Fault.AUTH if response.status in (401, 403) else Fault.ORIGIN
    raise Refusal(f"{what}: the registry answered {response.status}", fault)


def _checked(reference: Reference, digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise SourceError(f"{reference}: {digest[:80]!r} is no sha256 digest", Fault.PROTOCOL)
    return digest


def _digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _document(reference: Reference, body: bytes) -> Document:
    try:
        return msgspec.json.decode(body, type=Document)
    except MALFORMED as error:
        raise SourceError(f"{reference}: no manifest: {error}", Fault.PROTOCOL) from None


def _media_type(reference: Reference, response: Response) -> str:
    """What the body is. A body that can be read as two things is refused (the image
    specification's advice since CVE-2021-41190)."""
    document = _document(reference, response.body)
    said = response.headers.get("content-type", "").partition(";")[0].strip()
    known = INDEXES | MANIFESTS
    if said in known and document.media_type in known and said != document.media_type:
        raise SourceError(
            f"{reference}: sent as {said}, but says it is {document.media_type}", Fault.PROTOCOL
        )
    if document.layers is not None and document.manifests is not None:
        raise SourceError(f"{reference}: both a manifest and an index", Fault.PROTOCOL)
    media_type = document.media_type or said
    if media_type not in known:
        raise SourceError(
            f"{reference}: {media_type[:80]!r} is no manifest of an image", Fault.PROTOCOL
        )
    return media_type


def _choose(reference: Reference, index: Manifest, architecture: str) -> str:
    """The digest of an index's best entry."""
    fitting = [
        entry
        for entry in _document(reference, index.body).manifests or []
        if entry.platform is not None
        and entry.platform.os == "linux"
        and entry.platform.architecture == architecture
    ]
    fitting.sort(key=lambda entry: NYDUS_FEATURE not in (entry.platform or Platform()).os_features)
    if not fitting:
        raise SourceError(
            f"{reference}: the index has no image for linux/{architecture}", Fault.ORIGIN
        )
    return _checked(reference, fitting[0].digest)


async def _pieces(open_reader: Callable[[], BinaryIO], size: int) -> AsyncIterator[bytes]:
    left = size
    with await asyncio.to_thread(open_reader) as reader:
        while piece := await asyncio.to_thread(reader.read, _PIECE_BYTES):
            left -= len(piece)
            if left < 0:
                break
            yield piece
    if left:
        raise SourceError(f"the blob to push is not of {size} bytes", Fault.LOCAL)

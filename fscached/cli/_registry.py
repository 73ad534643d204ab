"""Images to and from a registry, as whoever docker's configuration says we are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fscached import config
from fscached.failure import Failure
from fscached.malformed import MALFORMED
from fscached.source import SourceError
from fscached.source.auth import Tokens
from fscached.source.distribution import Distribution
from fscached.source.docker_config import default_path
from fscached.source.exchange import Exchange
from fscached.source.keyring import Keyring
from fscached.source.outlet import Outlet
from fscached.source.patience import Patience
from fscached.source.reference import Reference
from fscached.source.registries import is_insecure, trust_in
from rafs_v6 import ImageError
from rafs_v6.convert import Converted
from rafs_v6.oci import MAX_DOCUMENT_BYTES, Descriptor, Manifest, StoredImage
from rafs_v6.revision import bootstrap_descriptor

UPLOADS_AT_ONCE = 4
ANSWER_TIMEOUT_S = 300.0
"""A registry hashes a blob, and may copy it, before it answers."""

T = TypeVar("T")


def push(
    converted: Converted,
    path: Callable[[Descriptor], Path],
    reference: Reference,
    settings: config.Config,
) -> None:
    """Push an image under a reference's tag, its manifest last. `path` is asked where a blob lies
    that the registry does not have yet, and may raise Failure.

    Raises Failure.
    """

    async def work(distribution: Distribution) -> None:
        slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def upload(blob: Descriptor) -> None:
            async with slots:
                await distribution.push_blob(
                    reference, blob.digest, blob.size, lambda: path(blob).open("rb")
                )

        parts = (*converted.manifest.layers, converted.manifest.config)
        await asyncio.gather(*map(upload, parts))
        manifest = converted.descriptor
        body = path(manifest).read_bytes()
        await distribution.push_manifest(reference, manifest.media_type, body)

    _run(work, reference, settings.source, "push failed", "mend that and try again")


def pull(reference: Reference, settings: config.Config) -> tuple[StoredImage, bytes]:
    """An image and the content of its bootstrap's layer, each verified; no blobs.

    Raises Failure, and ImageError for an image of another kind.
    """

    async def work(distribution: Distribution) -> tuple[StoredImage, bytes]:
        body = (await distribution.pull_manifest(reference)).body
        manifest = _decoded(body, Manifest, f"manifest of {reference}")
        described = await distribution.pull_blob(
            reference, manifest.config.digest, MAX_DOCUMENT_BYTES
        )
        image = StoredImage(
            manifest, _decoded(described, dict[str, Any], f"configuration of {reference}")
        )
        layer = bootstrap_descriptor(image)
        limit_bytes = min(layer.size, settings.source.bootstrap_limit_bytes)
        return image, await distribution.pull_blob(reference, layer.digest, limit_bytes)

    return _run(work, reference, settings.source, "pull failed", "mend that and try again")


def _decoded(body: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except MALFORMED as error:
        raise ImageError(f"{what}: {error}") from error


def _run(
    work: Callable[[Distribution], Awaitable[T]],
    reference: Reference,
    source: config.Source,
    what: str,
    remedy: str,
) -> T:
    async def talk() -> T:
        async with _distribution(reference.registry, source) as distribution:
            return await work(distribution)

    try:
        return asyncio.run(talk())
    except SourceError as error:
        raise Failure(f"{what}: {error}", remedy) from error


@asynccontextmanager
async def _distribution(host: str, source: config.Source) -> AsyncIterator[Distribution]:
    exchange = Exchange(
        trust_in(host, source),
        connect_timeout_s=source.connect_timeout_s,
        stall_timeout_s=ANSWER_TIMEOUT_S,
        outlet=Outlet(source.http_proxy, source.no_proxy),
    )
    try:
        yield Distribution(
            exchange=exchange,
            tokens=Tokens(exchange),
            keychain=Keyring.configured(source, docker_config=str(default_path())),
            insecure=(host,) if is_insecure(host, source) else (),
            patience=Patience(source.retries, source.retry_pause_s, source.retry_pause_limit_s),
            manifest_limit_bytes=source.manifest_limit_bytes,
        )
    finally:
        await exchange.close()

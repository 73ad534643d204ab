"""A converted image goes from its layout to a registry, manifest last."""

from __future__ import annotations

import asyncio

from fscached import config
from fscached.failure import Failure
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
from rafs_v6.convert import Converted
from rafs_v6.oci import Descriptor, Layout

UPLOADS_AT_ONCE = 4
ANSWER_TIMEOUT_S = 300.0
"""A registry hashes a blob, and may copy it, before it answers."""


def push(
    converted: Converted, layout: Layout, reference: Reference, settings: config.Config
) -> None:
    """Push an image under a reference's tag, as whoever docker's configuration says we are.

    Raises Failure.
    """
    try:
        asyncio.run(_push(converted, layout, reference, settings.source))
    except SourceError as error:
        raise Failure(f"push failed: {error}", "mend that and convert again") from error


async def _push(
    converted: Converted, layout: Layout, reference: Reference, source: config.Source
) -> None:
    host = reference.registry
    exchange = Exchange(
        trust_in(host, source),
        connect_timeout_s=source.connect_timeout_s,
        stall_timeout_s=ANSWER_TIMEOUT_S,
        outlet=Outlet(source.http_proxy, source.no_proxy),
    )
    distribution = Distribution(
        exchange=exchange,
        tokens=Tokens(exchange),
        keychain=Keyring.configured(source, docker_config=str(default_path())),
        insecure=(host,) if is_insecure(host, source) else (),
        patience=Patience(source.retries, source.retry_pause_s, source.retry_pause_limit_s),
        manifest_limit_bytes=source.manifest_limit_bytes,
    )
    slots = asyncio.Semaphore(UPLOADS_AT_ONCE)

    async def upload(blob: Descriptor) -> None:
        async with slots:
            path = layout.path(blob)
            await distribution.push_blob(reference, blob.digest, blob.size, lambda: path.open("rb"))

    try:
        await asyncio.gather(*map(upload, (*converted.manifest.layers, converted.manifest.config)))
        manifest = converted.descriptor
        body = layout.path(manifest).read_bytes()
        await distribution.push_manifest(reference, manifest.media_type, body)
    finally:
        await exchange.close()

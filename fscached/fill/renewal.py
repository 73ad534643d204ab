"""Chunks that the disk has spoiled are brought anew, while readers may have them open."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from fscached.fill.blob import OpenBlob, Stage
from fscached.fill.crew import Crew
from fscached.transport import NotReady, Transport

log = logging.getLogger(__name__)


async def renew(
    opened: OpenBlob,
    offsets: Iterable[int],
    transport: Transport,
    crew: Crew,
    deadline_s: float,
) -> int:
    """Fetch the resident chunks at these bytes of the cache file again; how many those were. From
    the first moment on readers wait for them, where a hole can make them ask.

    Raises NotReady when nobody knows the blob's chunks, SourceError and OSError when they do not
    come: then they are absent, as if they had never been there.
    """
    if opened.stage is Stage.NEW:
        await opened.learn()
    if opened.blob is None or opened.stage is not Stage.READY:
        raise NotReady(f"the chunks of {opened.origin.blob_id[:12]} are not known")
    count = 0
    for offset in offsets:
        fetch = opened.blob.spoiled(offset)
        if fetch is None:
            continue
        chunks = opened.blob.chunks
        start, end = chunks.offset(fetch.first), chunks.padded_end(fetch.end - 1)
        try:
            await crew.run(partial(transport.discard, opened.object, start, end))
        except (NotReady, OSError) as error:
            log.warning("%s: no hole at %d: %s", opened.origin.blob_id[:12], start, error)
        await opened.prefetch(fetch, deadline_s)
        count += 1
    return count

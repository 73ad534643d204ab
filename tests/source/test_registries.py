"""All registries of a daemon, and what they have cost."""

from __future__ import annotations

import pytest

from fscached.config import Config
from fscached.source import Priority
from fscached.source.registries import Registries
from tests.source.conftest import BLOB, BLOB_ID, REPOSITORY
from tests.source.faulty import FaultyServer

pytestmark = pytest.mark.asyncio


async def test_what_a_replaced_source_costs_is_counted(server: FaultyServer) -> None:
    """An image bound again gets a new source; blobs that are open may still read from the old."""
    registries = Registries(Config())
    old = registries.source(server.host, REPOSITORY, None, "http")
    new = registries.source(server.host, REPOSITORY, None, "http")
    for source in (new, old):
        got = bytearray()
        await source.read(BLOB_ID, 5, 105, Priority.DEMAND, got.extend, 20)
        assert got == BLOB[5:105]
    assert (registries.traffic.requests, registries.traffic.received_bytes) == (2, 200)
    await registries.close()

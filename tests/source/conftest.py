"""A client's half of the world, and servers for it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from fscached.source import Answer, Priority
from fscached.source.auth import Credential, FixedCredential, Keychain, Tokens
from fscached.source.exchange import Exchange
from fscached.source.origin import Trust
from fscached.source.patience import Patience
from fscached.source.registry import Registry
from fscached.source.remote import Remote
from fscached.source.transfer import Transfers
from tests.source.docker_registry import PROGRAM, DockerRegistry, docker_registry
from tests.source.faulty import FaultyServer, faulty_server

BLOB = random.Random(7).randbytes(3 << 20)
BLOB_ID = "5a" * 32
REPOSITORY = "library/thing"
BRIEF = Patience(retries=3, pause_s=0.001, pause_limit_s=0.002)


class Client:
    """All a registry's reader needs; `collect` reads a range into bytes."""

    def __init__(self, transfers: Transfers, exchange: Exchange) -> None:
        self.transfers = transfers
        self.exchange = exchange
        self.tokens = Tokens(exchange)
        self.answer: Answer | None = None

    def registry(
        self,
        host: str,
        *,
        keychain: Keychain | None = None,
        credential: Credential | None = None,
        patience: Patience = BRIEF,
        repository: str = REPOSITORY,
    ) -> Remote:
        endpoint = Registry(
            host,
            repository,
            scheme="http",
            tokens=self.tokens,
            keychain=keychain or FixedCredential(credential),
            trust=Trust(),
        )
        return Remote(endpoint, transfers=self.transfers, patience=patience)

    async def collect(
        self,
        registry: Remote,
        start: int,
        end: int,
        *,
        blob_id: str = BLOB_ID,
        priority: Priority = Priority.DEMAND,
        deadline_s: float = 20,
    ) -> bytes:
        got = bytearray()
        self.answer = await registry.read(blob_id, start, end, priority, got.extend, deadline_s)
        return bytes(got)


@asynccontextmanager
async def a_client(stall_timeout_s: float) -> AsyncIterator[Client]:
    transfers = Transfers(stall_timeout_s=stall_timeout_s, prefetch_quiet_s=0.001)
    exchange = Exchange(Trust(), connect_timeout_s=5, stall_timeout_s=5)
    yield Client(transfers, exchange)
    await exchange.close()
    await transfers.close()


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    """One with time."""
    async with a_client(stall_timeout_s=20) as client:
        yield client


@pytest_asyncio.fixture
async def impatient() -> AsyncIterator[Client]:
    """One that gives up a connection that stands still for 0.2 s."""
    async with a_client(stall_timeout_s=0.2) as client:
        yield client


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultyServer]:
    """A stand-in registry that serves BLOB and does what its test tells it."""
    async with faulty_server(BLOB) as server:
        yield server


@pytest_asyncio.fixture
async def other_server() -> AsyncIterator[FaultyServer]:
    """A second one: another port is another origin."""
    async with faulty_server(BLOB) as server:
        yield server


@pytest.fixture(scope="session")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """A docker-registry that lets everybody in."""
    if PROGRAM is None:
        pytest.skip("docker-registry is not installed")
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def basic_registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    """A docker-registry that wants alice and her password, `open sesame`."""
    if PROGRAM is None:
        pytest.skip("docker-registry is not installed")
    hashed = "$2b$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW"
    (tmp_path / "htpasswd").write_text(f"alice:{hashed}\n")
    auth: dict[str, object] = {"htpasswd": {"realm": "a, b", "path": str(tmp_path / "htpasswd")}}
    with docker_registry(tmp_path / "registry", auth) as registry:
        yield registry

"""Credentials as docker and podman keep them: config.json and its credential helpers."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import msgspec

from fscached.source import Fault, SourceError
from fscached.source.auth import Credential, Kind, Secret

FILE_LIMIT_BYTES: Final = 1 << 20
HELPER_LIMIT_BYTES: Final = 64 << 10
HELPER_TIMEOUT_S: Final = 10.0
_HELPER: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Docker Hub has three names for its hosts and a fourth for its key.
_HUB_HOSTS: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HUB_KEY: Final = "https://index.docker.io/v1/"


class Entry(msgspec.Struct):
    """One of `auths`."""

    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class Document(msgspec.Struct, rename={"cred_helpers": "credHelpers", "creds_store": "credsStore"}):
    """What of config.json matters here."""

    auths: dict[str, Entry] = {}
    cred_helpers: dict[str, str] = {}
    creds_store: str = ""


class HelperAnswer(msgspec.Struct, rename="pascal"):
    """What `docker-credential-… get` prints."""

    username: str
    secret: str


class DockerConfig:
    """A keychain that reads its file anew for every question; a file that is not there is empty.

    Helpers are run with a time limit of `helper_timeout_s` seconds.
    """

    def __init__(self, path: Path, *, helper_timeout_s: float = HELPER_TIMEOUT_S) -> None:
        self._path = path
        self._helper_timeout_s = helper_timeout_s

    async def find(self, host: str) -> Credential | None:
        """The credential for `host[:port]`. Raises SourceError (LOCAL)."""
        document = await asyncio.to_thread(self._read)
        for key in _keys(host):
            if helper := document.cred_helpers.get(key):
                return await self._ask(helper, key)
        if document.creds_store:
            for key in _keys(host):
                if key in document.auths:
                    return await self._ask(document.creds_store, key)
            return await self._ask(document.creds_store, _keys(host)[0])
        for key in _keys(host):
            if entry := document.auths.get(key):
                return self._credential(entry, key)
        return None

    def _read(self) -> Document:
        try:
            with self._path.open("rb") as file:
                text = file.read(FILE_LIMIT_BYTES + 1)
        except FileNotFoundError:
            return Document()
        except OSError as error:
            raise self._fault(str(error.strerror)) from None
        if len(text) > FILE_LIMIT_BYTES:
            raise self._fault(f"larger than {FILE_LIMIT_BYTES} bytes")
        try:
            return msgspec.json.decode(text, type=Document)
        except (msgspec.DecodeError, UnicodeDecodeError):
            # not the error's text: it may quote the file
            raise self._fault("not the JSON docker writes") from None

    def _credential(self, entry: Entry, key: str) -> Credential | None:
        if entry.registrytoken:
            return Credential("", Secret(entry.registrytoken), Kind.BEARER)
        if entry.identitytoken:
            return Credential(entry.username, Secret(entry.identitytoken), Kind.IDENTITY)
        if entry.auth:
            try:
                return Credential.from_basic(entry.auth)
            except ValueError as error:
                raise self._fault(f"entry {key!r}: {error}") from None
        if entry.username:
            return Credential(entry.username, Secret(entry.password))
        return None

    async def _ask(self, helper: str, key: str) -> Credential | None:
        """The helper protocol: the key on stdin, JSON on stdout."""
        if not _HELPER.fullmatch(helper):
            raise self._fault(f"{helper[:64]!r} is no name of a credential helper")
        program = f"docker-credential-{helper}"
        try:
            async with asyncio.timeout(self._helper_timeout_s):
                status, output = await _run(program, key)
        except TimeoutError:
            raise self._fault(f"{program} took over {self._helper_timeout_s:g} s") from None
        except OSError as error:
            raise self._fault(f"{program}: {error.strerror}") from None
        if status != 0:
            if b"credentials not found" in output:
                return None
            raise self._fault(f"{program} failed with status {status}")
        try:
            answer = msgspec.json.decode(output, type=HelperAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._fault(f"{program} did not print the JSON of a credential") from None
        kind = Kind.IDENTITY if answer.username == "<token>" else Kind.PASSWORD
        return Credential(answer.username, Secret(answer.secret), kind)

    def _fault(self, what: str) -> SourceError:
        return SourceError(f"{self._path}: {what}; mend it or run `docker login`", Fault.LOCAL)


def default_path() -> Path:
    """The file docker would use, or else podman's, or docker's again when there is neither."""
    candidates = list(_candidates())
    return next((path for path in candidates if path.is_file()), candidates[0])


def _candidates() -> Iterator[Path]:
    home = Path(os.environ.get("HOME") or "/root")
    yield Path(os.environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"
    if file := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(file)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"
    yield home / ".config" / "containers" / "auth.json"


def _keys(host: str) -> list[str]:
    """The keys under which a host's entry may be found, the likeliest first."""
    if host in _HUB_HOSTS:
        return [_HUB_KEY, *sorted(_HUB_HOSTS)]
    bare = [host, f"https://{host}", f"http://{host}"]
    return bare + [f"{key}{path}" for key in bare for path in ("/", "/v1/", "/v2/")]


class _Helper(asyncio.SubprocessProtocol):
    """Collects what a helper prints, up to the limit: one that prints more is ended."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output += data
        if len(self.output) > HELPER_LIMIT_BYTES:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def _run(program: str, key: str) -> tuple[int | None, bytes]:
    """Status and output; the status of a helper that was ended is not 0."""
    loop = asyncio.get_running_loop()
    transport, helper = await loop.subprocess_exec(
        _Helper, program, "get", stderr=asyncio.subprocess.DEVNULL
    )
    try:
        stdin = cast(asyncio.WriteTransport, transport.get_pipe_transport(0))
        stdin.write(key.encode())
        stdin.close()
        await helper.ended
        return transport.get_returncode(), bytes(helper.output)
    finally:
        transport.close()  # kills it, if it still runs

"""Credentials as docker and podman keep them: config.json and its credential helpers."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from fscached.malformed import MALFORMED
from fscached.source import Fault, SourceError
from fscached.source.auth import Credential, Kind, Secret
from fscached.source.image_pattern import canonical, fitting
from fscached.source.plugin import ask

FILE_LIMIT_BYTES: Final = 1 << 20
HELPER_TIMEOUT_S: Final = 10.0
# In a directory, the first of these: a mounted secret's (kubernetes.io/dockerconfigjson), docker's.
FILE_NAMES: Final = (".dockerconfigjson", "config.json")
_HELPER: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HUB: Final = "docker.io"
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
    """A keychain that reads its file anew for every question, so a new login or a secret that was
    replaced is seen at once. `path` is the file or its directory; what is not there is empty.

    Helpers are run with a time limit of `helper_timeout_s` seconds.
    """

    def __init__(self, path: Path, *, helper_timeout_s: float = HELPER_TIMEOUT_S) -> None:
        self._path = path
        self._helper_timeout_s = helper_timeout_s

    async def find(self, image: str) -> Credential | None:
        """The credential for `host[:port]/repository`; of several entries that cover it, the most
        particular one that has any. Raises SourceError (LOCAL)."""
        document = await asyncio.to_thread(self._read)
        host = image.partition("/")[0]
        for key, helper in document.cred_helpers.items():
            if canonical(key) == canonical(host):
                return await self._ask(helper, key)
        keys = fitting(document.auths, image)
        if document.creds_store:
            key = _HUB_KEY if canonical(host) == _HUB else host
            return await self._ask(document.creds_store, keys[0] if keys else key)
        for key in keys:
            if credential := self._credential(document.auths[key], key):
                return credential
        return None

    def _file(self) -> Path:
        if not self._path.is_dir():
            return self._path
        files = [self._path / name for name in FILE_NAMES]
        return next((file for file in files if file.exists()), files[0])

    def _read(self) -> Document:
        try:
            with self._file().open("rb") as file:
                text = file.read(FILE_LIMIT_BYTES + 1)
        except FileNotFoundError:
            return Document()
        except OSError as error:
            raise self._fault(str(error.strerror)) from None
        if len(text) > FILE_LIMIT_BYTES:
            raise self._fault(f"larger than {FILE_LIMIT_BYTES} bytes")
        try:
            return msgspec.json.decode(text, type=Document)
        except MALFORMED:
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
            status, output = await ask((program, "get"), key.encode(), self._helper_timeout_s)
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
        except MALFORMED:
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

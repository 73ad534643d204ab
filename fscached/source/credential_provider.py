"""Credentials from kubelet's credential providers (credentialprovider.kubelet.k8s.io/v1).

The file is kubelet's own CredentialProviderConfig. A provider is a program that is told the image
and prints credentials by pattern, and for how long and for what they may be kept.
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from fscached.malformed import MALFORMED
from fscached.source import Fault, SourceError
from fscached.source.auth import Credential, Secret
from fscached.source.image_pattern import canonical, covers, fitting
from fscached.source.plugin import ask

FILE_LIMIT_BYTES: Final = 1 << 20
# kubelet's own limit for one run (pkg/credentialprovider/plugin).
RUN_TIMEOUT_S: Final = 60.0
CACHE_LIMIT: Final = 1024
_API: Final = "credentialprovider.kubelet.k8s.io/v1"
_NAME: Final = r"^(?!\.{1,2}\Z)[^/\s\x00]{1,255}\Z"
_DURATION: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|s|us|µs|ns)", re.ASCII)
_UNIT_S: Final = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


class Variable(msgspec.Struct):
    """Of a provider's environment."""

    name: str
    value: str


class Provider(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """One of the file's `providers`; `name` is that of its program."""

    name: Annotated[str, Meta(pattern=_NAME)]
    match_images: Annotated[list[str], Meta(min_length=1)]
    default_cache_duration: str
    api_version: Literal["credentialprovider.kubelet.k8s.io/v1"]
    args: list[str] = []
    env: list[Variable] = []


class ProviderConfig(msgspec.Struct, rename="camel"):
    """The file."""

    api_version: Literal["kubelet.config.k8s.io/v1"]
    kind: Literal["CredentialProviderConfig"]
    providers: Annotated[list[Provider], Meta(min_length=1)]


class Login(msgspec.Struct):
    """A credential as a provider prints it."""

    username: str = ""
    password: str = ""


class Response(msgspec.Struct, rename="camel"):
    """What a provider prints."""

    api_version: Literal["credentialprovider.kubelet.k8s.io/v1"]
    kind: Literal["CredentialProviderResponse"]
    cache_key_type: Literal["Image", "Registry", "Global"]
    cache_duration: str | None = None
    auth: dict[str, Login] | None = None


class CredentialProviders:
    """A keychain of all providers of a file, whose programs lie in `programs`. The file is read
    with the first question; while a provider runs for an image, others who ask wait for it."""

    def __init__(self, file: Path, programs: Path, *, timeout_s: float = RUN_TIMEOUT_S) -> None:
        self._file = file
        self._programs = programs
        self._timeout_s = timeout_s
        self._providers: list[Provider] | None = None
        self._known: dict[tuple[str, str], tuple[Response, float]] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[Response]] = {}

    async def find(self, image: str) -> Credential | None:
        """The credential for `host[:port]/repository` of the first provider that has one.

        Raises SourceError (LOCAL).
        """
        image = canonical(image)
        if self._providers is None:
            self._providers = await asyncio.to_thread(self._read)
        for provider in self._providers:
            if any(covers(pattern, image) for pattern in provider.match_images):
                auth = (await self._answer(provider, image)).auth or {}
                for pattern in fitting(auth, image):
                    login = auth[pattern]
                    return Credential(login.username, Secret(login.password))
        return None

    def _read(self) -> list[Provider]:
        import yaml  # nobody without this file needs it

        try:
            with self._file.open("rb") as file:
                text = file.read(FILE_LIMIT_BYTES + 1)
            if len(text) > FILE_LIMIT_BYTES:
                raise self._fault(f"larger than {FILE_LIMIT_BYTES} bytes")
            providers = msgspec.convert(yaml.safe_load(text), ProviderConfig).providers
            for provider in providers:
                seconds(provider.default_cache_duration)
        except OSError as error:
            raise self._fault(str(error.strerror)) from None
        except yaml.YAMLError:  # not its text: it quotes the file, which may hold a secret
            raise self._fault("not YAML") from None
        except (msgspec.ValidationError, ValueError) as error:
            raise self._fault(str(error)) from None
        return providers

    async def _answer(self, provider: Provider, image: str) -> Response:
        now = asyncio.get_running_loop().time()
        for scope in (image, image.partition("/")[0], ""):
            known = self._known.get((provider.name, scope))
            if known is not None and now < known[1]:
                return known[0]
        key = provider.name, image
        if key not in self._asking:
            task = self._asking[key] = asyncio.create_task(self._ask(provider, image))
            task.add_done_callback(lambda done: self._asked(key, done))
        return await asyncio.shield(self._asking[key])

    def _asked(self, key: tuple[str, str], task: asyncio.Task[Response]) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # whoever waited has it; all may have left

    async def _ask(self, provider: Provider, image: str) -> Response:
        request = {"apiVersion": _API, "kind": "CredentialProviderRequest", "image": image}
        command = (str(self._programs / provider.name), *provider.args)
        environment = os.environ | {given.name: given.value for given in provider.env}
        try:
            status, output = await ask(
                command, msgspec.json.encode(request), self._timeout_s, environment
            )
        except TimeoutError:
            raise self._fault(f"{command[0]} took over {self._timeout_s:g} s") from None
        except OSError as error:
            raise self._fault(f"{command[0]}: {error.strerror}") from None
        if status != 0:
            raise self._fault(f"{command[0]} failed with status {status}")
        try:
            response = msgspec.json.decode(output, type=Response)
            given = response.cache_duration
            life_s = seconds(provider.default_cache_duration if given is None else given)
        except (*MALFORMED, ValueError):
            raise self._fault(f"{command[0]} did not print a {_API} response") from None
        scopes = {"Image": image, "Registry": image.partition("/")[0], "Global": ""}
        if life_s > 0:
            if len(self._known) >= CACHE_LIMIT:
                del self._known[next(iter(self._known))]
            end = asyncio.get_running_loop().time() + life_s
            self._known[provider.name, scopes[response.cache_key_type]] = response, end
        return response

    def _fault(self, what: str) -> SourceError:
        return SourceError(f"{self._file}: {what}; mend it as for kubelet", Fault.LOCAL)


def seconds(duration: str) -> float:
    """A duration as Go writes it, `1h30m` or `0s`, in seconds. Raises ValueError."""
    parts: list[Any] = _DURATION.findall(duration)
    if "".join(map("".join, parts)) != duration or not parts:
        if duration == "0":
            return 0.0
        raise ValueError(f"{duration[:40]!r} is no duration such as 12h or 1m30s")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)

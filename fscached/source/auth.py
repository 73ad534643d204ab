"""How registries let us in: challenges, credentials, tokens (distribution's token flow).

No secret leaves this module but in an `Authorization` header for the registry it belongs to, or in
a request to the token server that registry names, after that name was checked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import random
import re
from dataclasses import dataclass
from enum import Enum
from hmac import compare_digest
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import urlencode, urlsplit

import msgspec

from fscached.malformed import MALFORMED
from fscached.source import Fault, SourceError
from fscached.source.exchange import Exchange, Response
from fscached.source.origin import Traffic, is_inward, origin_of
from fscached.source.patience import RETRIED_STATUSES

TOKEN_LIMIT_BYTES: Final = 64 << 10
# "If omitted, this defaults to 60 seconds" (distribution, token authentication specification).
TOKEN_LIFE_S: Final = 60.0
TOKEN_LIFE_LIMIT_S: Final = 24 * 3600.0
TOKENS_LIMIT: Final = 4096
# A token is renewed, while it is still used, this long or a quarter of its life before its end.
RENEWAL_MARGIN_S: Final = 20.0
# Up to this part of its life earlier: tokens that were fetched together are not renewed together.
_RENEWAL_JITTER: Final = 0.1
# A renewal ahead of time that failed is tried again after this, while the token is still good.
RENEWAL_PAUSE_S: Final = 5.0
_CHALLENGE_LIMIT: Final = 8 << 10

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER: Final = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")\s*(?:,|$)')
_SCHEME: Final = re.compile(rf"[\s,]*({_TOKEN})(?:\s+|\s*(?:,|$))")
_TOKEN68: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*\s*(?:,|$)")
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+")


class Secret:
    """A text that shows itself to nobody by accident."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash(self._text)


class Kind(Enum):
    """What a credential's secret is: a password, a token to trade for tokens, or one to send."""

    PASSWORD = "password"
    IDENTITY = "identity token"
    BEARER = "bearer token"


@dataclass(frozen=True, slots=True)
class Credential:
    """Who we are to one registry."""

    username: str
    secret: Secret
    kind: Kind = Kind.PASSWORD

    @classmethod
    def from_basic(cls, encoded: str) -> Credential:
        """From base64 of `user:password`, the `auth` of docker's and nydusd's configurations.

        Raises ValueError, whose text does not repeat it.
        """
        try:
            user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            raise ValueError("auth is not base64 of user:password")
        return cls(user, Secret(password.rstrip("\0")))

    @property
    def basic(self) -> str:
        """As the value of an Authorization header (RFC 7617)."""
        pair = f"{self.username}:{self.secret.reveal()}"
        return f"Basic {base64.b64encode(pair.encode()).decode()}"


class Keychain(Protocol):
    """Where credentials come from."""

    async def find(self, image: str) -> Credential | None:
        """The credential for `host[:port]/repository`, None when there is none.

        Raises SourceError.
        """
        ...


class FixedCredential:
    """A credential that was given with an image; a new one takes effect with the next 401."""

    def __init__(self, credential: Credential | None) -> None:
        self.credential = credential

    async def find(self, image: str) -> Credential | None:
        return self.credential


class Challenge(NamedTuple):
    """One way in that a 401 offers; scheme and names of parameters in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(value: str) -> list[Challenge]:
    """The challenges of all WWW-Authenticate values joined by commas (RFC 9110 11.6.1).

    What cannot be understood ends the list: a header is no reason to fail before it matters.
    """
    challenges: list[Challenge] = []
    value, position = value[:_CHALLENGE_LIMIT], 0
    while match := _SCHEME.match(value, position):
        position = match.end()
        challenge = Challenge(match[1].lower(), {})
        if _PARAMETER.match(value, position) is None and (blob := _TOKEN68.match(value, position)):
            # token68, or a scheme without parameters followed by the next one after a comma
            position = blob.end()
        while match := _PARAMETER.match(value, position):
            position = match.end()
            text = match[2] if match[2] is not None else re.sub(r"\\(.)", r"\1", match[3])
            challenge.parameters.setdefault(match[1].lower(), text)
        challenges.append(challenge)
    return challenges


class TokenAnswer(msgspec.Struct):
    """What a token server answers; some set one name of the token, some the other."""

    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


class _Question(NamedTuple):
    """Everything a token depends on."""

    realm: str
    service: str
    scopes: tuple[str, ...]
    credential: Credential | None


class Token(NamedTuple):
    header: Secret
    renew_at: float
    expires_at: float


class Tokens:
    """Bearer tokens of all registries; for one question there is one request under way."""

    def __init__(self, exchange: Exchange) -> None:
        self.traffic = Traffic()
        self._exchange = exchange
        self._known: dict[_Question, Token] = {}
        self._asking: dict[_Question, asyncio.Task[Token]] = {}

    async def get(
        self,
        registry: str,
        challenge: Challenge,
        scope: str,
        credential: Credential | None,
        refused: Secret | None,
    ) -> Token:
        """A token for `registry` (its origin) other than the `refused` one.

        Raises SourceError: AUTH when it is denied, PROTOCOL for a realm we must not ask, NETWORK
        or ORIGIN when another try may help.
        """
        realm = _checked_realm(registry, challenge.parameters.get("realm", ""))
        scopes = tuple((challenge.parameters.get("scope") or scope).split())
        service = challenge.parameters.get("service", "")
        question = _Question(realm, service, scopes, credential)
        known = self._known.get(question)
        now = asyncio.get_running_loop().time()
        if known is not None and known.header != refused and now < known.renew_at:
            return known
        task = self._asking.get(question)
        if task is None:
            task = self._asking[question] = asyncio.create_task(self._ask(question))
            task.add_done_callback(_observed)
        return await asyncio.shield(task)

    async def _ask(self, question: _Question) -> Token:
        asked_at = asyncio.get_running_loop().time()
        credential = question.credential
        try:
            if credential is not None and credential.kind is Kind.IDENTITY:
                response = await self._trade(question, credential)
            else:
                response = await self._fetch(question)
        finally:
            del self._asking[question]
        token = _read_token(response, origin_of(question.realm), asked_at)
        if len(self._known) >= TOKENS_LIMIT:
            del self._known[next(iter(self._known))]
        self._known[question] = token
        return token

    async def _fetch(self, question: _Question) -> Response:
        """The dialect every token server speaks."""
        query = [("service", question.service)] if question.service else []
        query += [("scope", scope) for scope in question.scopes]
        query.append(("client_id", "fscached"))
        headers = (
            {} if question.credential is None else {"Authorization": question.credential.basic}
        )
        joint = "&" if urlsplit(question.realm).query else "?"
        url = f"{question.realm}{joint}{urlencode(query)}"
        return await self._exchange.send(
            "GET", url, headers, self.traffic, limit_bytes=TOKEN_LIMIT_BYTES
        )

    async def _trade(self, question: _Question, credential: Credential) -> Response:
        """OAuth2: an identity token is traded for an access token."""
        form = {
            "grant_type": "refresh_token",
            "service": question.service,
            "client_id": "fscached",
            "scope": " ".join(question.scopes),
            "refresh_token": credential.secret.reveal(),
        }
        return await self._exchange.send(
            "POST",
            question.realm,
            {"Content-Type": "application/x-www-form-urlencoded"},
            self.traffic,
            limit_bytes=TOKEN_LIMIT_BYTES,
            content=urlencode(form).encode(),
        )


class Authorization:
    """What to send to one registry for one scope, kept fresh.

    The first request goes without; the 401 says what is wanted. `registry` is its origin, `image`
    the name in the keychain: `host[:port]/repository`.
    """

    def __init__(
        self, registry: str, image: str, scope: str, keychain: Keychain, tokens: Tokens
    ) -> None:
        self._registry = registry
        self._image = image
        self._scope = scope
        self._keychain = keychain
        self._tokens = tokens
        self._header: Secret | None = None
        self._challenge: Challenge | None = None
        self._renew_at = self._expires_at = float("inf")
        self._renewal: asyncio.Task[None] | None = None

    async def header(self) -> Secret | None:
        """The Authorization header's value to send now. Raises SourceError when none can be had."""
        if self._challenge is not None and self._header is not None:
            now = asyncio.get_running_loop().time()
            if now >= self._renew_at:
                renewal = self._renew(self._challenge, self._header)
                if now >= self._expires_at:
                    await asyncio.shield(renewal)
        return self._header

    async def refused(self, www_authenticate: str, sent: Secret | None) -> None:
        """The registry answered `sent` with 401, or 403 and no challenge: get something better.

        Raises SourceError, AUTH when nothing better can be had.
        """
        if sent != self._header:
            return
        challenge = self._chosen(www_authenticate)
        if sent is not None and challenge.scheme != _scheme_of(sent):
            # Harbor answers an expired bearer token with a Basic challenge: ask again with nothing.
            self._header = None
            return
        await asyncio.shield(self._renew(challenge, sent))

    def _chosen(self, www_authenticate: str) -> Challenge:
        for challenge in parse_challenges(www_authenticate):
            if challenge.scheme in ("bearer", "basic"):
                return challenge
        if not www_authenticate and self._challenge is not None:
            return self._challenge
        raise SourceError(
            f"{self._registry} refuses us and asks for no login fscached knows (Basic, Bearer)",
            Fault.AUTH,
        )

    def _renew(self, challenge: Challenge, stale: Secret | None) -> asyncio.Task[None]:
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._replace(challenge, stale))
            self._renewal.add_done_callback(_observed)
        return self._renewal

    async def _replace(self, challenge: Challenge, stale: Secret | None) -> None:
        try:
            token = await self._obtain(challenge, stale)
        except SourceError:
            pause_s = RENEWAL_PAUSE_S * random.uniform(1, 2)
            now = asyncio.get_running_loop().time()
            self._renew_at = max(self._renew_at, min(now + pause_s, self._expires_at))
            raise
        finally:
            self._renewal = None
        self._challenge = challenge
        self._header, self._renew_at, self._expires_at = token

    async def _obtain(self, challenge: Challenge, stale: Secret | None) -> Token:
        credential = await self._keychain.find(self._image)
        if credential is not None and credential.kind is Kind.BEARER:
            token = _lasting(f"Bearer {credential.secret.reveal()}")
        elif challenge.scheme == "basic":
            if credential is None:
                raise SourceError(
                    f"{self._registry} wants a login and there is none for {self._image}: "
                    "run `docker login` or give a credential with the image",
                    Fault.AUTH,
                )
            token = _lasting(credential.basic)
        else:
            token = await self._tokens.get(
                self._registry, challenge, self._scope, credential, stale
            )
        if token.header == stale and token.expires_at == float("inf"):
            raise SourceError(
                f"{self._registry} refuses the credential for {self._image}: "
                "log in again or check its rights",
                Fault.AUTH,
            )
        return token


def _observed(task: asyncio.Task[Any]) -> None:
    """A renewal ahead of time, or one whose readers left, has nobody who waits for its failure."""
    if not task.cancelled():
        task.exception()


def _lasting(header: str) -> Token:
    if not _HEADER_SAFE.fullmatch(header.replace(" ", "", 1)):
        raise SourceError("a credential holds characters no header may have", Fault.AUTH)
    return Token(Secret(header), float("inf"), float("inf"))


def _scheme_of(header: Secret) -> str:
    return header.reveal().partition(" ")[0].lower()


def _checked_realm(registry: str, realm: str) -> str:
    """The realm, if a registry there may send our credentials to it.

    Never from https to http, and never to an address inside the network but the registry's own.
    Raises SourceError.
    """
    if not realm or "#" in realm:
        raise SourceError(f"{registry}: a Bearer challenge without a usable realm", Fault.PROTOCOL)
    target = origin_of(realm)
    ours, theirs = urlsplit(registry), urlsplit(target)
    if ours.scheme == "https" != theirs.scheme:
        raise SourceError(
            f"{registry} sends us to {target} for a token; a secure registry's token server "
            "must be reached by https",
            Fault.PROTOCOL,
        )
    if theirs.hostname != ours.hostname and is_inward(theirs.netloc):
        raise SourceError(
            f"{registry} sends us to {target} for a token, an address inside the network "
            "that is not the registry's own",
            Fault.PROTOCOL,
        )
    return realm


def _read_token(response: Response, server: str, asked_at: float) -> Token:
    status = response.status
    if status in RETRIED_STATUSES:
        raise SourceError(f"token server {server} answered {status}", Fault.ORIGIN)
    if status != 200:
        raise SourceError(
            f"token server {server} answered {status}: log in again or check the image's name",
            Fault.AUTH,
        )
    try:
        answer = msgspec.json.decode(response.body, type=TokenAnswer)
    except MALFORMED:
        answer = TokenAnswer()
    token = answer.token or answer.access_token
    if not _HEADER_SAFE.fullmatch(token):
        raise SourceError(f"token server {server} answered without a token", Fault.PROTOCOL)
    life_s = TOKEN_LIFE_S if answer.expires_in is None else answer.expires_in
    life_s = min(max(life_s, 0.0), TOKEN_LIFE_LIMIT_S)
    margin_s = min(RENEWAL_MARGIN_S, life_s / 4) + life_s * random.uniform(0, _RENEWAL_JITTER)
    return Token(Secret(f"Bearer {token}"), asked_at + life_s - margin_s, asked_at + life_s)

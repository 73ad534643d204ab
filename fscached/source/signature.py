"""Signatures of object stores, in headers: AWS's version 4 and OSS's first. Pure: the moment is
given.

Neither signs Range: a peer between us and the store may ask for other ranges than we do.
"""

from __future__ import annotations

import base64
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol
from urllib.parse import quote, unquote, urlsplit

from fscached.source.auth import Secret

_NO_BODY: Final = sha256(b"").hexdigest()
_PORTS: Final = {"http": 80, "https": 443}


class Signer(Protocol):
    """Makes a GET of a URL one of ours."""

    def sign(self, url: str, now_s: float) -> dict[str, str]:
        """The headers to add, for a request sent at `now_s` (Unix time)."""
        ...


@dataclass(frozen=True, slots=True)
class Key:
    """An access key."""

    key_id: str
    secret: Secret


@dataclass(frozen=True, slots=True)
class S3Signer:
    """AWS Signature Version 4 for the service s3, of the host (with its port, unless it is the
    scheme's), the path and x-amz-*."""

    key: Key
    region: str

    def sign(self, url: str, now_s: float) -> dict[str, str]:
        """See Signer."""
        parts = urlsplit(url)
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
        added = {"x-amz-content-sha256": _NO_BODY, "x-amz-date": moment}
        signed = {"host": host_header(url)} | added
        scope = f"{moment[:8]}/{self.region}/s3/aws4_request"
        names = ";".join(sorted(signed))
        request = canonical_request(parts.path, signed, names)
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{sha256(request.encode()).hexdigest()}"
        key = f"AWS4{self.key.secret.reveal()}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        return added | {
            "Authorization": f"AWS4-HMAC-SHA256 Credential={self.key.key_id}/{scope},"
            f"SignedHeaders={names},Signature={signature}"
        }


def canonical_request(path: str, signed: Mapping[str, str], names: str) -> str:
    """What of a GET is signed: no query, the headers by name, the hash of no body."""
    lines = [f"{name}:{value}" for name, value in sorted(signed.items())]
    return "\n".join(["GET", path, "", *lines, "", names, _NO_BODY])


@dataclass(frozen=True, slots=True)
class OssSigner:
    """OSS's header signature (HMAC-SHA1) of verb, date, bucket and object."""

    key: Key
    bucket: str

    def sign(self, url: str, now_s: float) -> dict[str, str]:
        """See Signer."""
        from email.utils import formatdate  # as much as 5 ms, and few images are in OSS

        date = formatdate(now_s, usegmt=True)
        text = f"GET\n\n\n{date}\n/{self.bucket}{unquote(urlsplit(url).path)}"
        signature = hmac.digest(self.key.secret.reveal().encode(), text.encode(), "sha1")
        encoded = base64.b64encode(signature).decode()
        return {"Date": date, "Authorization": f"OSS {self.key.key_id}:{encoded}"}


def host_header(url: str) -> str:
    """Host as curl sends it: with the port, unless it is the scheme's own."""
    parts = urlsplit(url)
    name = parts.netloc.rpartition(":")[0] if parts.port == _PORTS[parts.scheme] else parts.netloc
    return name.lower()


def object_path(name: str) -> str:
    """An object's name as a URL has it: every byte but unreserved ones and slashes encoded."""
    return quote(name, safe="/-_.~")

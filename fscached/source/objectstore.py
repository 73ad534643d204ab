"""Blobs as objects: S3, OSS, and any HTTP server that has them as files."""

from __future__ import annotations

import re
import time
from typing import Final

from fscached.source import Fault, Priority, SourceError
from fscached.source.endpoint import UNAUTHORISED_STATUSES, refusal
from fscached.source.origin import Trust, origin_of
from fscached.source.redirect import Route
from fscached.source.request import Reply, Request
from fscached.source.signature import Key, OssSigner, S3Signer, Signer, object_path

_BLOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET: Final = re.compile(r"[a-z0-9A-Z][a-z0-9A-Z._-]{0,254}")
_HOST: Final = re.compile(r"[A-Za-z0-9._\[\]:-]{1,255}")
_REGION: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_KEY_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")
# Stores refuse a signature whose moment is further away than this (S3: RequestTimeTooSkewed).
_CLOCK_TOLERANCE_S: Final = 900.0


class ObjectStore:
    """The objects whose URLs begin with `base`, an `Endpoint`. Without a `signer` they are
    everybody's."""

    def __init__(self, base: str, trust: Trust, signer: Signer | None = None) -> None:
        """Raises SourceError (PROTOCOL) for a base that is no plain http or https URL."""
        self.name = base.rstrip("/")
        self.origin = origin_of(base)
        self._base = base
        self._trust = trust
        self._signer = signer

    @classmethod
    def s3(
        cls, scheme: str, host: str, region: str, bucket: str, prefix: str, key: Key, trust: Trust
    ) -> ObjectStore:
        """A bucket by its path, as nydusd asks; `host` may have a port. Without a key id requests
        are not signed. Raises SourceError (LOCAL)."""
        _require(_HOST, host, "endpoint")
        _require(_BUCKET, bucket, "bucket_name")
        base = f"{scheme}://{host}/{bucket}/{object_path(prefix)}"
        if not key.key_id:
            return cls(base, trust)
        _require(_REGION, region, "region")
        _require(_KEY_ID, key.key_id, "access_key_id")
        return cls(base, trust, S3Signer(key, region))

    @classmethod
    def oss(
        cls, scheme: str, host: str, bucket: str, prefix: str, key: Key, trust: Trust
    ) -> ObjectStore:
        """A bucket by its host's name. Without a key id requests are not signed.

        Raises SourceError (LOCAL).
        """
        _require(_HOST, host, "endpoint")
        _require(_BUCKET, bucket, "bucket_name")
        base = f"{scheme}://{bucket}.{host}/{object_path(prefix)}"
        if not key.key_id:
            return cls(base, trust)
        _require(_KEY_ID, key.key_id, "access_key_id")
        return cls(base, trust, OssSigner(key, bucket))

    @classmethod
    def files(cls, address: str, path: str, trust: Trust) -> ObjectStore:
        """A directory of a web server. Raises SourceError (PROTOCOL)."""
        directory = path.strip("/")
        base = f"{address.rstrip('/')}/{object_path(directory)}{'/' if directory else ''}"
        return cls(base, trust)

    def url(self, blob_id: str) -> str:
        """See Endpoint."""
        if not _BLOB_ID.fullmatch(blob_id):
            raise SourceError(f"{blob_id[:128]!r} is no id of a blob", Fault.PROTOCOL)
        return self._base + blob_id

    async def request(self, route: Route, start: int, end: int, priority: Priority) -> Request:
        """See Endpoint."""
        added: dict[str, str] = {}
        if self._signer is not None and route.origin == self.origin:
            added = self._signer.sign(route.url, time.time())
        lines = tuple(f"{name}: {value}" for name, value in added.items())
        return Request(route.url, lines, start, end, priority, self._trust)

    async def refused(self, request: Request, reply: Reply) -> None:
        """See Endpoint. What was signed once is signed no better a second time."""
        if reply.status not in UNAUTHORISED_STATUSES:
            raise refusal(self.origin, reply)
        if self._signer is None:
            why = "gives nothing to those without an access key"
        elif abs(skew_s := _skew_s(reply.headers.get("date", ""))) > _CLOCK_TOLERANCE_S:
            why = f"refuses the signature: this node's clock is {skew_s:.0f} s ahead of the store's"
        else:
            why = "refuses the access key: it, its rights, the bucket and the region must be right"
        raise SourceError(f"{self.origin} answered {reply.status}, it {why}", Fault.AUTH)


def _require(form: re.Pattern[str], text: str, key: str) -> None:
    if not form.fullmatch(text):
        raise SourceError(f"{key} of an object store is none: {text[:80]!r}", Fault.LOCAL)


def _skew_s(date: str) -> float:
    from email.utils import parsedate_to_datetime

    try:
        return time.time() - parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return 0.0

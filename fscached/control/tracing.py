"""What people ask of traces: what an image's runs read first, and that a new run may begin."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Final

import msgspec

from fscached.control.http import ApiError
from fscached.control.messages import KnownTrace, Recorded, RecordTrace
from fscached.images import Registration
from fscached.prefetch.service import Service
from fscached.prefetch.trace import TraceError, decode, encode
from fscached.store import Image, Store
from fscached.transport import ObjectKey
from rafs_v6 import ImageError

_FSID: Final = re.compile(r"[0-9a-f]{64}")


class Tracing:
    """Implements `control.api.Traces`. An image that was mounted once is known as long as its
    bootstrap is kept; `registered` are those that are now."""

    def __init__(
        self,
        store: Store,
        prefetch: Service,
        registered: Callable[[], Iterable[Registration]],
        resident_bytes: Callable[[Registration], int],
    ) -> None:
        self._store = store
        self._prefetch = prefetch
        self._registered = registered
        self._resident_bytes = resident_bytes

    async def known(self, image: str, *, run: bool) -> KnownTrace:
        key, found = await self._find(image)
        trace = await self._prefetch.trace(key, found, run=run)
        if trace is None:
            what = "run of it goes on, or it has read nothing" if run else "run of it is known"
            raise ApiError(HTTPStatus.NOT_FOUND, f"NotFound: {image}: no {what} yet")
        encoded = await asyncio.to_thread(encode, trace)
        return KnownTrace(found.fsid, found.reference, str(found.path), msgspec.Raw(encoded))

    async def adopt(self, body: bytes) -> None:
        try:
            trace = await asyncio.to_thread(decode, body)
        except TraceError as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"ParseBody({error})") from None
        try:
            await self._prefetch.adopt(trace)
        except OSError as error:
            raise _unkept("AdoptTrace", error) from error

    async def record(self, wanted: RecordTrace) -> Recorded:
        registration = self._registration(wanted.image)
        if registration is None:
            raise _unknown(wanted.image)
        resident = self._resident_bytes(registration)
        if not await self._prefetch.record(registration.key, prefetch=wanted.prefetch):
            raise ApiError(
                HTTPStatus.CONFLICT,
                f"Conflict: {wanted.image} is not mounted, or [prefetch] record is off",
            )
        return Recorded(registration.image.fsid, registration.image.reference, resident)

    async def forget(self, image: str) -> None:
        _, found = await self._find(image)
        try:
            known = await self._prefetch.forget(found)
        except OSError as error:
            raise _unkept("ForgetTrace", error) from error
        if not known:
            raise ApiError(HTTPStatus.NOT_FOUND, f"NotFound: {image}: no run of it is known")

    async def _find(self, name: str) -> tuple[ObjectKey, Image]:
        registration = self._registration(name)
        if registration is not None:
            return registration.key, registration.image
        image = await asyncio.to_thread(self._kept, name)
        if image is None:
            raise _unknown(name)
        return ObjectKey(image.fsid, image.fsid), image

    def _registration(self, name: str) -> Registration | None:
        """The one mounted last, where a tag has moved on."""
        found = [
            known
            for known in self._registered()
            if name in (known.image.reference, known.image.fsid)
        ]
        return found[-1] if found else None

    def _kept(self, name: str) -> Image | None:
        try:
            if _FSID.fullmatch(name):
                return self._store.load(name)
            return self._store.find(name)
        except (OSError, ImageError):
            return None


def _unkept(what: str, error: OSError) -> ApiError:
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, f"{what}({error})")


def _unknown(name: str) -> ApiError:
    return ApiError(HTTPStatus.NOT_FOUND, f"NotFound: no image {name} was ever mounted here")

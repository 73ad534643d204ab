"""The control API from the other side: blocking calls for the command line's verbs."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, ClassVar, Final
from urllib.parse import urlencode

from fscached.failure import Failure, Missing

# Pulling a manifest and a bootstrap is within the request; the daemon has its own deadlines.
TIMEOUT_S: Final = 300.0
REPLY_LIMIT_BYTES: Final = 64 << 20


class DaemonAway(Missing):
    """Nobody answers on the socket."""


class DaemonError(Failure):
    """The daemon answered with an error."""

    exit_code: ClassVar[int] = 1

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message, "the daemon's log says more")
        self.status = status


class Client:
    """Requests to the daemon on one socket. Every call raises DaemonAway or DaemonError."""

    def __init__(self, socket_path: str, timeout_s: float = TIMEOUT_S) -> None:
        self._socket_path = socket_path
        self._timeout_s = timeout_s

    def get(self, path: str, **query: str) -> Any:
        """The decoded reply."""
        return self._call("GET", path, query, None)

    def put(self, path: str, body: object = None) -> Any:
        """The decoded reply, None when it has no body."""
        return self._call("PUT", path, {}, None if body is None else _compact(body))

    def delete(self, path: str, **query: str) -> None:
        """Nothing when it went well."""
        self._call("DELETE", path, query, None)

    def _call(self, method: str, path: str, query: dict[str, str], body: str | None) -> Any:
        connection = _UnixConnection(self._socket_path, self._timeout_s)
        target = f"{path}?{urlencode(query)}" if query else path
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, target, body, headers)
            reply = connection.getresponse()
            data = reply.read(REPLY_LIMIT_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from None
        finally:
            connection.close()
        if reply.status not in (200, 204):
            raise DaemonError(reply.status, _message(data))
        return json.loads(data) if data else None

    def _away(self, error: Exception) -> DaemonAway:
        if isinstance(error, TimeoutError):
            why = f"no reply within {self._timeout_s:g} s"
        else:
            why = (error.strerror if isinstance(error, OSError) else None) or repr(error)
        return DaemonAway(
            f"no daemon answers on {self._socket_path} ({why})",
            "start it with `fscached supervise`, or name its socket with --socket",
        )


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection whose host is a path."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("unix", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _compact(body: object) -> str:
    return json.dumps(body, separators=(",", ":"))


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["message"])
    except (ValueError, LookupError, TypeError):
        return "an error without a message"

"""A registry in a thread: it can be slow, gone, or wrong, and remembers what it sent."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from rafs_v6.oci import BLOB_ANNOTATION, BOOTSTRAP_ANNOTATION
from tests.rafs_v6.trees import Built

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Sent(NamedTuple):
    """Bytes [start, end) of a blob that went out."""

    blob_id: str
    start: int
    end: int


class Origin:
    """What a test may change while it serves: `pause_s` before every answer with data, `down`,
    and `flip`, a blob id whose bytes are sent wrong."""

    def __init__(self) -> None:
        self.host = ""
        self.pause_s = 0.0
        self.down = False
        self.flip = ""
        self.sent: list[Sent] = []
        self.open = threading.Event()
        self.open.set()
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[str, bytes] = {}

    def add(self, name: str, built: Built) -> str:
        """Serve an image; its reference."""
        layers = [_descriptor(data, BLOB_ANNOTATION) for data in built.blobs.values()]
        archive = _archive(built.image.bootstrap)
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor(b"{}", "none"),
            "layers": [*layers, _descriptor(archive, BOOTSTRAP_ANNOTATION)],
        }
        self._blobs |= {_hex(data): data for data in (archive, b"{}", *built.blobs.values())}
        self._manifests[name] = json.dumps(manifest).encode()
        return f"{self.host}/{name}:1"

    def asked(self, blob_ids: Sequence[str]) -> list[Sent]:
        """What of these blobs was sent, in order."""
        return [sent for sent in self.sent if sent.blob_id in blob_ids]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        self.open.wait()
        if self.down:
            handler.close_connection = True
            return
        *_, name, kind, what = handler.path.split("?")[0].split("/")
        if kind == "manifests":
            manifest = self._manifests[name]
            digest = f"sha256:{_hex(manifest)}"
            headers = {
                "Content-Type": "application/vnd.oci.image.manifest.v1+json",
                "Docker-Content-Digest": digest,
            }
            self._send(handler, 200, manifest, headers)
        elif kind == "blobs":
            self._send_blob(handler, what.removeprefix("sha256:"))
        else:
            self._send(handler, 200, b"{}", {})

    def _send_blob(self, handler: BaseHTTPRequestHandler, blob_id: str) -> None:
        data = self._blobs[blob_id]
        found = _RANGE.fullmatch(handler.headers.get("Range", ""))
        if found is None:
            self._send(handler, 200, data, {})
            return
        start, end = int(found[1]), min(int(found[2]) + 1, len(data))
        self.sent.append(Sent(blob_id, start, end))
        time.sleep(self.pause_s)
        part = data[start:end]
        if blob_id == self.flip:
            part = bytes(byte ^ 1 for byte in part)
        self._send(handler, 206, part, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)


@contextmanager
def origin() -> Iterator[Origin]:
    """One that listens on loopback."""
    served = Origin()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def do_GET(self) -> None:
            served.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # so that closing it waits for the last connection
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            """A daemon that was killed in the middle of an answer."""

    server = Server(("127.0.0.1", 0), Handler)
    served.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        served.open.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _descriptor(data: bytes, annotation: str) -> dict[str, Any]:
    return {
        "mediaType": "application/octet-stream",
        "digest": f"sha256:{_hex(data)}",
        "size": len(data),
        "annotations": {annotation: "true"},
    }


def _archive(bootstrap: bytes) -> bytes:
    with tarfile.open(fileobj=(output := io.BytesIO()), mode="w") as archive:
        member = tarfile.TarInfo("image/image.boot")
        member.size = len(bootstrap)
        archive.addfile(member, io.BytesIO(bootstrap))
    return output.getvalue()

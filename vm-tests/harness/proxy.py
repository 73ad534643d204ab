"""A proxy before the origin, run in a guest: it notes every range that is asked for, and can be
slow. `python3 -m harness.proxy PORT ORIGIN_PORT STORAGE LEDGER BYTES_PER_S`; SIGUSR1 ends the
slowness.

Ranges of blobs it reads from the origin's storage itself: docker-registry reads 4 MiB for each
(fileReaderBufferSize of its filesystem driver), 0.15 s of an emulated CPU. One line of JSON per
range, written before the first byte is sent.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE_BYTES = 16 << 10
PRIORITY = 0x10002
"""Class 1:2 where a link has classes (`harness.link.FROM_ORIGIN`)."""
BLOB = re.compile(r"/v2/.+/blobs/sha256:([0-9a-f]{64})")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Pace:
    """Lets so many bytes per second through, all connections together."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._due_s = 0.0
        self._lock = threading.Lock()

    def wait(self, size_bytes: int) -> None:
        with self._lock:
            self._due_s = max(self._due_s, time.monotonic()) + size_bytes / self.bytes_per_s
            due_s = self._due_s
        while (left_s := due_s - time.monotonic()) > 0 and self.bytes_per_s < math.inf:
            time.sleep(min(left_s, 0.1))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    origin_port: int
    storage: str
    ledger: int
    pace: Pace

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, PRIORITY)
        super().setup()

    def do_GET(self) -> None:
        blob = BLOB.fullmatch(self.path)
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        if blob and asked:
            self._send(blob[1], int(asked[1]), int(asked[2]) + 1)
        else:
            self._pass_on()

    do_HEAD = do_GET

    def _send(self, blob_id: str, start: int, end: int) -> None:
        row = {"at_s": time.monotonic(), "blob": blob_id, "start": start, "end": end}
        os.write(self.ledger, json.dumps(row).encode() + b"\n")
        with open(f"{self.storage}/{blob_id[:2]}/{blob_id}/data", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = min(end, size)
            self.send_response_only(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            for at in range(start, end, PIECE_BYTES):
                piece = os.pread(file.fileno(), min(PIECE_BYTES, end - at), at)
                self.pace.wait(len(piece))
                self.wfile.write(piece)

    def _pass_on(self) -> None:
        origin = http.client.HTTPConnection("127.0.0.1", self.origin_port)
        accept = {"Accept": self.headers["Accept"]} if "Accept" in self.headers else {}
        origin.request(self.command, self.path, headers=accept)
        answer = origin.getresponse()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())
        origin.close()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """The ledger says it all."""


def main() -> None:
    port, Handler.origin_port, Handler.storage = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    Handler.ledger = os.open(sys.argv[4], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    Handler.pace = Pace(float(sys.argv[5]))

    def hurry(*_: object) -> None:
        Handler.pace.bytes_per_s = math.inf

    signal.signal(signal.SIGUSR1, hurry)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()

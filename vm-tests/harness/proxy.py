"""A proxy before the origin, run in a guest: it notes every range that is asked for, and can be
slow. `python3 -m harness.proxy PORT ORIGIN_PORT LEDGER BYTES_PER_S`; SIGUSR1 ends the slowness.

One line of JSON per request, written before the origin is asked.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE_BYTES = 16 << 10
RANGE = re.compile(r"bytes=(\d+)-(\d+)")
PASSED_ON = ("Range", "Accept", "Accept-Encoding", "Authorization")


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


class Ledger:
    """Where requests are noted, by the clock that all of a guest's programs share."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, path: str, asked: str) -> None:
        found = RANGE.fullmatch(asked)
        start, end = (int(found[1]), int(found[2]) + 1) if found else (0, 0)
        line = json.dumps({"at_s": time.monotonic(), "path": path, "start": start, "end": end})
        os.write(self._fd, line.encode() + b"\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    origin_port: int
    ledger: Ledger
    pace: Pace

    def setup(self) -> None:
        super().setup()
        self._origin = http.client.HTTPConnection("127.0.0.1", self.origin_port)

    def finish(self) -> None:
        self._origin.close()
        super().finish()

    def do_GET(self) -> None:
        self.ledger.note(self.path, self.headers.get("Range", ""))
        headers = {name: self.headers[name] for name in PASSED_ON if name in self.headers}
        self._origin.request(self.command, self.path, headers=headers)
        answer = self._origin.getresponse()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        while piece := answer.read(PIECE_BYTES):
            self.pace.wait(len(piece))
            self.wfile.write(piece)

    do_HEAD = do_GET

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """The ledger says it all."""


def main() -> None:
    port, Handler.origin_port = int(sys.argv[1]), int(sys.argv[2])
    Handler.ledger, Handler.pace = Ledger(sys.argv[3]), Pace(float(sys.argv[4]))

    def hurry(*_: object) -> None:
        Handler.pace.bytes_per_s = math.inf

    signal.signal(signal.SIGUSR1, hurry)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()

"""The real thing: nginx on ports of loopback, in the foreground, its files in a directory."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
_ACCESS = re.compile(r'^(\d+) (\d+) "([^"]*)" (\S+) (\S+)$')

_CONFIG = """
daemon off;
master_process off;
pid {root}/pid;
error_log {root}/errors;
events {{}}
http {{
    log_format brief '$status $body_bytes_sent "$http_range" $request_method $request_uri';
    access_log {root}/accesses brief;
    client_body_temp_path {root}/t1;
    proxy_temp_path {root}/t2;
    fastcgi_temp_path {root}/t3;
    uwsgi_temp_path {root}/t4;
    scgi_temp_path {root}/t5;
    {before}
    server {{
        listen {address}:{port}{tls};
        root {root}/files;
        {server}
    }}
}}
"""


class Access(NamedTuple):
    """A line of its access log."""

    status: int
    body_bytes: int
    range: str
    method: str
    target: str


class Nginx:
    """One that runs; its files are below `files`."""

    def __init__(self, root: Path, address: str, port: int) -> None:
        self.host = f"{address}:{port}"
        self.port = port
        self.files = root / "files"
        self._root = root

    def put_blob(self, repository: str, blob_id: str, body: bytes) -> None:
        """Lay a blob where a registry would serve it."""
        blobs = self.files / "v2" / repository / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"sha256:{blob_id}").write_bytes(body)

    def accesses(self, count: int) -> list[Access]:
        """Its requests, at least `count`: it logs them when they are over."""
        for _ in _patience():
            lines = (self._root / "accesses").read_text().splitlines()
            found = [match for line in lines if (match := _ACCESS.match(line))]
            if len(found) >= count:
                return [Access(int(m[1]), int(m[2]), m[3], m[4], m[5]) for m in found]
        raise TimeoutError(f"fewer than {count} requests were logged")


@contextmanager
def nginx(
    root: Path,
    server: str = "",
    *,
    before: str = "",
    certificate: Path | None = None,
    address: str = "127.0.0.1",
) -> Iterator[Nginx]:
    """Run one with directives of its `server` block, and others `before` that. `certificate`: a PEM
    file of key and chain to speak TLS with."""
    assert PROGRAM is not None
    (root / "files").mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    if certificate is not None:
        server += f"\nssl_certificate {certificate};\nssl_certificate_key {certificate};"
    tls = " ssl" if certificate is not None else ""
    text = _CONFIG.format(
        root=root, address=address, port=port, server=server, before=before, tls=tls
    )
    (root / "nginx.conf").write_text(text)
    command = [PROGRAM, "-p", str(root), "-c", str(root / "nginx.conf"), "-e", str(root / "errors")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_listening(process, root, (address, port))
        yield Nginx(root, address, port)
    finally:
        process.kill()
        process.wait()


def _wait_until_listening(
    process: subprocess.Popen[bytes], root: Path, where: tuple[str, int]
) -> None:
    for _ in _patience():
        if process.poll() is not None:
            raise RuntimeError(f"nginx ended: {(root / 'errors').read_text()}")
        with socket.socket() as probe:
            if probe.connect_ex(where) == 0:
                return
    raise TimeoutError("nginx does not listen")


def _patience() -> Iterator[None]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        yield
        time.sleep(0.01)

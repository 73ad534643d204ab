"""nginx on the loopback: a web server for files, and what speaks TLS for a registry."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from harness.guest import Guest

NAME = "origin.test"
"""What the certificate is for beside the loopback's address: a registry on that is spoken to
without TLS."""

LOOPBACK = "127.0.0.1"
FILES = "/run/nginx"
"""Of the one in a guest."""

PATIENCE_S = 20.0

_CONFIGURATION = """\
daemon off;
user root;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/errors warn;
events {{}}
http {{
    access_log {access_log};
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {directory}/t1;
    proxy_temp_path {directory}/t2;
    fastcgi_temp_path {directory}/t3;
    uwsgi_temp_path {directory}/t4;
    scgi_temp_path {directory}/t5;
    server {{
        listen {ports.address}:{ports.http};
        listen {ports.address}:{ports.https} ssl;
        ssl_protocols TLSv1.3;
        ssl_certificate {directory}/server.pem;
        ssl_certificate_key {directory}/server.pem;
        {locations}
    }}
}}
"""

_REGISTRY = """\
location / {{
            proxy_pass http://{address};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffers 16 128k;
            proxy_buffer_size 128k;
            proxy_busy_buffers_size 256k;
            proxy_max_temp_file_size 0;
        }}"""

_BLOBS = """\
location ~ "^/v2/.+/blobs/sha256:(([0-9a-f]{{2}})[0-9a-f]{{62}})$" {{
            alias {storage}/docker/registry/v2/blobs/sha256/$2/$1/data;
        }}
        """


@dataclass(frozen=True)
class Ports:
    """The same by HTTP and by HTTPS."""

    http: int
    https: int
    address: str = LOOPBACK


def certificates(directory: Path) -> Path:
    """Make `server.pem`, key and certificate, in `directory`, and the authority's certificate
    beside it, which is returned."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "authority.pem")
    made = authority.issue_cert(NAME, LOOPBACK)
    made.private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    return directory / "authority.pem"


def configuration(directory: str, ports: Ports, locations: str, *, access_log: str = "off") -> str:
    """What nginx reads; its own files and `server.pem` are in `directory`."""
    return _CONFIGURATION.format(
        directory=directory, ports=ports, locations=locations, access_log=access_log
    )


def files(directory: Path) -> str:
    """Locations: the files of a directory."""
    return f"root {directory};"


def registry(address: str, storage: str = "") -> str:
    """Locations: a registry at `address`. With its `storage` it is not asked for blobs: nginx
    sends their files."""
    blobs = _BLOBS.format(storage=storage) if storage else ""
    return blobs + _REGISTRY.format(address=address)


@contextmanager
def on_host(directory: Path, locations: str, address: str = LOOPBACK) -> Iterator[Ports]:
    """Run one at an address of this machine, with the certificate in `directory`. Raises SystemExit
    when it does not listen."""
    ports = _free_ports(address)
    conf = directory / "nginx.conf"
    conf.write_text(configuration(str(directory), ports, locations))
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if program is None:
        raise SystemExit("nginx is missing: scripts/setup installs it")
    command: list[str | Path] = [program, "-p", directory, "-c", conf, "-e", directory / "errors"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _await(process, ports, directory)
            yield ports
        finally:
            # Its worker ends with it.
            process.terminate()


def in_guest(
    guest: Guest,
    ports: Ports,
    locations: str,
    *,
    within: Sequence[str] = (),
    access_log: str = "off",
) -> None:
    """Run one in a guest until its end; `within` is a command that enters a namespace. Raises
    CommandFailed when it does not answer."""
    with tempfile.TemporaryDirectory() as made:
        certificates(Path(made))
        for name in ("server.pem", "authority.pem"):
            guest.put(f"{FILES}/{name}", Path(made, name).read_bytes())
    text = configuration(FILES, ports, locations, access_log=access_log)
    guest.put(f"{FILES}/nginx.conf", text.encode())
    serve = [*within, "/usr/sbin/nginx", "-c", f"{FILES}/nginx.conf"]
    guest.start(serve, log=f"{FILES}/log")
    retry = "--retry 200 --retry-delay 0 --retry-connrefused"
    guest.run(f"curl -s -o /dev/null {retry} http://{ports.address}:{ports.http}/")


def _free_ports(address: str) -> Ports:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((address, 0))) for _ in range(2)]
        http, https = (found.getsockname()[1] for found in sockets)
        return Ports(http, https, address)


def _await(process: subprocess.Popen[bytes], ports: Ports, directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as trial:
            if trial.connect_ex((ports.address, ports.https)) == 0:
                return
        time.sleep(0.01)
    raise SystemExit(f"nginx does not listen: {(directory / 'errors').read_text()[-2000:]}")

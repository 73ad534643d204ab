"""A daemon started on a configuration that was written for nydusd."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fscached.control.client import Client, DaemonAway
from tests.native.conftest import until

ARTICLE = Path(__file__).parents[1] / "data" / "nydusd" / "article.json"

# Its paths are the host's own, /var/lib and /run: in a namespace they are the test's.
PRIVATE = """
mount --bind "$1/lib" /var/lib
mount --bind "$1/run" /run
exec "$2" -m fscached run --config "$3" --unsafe-no-supervisor
"""


def test_the_articles_file_starts_a_daemon(tmp_path: Path) -> None:
    """As it is: the cache is where it says, and what does not apply is named in one line."""
    for name in ("lib", "run"):
        (tmp_path / name).mkdir()
    command = ["unshare", "--mount", "sh", "-ec", PRIVATE, "sh"]
    with (tmp_path / "log").open("wb") as log:
        daemon = subprocess.Popen(
            [*command, str(tmp_path), sys.executable, str(ARTICLE)], stdout=log, stderr=log
        )
    client = Client(str(tmp_path / "run/fscached/api.sock"), 10.0)

    def running() -> dict[str, object] | None:
        if daemon.poll() is not None:
            raise RuntimeError((tmp_path / "log").read_text()[-3000:])
        try:
            return dict(client.get("/api/v2/status"))
        except DaemonAway:
            return None

    try:
        status = until(running, "the daemon does not answer")
    finally:
        daemon.terminate()
    assert status["state"] == "RUNNING"
    assert status["cache_directory"] == "/var/lib/nydus/cache/"
    assert (tmp_path / "lib/nydus/cache").is_dir()
    assert daemon.wait(20) == 0
    named = [line for line in (tmp_path / "log").read_text().splitlines() if "digest_valid" in line]
    assert len(named) == 1 and "level=info" in named[0]

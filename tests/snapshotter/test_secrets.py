"""A registry's password goes from containerd's label to the registry, and nowhere else."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fscached.control.client import Client, DaemonError
from tests.rafs_v6.trees import Built
from tests.snapshotter.device import Device
from tests.snapshotter.snapshotter import Snapshotter, until
from tests.source.conftest import basic_registry
from tests.source.docker_registry import DockerRegistry

__all__ = ["basic_registry"]

USER, PASSWORD = "alice", "open sesame"
AUTH = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
SECRETS = [PASSWORD.encode(), AUTH.encode(), AUTH.rstrip("=").encode()]
DOMAIN, FSID = "shared", "f" * 64

GETS = (
    *("/api/v1/daemon", "/api/v1/daemon/events", "/api/v1/config?id=" + FSID, "/api/v2/daemon"),
    *("/api/v1/metrics", "/api/v1/metrics/backend", "/api/v1/metrics/blobcache"),
    *("/api/v2/blobs", "/api/v2/images", "/api/v2/status", "/api/v2/cache"),
)


def found(directory: Path) -> list[Path]:
    """Files below a directory that hold a secret; sockets and pipes hold none."""
    paths = (Path(place, name) for place, _, names in os.walk(directory) for name in names)
    files = [path for path in paths if stat.S_ISREG(path.lstat().st_mode)]
    return [path for path in files if any(secret in path.read_bytes() for secret in SECRETS)]


def test_a_password_is_nowhere(
    make: Callable[..., Snapshotter],
    device: Device,
    built: Built,
    basic_registry: DockerRegistry,
) -> None:
    """Not in logs at their loudest, answers, errors, arguments, or files that we write; nor in
    what a snapshotter keeps for the successor, who has it all the same."""
    snapshotter = make()
    snapshotter.start()
    snapshotter.keeps(1)
    daemon = snapshotter.daemon
    daemon.put("/api/v1/daemon", {"log_level": "trace"})
    (blob,) = (basic_registry.put_blob("lib/app", data) for data in built.blobs.values())
    (boot := snapshotter.root / "image.boot").write_bytes(built.image.bootstrap)
    backend = {"host": basic_registry.host, "repo": "lib/app", "scheme": "http", "auth": AUTH}
    entry = {"type": "bootstrap", "id": FSID, "domain_id": DOMAIN}
    config = {"backend_type": "registry", "backend_config": backend, "metadata_path": str(boot)}
    config["cache_config"] = {"work_dir": str(snapshotter.root)}
    daemon.put("/api/v2/blobs", entry | {"config": config})
    device.open(DOMAIN, FSID)
    device.open(DOMAIN, blob)
    device.read(DOMAIN, blob, 0, 4096)
    said = [json.dumps(daemon.get(path)) for path in GETS]
    said += [_refusal(daemon, entry | {"config": config | {"metadata_path": "/nowhere"}})]
    said += [_refusal(daemon, entry | {"config": config | {"backend_config": [backend]}})]
    (pid,) = snapshotter.daemons()
    said.append(Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(pid, 9)
    until(lambda: snapshotter.info().get("state") == "RUNNING" or None, "no successor")
    data = device.read(DOMAIN, blob, 128 << 10, 132 << 10)
    assert data == built.cache_file(blob)[128 << 10 : 132 << 10]
    assert [text for text in said if any(secret.decode() in text for secret in SECRETS)] == []
    snapshotter.stop()
    assert "level=debug" in snapshotter.log.read_text()
    assert found(snapshotter.root) == []
    for name in ("state", "run"):
        assert stat.S_IMODE((snapshotter.root / name).stat().st_mode) == 0o700


def _refusal(daemon: Client, body: object) -> str:
    with pytest.raises(DaemonError) as error:
        daemon.put("/api/v2/blobs", body)
    return str(error.value)

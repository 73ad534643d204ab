"""`fscached cache verify`: what is compared, what is said, and what is asked of the daemon."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fscached.control.http import ApiError
from fscached.control.messages import CacheFileInfo
from fscached.store import Store
from tests.rafs_v6.trees import Built, build, directory, regular
from tests.test_store import BlobFile

Fscached = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def built() -> Built:
    return build(directory({b"a": regular(b"a" * 5000), b"b": regular(os.urandom(3_000_000))}))


@pytest.fixture
def files(daemon: Any, built: Built, config_file: str, tmp_path: Path) -> dict[str, Path]:
    """An image whose bootstrap and blob are in the cache, all of them, by kind."""
    state = tmp_path / "state"
    with open(config_file, "a") as file:
        file.write(f"state_directory = '{state}'\n")
    [(blob_id, remote)] = built.blobs.items()
    store = Store(state)
    image = store.adopt("host/app:1", "sha256:0", built.image.bootstrap, frozenset({blob_id}))
    asyncio.run(store.chunks(image, image.blobs[0], BlobFile(remote), True, 1.0))
    found = {"blob": tmp_path / "blob", "bootstrap": tmp_path / "bootstrap"}
    found["blob"].write_bytes(built.cache_file(blob_id))
    found["bootstrap"].write_bytes(built.image.bootstrap)
    daemon.cache_files = [
        CacheFileInfo(
            "dom", name, kind, "bound", True, path.stat().st_size, path.stat().st_size, 1.0,
            str(path), ["host/app:1"], str(image.path),
        )
        for (kind, path), name in zip(found.items(), (blob_id, image.fsid), strict=True)
    ]  # fmt: skip
    return found


def verified(fscached: Fscached, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    status, said, _ = fscached("cache", "verify", "-o", "json", *words)
    return status, {report["kind"]: report for report in json.loads(said)}


def test_what_is_right_is_counted(files: Any, fscached: Fscached) -> None:
    """Every chunk of the blob, and the bootstrap."""
    status, reports = verified(fscached)
    assert status == 0 and all(not report["unknown"] for report in reports.values())
    assert reports["blob"]["right"] > 1 and reports["bootstrap"]["right"] == 1
    status, said, noise = fscached("cache", "verify")
    total = reports["blob"]["right"] + 1
    assert said == f"2 files: {total} chunks right, 0 wrong\n" and "comparing" in noise


def test_what_is_wrong_is_named_and_repaired(
    files: dict[str, Path], daemon: Any, fscached: Fscached
) -> None:
    """By its offset, which is what the daemon is asked to fetch again; or not, and then why."""
    with files["blob"].open("r+b") as file:
        file.seek(9000)
        file.write(b"rot")
    status, reports = verified(fscached)
    [at] = reports["blob"]["bad"]
    assert status == 1 and 0 < at <= 9000 and not daemon.repaired
    status, reports = verified(fscached, "--repair")
    assert status == 0 and reports["blob"]["remedy"] == "1 chunks fetched again"
    assert [(it.volume, it.offsets) for it in daemon.repaired] == [("dom", [at])]
    daemon.repair_error = ApiError(409, "in use: unmount its images first")
    status, said, _ = fscached("cache", "verify", "--repair")
    assert status == 1 and "1 chunks are wrong, at bytes" in said and "unmount its images" in said


def test_what_cannot_be_compared_says_why(
    files: Any, daemon: Any, fscached: Fscached, tmp_path: Path
) -> None:
    """No name, no image, no chunk map: none of it is a failure of the cache."""
    blob, boot = daemon.cache_files
    unknown = msgspec.structs.replace(boot, kind="", state="orphan", images=[], bootstrap="")
    daemon.cache_files = [msgspec.structs.replace(blob, path=""), unknown, blob]
    for path in (tmp_path / "state/blobs").iterdir():
        path.unlink()
    status, said, _ = fscached("cache", "verify")
    lines = said.splitlines()
    assert status == 0
    assert "has no name before it is closed" in lines[0]
    assert "no image here has it" in lines[1]
    assert "nobody has read it yet" in lines[2]
    assert lines[3].endswith("0 chunks right, 0 wrong, 3 files not compared")

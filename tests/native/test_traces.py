"""Traces of real reads on this machine's kernel: recorded, compared, moved to another node."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.conftest import Node, image_of, noise, until
from tests.native.origin import Origin

CHUNK_BYTES = 65_536
FILES = noise(11, 12, 700_000)
"""More than one window brings."""


@pytest.fixture
def other(tmp_path: Path, registry: Origin) -> Iterator[Node]:
    """Another node, which has never seen an image."""
    (root := tmp_path / "other").mkdir()
    node = Node(root, registry.host)
    node.configure(prefetch={"enabled": True, "policies": ["trace"]})
    yield node
    node.end()


def trace(node: Node, verb: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [verb, "--config", str(node.config), *map(str, words)]
    command = [*node.program, "trace", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def shown(node: Node, *words: object) -> list[str]:
    """Names of files that were read, first used first."""
    done = trace(node, "show", *words, "-o", "json")
    assert done.returncode == 0, done.stderr
    return [use["path"] for use in json.loads(done.stdout)["files"]]


def read(target: Path, *names: str) -> None:
    for name in names:
        assert (target / name).read_bytes() == FILES[name]


def test_what_is_read_is_what_the_trace_says(
    node: Node, other: Node, registry: Origin, tmp_path: Path
) -> None:
    """In the order of reading; a second run tells what is new in it; a node that imports the trace
    has what was read before anybody asks, and nothing else."""
    reference = registry.add("app", image_of(FILES, chunk_bytes=CHUNK_BYTES))
    node.start()
    target = node.mount(reference)
    read(target, "f9", "f2")
    assert shown(node, target) == ["/f9", "/f2"]
    exported = tmp_path / "app.trace"
    assert trace(node, "export", reference, "--to", exported).returncode == 0

    assert "a new run" in trace(node, "record", target).stdout
    read(target, "f5")
    done = trace(node, "diff", exported, target)
    assert (done.returncode, done.stdout.split()[-1]) == (1, "/f5")
    assert shown(node, target, "--run") == ["/f5"]
    assert sorted(shown(node, reference)) == ["/f2", "/f5", "/f9"]
    assert trace(node, "diff", reference, target).returncode == 0

    other.start()
    assert trace(other, "import", exported).returncode == 0
    there = other.mount(reference, "there")
    until(lambda: _phase(other) == "done" or None, "prefetch does not end")
    (blob,) = other.wait()["images"][0]["blobs"]
    assert 2 * 700_000 <= blob["resident_bytes"] < 3 * 700_000 + 4 * CHUNK_BYTES
    asked = len(registry.sent)
    read(there, "f2", "f9")
    assert len(registry.sent) == asked


def _phase(node: Node) -> str:
    return str(node.wait()["images"][0]["prefetch"]["phase"])


def test_a_killed_daemon_loses_no_run(node: Node, registry: Origin) -> None:
    """What was read before the kill is known after it, as soon as it was on the disk."""
    reference = registry.add("app", image_of(FILES, chunk_bytes=CHUNK_BYTES))
    node.start()
    target = node.mount(reference)
    read(target, "f1")
    until(lambda: list(node.root.glob("state/traces/*.run")) or None, "the run is not kept")
    node.kill()
    until(lambda: node.daemon_pid() or None, "no successor")
    node.wait()
    read(target, "f7")
    assert sorted(shown(node, reference)) == ["/f1", "/f7"]

"""Prefetch on this machine's kernel: whole images by order, and what an earlier run read first."""

from __future__ import annotations

import json
import shutil

from tests.native.conftest import Node, image_of, noise, until
from tests.native.origin import Origin
from tests.native.test_reads import content, fetched_twice

MIB = 1 << 20


def prefetched(node: Node, *words: object) -> dict[str, object]:
    """What `fscached prefetch --wait` says in the end."""
    done = node.fscached("prefetch", *words, "--wait", "-o", "json")
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_an_image_nobody_has_mounted_is_brought(node: Node, registry: Origin) -> None:
    """All of it, once; nothing is left mounted or registered; later reads need no registry."""
    files = noise(21, 6, 700_000)
    built = image_of(files)
    reference = registry.add("app", built)
    node.start()
    refused = node.fscached("prefetch", reference, check=False)
    assert refused.returncode == 3 and "--wait" in refused.stderr
    report = prefetched(node, reference)
    assert (report["phase"], report["left_bytes"]) == ("done", 0)
    assert not fetched_twice(registry, list(built.blobs))
    assert node.wait()["images"] == []
    assert list((node.root / "run/prefetch").iterdir()) == []
    asked = len(registry.asked(list(built.blobs)))
    assert content(node.mount(reference)) == files
    assert len(registry.asked(list(built.blobs))) == asked


def test_a_mounted_image_is_brought_by_order(node: Node, registry: Origin) -> None:
    """Although its daemon prefetches nothing by itself; what was read before is not asked again."""
    files = noise(22, 6, 700_000)
    built = image_of(files)
    node.start()
    target = node.mount(registry.add("app", built))
    assert (target / "f3").read_bytes() == files["f3"]
    assert "off" in node.fscached("status").stdout
    assert prefetched(node, target)["phase"] == "done"
    assert not fetched_twice(registry, list(built.blobs))
    registry.down = True
    assert content(target) == files


def test_what_a_run_read_first_is_there_before_it_is_asked_for(
    node: Node, registry: Origin
) -> None:
    """The cache is lost, the trace is not: what it names is brought, nothing else is, and the same
    reads need no registry."""
    files = noise(23, 12, MIB)
    built = image_of(files)
    reference = registry.add("app", built)
    node.configure(fetch={"window_bytes": 4096, "window_limit_bytes": 4096})
    node.start()
    target = node.mount(reference)
    order = ["f7", "f2", "f10"]
    for name in order:
        assert (target / name).read_bytes() == files[name]
    node.fscached("umount", target)
    traces = node.root / "state/traces"
    until(lambda: list(traces.glob("*.trace")) or None, "no trace was kept")
    node.stop()
    shutil.rmtree(node.cache)

    node.configure(prefetch={"enabled": True, "policies": ["trace"]})
    node.start()
    registry.sent.clear()
    target = node.mount(reference)
    until(lambda: _phase(node) == "done" or None, "the trace is not brought")
    assert node.wait()["images"][0]["blobs"][0]["resident_bytes"] == 3 * MIB
    assert not fetched_twice(registry, list(built.blobs))
    registry.down = True
    for name in order:
        assert (target / name).read_bytes() == files[name]
    assert node.wait()["totals"]["reads_failed"] == 0


def _phase(node: Node) -> str:
    images = node.wait()["images"]
    return str(images[0]["prefetch"]["phase"]) if images else ""

"""Cache files that nobody needs any more, on this machine's kernel."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest

from tests.native.conftest import Node, forget_pages, image_of, noise, until
from tests.native.origin import Origin

MIB = 1 << 20


def files(node: Node) -> set[str]:
    return {path.name for path in (node.cache / "files").rglob("*") if path.is_file()}


def content(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir()}


def collect(node: Node, *words: str) -> dict[str, list[dict[str, object]]]:
    found = json.loads(node.fscached("cache", "gc", *words, "-o", "json").stdout)
    assert isinstance(found, dict)
    return found


def test_what_is_mounted_stays_and_what_is_not_goes(node: Node, registry: Origin) -> None:
    """The lease on a file tells; an incomplete image, a complete one, and one mounted by nobody.
    Reads go on meanwhile, and an image whose files went is fetched anew."""
    trees = [noise(seed, 2, MIB) for seed in (50, 51, 52)]
    built = [image_of(tree) for tree in trees]
    references = [registry.add(f"app{number}", it) for number, it in enumerate(built)]
    [whole, partly, idle] = [next(iter(it.blobs)) for it in built]
    node.start()
    targets = [node.mount(reference, f"m{n}") for n, reference in enumerate(references)]
    assert content(targets[0]) == trees[0]
    assert (targets[1] / "f0").read_bytes() == trees[1]["f0"]
    assert content(targets[2]) == trees[2]
    node.fscached("umount", targets[2])
    assert files(node) == {whole, partly, idle}
    until(lambda: node.client.get("/api/v2/images").__len__() == 2 or None, "not forgotten")
    assert [it["cookie"] for it in collect(node, "--all", "--dry-run")["culled"]] == [idle]
    assert [it["cookie"] for it in collect(node, "--all")["culled"]] == [idle]
    assert files(node) == {whole, partly}
    for target, tree in zip(targets[:2], trees, strict=False):
        forget_pages(target)
        assert content(target) == tree
    assert content(node.mount(references[2], "again")) == trees[2]


def test_the_kernel_is_asked_not_our_books(node: Node, registry: Origin) -> None:
    """A complete image that outlives its daemon is bound by nobody, and in use all the same."""
    tree = noise(53, 1, MIB)
    built = image_of(tree)
    [blob_id] = built.blobs
    node.start()
    target = node.mount(registry.add("app", built))
    assert content(target) == tree
    node.stop()
    node.start()
    swept = collect(node, "--all")
    assert swept["culled"] == [] and [it["cookie"] for it in swept["busy"]] == [blob_id]
    forget_pages(target)
    assert content(target) == tree


def test_a_budget_evicts_by_last_use(node: Node, registry: Origin) -> None:
    """The image unmounted first goes first; the one that is mounted stays."""
    node.configure(cache={"budget_bytes": 5 * MIB, "sweep_interval_s": 1})
    built = [image_of(noise(seed, 2, MIB)) for seed in (54, 55, 56)]
    references = [registry.add(f"app{number}", it) for number, it in enumerate(built)]
    blob_ids = [next(iter(it.blobs)) for it in built]
    node.start()
    for name, reference in zip("ab", references, strict=False):
        target = node.mount(reference, name)
        content(target)
        node.fscached("umount", target)
    assert files(node) == set(blob_ids[:2])
    content(node.mount(references[2], "c"))
    until(lambda: files(node) == set(blob_ids[1:]) or None, "nothing was evicted")
    until(lambda: node.wait()["cache"]["culled_files"] == 1 or None, "not counted")
    status = node.wait()["cache"]
    assert status["budget_bytes"] == 5 * MIB
    assert 4 * MIB <= status["used_bytes"] <= 5 * MIB and status["excess_bytes"] == 0


def spoil(node: Node, blob_id: str, at: int) -> None:
    """A block rots on the disk. Where there is a mark the daemon is asked, and allows it."""
    [path] = (node.cache / "files").rglob(blob_id)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as block:
        block[:] = bytes(range(256)) * 16
        os.pwrite(fd, block, at // 4096 * 4096)
    os.close(fd)


def verified(node: Node, *words: str) -> tuple[int, list[dict[str, object]]]:
    done = node.fscached("cache", "verify", "-o", "json", *words, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("whole", [True, False], ids=["complete", "incomplete"])
def test_what_the_disk_has_spoiled_is_found_and_fetched_again(
    node: Node, registry: Origin, whole: bool
) -> None:
    """Under a mount that has it open, with a mark and without one."""
    tree = noise(57, 4, MIB)
    built = image_of(tree)
    [blob_id] = built.blobs
    node.configure(fetch={"window_bytes": 4096, "window_limit_bytes": 4096})
    node.start()
    target = node.mount(registry.add("app", built))
    for name in tree if whole else ("f0", "f1"):
        assert (target / name).read_bytes() == tree[name]
    status, [right] = verified(node)
    assert status == 0 and right["right"] == (4 if whole else 2) and right["bad"] == []
    node.wait()
    if whole:
        until(lambda: "complete, and read" in node.log.read_text() or None, "not complete")
    spoil(node, blob_id, MIB + 8192)
    status, [wrong] = verified(node)
    assert status == 1 and wrong["bad"] == [MIB]
    status, [repaired] = verified(node, "--repair")
    assert status == 0 and repaired["remedy"] == "1 chunks fetched again"
    assert content(target) == tree
    assert verified(node)[0] == 0

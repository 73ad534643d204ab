"""`scripts/demo`: the main job on a real kernel, with its result as one line of JSON.

An image is made from a tree and pushed to docker-registry; a guest mounts it, runs a program from
it, reads every file, drops its caches and reads everything again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import content, disk, image, kernel, listing, store
from harness.daemon import Daemon, drop_caches
from harness.guest import Guest
from harness.qemu import with_one_retry
from harness.registry import Registry

MOUNT = "/mnt/image"
LISTING_TIMEOUT_S = 600.0
PROGRAMS = {
    "usr/bin/python3": "chroot {mount} /usr/bin/python3 -V",
    "bin/sh": "chroot {mount} /bin/sh -c 'echo hello from the image'",
}
ANY_FILE = "find {mount} -type f -size +0 -print -quit | xargs -d '\\n' head -c 4096 | wc -c"
SCRIPT = "app/main.py"


def main() -> int:
    arguments = _arguments()
    began = time.monotonic()
    try:
        kernel.prepared(arguments.kernel)
    except kernel.NotHere as reason:
        _say(f"not on this machine: {reason}; --kernel 6.1 does it in a virtual machine")
        return 3
    with tempfile.TemporaryDirectory(prefix="fscached-demo-") as scratch:
        result = with_one_retry(lambda: _demo(arguments, Path(scratch)))
    _say(f"done in {time.monotonic() - began:.0f} s")
    print(json.dumps(result))
    return 0 if result["ok"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--source", type=Path, metavar="DIR", help="the tree to make an image of")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--kernel", default="6.1", metavar="SERIES", help="6.1 (default), 6.12, or 6.14 and later"
    )
    where.add_argument(
        "--native",
        action="store_const",
        const=kernel.NATIVE,
        dest="kernel",
        help="this machine's own kernel (6.14 or later), without a virtual machine",
    )
    parser.add_argument("--prefetch", action="store_true", help="fetch the rest in the background")
    arguments = parser.parse_args()
    if arguments.source is not None and not arguments.source.is_dir():
        parser.error(f"--source {arguments.source}: no such directory")
    return arguments


def _demo(arguments: argparse.Namespace, scratch: Path) -> dict[str, object]:
    tree, origin = _image(arguments.source, scratch)
    _say("listing the source tree")
    expected = listing.dump(str(tree))
    results = store.root() / "results"
    results.mkdir(exist_ok=True)
    _say(f"starting a guest on kernel {arguments.kernel}")
    disks = [disk.cache(scratch / "cache.ext4"), origin.disk]
    with Guest(arguments.kernel, results / "demo.console", disks=disks) as guest:
        result = _scene(guest, tree, arguments.prefetch, expected, results / "demo.jsonl")
        guest.power_off()
    return result | {"image_bytes": origin.blob_bytes(image.NAME)}


def _image(source: Path | None, scratch: Path) -> tuple[Path, image.Origin]:
    if source is None:
        _say("making a Debian tree with python3 and an image of three layers (kept for later runs)")
        return content.content().tree, image.debian()
    _say(f"making an image of {source}")
    return source, image.of_directory(source, scratch)


def _scene(
    guest: Guest, tree: Path, prefetch: bool, expected: str, found_at: Path
) -> dict[str, object]:
    registry, daemon = Registry(guest), Daemon(guest, {"prefetch": {"enabled": prefetch}})
    registry.start()
    daemon.start()
    guest.reset_cachefiles_counts()
    program = next((run for path, run in PROGRAMS.items() if (tree / path).exists()), ANY_FILE)
    _say("mounting and running a program from the image, cold")
    seconds, output = _first_output(guest, program.format(mount=MOUNT))
    fetched = sum(request.sent_bytes for request in registry.requests())
    _say(f"after {seconds:.2f} s and {fetched} bytes: {output}")
    if (tree / SCRIPT).exists():
        _say(guest.run(["chroot", MOUNT, "/usr/bin/python3", f"/{SCRIPT}"]).stdout.strip())
    _say("reading every file")
    first = _listing(guest)
    cold = daemon.asked()
    _say("dropping caches and reading every file again")
    drop_caches(guest)
    second = _listing(guest)
    hit = daemon.asked() - cold
    found_at.write_text(first)
    mismatches = [*listing.differences(expected, first), *listing.differences(expected, second)]
    for line in mismatches[:20]:
        _say(f"  {line}")
    requests = registry.requests()
    transport = daemon.status()["transport"]
    daemon.umount(MOUNT)
    ended = daemon.stop()
    return {
        "ok": not mismatches and hit == 0 and ended == 0,
        "kernel": guest.run(["uname", "-r"]).stdout.strip(),
        "transport": transport,
        "files_compared": expected.count("\n"),
        "mismatches": len(mismatches),
        "listing": str(found_at),
        "bytes_fetched_to_first_output": fetched,
        "seconds_to_first_output": round(seconds, 3),
        "read_requests_cold": cold,
        "read_requests_hit": hit,
        "origin_requests": len(requests),
        "origin_bytes": sum(request.sent_bytes for request in requests),
    }


def _first_output(guest: Guest, program: str) -> tuple[float, str]:
    """Seconds, by the guest's clock, from the mount's start to the program's output."""
    mount = f"fscached mount {image.reference(image.NAME)} {MOUNT} >/dev/null"
    timed = f"mkdir -p {MOUNT}; date +%s.%N; {mount}; {program} 2>&1; date +%s.%N"
    began, *output, ended = guest.run(timed, timeout_s=120).stdout.splitlines()
    return float(ended) - float(began), " ".join(output)


def _listing(guest: Guest) -> str:
    walk = ["python3", "-m", "harness.listing", MOUNT]
    return guest.run(walk, cwd="/run", timeout_s=LISTING_TIMEOUT_S).stdout


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Make, or find kept, everything guests are made of: `python -m harness --kernel 6.12`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from harness import content, disk, kernel, snapshotter
from harness.apt import NoMirror
from harness.command import CommandFailed


def _timed(name: str, make: Callable[[], object]) -> None:
    started = time.monotonic()
    make()
    print(f"setup: {name}: {time.monotonic() - started:.1f} s", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", required=True, metavar="SERIES")
    kernels = parser.parse_args().kernel

    def all_kernels() -> None:
        for name in kernels:
            _timed(f"kernel {name}", partial(kernel.prepared, name))

    # Downloading, compiling and unpacking overlap well, also on two cores.
    with ThreadPoolExecutor() as pool:
        steps = [
            pool.submit(all_kernels),
            pool.submit(_timed, "root disk", disk.root),
            pool.submit(_timed, "nydus-snapshotter", snapshotter.of_guests),
            pool.submit(_timed, "image content", content.content),
            pool.submit(_timed, "project disk", disk.site),
        ]
    for step in steps:
        step.result()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (kernel.NoSuchKernel, kernel.NotHere, NoMirror, CommandFailed, OSError) as error:
        sys.exit(f"setup: {error}")

"""`scripts/bench NAME`: one bench; its last line is one JSON object.

Each file in `workloads` is a bench of its name, found by being there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Protocol, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "vm-tests"))

import workloads
from environments import Options
from harness.qemu import GuestPanic
from report import Report, table


class Workload(Protocol):
    """A module of `workloads`; its docstring's first line says what is measured."""

    REPETITIONS: int

    def run(self, options: Options) -> Report: ...


def main() -> int:
    names = sorted(module.name for module in pkgutil.iter_modules(workloads.__path__))
    benches = {name.replace("_", "-"): name for name in names}
    arguments = _arguments(list(benches))
    module = importlib.import_module(f"workloads.{benches[arguments.bench]}")
    workload = cast(Workload, module)
    with tempfile.TemporaryDirectory(prefix="fscached-bench-") as scratch:
        options = Options(
            bench=arguments.bench,
            kernel=arguments.kernel,
            repetitions=arguments.repetitions or workload.REPETITIONS,
            scratch=Path(scratch),
        )
        report = _with_one_retry(workload, options)
    print(table(report))
    print(json.dumps(dataclasses.asdict(report)))
    return 0


def _arguments(benches: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("bench", choices=benches, metavar="NAME", help=", ".join(benches))
    parser.add_argument("--kernel", default="6.12", metavar="SERIES", help="6.1 or 6.12 (default)")
    parser.add_argument("--repetitions", type=int, metavar="N", help="of every measurement")
    return parser.parse_args()


def _with_one_retry(workload: Workload, options: Options) -> Report:
    """Under emulation a guest's kernel now and then dies of the emulator."""
    try:
        return workload.run(options)
    except GuestPanic as panic:
        print(f"the guest's kernel died, once more: {panic}", file=sys.stderr)
        return workload.run(options)


if __name__ == "__main__":
    sys.exit(main())

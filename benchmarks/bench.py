"""`scripts/bench NAME`: one bench; its last line is one JSON object.

Each file in `workloads` is a bench of its name, found by being there. It has `run` for a guest,
`run_native` for this machine's own kernel, or both; `draw` when its plot is of another kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "vm-tests"))

import workloads
from environments import Options, with_one_retry
from harness import store
from report import Report, table

Run = Callable[[Options], Report]


def main() -> int:
    names = sorted(module.name for module in pkgutil.iter_modules(workloads.__path__))
    benches = {name.replace("_", "-"): name for name in names}
    arguments = _arguments(list(benches))
    module = importlib.import_module(f"workloads.{benches[arguments.bench]}")
    run: Run | None = getattr(module, "run_native" if arguments.native else "run", None)
    if run is None:
        raise SystemExit(
            f"{arguments.bench}: {'not' if arguments.native else 'only'} with --native"
        )
    # Natively beside the trees it is compared with: on the same file system.
    place = store.root() if arguments.native else None
    with tempfile.TemporaryDirectory(prefix="fscached-bench-", dir=place) as scratch:
        options = Options(
            bench=arguments.bench,
            kernel=arguments.kernel,
            repetitions=arguments.repetitions or module.REPETITIONS,
            scratch=Path(scratch),
            only=tuple(arguments.only),
            long=arguments.long,
        )
        report = with_one_retry(partial(run, options))
    if arguments.plot is not None:
        draw = getattr(module, "draw", None) or importlib.import_module("plots.bars").draw
        draw(report, arguments.plot)
    print(table(report))
    print(json.dumps(dataclasses.asdict(report)))
    return 0


def _arguments(benches: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("bench", choices=benches, metavar="NAME", help=", ".join(benches))
    parser.add_argument("--kernel", default="6.12", metavar="SERIES", help="6.1 or 6.12 (default)")
    parser.add_argument("--repetitions", type=int, metavar="N", help="of every measurement")
    parser.add_argument(
        "--native", action="store_true", help="on this machine's own kernel; as root"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help="of the bench (repeatable)"
    )
    parser.add_argument("--long", action="store_true", help="what takes very long too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios, as SVG")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

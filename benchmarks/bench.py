"""`scripts/bench NAME`: one bench; its last line is one JSON object. `scripts/bench all`: all of
them, and one report.

Each file in `workloads` is a bench of its name, found by being there. It has `run` for a guest,
`run_native` for this machine's own kernel, or both; `GUEST_REPETITIONS` when a guest's are fewer,
`draw` when its plot is of another kind, `TAKES_PEER` when another daemon can take part.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "vm-tests"))

import suite
import workloads
from environments import Options
from harness import store
from harness.qemu import with_one_retry
from report import Report, table

Run = Callable[[Options], Report]

ALL = "all"
PEER_HELP = "in a guest also another daemon that is called and spoken to as nydusd is"
ONLY_HELP = "of the bench, or a bench of `all`, also as NAME-native (repeatable)"


def main() -> int:
    names = sorted(module.name for module in pkgutil.iter_modules(workloads.__path__))
    benches = {name.replace("_", "-"): name for name in names}
    arguments = _arguments(list(benches))
    if arguments.bench == ALL:
        return _all(arguments, benches)
    module = importlib.import_module(f"workloads.{benches[arguments.bench]}")
    run: Run | None = getattr(module, "run_native" if arguments.native else "run", None)
    if run is None:
        raise SystemExit(
            f"{arguments.bench}: {'not' if arguments.native else 'only'} with --native"
        )
    if arguments.peer and (arguments.native or not hasattr(module, "TAKES_PEER")):
        raise SystemExit(f"{arguments.bench}: no --peer here")
    # Natively beside the trees it is compared with: on the same file system.
    place = store.root() if arguments.native else None
    with tempfile.TemporaryDirectory(prefix="fscached-bench-", dir=place) as scratch:
        options = Options(
            bench=arguments.bench,
            kernel=arguments.kernel,
            repetitions=arguments.repetitions or _repetitions(module, native=arguments.native),
            scratch=Path(scratch),
            only=tuple(arguments.only),
            long=arguments.long,
            peer=arguments.peer,
        )
        report = with_one_retry(partial(run, options))
    if arguments.plot is not None:
        draw = getattr(module, "draw", None) or importlib.import_module("plots.bars").draw
        draw(report, arguments.plot)
    print(table(report))
    print(json.dumps(dataclasses.asdict(report)))
    return 0


def _repetitions(module: ModuleType, *, native: bool) -> int:
    """A bench's own; a guest's emulated processor may allow fewer."""
    here: int = module.REPETITIONS
    return here if native else getattr(module, "GUEST_REPETITIONS", here)


def _all(arguments: argparse.Namespace, benches: Mapping[str, str]) -> int:
    if arguments.report is None or arguments.native or arguments.plot:
        raise SystemExit("all: needs --report DIR, and has --native and --plot of its own")
    modules = {name: importlib.import_module(f"workloads.{file}") for name, file in benches.items()}
    options = ["--kernel", arguments.kernel]
    if arguments.repetitions:
        options += ["--repetitions", str(arguments.repetitions)]
    if arguments.long:
        options.append("--long")
    wanted = suite.runs(modules, arguments.only)
    peers = {name for name, module in modules.items() if hasattr(module, "TAKES_PEER")}
    if arguments.peer:
        wanted = [
            suite.with_peer(run, arguments.peer) if run.name in peers else run for run in wanted
        ]
    return suite.run(wanted, arguments.report, options, long=arguments.long)


def _arguments(benches: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("bench", choices=[*benches, ALL], metavar="NAME", help=", ".join(benches))
    parser.add_argument("--kernel", default="6.12", metavar="SERIES", help="6.1 or 6.12 (default)")
    parser.add_argument("--repetitions", type=int, metavar="N", help="of every measurement")
    parser.add_argument(
        "--native", action="store_true", help="on this machine's own kernel; as root"
    )
    parser.add_argument("--only", action="append", default=[], metavar="PART", help=ONLY_HELP)
    parser.add_argument("--long", action="store_true", help="what takes very long too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios, as SVG")
    parser.add_argument("--peer", default="", metavar="CMD", help=PEER_HELP)
    parser.add_argument("--report", type=Path, metavar="DIR", help="of `all`")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

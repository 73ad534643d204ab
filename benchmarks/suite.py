"""`scripts/bench all`: every bench in every environment it has, and one report of them.

Each is a program of its own, with a limit. What it says is kept in the report's directory, and is
not asked for again while the tree is the same: so a run that was ended goes on where it was.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from document import Section, markdown
from environments import ROOT, commit
from report import Report, read

LIMIT_S = 1800.0
LONG_LIMIT_S = 4 * 3600.0
DIRTY = "-dirty"
DOCUMENT = "report.md"


class Run(NamedTuple):
    """A bench in an environment: `name` is that of its files."""

    name: str
    title: str
    argv: list[str]
    about: str


def runs(benches: Mapping[str, ModuleType], only: Sequence[str]) -> list[Run]:
    """All of them, or those that `only` names: `hit` is both environments', `hit-native` one's.

    Raises SystemExit for a name that is none.
    """
    found = [run for name, module in benches.items() for run in _environments(name, module)]
    known = {run.name for run in found} | {run.argv[0] for run in found}
    if unknown := sorted(set(only) - known):
        raise SystemExit(f"{', '.join(unknown)}: no bench; there are {', '.join(sorted(known))}")
    return [run for run in found if not only or {run.name, run.argv[0]} & set(only)]


def with_peer(run: Run, command: str) -> Run:
    """The same beside another daemon."""
    return run._replace(argv=[*run.argv, "--peer", command])


def _environments(name: str, module: ModuleType) -> Iterator[Run]:
    about = (inspect.getdoc(module) or "").partition("\n\n")[0]
    if hasattr(module, "run"):
        yield Run(name, f"{name}, in a guest", [name], about)
    if hasattr(module, "run_native"):
        title = f"{name}, on this machine's own kernel"
        yield Run(f"{name}-native", title, [name, "--native"], about)


def run(wanted: Sequence[Run], directory: Path, options: Sequence[str], *, long: bool) -> int:
    """Run what is not there yet, write the document after each; 1 when one of them failed."""
    directory.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    for number, one in enumerate(wanted, 1):
        said = directory / f"{one.name}.json"
        if _is_current(said):
            _say(f"{number} of {len(wanted)}: {one.title}: there already")
            continue
        _say(f"{number} of {len(wanted)}: {one.title}")
        began = time.monotonic()
        failures[one.name] = _measure(one, directory, options, LONG_LIMIT_S if long else LIMIT_S)
        outcome = failures[one.name].rpartition("\n")[2] or "done"
        _say(f"{one.name}: {outcome} after {time.monotonic() - began:.0f} s")
        write(wanted, directory, failures)
    write(wanted, directory, failures)
    _say(f"the report is {directory / DOCUMENT}")
    return int(any(failures.values()))


def write(wanted: Sequence[Run], directory: Path, failures: Mapping[str, str]) -> None:
    """The document, of what is there now."""
    sections = []
    for one in wanted:
        report = _known(directory / f"{one.name}.json")
        plot = f"{one.name}.svg"
        there = report is not None and (directory / plot).exists()
        failure = failures.get(one.name) or "Not run yet."
        section = Section(one.title, one.about, report, failure, plot if there else "")
        sections.append(section)
    (directory / DOCUMENT).write_text(markdown(sections))


def _measure(one: Run, directory: Path, options: Sequence[str], limit_s: float) -> str:
    """Why there is no result, or nothing."""
    said, plot = directory / f"{one.name}.json", directory / f"{one.name}.svg"
    said.unlink(missing_ok=True)
    plot.unlink(missing_ok=True)
    argv = ["scripts/bench", *one.argv, *options, "--plot", _named(plot)]
    # All that it starts ends with it: guests, and the name space of a native bench.
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as bench:
        try:
            output, errors = bench.communicate(timeout=limit_s)
        except BaseException as error:
            bench.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"no end after {limit_s:.0f} s"
            raise
    if bench.returncode != 0:
        tail = errors.decode(errors="replace").strip().splitlines()
        return tail[-1] if tail else f"exit status {bench.returncode}"
    last = output.decode().strip().rpartition("\n")[2]
    said.write_text(json.dumps(json.loads(last), indent=1) + "\n")
    return ""


def _named(file: Path) -> str:
    """As benches are called with it: from the tree's root, if it is there."""
    absolute = file.absolute()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


def _is_current(said: Path) -> bool:
    """Whether it is of this very tree."""
    report = _known(said)
    now = commit()
    return report is not None and report.environment["commit"] == now and DIRTY not in now


def _known(said: Path) -> Report | None:
    return read(said.read_text()) if said.exists() else None


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)

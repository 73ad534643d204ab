"""Results of long runs, committed below benchmarks/results."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping

from harness import command, project

RESULTS = project.ROOT / "benchmarks/results"


def counted(
    kernel: str,
    seed: int,
    name: str,
    count: int,
    of: int,
    facts: Mapping[str, object],
    *,
    keep: bool,
) -> None:
    """Say how far a count has come, and `keep` it beside the others of its kernel, in the place of
    what was there by this name: a run that ends early has counted what it has counted."""
    facts = {"count": count, "of": of, **facts}
    print(f"{name}, seed {seed}: {facts}")
    if keep:
        _keep(kernel, seed, name, facts)


def _keep(kernel: str, seed: int, name: str, facts: Mapping[str, object]) -> None:
    """With the commit it is of."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"crash-{kernel}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    commit = command.run(["git", "-C", project.ROOT, "rev-parse", "HEAD"]).strip()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    kept[name] = {"seed": seed, "commit": commit, "date": date, **facts}
    path.write_text(json.dumps(kept, indent=2) + "\n")

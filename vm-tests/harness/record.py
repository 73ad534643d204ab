"""Results of long runs, committed below benchmarks/results."""

from __future__ import annotations

import datetime
import json
from typing import Any

from harness import command, project

RESULTS = project.ROOT / "benchmarks/results"


def keep(kernel: str, seed: int, name: str, facts: dict[str, Any]) -> None:
    """Put a result beside the others of its kernel, with the commit it is of."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"crash-{kernel}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    commit = command.run(["git", "-C", project.ROOT, "rev-parse", "HEAD"]).strip()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    kept[name] = {"seed": seed, "commit": commit, "date": date, **facts}
    path.write_text(json.dumps(kept, indent=2) + "\n")

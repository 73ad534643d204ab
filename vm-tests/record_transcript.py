#!/usr/bin/python3
"""Record what goes over the cachefiles device during two mounts, for tests/transport to replay.

Writes tests/data/cachefiles/SERIES.jsonl for each kernel series named (6.1, 6.12).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import disk
from harness.guest import Guest

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "tests" / "data" / "cachefiles"


def record(series: str) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        cache = disk.cache(Path(scratch) / "cache.ext4")
        with Guest(series, Path(scratch) / "console", disks=[cache]) as guest:
            guest.put("/run/scenarios.py", (HERE / "transport_scenarios.py").read_bytes())
            program = ["/usr/bin/python3", "/run/scenarios.py", "transcript"]
            lines = json.loads(guest.run(program).stdout)["transcript"]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{series}.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(record(name))

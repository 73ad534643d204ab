"""Benches are programs, not a package: they find each other and the harness as programs do."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "vm-tests")]

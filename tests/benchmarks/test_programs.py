"""The C programs beside the benches."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from environments.programs import HERE, compiled

SOURCES = sorted(HERE.glob("*.c"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_program_compiles_and_says_how_it_is_called(source: Path) -> None:
    """Without a warning; exit status 2 is a wrong call."""
    done = subprocess.run([compiled(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: " in done.stderr

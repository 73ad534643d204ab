"""What nydus-image wrote: see tests/data/nydus/README.md."""

from pathlib import Path

import pytest

NYDUS = Path(__file__).parents[1] / "data" / "nydus"


@pytest.fixture(scope="session")
def nydus_bootstrap() -> bytes:
    return (NYDUS / "rafs-v6-2.2.boot").read_bytes()


@pytest.fixture(scope="session")
def nydus_blob() -> bytes:
    name = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    return (NYDUS / name).read_bytes()

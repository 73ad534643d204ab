"""The real nydus-snapshotter, our daemon, and a stand-in for the kernel's device between them."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.native.conftest import image_of, noise
from tests.native.origin import Origin, origin
from tests.rafs_v6.trees import Built
from tests.snapshotter.device import Device
from tests.snapshotter.snapshotter import HOUSE, Snapshotter

sys.path.insert(0, str(HOUSE / "vm-tests"))

from harness import apt, snapshotter
from harness.command import CommandFailed


@pytest.fixture(scope="session")
def program() -> Path:
    """Debian's package, kept below the cache directory; nothing is installed."""
    if os.geteuid() != 0:
        pytest.skip("not root: nydus-snapshotter mounts")
    try:
        return snapshotter.package() / snapshotter.PROGRAM
    except (apt.NoMirror, CommandFailed) as error:
        pytest.skip(
            f"Debian's {snapshotter.PACKAGE} cannot be fetched: {str(error).splitlines()[0]}"
        )


@pytest.fixture
def root() -> Iterator[Path]:
    """Short, since sockets are deep below it."""
    directory = Path(tempfile.mkdtemp(prefix="fs-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def device(root: Path) -> Iterator[Device]:
    """The kernel's."""
    device = Device(root)
    yield device
    device.close()


@pytest.fixture
def make(
    program: Path, root: Path, device: Device, registry: Origin
) -> Iterator[Callable[..., Snapshotter]]:
    """Makes the test's snapshotter, which is ended afterwards, and before the registry."""
    made: list[Snapshotter] = []

    def make(policy: str = "failover") -> Snapshotter:
        made.append(Snapshotter(program, root, device.path, policy))
        return made[-1]

    yield make
    for one in made:
        one.close()
        print(one.log.read_text())  # for whoever looks at a failure


@pytest.fixture(name="snapshotter")
def running(make: Callable[..., Snapshotter]) -> Snapshotter:
    """One that runs, with failover."""
    snapshotter = make()
    snapshotter.start()
    return snapshotter


@pytest.fixture(scope="session")
def built() -> Built:
    """An image with one blob."""
    return image_of(noise(3, 4, 400_000))


@pytest.fixture
def registry(built: Built) -> Iterator[Origin]:
    """Has the image as `app`; what it answers can be held back."""
    with origin() as served:
        served.add("app", built)
        yield served

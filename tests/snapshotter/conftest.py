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

from harness import apt, store
from harness.command import CommandFailed

RELEASE, PACKAGE, PROGRAM = "trixie", "nydus-snapshotter", "usr/bin/containerd-nydus-grpc"


def _fetch(directory: Path) -> None:
    archive = apt.Archive(RELEASE)
    archive.refresh()
    archive.extract([PACKAGE], directory)


@pytest.fixture(scope="session")
def program() -> Path:
    """Debian's package, kept below the cache directory; nothing is installed."""
    if os.geteuid() != 0:
        pytest.skip("not root: nydus-snapshotter mounts")
    try:
        name = store.key(RELEASE, PACKAGE, 1)
        return store.kept("snapshotters", name, _fetch, keep=1) / PROGRAM
    except (apt.NoMirror, CommandFailed) as error:
        pytest.skip(f"Debian's {PACKAGE} cannot be fetched: {str(error).splitlines()[0]}")


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
    for snapshotter in made:
        snapshotter.close()
        print(snapshotter.log.read_text())  # for whoever looks at a failure


@pytest.fixture
def snapshotter(make: Callable[..., Snapshotter]) -> Snapshotter:
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

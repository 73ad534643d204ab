"""The ground every other scenario stands on."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
from harness import disk, link
from harness.guest import Guest
from harness.kernel import NATIVE
from harness.registry import Registry, Request

BIND = f"""
import os
device = os.open("/dev/cachefiles", os.O_RDWR)
for command in (b"dir {disk.CACHE_MOUNT}", b"tag boot", b"bind ondemand"):
    os.write(device, command)
"""

# Refuse the first OPEN: the shortest way to make the kernel ask exactly once.
REFUSE_MOUNT = """
import select, struct, subprocess
mount = subprocess.Popen(["mount", "-t", "erofs", "-o", "fsid=nobody", "none", "/mnt"])
select.select([device], [], [])
message = os.read(device, 4096)
os.write(device, b"copen %d,-2" % struct.unpack_from("<I", message))
print(mount.wait())
"""


@pytest.fixture
def registry(guest: Guest) -> Iterator[Registry]:
    origin = Registry(guest)
    origin.start()
    yield origin
    origin.stop()


def test_kernel_is_the_one_asked_for(guest: Guest, kernel: str) -> None:
    """The guest runs the series the test was parametrised with, or this machine's kernel."""
    series = platform.release() if kernel == NATIVE else f"{kernel}."
    assert guest.run(["uname", "-r"]).stdout.startswith(series)


@pytest.mark.cachefiles
def test_cachefiles_binds_in_ondemand_mode(guest: Guest) -> None:
    """The rebuilt module offers what Debian's own leaves out."""
    guest.python(BIND)


@pytest.mark.cachefiles
def test_tracepoints_count_what_the_kernel_asked(guest: Guest) -> None:
    """One refused mount is one OPEN and no READ, and a reset starts from zero."""
    guest.reset_cachefiles_counts()
    assert guest.python(BIND + REFUSE_MOUNT).stdout.strip() != "0"
    counts = guest.cachefiles_counts()
    assert (counts["open"], counts["read"]) == (1, 0)
    guest.reset_cachefiles_counts()
    assert guest.cachefiles_counts()["open"] == 0


def test_project_and_its_dependencies_import(guest: Guest) -> None:
    """Debian's own Python finds the project, its extension module and what it depends on."""
    guest.python("import fscached.transport, cdefs._abi, pycurl, uvloop, blake3, msgspec")


def test_registry_answers_and_its_log_counts_bytes(guest: Guest, registry: Registry) -> None:
    """The origin's access log has one line per request, with the length of the body."""
    body = guest.run(["curl", "-sS", f"http://{registry.address}/v2/_catalog"]).stdout
    assert registry.requests() == [Request("GET", "/v2/_catalog", 200, len(body))]


@pytest.mark.machine
def test_shaping_modules_load_on_demand(guest: Guest) -> None:
    """The kernel finds sch_netem by itself when tc asks for it."""
    assert link.can_delay(guest)

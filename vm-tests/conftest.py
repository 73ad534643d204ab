"""Guests for scenarios: one per test file and kernel, with one counted retry after a panic.

Under emulation a guest's kernel now and then dies of the emulator. A boot or a test during which
that happens is tried once more on a fresh guest; the summary counts it. A second panic is a failure
like any other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import disk, store
from harness import kernel as kernels
from harness.command import CommandFailed
from harness.guest import Guest
from harness.qemu import GuestLost, GuestPanic

KERNELS = ("6.1", "6.12", "6.18", kernels.NATIVE)
TEST_TIMEOUT_S = 600
LONG_TEST_TIMEOUT_S = 4 * 3600
RESULTS_KEPT = 10

# Where a guest's programs write what they have to say.
LOGS = "/var/log"

Boot = Callable[..., Guest]

live_guests = pytest.StashKey[list[Guest]]()
panics = pytest.StashKey[list[Guest]]()
"""Guests that have panicked and are gone: after a file's last test all are."""

retried = pytest.StashKey[list[str]]()
results_directory = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernel",
        action="append",
        metavar="SERIES",
        help=f"run scenarios on this kernel only (repeatable; default: {', '.join(KERNELS)})",
    )
    parser.addoption(
        "--long", action="store_true", help="full counts of kills and power cuts, not a sample"
    )
    parser.addoption("--seed", type=int, help="of everything drawn at random; default: a new one")
    parser.addoption("--results", type=Path, help="directory for consoles and guests' logs")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[live_guests] = []
    config.stash[panics] = []
    config.stash[retried] = []
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    default = store.root() / "results" / f"{now}-{os.getpid()}"
    config.stash[results_directory] = config.getoption("--results") or default
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(1 << 32)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        names = metafunc.config.getoption("--kernel") or KERNELS
        metafunc.parametrize("kernel", names, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if _is_not_for_its_kernel(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    timeout_s = LONG_TEST_TIMEOUT_S if config.option.long else TEST_TIMEOUT_S
    for item in filter(_needs_guest, items):
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(timeout_s))


def _is_not_for_its_kernel(item: pytest.Item) -> bool:
    """A scenario about one transport has nothing to say on a kernel of the other; one about other
    programs says the same on every kernel."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or "kernel" not in callspec.params:
        return False
    kernel = callspec.params["kernel"]
    others = ["cachefiles" if kernels.has_fanotify(kernel) else "fanotify"]
    others += ["machine"] if kernel == kernels.NATIVE else []
    only = item.get_closest_marker("only")
    if only is not None and kernel not in only.args:
        return True
    return any(item.get_closest_marker(other) is not None for other in others)


def _needs_guest(item: pytest.Item) -> bool:
    return "kernel" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test; when it failed and a guest has panicked, run it again from fresh fixtures."""
    if not _needs_guest(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.config.stash[panics].clear()
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    guests = [*item.config.stash[live_guests], *item.config.stash[panics]]
    if any(report.failed for report in reports) and any(guest.panicked for guest in guests):
        item.config.stash[retried].append(item.nodeid)
        item.session._setupstate.teardown_exact(None)
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the guests had to say."""
    report = yield
    if report.failed and _needs_guest(item):
        for guest in item.config.stash[live_guests]:
            report.sections.append((f"guest, {guest.console}", _last_words(guest)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stash = terminalreporter.config.stash
    if stash[results_directory].is_dir():
        terminalreporter.write_line(f"guests' consoles and logs: {stash[results_directory]}")
        terminalreporter.write_line(f"seed: {terminalreporter.config.option.seed}")
        terminalreporter.write_line(f"retries after a guest's panic: {len(stash[retried])}")
    for test in stash[retried]:
        terminalreporter.write_line(f"  {test}")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Path:
    """Where this run's consoles and logs go."""
    directory = request.config.stash[results_directory]
    directory.mkdir(parents=True, exist_ok=True)
    store.prune(store.root() / "results", RESULTS_KEPT)
    return directory


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Where this run's randomness begins."""
    number: int = request.config.option.seed
    return number


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether full counts are wanted instead of a sample."""
    asked: bool = request.config.option.long
    return asked


@pytest.fixture(scope="module")
def kernel(request: pytest.FixtureRequest) -> str:
    """The series of the kernel to run on; every test that asks for it runs on each."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def boot_guest(request: pytest.FixtureRequest, kernel: str, results: Path) -> Iterator[Boot]:
    """Boots guests that live until the end of the test file: `boot_guest(disks=..., ...)` takes
    what `harness.guest.boot` takes. Their logs are brought out at the end."""
    guests = request.config.stash[live_guests]
    stem = f"{Path(request.node.name).stem}-{kernel}"

    def boot_one(**options: Any) -> Guest:
        number = len(list(results.glob(f"{stem}-*.console"))) + 1
        try:
            guest = Guest(kernel, results / f"{stem}-{number}.console", **options)
        except kernels.NotHere as reason:
            pytest.skip(str(reason))
        guests.append(guest)
        guest.wait_for_agent()
        return guest

    def boot_with_one_retry(**options: Any) -> Guest:
        try:
            return boot_one(**options)
        except GuestPanic:
            request.config.stash[retried].append(f"a boot for {request.node.name} on {kernel}")
            guests.pop().kill()
            return boot_one(**options)

    yield boot_with_one_retry
    while guests:
        ended = guests.pop()
        if ended.panicked:
            request.config.stash[panics].append(ended)
        _bring_out_logs(ended)
        ended.kill()


@pytest.fixture(scope="module")
def guest(boot_guest: Boot, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """A guest with an empty cache disk at `disk.CACHE_MOUNT`, shared by a test file."""
    image = tmp_path_factory.mktemp("disks") / "cache.ext4"
    return boot_guest(disks=[disk.cache(image)])


def _bring_out_logs(guest: Guest) -> None:
    with contextlib.suppress(GuestPanic, GuestLost, CommandFailed):
        guest.run(f"dmesg > {LOGS}/dmesg; tar -C {LOGS} -czf /tmp/logs.tar.gz .", timeout_s=30)
        guest.console.with_suffix(".logs.tar.gz").write_bytes(guest.get("/tmp/logs.tar.gz"))


def _last_words(guest: Guest) -> str:
    words = guest.console.read_text(errors="replace").splitlines()[-20:]
    with contextlib.suppress(GuestPanic, GuestLost, CommandFailed):
        words.append(guest.run(f"tail -n 40 {LOGS}/*.log", timeout_s=30, check=False).stdout)
    return "\n".join(words)

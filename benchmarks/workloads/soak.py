"""Random reads of images that become cold again and again, with faults, beside the same without.

Lanes mount an image of a registry, have four readers look at every byte they read for some seconds,
unmount it and have its cache files deleted. Meanwhile, one after the other and at random: the
daemon is killed, the registry is killed and comes back, or stands still, the page cache is dropped.
Wrong bytes or a reader that does not end fail the bench. An error is counted: a fault is shorter
than the daemon's deadline, so there should be none.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from environments import Options, native
from environments.programs import HERE
from harness import noise, registry
from harness.registry import HostRegistry
from load import Said
from report import Report, Result, percentile, result
from runners.supervised import Supervised

from fscached.control.client import DaemonAway, DaemonError
from fscached.transport import mount

REPETITIONS = 1
QUIET_S, FAULTY_S = 40.0, 120.0
LONG_QUIET_S, LONG_FAULTY_S = 300.0, 3600.0
IMAGES = (*noise.CRASH, noise.OUTAGE[0])
"""One for each lane."""
READERS = 4
TURN_S = 8.0
PAUSE_S = (0.5, 4.0)
"""Between two faults."""
FAULT_S = (0.2, 3.0)
"""How long one lasts."""
PATIENCE_S = 60.0
MB = 1e6
SIGBUS = Said(reads=0, bytes=0, errors={"SIGBUS": 1}, wrong=[], longest_s=0.0, seconds=[])

T = TypeVar("T")


@dataclass
class Figures:
    """What readers said, and what was done to them."""

    reads: int = 0
    read_bytes: int = 0
    errors: int = 0
    turns: int = 0
    faults: int = 0
    longest_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)

    def note(self, said: Said) -> None:
        """Raises SystemExit for wrong bytes."""
        if said["wrong"]:
            raise SystemExit(f"wrong bytes: {'; '.join(said['wrong'])}")
        self.reads += said["reads"]
        self.read_bytes += said["bytes"]
        self.errors += sum(said["errors"].values())
        self.longest_s = max(self.longest_s, said["longest_s"])
        self.seconds += said["seconds"]


class Soak:
    """A daemon, its registry, and how long it has to stand."""

    def __init__(self, scratch: Path, daemon: Supervised, origin: HostRegistry) -> None:
        self._scratch = scratch
        self._daemon = daemon
        self._origin = origin
        self._lock = threading.Lock()

    def run(self, seconds: float, faults: random.Random | None) -> Figures:
        """All lanes until the time is up. Raises SystemExit for a wrong byte or a hang."""
        figures, end = Figures(), time.monotonic() + seconds
        with ThreadPoolExecutor(len(IMAGES)) as pool:
            lanes = [pool.submit(self._lane, image, end, figures) for image in IMAGES]
            while time.monotonic() < end and not any(lane.done() for lane in lanes):
                time.sleep(min(1.0, max(end - time.monotonic(), 0)))
                if faults is not None:
                    time.sleep(faults.uniform(*PAUSE_S))
                    self._fault(faults)
                    figures.faults += 1
            for lane in lanes:
                lane.result()
        return figures

    def _fault(self, rng: random.Random) -> None:
        """One, and its end."""
        lasts_s = rng.uniform(*FAULT_S)
        kind = rng.choice(("kill", "away", "still", "drop"))
        if kind == "kill":
            _patiently(self._daemon.restart)
        elif kind == "away":
            self._origin.kill()
            time.sleep(lasts_s)
            self._origin.start()
        elif kind == "still":
            self._origin.pause()
            time.sleep(lasts_s)
            self._origin.resume()
        else:
            native.drop_caches()

    def _lane(self, image: str, end: float, figures: Figures) -> None:
        at = self._scratch / image.replace("/", "-").replace(":", "-")
        at.mkdir(exist_ok=True)
        while time.monotonic() < end:
            known = _patiently(partial(self._daemon.add, f"{self._origin.address}/{image}"))
            mount.mount_files(str(at), known.bootstrap, known.devices or [])
            try:
                said = _read(at, f"{image} {figures.turns}")
            finally:
                mount.unmount(str(at))
            _patiently(partial(self._daemon.forget, known.fsid))
            resident_mib = _patiently(self._daemon.resident_mib)
            with self._lock:
                figures.turns += 1
                figures.resident_mib.append(resident_mib)
                for one in said:
                    figures.note(one)


def run_native(options: Options) -> Report:
    """Without faults first, then with."""
    quiet_s, faulty_s = (LONG_QUIET_S, LONG_FAULTY_S) if options.long else (QUIET_S, FAULTY_S)
    scratch = options.scratch
    with (
        native.mounted(noise.origin().disk.image, scratch / "origin") as storage,
        registry.on_host_with_faults(storage) as origin,
    ):
        daemon = Supervised("fscached", scratch / "daemon", {"prefetch": {"enabled": False}})
        daemon.start()
        try:
            soak = Soak(scratch, daemon, origin)
            quiet = soak.run(quiet_s, None)
            faulty = soak.run(faulty_s, random.Random(1))
        finally:
            daemon.stop()
    environment = {**native.described(options), "faulty_s": faulty_s, "quiet_s": quiet_s}
    return Report(options.bench, environment, list(_results(quiet, faulty, quiet_s, faulty_s)))


def _read(at: Path, seed: str) -> list[Said]:
    """Readers of one mount, to their end."""
    readers = []
    for number in range(READERS):
        argv = [sys.executable, str(HERE / "load.py"), str(at), str(TURN_S), f"{seed} {number}"]
        readers.append(subprocess.Popen(argv, stdout=subprocess.PIPE))
    said: list[Said] = []
    for reader in readers:
        try:
            output, _ = reader.communicate(timeout=TURN_S + PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"a reader of {at} hangs") from None
        if reader.returncode == -signal.SIGBUS:
            said.append(SIGBUS)
            continue
        if reader.returncode != 0:
            raise SystemExit(f"a reader of {at} ended with {reader.returncode}")
        said.append(json.loads(output))
    return said


def _patiently(call: Callable[[], T]) -> T:
    """Again, while a fault lasts."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except (DaemonAway, DaemonError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _results(quiet: Figures, faulty: Figures, quiet_s: float, faulty_s: float) -> Iterator[Result]:
    for percent in (50, 99):
        ours, other = ([percentile(of.seconds, percent) * 1e3] for of in (faulty, quiet))
        yield result(f"read_p{percent}", "ms", "lower", ours, other)
    ours, other = [faulty.read_bytes / MB / faulty_s], [quiet.read_bytes / MB / quiet_s]
    yield result("read_throughput", "MB/s", "higher", ours, other)
    yield result("read_longest", "s", "lower", [faulty.longest_s], [quiet.longest_s])
    yield result(
        "memory_most", "MiB", "lower", [max(faulty.resident_mib)], [max(quiet.resident_mib)]
    )
    yield result("reads", "count", "higher", [float(faulty.reads + quiet.reads)])
    yield result("turns", "count", "higher", [float(faulty.turns + quiet.turns)])
    yield result("faults", "count", "higher", [float(faulty.faults)])
    yield result("errors", "count", "lower", [float(faulty.errors + quiet.errors)])

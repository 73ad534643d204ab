"""Cold sequential throughput from a registry on the loopback, beside C that only moves the bytes.

One large file is read through the mount, from an uncompressed and from a zstd image.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from environments import Options
from environments.archive import FILE, images
from environments.guest import PROGRAMS, booted, described, fresh_cache, probe
from harness.guest import Guest
from harness.image import Origin, reference
from harness.registry import Registry
from report import Report, Result, result
from runners import MOUNT
from runners.fscached import Fscached

REPETITIONS = 5
COMPRESSORS = {"plain": "none", "zstd": "zstd"}
FILE_BYTES = 128 << 20
RANGE_BYTES = 1 << 20
MB = 1e6


class Bench:
    """One guest with its registry; figures by name, one value for every repetition."""

    def __init__(self, guest: Guest, origin: Origin) -> None:
        self.fscached = Fscached(guest)
        self.figures: dict[str, list[float]] = defaultdict(list)
        self._guest = guest
        self._origin = origin
        self._registry = Registry(guest)
        self._registry.start()

    def fetch(self) -> None:
        """The C program moves the plain blob to a file on the cache disk."""
        blob_id = self._blob_id("plain")
        size_bytes = self._origin.blob_bytes(_image("plain"))
        url = f"/v2/plain/blobs/sha256:{blob_id}"
        cache = self._begin()
        port = self._registry.address.rpartition(":")[2]
        words = [f"{PROGRAMS}/fetch", port, url, str(size_bytes), str(RANGE_BYTES), "1"]
        said = self._guest.run([*words, f"{cache}/blob"], timeout_s=300).stdout
        seconds, _ = said.split()
        self.figures["c"].append(size_bytes / MB / float(seconds))

    def read(self, name: str) -> None:
        """A reader takes the file through the mount."""
        self.fscached.run(self._begin(), {})
        self.fscached.pull(reference(_image(name)))
        seconds = probe(self._guest, "sequential", f"{MOUNT}/{FILE}")
        self.fscached.stop()
        self.figures[name].append(FILE_BYTES / MB / float(seconds))
        self.figures[f"{name} request"].append(self._request_bytes(name) / 1024)

    def _begin(self) -> str:
        """An empty cache, and everything the registry serves in the guest's memory."""
        self._guest.run(f"find {self._registry.storage} -type f -exec cat {{}} + > /dev/null")
        self._registry.forget()
        return fresh_cache(self._guest)

    def _blob_id(self, name: str) -> str:
        [blob_id] = self._origin.blob_ids(_image(name))
        return blob_id

    def _request_bytes(self, name: str) -> float:
        """What the daemon asked for at once, on the average."""
        blob = self._blob_id(name)
        return statistics.mean(
            request.sent_bytes for request in self._registry.requests() if blob in request.path
        )


def run(options: Options) -> Report:
    """Each in its turn, on an empty cache."""
    origin = _origin()
    with booted(options, [origin.disk]) as guest:
        environment = described(guest, options)
        bench = Bench(guest, origin)
        turns: list[Callable[[], None]] = [bench.fetch]
        turns += [partial(bench.read, name) for name in COMPRESSORS]
        for _ in range(options.repetitions):
            for turn in turns:
                turn()
            turns.reverse()
    return Report(options.bench, environment, _results(bench))


def _results(bench: Bench) -> list[Result]:
    figures, ours = bench.figures, bench.fscached
    results = [
        result(f"cold_{name}", "MB/s", "higher", figures[name], figures["c"])
        for name in COMPRESSORS
    ]
    results += [
        result(f"request_{name}", "KiB", "higher", figures[f"{name} request"], [RANGE_BYTES / 1024])
        for name in COMPRESSORS
    ]
    return [
        *results,
        result("daemon_start_s", "s", "lower", ours.start_s),
        result("resident_mib", "MiB", "lower", ours.resident_idle_mib),
        result("resident_image_mib", "MiB", "lower", ours.resident_image_mib),
    ]


def _origin() -> Origin:
    """The same file as an image of each kind, kept."""
    options = {_image(name): ["--compressor", word] for name, word in COMPRESSORS.items()}
    return images(FILE_BYTES, options)


def _image(name: str) -> str:
    return f"{name}:latest"

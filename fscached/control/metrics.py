"""Counters for whoever scrapes them, in Prometheus' text format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import Final

import msgspec

from fscached.control.messages import (
    CacheStatus,
    ImageStatus,
    LatencyCounts,
    ObjectStatus,
    SourceStatus,
    Status,
    Totals,
)
from fscached.fill.tally import LATENCIES_S

PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"

_GAUGES: Final = {"open_objects", "reads_waiting"}
_HELP: Final = {
    "opens": "Objects the kernel has opened.",
    "closes": "Objects the kernel has closed.",
    "open_objects": "Objects open now.",
    "reads": "READs of the kernel.",
    "reads_waiting": "READs not answered yet.",
    "reads_failed": "READs answered without their bytes; the reader gets EIO.",
    "reads_slow": "READs that took longer than log.slow_read_s; each has a line in the log.",
    "requests": "HTTP requests sent for bytes of blobs.",
    "received_bytes": "Bytes of their bodies.",
    "written_bytes": "Bytes written to cache files.",
    "bad_chunks": "Chunks whose digest was wrong; never written.",
    "prefetches_stopped": "Prefetches that were slow to bring what a reader waited for.",
    "source_errors": "Transfers that failed after all their tries.",
}

_CACHE_HELP: Final = {
    "used_bytes": "What cache files take of the disk, those without a name too.",
    "budget_bytes": "What they may take; 0: no budget.",
    "excess_bytes": "What is too much, and all in use.",
    "files": "Cache files.",
    "culled_files": "Cache files deleted.",
    "culled_bytes": "What they took of the disk.",
    "culls_waiting": "Blobs and bootstraps to be deleted when nobody uses them.",
}


_PREFETCH_HELP: Final = {
    "brought_bytes": "Bytes that prefetch has brought since the image was mounted.",
    "left_bytes": "Bytes that prefetch is still to bring, at most.",
    "eta_s": "Seconds that that takes that takes at the present speed.",
}


_SOURCE_HELP: Final = {
    "requests": "HTTP requests sent to a source, refused ones and redirects too.",
    "received_bytes": "Bytes of their bodies.",
    "failures": "Ranges that did not come from it after all tries.",
}


def resident_memory_bytes() -> int:
    """Resident memory of this process (second number of /proc/self/statm, proc(5))."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def prometheus(status: Status) -> bytes:
    """The totals, each image's resident and full size, and the process' own figures."""
    return "".join(f"{line}\n" for line in _lines(status)).encode()


def _lines(status: Status) -> Iterator[str]:
    for field in msgspec.structs.fields(Totals):
        kind, suffix = ("gauge", "") if field.name in _GAUGES else ("counter", "_total")
        value = getattr(status.totals, field.name)
        yield from _metric(f"{field.name}{suffix}", kind, _HELP[field.name], value)
    yield "# HELP fscached_given_bytes_total Bytes of blobs by who gave them."
    yield "# TYPE fscached_given_bytes_total counter"
    for giver, count in status.given.items():
        yield f'fscached_given_bytes_total{{giver="{giver}"}} {count}'
    yield from _gauge("resident_memory_bytes", "Memory of the daemon.", status.rss_bytes)
    yield from _gauge("uptime_seconds", "Since the daemon started.", status.uptime_s)
    yield from _gauge("images", "Images registered.", len(status.images))
    yield from _cache(status.cache)
    yield from _objects(status.images, "size_bytes", "Uncompressed bytes of the image.")
    yield from _objects(status.images, "resident_bytes", "Bytes of the image in the cache.")
    yield from _objects(status.images, "in_flight_bytes", "Bytes of the image on their way.")
    yield from _images(status.images)
    yield from _demand(status)
    yield from _sources(status.demand.sources)
    yield from _prefetches(status.images)


def _demand(status: Status) -> Iterator[str]:
    """How READs fared: all of them in a histogram, those of each image in counts and seconds."""
    yield "# HELP fscached_read_seconds From the kernel's READ to its answer."
    yield "# TYPE fscached_read_seconds histogram"
    yield from _histogram("read_seconds", "", status.demand.latencies)
    name = "fscached_image_reads_total"
    yield f"# HELP {name} READs by what became of them: bytes were there, on their way, or not."
    yield f"# TYPE {name} counter"
    for image in status.images:
        for result in ("hits", "joined", "misses", "failed"):
            count = getattr(image.demand, result)
            yield f'{name}{{{_labels(image)},result="{result}"}} {count}'
    yield "# HELP fscached_image_read_seconds From the kernel's READs to their answers."
    yield "# TYPE fscached_image_read_seconds summary"
    for image in status.images:
        latencies, labels = image.demand.latencies, _labels(image)
        yield f"fscached_image_read_seconds_sum{{{labels}}} {latencies.seconds:g}"
        yield f"fscached_image_read_seconds_count{{{labels}}} {sum(latencies.counts)}"


def _sources(sources: dict[str, SourceStatus]) -> Iterator[str]:
    for field, meaning in _SOURCE_HELP.items():
        name = f"fscached_source_{field}_total"
        yield f"# HELP {name} {meaning}"
        yield f"# TYPE {name} counter"
        for source, spent in sources.items():
            yield f'{name}{{source="{_escaped(source)}"}} {getattr(spent, field)}'
    yield "# HELP fscached_source_seconds How long ranges took to come."
    yield "# TYPE fscached_source_seconds histogram"
    for source, spent in sources.items():
        columns = zip(*(row.counts for row in spent.by_size), strict=True)
        seconds = sum(row.seconds for row in spent.by_size)
        latencies = LatencyCounts(tuple(map(sum, columns)), seconds)
        yield from _histogram("source_seconds", f'source="{_escaped(source)}"', latencies)


def _histogram(name: str, labels: str, latencies: LatencyCounts) -> Iterator[str]:
    before = f"{labels}," if labels else ""
    for bound, count in zip((*LATENCIES_S, inf), accumulate(latencies.counts), strict=True):
        le = "+Inf" if bound == inf else f"{bound:g}"
        yield f'fscached_{name}_bucket{{{before}le="{le}"}} {count}'
    alone = f"{{{labels}}}" if labels else ""
    yield f"fscached_{name}_sum{alone} {latencies.seconds:g}"
    yield f"fscached_{name}_count{alone} {sum(latencies.counts)}"


def _prefetches(images: list[ImageStatus]) -> Iterator[str]:
    for field, meaning in _PREFETCH_HELP.items():
        name = f"fscached_image_prefetch_{field.replace('eta_s', 'eta_seconds')}"
        yield f"# HELP {name} {meaning}"
        yield f"# TYPE {name} gauge"
        for image in images:
            value = getattr(image.prefetch, field)
            if value is not None:
                yield f"{name}{{{_labels(image)}}} {value}"
    yield "# HELP fscached_image_prefetch Which phase prefetch of the image is in."
    yield "# TYPE fscached_image_prefetch gauge"
    for image in images:
        yield f'fscached_image_prefetch{{{_labels(image)},phase="{image.prefetch.phase}"}} 1'


def _cache(cache: CacheStatus) -> Iterator[str]:
    for field in msgspec.structs.fields(CacheStatus):
        value, meaning = getattr(cache, field.name), _CACHE_HELP[field.name]
        if field.name.startswith("culled_"):
            yield from _metric(f"cache_{field.name}_total", "counter", meaning, value)
        else:
            yield from _gauge(f"cache_{field.name}", meaning, value)


def _gauge(name: str, meaning: str, value: float) -> Iterator[str]:
    yield from _metric(name, "gauge", meaning, value)


def _metric(name: str, kind: str, meaning: str, value: float) -> Iterator[str]:
    yield f"# HELP fscached_{name} {meaning}"
    yield f"# TYPE fscached_{name} {kind}"
    yield f"fscached_{name} {value:g}" if isinstance(value, float) else f"fscached_{name} {value}"


def _objects(images: list[ImageStatus], field: str, meaning: str) -> Iterator[str]:
    yield f"# HELP fscached_image_{field} {meaning}"
    yield f"# TYPE fscached_image_{field} gauge"
    for image in images:
        value = sum(_amount(item, field) for item in (image.bootstrap, *image.blobs))
        yield f"fscached_image_{field}{{{_labels(image)}}} {value}"


def _images(images: list[ImageStatus]) -> Iterator[str]:
    name = "fscached_image_last_demand_seconds"
    yield f"# HELP {name} From an image's binding to the last fetch that a reader waited for."
    yield f"# TYPE {name} gauge"
    yield from (f"{name}{{{_labels(image)}}} {image.last_demand_s:g}" for image in images)


def _labels(image: ImageStatus) -> str:
    return f'fsid="{_escaped(image.fsid)}",reference="{_escaped(image.reference)}"'


def _amount(item: ObjectStatus, field: str) -> int:
    return int(getattr(item, field) or 0)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

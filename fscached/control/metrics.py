"""Counters for whoever scrapes them: Prometheus' text format, and nydusd's two JSON shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from fscached.control.messages import CacheStatus, ImageStatus, ObjectStatus, Status, Totals

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


def resident_memory_bytes() -> int:
    """Resident memory of this process (second number of /proc/self/statm, proc(5))."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def prometheus(status: Status) -> bytes:
    """The totals, each image's resident and full size, and the process' own figures."""
    return "".join(f"{line}\n" for line in _lines(status)).encode()


def backend(image: ImageStatus) -> dict[str, Any]:
    """nydusd's BackendMetrics of one image. Its latency distributions are not kept: zeros."""
    blobs = image.blobs
    return {
        "backend_type": "registry",
        "read_count": sum(blob.requests for blob in blobs),
        "read_errors": sum(blob.reads_failed for blob in blobs),
        "read_amount_total": sum(blob.received_bytes for blob in blobs),
        "read_cumulative_latency_millis_total": 0,
        "read_cumulative_latency_millis_dist": [0] * 8,
        "read_count_block_size_dist": [0] * 8,
        "read_latency_sizes_dist": [[0] * 8 for _ in range(8)],
    }


def blobcache(image: ImageStatus, store_path: str) -> dict[str, Any]:
    """nydusd's BlobcacheMetrics of one image; what the kernel transport has no word for is zero.

    Every READ is a miss, so hits are zero by nature: the kernel serves those alone.
    """
    blobs = image.blobs
    complete = all(blob.resident_bytes == blob.size_bytes for blob in blobs)
    return {
        "id": image.fsid,
        "underlying_files": [f"{blob.id}.blob.data" for blob in blobs],
        "store_path": store_path,
        "partial_hits": 0,
        "whole_hits": 0,
        "total": sum(blob.reads for blob in blobs),
        "entries_count": len(blobs),
        "prefetch_data_amount": image.prefetch.brought_bytes,
        "prefetch_requests_count": image.prefetch.requests,
        "prefetch_workers": 0,
        "prefetch_unmerged_chunks": 0,
        "prefetch_cumulative_time_millis": 0,
        "prefetch_begin_time_secs": 0,
        "prefetch_begin_time_millis": 0,
        "prefetch_end_time_secs": 0,
        "prefetch_end_time_millis": 0,
        "buffered_backend_size": 0,
        "data_all_ready": complete,
    }


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
    yield from _prefetches(status.images)


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

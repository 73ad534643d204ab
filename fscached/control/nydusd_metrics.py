"""Counters in nydusd's three JSON shapes, for nydus-snapshotter and nydusctl."""

from __future__ import annotations

from typing import Any, Final

from fscached.control.messages import DemandStatus, ImageStatus, Status

FILE_OPERATIONS: Final = 16
"""FUSE's that nydusd counts. Zeros: no file operation comes here."""


def backend(image: ImageStatus) -> dict[str, Any]:
    """BackendMetrics of one image: the ranges that were read of its sources, by their sizes, and of
    each size how many took how long (bounds: `fscached.fill.tally`)."""
    sources = image.demand.sources.values()
    sizes = list(zip(*(source.by_size for source in sources), strict=True)) or [()] * 8
    seconds = [sum(cell.seconds for cell in row) for row in sizes]
    counts = [[sum(column) for column in _columns(row)] for row in sizes]
    return {
        "backend_type": "registry",
        "read_count": sum(map(sum, counts)),
        "read_errors": sum(source.failures for source in sources),
        "read_amount_total": sum(source.received_bytes for source in sources),
        "read_cumulative_latency_millis_total": _millis(sum(seconds)),
        "read_cumulative_latency_millis_dist": [_millis(each) for each in seconds],
        "read_count_block_size_dist": [sum(row) for row in counts],
        "read_latency_sizes_dist": counts,
    }


def blobcache(image: ImageStatus, store_path: str) -> dict[str, Any]:
    """BlobcacheMetrics of one image; what has no meaning here is zero.

    `total` are the READs of the kernel, which are misses of its own cache: what is resident it
    serves alone. `whole_hits` found their bytes come meanwhile, `partial_hits` on their way.
    """
    blobs, demand = image.blobs, image.demand
    complete = all(blob.resident_bytes == blob.size_bytes for blob in blobs)
    return {
        "id": image.fsid,
        "underlying_files": [f"{blob.id}.blob.data" for blob in blobs],
        "store_path": store_path,
        "partial_hits": demand.joined,
        "whole_hits": demand.hits,
        "total": demand.hits + demand.joined + demand.misses,
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


def file_system(status: Status, demand: DemandStatus, fsid: str = "") -> dict[str, Any]:
    """FsMetrics: of an image, or with an empty `fsid` of all. `data_read` are bytes that were
    brought, since what is read without asking is the kernel's to know."""
    brought = sum(source.received_bytes for source in demand.sources.values())
    return {
        "files_account_enabled": False,
        "access_pattern_enabled": False,
        "measure_latency": True,
        "id": fsid,
        "data_read": brought if fsid else status.totals.received_bytes,
        "block_count_read": [0] * 8,
        "fop_hits": [0] * FILE_OPERATIONS,
        "fop_errors": [0] * FILE_OPERATIONS,
        "fop_cumulative_latency_total": [0] * FILE_OPERATIONS,
        "read_latency_dist": demand.latencies.counts,
        "nr_opens": status.totals.open_objects,
    }


def _columns(row: tuple[Any, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(cell.counts for cell in row), strict=True)) or [()] * 8


def _millis(seconds: float) -> int:
    return round(seconds * 1000)

"""A trace as a picture: when which part of which blob was first of use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fscached.failure import Missing
from fscached.prefetch.trace import Access, Trace
from rafs_v6.bootstrap import Bootstrap

MIB = 1 << 20
SERIES = (("read", "#d1495b", True), ("prefetched", "#2e86ab", False))
"""Name, colour, and whether a reader asked."""


def draw(trace: Trace, image: Bootstrap | None, file: Path) -> None:
    """Write an SVG, the same for the same trace. Raises Missing without matplotlib, OSError."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise Missing(
            "matplotlib, which draws, is not installed", "install fscached with its extra `plot`"
        ) from None
    mpl.rcParams.update({"svg.hashsalt": trace.fsid, "svg.fonttype": "none"})
    floors = _floors(trace, image)
    figure = Figure((10, 6), layout="constrained")
    axes = figure.subplots()
    for name, colour, demanded in SERIES:
        accesses = [access for access in trace.accesses if access.demanded is demanded]
        moments, offsets = _line(accesses, floors)
        # One path for all chunks: a picture of 65,536 shapes is one nobody can open.
        axes.plot(
            moments,
            offsets,
            color=colour,
            linewidth=2.5,
            solid_capstyle="round",
            label=f"{name} ({len(accesses)} chunks)",
        )
    for blob_id, floor in floors.items():
        axes.axhline(floor / MIB, color="#999999", linewidth=0.5)
        axes.annotate(
            blob_id[:12],
            (1, floor / MIB),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color="#666666",
        )
    axes.set_xlabel("seconds after the first read")
    axes.set_ylabel("offset, blob behind blob (MiB)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{trace.reference or trace.fsid}: {trace.runs} cold runs", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(SERIES), fontsize=8)
    figure.savefig(file, format="svg", metadata={"Date": None})


def _floors(trace: Trace, image: Bootstrap | None) -> dict[str, int]:
    """Where each blob begins on the axis, in bytes."""
    sizes: dict[str, int] = {}
    if image is not None:
        sizes = {blob.blob_id: blob.uncompressed_size for blob in image.blobs}
    for access in trace.accesses:
        sizes[access.blob_id] = max(sizes.get(access.blob_id, 0), access.end)
    floors, end = {}, 0
    for blob_id, size in sizes.items():
        floors[blob_id] = end
        end += size
    return floors


def _line(accesses: Iterable[Access], floors: dict[str, int]) -> tuple[list[float], list[float]]:
    """One upright stroke per chunk; what is no number ends it."""
    moments: list[float] = []
    offsets: list[float] = []
    for access in accesses:
        floor = floors[access.blob_id]
        moments += [access.after_s, access.after_s, float("nan")]
        offsets += [(floor + access.start) / MIB, (floor + access.end) / MIB, float("nan")]
    return moments, offsets

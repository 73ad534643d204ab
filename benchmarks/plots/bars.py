"""How fast each thing is beside its baseline, as bars in groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from report import Report

WIDTH_INCHES = 10.0
GROUP_INCHES = 0.65
HEAD_INCHES = 1.6
BAR_SHARE = 0.8
"""Of a group's height."""


def draw(report: Report, file: Path) -> None:
    """Write an SVG: 1 is as fast as the baseline, more is faster. None, where there is none."""
    # The same report is the same file, and its text stays text.
    mpl.rcParams.update({"svg.hashsalt": report.bench, "svg.fonttype": "none"})
    speeds = grouped(report)
    if not speeds:
        return
    groups = list(speeds.values())
    series = list(dict.fromkeys(name for group in groups for name in group))
    figure = Figure((WIDTH_INCHES, HEAD_INCHES + GROUP_INCHES * len(groups)), layout="constrained")
    axes = figure.subplots()
    height = BAR_SHARE / len(series)
    for number, name in enumerate(series):
        rows = [(place, group[name]) for place, group in enumerate(groups) if name in group]
        places = [place + (number - (len(series) - 1) / 2) * height for place, _ in rows]
        bars = axes.barh(places, [speed for _, speed in rows], height, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(groups)), list(speeds))
    axes.invert_yaxis()
    axes.set_xlabel("speed, 1 = baseline")
    found = report.environment
    axes.set_title(
        f"{report.bench}: {found['kernel']}, {found['cpus']} CPUs, {found['memory_mib']} MiB, "
        f"median of {found['repetitions']}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=len(series))
    figure.savefig(file, format="svg", metadata={"Date": None})


def grouped(report: Report) -> Mapping[str, Mapping[str, float]]:
    """Speeds beside the baseline. A figure's name is that of its group, and its own after the last
    underscore; what has no baseline is left out."""
    groups: dict[str, dict[str, float]] = {}
    for found in report.results:
        if found.ratio:
            group, _, name = found.name.rpartition("_")
            speed = found.ratio if found.better == "higher" else 1 / found.ratio
            groups.setdefault(group, {})[name] = speed
    return groups

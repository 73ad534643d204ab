"""Cold starts in the article's layout: a chart for each link, a group for each program, a bar for
each scenario in seconds, and on it how that is to the full pull."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from report import Report, Result

WIDTH_INCHES = 11.0
CHART_INCHES = 4.0
BARS_SHARE = 0.85
"""Of a group's width."""

Charts = Mapping[str, Mapping[str, Mapping[str, Result]]]
"""By link, program and scenario."""


def draw(report: Report, charts: Charts, scenarios: Mapping[str, str], file: Path) -> None:
    """Write an SVG of some of a report's results. `scenarios` gives the titles of those that are
    shown, in their order."""
    # The same report is the same file, and its text stays text.
    mpl.rcParams.update({"svg.hashsalt": report.bench, "svg.fonttype": "none"})
    figure = Figure((WIDTH_INCHES, CHART_INCHES * len(charts) + 1), layout="constrained")
    rows = figure.subplots(len(charts), squeeze=False)[:, 0]
    width = BARS_SHARE / len(scenarios)
    for axes, (link, chart) in zip(rows, charts.items(), strict=True):
        for number, (scenario, title) in enumerate(scenarios.items()):
            bars = [(at, of[scenario]) for at, of in enumerate(chart.values()) if scenario in of]
            places = [at + (number - (len(scenarios) - 1) / 2) * width for at, _ in bars]
            drawn = axes.bar(places, [bar.median for _, bar in bars], width, label=title)
            axes.bar_label(drawn, [_label(bar) for _, bar in bars], padding=2, fontsize=6)
        axes.set_xticks(range(len(chart)), list(chart))
        axes.set_ylabel("seconds")
        axes.set_title(f"origin {link} away", fontsize=10)
    machine = report.environment
    processors = machine.get("emulation", "not emulated")
    figure.suptitle(
        f"{report.bench}: {machine['kernel']}, {machine['cpus']} CPUs ({processors}), "
        f"median of {machine['repetitions']}; under each time its ratio to the full pull",
        fontsize=9,
    )
    handles, titles = rows[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=4)
    figure.savefig(file, format="svg", metadata={"Date": None})


def _label(bar: Result) -> str:
    return f"{bar.median:.1f}" + ("" if bar.ratio is None else f"\n×{bar.ratio:.2f}")

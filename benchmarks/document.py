"""One Markdown report of many benches, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from report import Report, Result

HEAD = "| | ours | spread | beside | ratio | better is |\n|---|--:|--:|--:|--:|---|"


class Section(NamedTuple):
    """A bench in one environment. `failure` says why there is no report; `plot` is the name of a
    picture beside the document, if there is one."""

    title: str
    about: str
    report: Report | None = None
    failure: str = ""
    plot: str = ""


def markdown(sections: Sequence[Section]) -> str:
    """The document: what was measured, then what was not."""
    found = [section.report.environment for section in sections if section.report is not None]
    lines = ["# What the benches found", ""]
    for key in ("machine", "commit"):
        values = dict.fromkeys(str(environment[key]) for environment in found)
        lines.append(f"{key.capitalize()}: {', '.join(values) or 'none'}  ")
    lines += [
        "",
        "A ratio is ours to what stands beside it, in the same run on the same machine. Compare",
        "ratios: absolute figures of another machine, or of an emulated one, say little.",
        "",
    ]
    for section in sections:
        lines += _section(section)
    return "\n".join(lines)


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    yield ""
    yield section.about
    yield ""
    if section.report is None:
        yield f"**No result.** {section.failure}"
        yield ""
        return
    yield from _environment(section.report)
    if section.plot:
        yield f"![{section.title}]({section.plot})"
        yield ""
    yield HEAD
    for found in section.report.results:
        yield _row(found)
    yield ""


def _environment(report: Report) -> Iterator[str]:
    here = report.environment
    below = f"guest, {here['emulation']}" if "emulation" in here else "this machine's own kernel"
    yield (
        f"`{here['command']}`: {here['date']}, kernel {here['kernel']} ({below}), {here['cpus']} "
        f"CPUs, {here['memory_mib']} MiB, medians of {here['repetitions']}."
    )
    yield ""


def _row(found: Result) -> str:
    baseline, ratio = (
        "" if figure is None else f"{figure:g}" for figure in (found.baseline, found.ratio)
    )
    return (
        f"| {found.name} ({found.unit}) | {found.median:g} | {found.spread:g} | {baseline} "
        f"| {ratio} | {found.better} |"
    )

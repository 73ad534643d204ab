"""Kills during cold reads, in rounds of an image that is read to its end, until so many counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from harness import record
from harness.inspector import Seen
from harness.killer import Kill, Report

Round = Callable[[int, int], tuple[Report, list[Seen]]]
"""Of a seed and the kills that are left: what the killer and the readers have to say."""


def until(
    kills: int,
    play: Round,
    kernel: str,
    seed: int,
    *,
    keep: bool,
    more: Callable[[], Mapping[str, object]] = dict,
) -> None:
    """Play until so many kills counted, each round with a seed of its own; `record` is told after
    every one, and of what there is `more` to say."""
    done: list[Kill] = []
    longest_s, idle = 0.0, 0
    while len(done) < kills:
        report, seen = play(seed + len(done), kills - len(done))
        assert report["kills"], "an image was read to its end, and no kill counted: it would go on"
        done += report["kills"]
        idle += report["idle"]
        longest_s = max(longest_s, *(one["slowest_s"] for one in seen))
        unanswered = Counter(kill["unanswered"]["read"] for kill in done)
        facts = {
            "idle_and_not_counted": idle,
            "longest_pause_s": round(longest_s, 2),
            "kills_by_unanswered_reads": dict(sorted(unanswered.items())),
            **more(),
        }
        record.counted(kernel, seed, "kills", len(done), kills, facts, keep=keep)

"""Traces: what a run leaves, what several become, and what a hostile file gets."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.prefetch import trace as module
from fscached.prefetch.trace import (
    Access,
    FileUse,
    Recorder,
    Trace,
    TraceError,
    decode,
    encode,
    merge,
)

FSID = "f" * 64
BLOBS = ("a" * 64, "b" * 64)
CHUNK_BYTES = 65536


class Chunks:
    """Chunks of one size, back to back."""

    def __init__(self, count: int = 16) -> None:
        self.count = count

    def offset(self, index: int) -> int:
        return index * CHUNK_BYTES

    def padded_end(self, index: int) -> int:
        return (index + 1) * CHUNK_BYTES

    def overlapping(self, start: int, end: int) -> range:
        return range(start // CHUNK_BYTES, min(-(-end // CHUNK_BYTES), self.count))


def access(blob: int, chunk: int, after_ms: int, demands: int = 1, prefetches: int = 0) -> Access:
    start = chunk * CHUNK_BYTES
    moment = after_ms / 1000
    return Access(BLOBS[blob], start, start + CHUNK_BYTES, moment, demands, prefetches)


uses = st.builds(
    lambda name, after_ms, read, more: FileUse(b"/" + name, after_ms / 1000, read, read + more),
    st.binary(min_size=1, max_size=30).filter(lambda name: 0 not in name),
    st.integers(0, 9999),
    st.integers(1, 9),
    st.integers(0, 9),
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """A trace as a recorder or a merge of such would have it."""
    places = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), unique=True))
    accesses = []
    for blob, chunk in places:
        demands, prefetches = draw(
            st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda counts: sum(counts) > 0)
        )
        accesses.append(access(blob, chunk, draw(st.integers(0, 9999)), demands, prefetches))
    runs = draw(st.integers(0, 5))
    files = draw(st.lists(uses, max_size=5, unique_by=lambda use: use.path))
    return module.bounded(Trace(FSID, "host/image:1", runs, tuple(accesses), tuple(files)))


@given(traces())
def test_a_trace_survives_its_file(trace):
    assert decode(encode(trace)) == trace


@given(st.lists(traces(), min_size=1, max_size=4), st.randoms())
def test_merging_knows_no_order(given_traces, random):
    """Whatever the order and the grouping, the same runs make the same trace."""
    whole = merge(given_traces)
    shuffled = list(given_traces)
    random.shuffle(shuffled)
    stepwise = shuffled[0]
    for trace in shuffled[1:]:
        stepwise = merge([stepwise, trace])
    assert whole == stepwise
    assert whole.runs == sum(trace.runs for trace in given_traces)
    total = sum(entry.demands + entry.prefetches for trace in given_traces for entry in trace[3])
    assert sum(entry.demands + entry.prefetches for entry in whole.accesses) == total


@given(traces())
def test_what_is_expected_was_read(trace):
    """Every chunk that was ever read, once; what was only prefetched is no evidence."""
    expected = list(trace.expected())
    assert sorted(expected) == sorted(entry for entry in trace.accesses if entry.demands)


def test_what_most_runs_read_comes_first():
    """Three runs: a chunk that one of them read early comes after what all of them read."""
    common = [access(0, 1, 500), access(0, 2, 900)]
    runs = [
        Trace(FSID, "", 1, tuple(extra + common))
        for extra in ([access(0, 9, 1)], list[Access](), list[Access]())
    ]
    order = [entry.start // CHUNK_BYTES for entry in merge(runs).expected()]
    assert order == [1, 2, 9]


def test_a_prefetched_chunk_is_not_held_against():
    """The more a trace is used the fewer READs there are: that must not undo it."""
    cold = Trace(FSID, "", 1, (access(0, 1, 10), access(0, 2, 20)))
    helped = Trace(FSID, "", 1, (access(0, 1, 0, 0, 1), access(0, 2, 0, 0, 1), access(0, 3, 5)))
    merged = merge([cold, *[helped] * 10])
    assert [entry.start // CHUNK_BYTES for entry in merged.expected()] == [3, 1, 2]
    assert [entry.after_s for entry in merged.expected()] == [0.005, 0.01, 0.02]
    warm = Trace(FSID, "", 0, (access(0, 4, 1),))
    assert merge([cold, *[warm] * 10]).runs == 1


def test_traces_of_different_images_are_not_merged():
    with pytest.raises(TraceError, match="different images"):
        merge([Trace(FSID, "a", 1, ()), Trace("0" * 64, "b", 1, ())])
    with pytest.raises(TraceError, match="no traces"):
        merge([])


def test_a_recorder_keeps_the_first_access_of_each_chunk():
    """Times count from the first READ, a READ counts more than a prefetch before it."""
    recorder = Recorder(FSID, "host/image:1")
    recorder.learn(BLOBS[0], Chunks(), resident=False)
    recorder.learn(BLOBS[1], Chunks(), resident=False)
    recorder.prefetched(BLOBS[1], 0, 3, 99.0)
    assert recorder.trace() is None
    recorder.read(BLOBS[0], 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 4096, 100.0)
    recorder.read(BLOBS[1], CHUNK_BYTES, 2 * CHUNK_BYTES, 100.25)
    recorder.read(BLOBS[0], 3 * CHUNK_BYTES, 5 * CHUNK_BYTES, 101.0)
    recorder.read("unknown", 0, 4096, 102.0)
    assert recorder.began_s == 100.0
    assert recorder.trace() == Trace(
        FSID,
        "host/image:1",
        1,
        (
            access(0, 3, 0),
            access(1, 0, 0, 0, 1),
            access(1, 2, 0, 0, 1),
            access(1, 1, 250),
            access(0, 4, 1000),
        ),
    )


def test_what_is_read_before_its_chunks_are_known_is_not_lost():
    """A blob's first READ waits for its chunk map: 150 ms where it has to be fetched."""
    recorder = Recorder(FSID, "")
    recorder.read(BLOBS[0], 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 4096, 1.0)
    recorder.read(BLOBS[1], 0, 4096, 1.5)
    recorder.learn(BLOBS[1], Chunks(), resident=False)
    recorder.learn(BLOBS[0], Chunks(), resident=False)
    trace = recorder.trace()
    assert trace is not None
    assert trace.accesses == (access(0, 3, 0), access(1, 0, 500))


def test_what_was_fetched_along_with_a_chunk_is_known():
    """Whoever reads in a window finds it resident, and nobody is told."""
    recorder = Recorder(FSID, "")
    recorder.learn(BLOBS[0], Chunks(), resident=False)
    recorder.fetched(BLOBS[0], 2, 4)
    recorder.read(BLOBS[0], 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 4096, 1.0)
    recorder.fetched(BLOBS[0], 4, 8)
    recorder.fetched(BLOBS[0], 12, 14)
    trace = recorder.trace()
    assert trace is not None
    assert trace.accesses == (access(0, 2, 0)._replace(reach=8 * CHUNK_BYTES),)


def test_a_run_that_began_warm_is_no_cold_one():
    """Residents from before the run: what was not read may have been read unasked."""
    recorder = Recorder(FSID, "")
    recorder.learn(BLOBS[0], Chunks(), resident=True)
    recorder.read(BLOBS[0], 0, 4096, 1.0)
    trace = recorder.trace()
    assert trace is not None
    assert (trace.runs, len(trace.accesses)) == (0, 1)


def test_what_is_kept_has_a_limit(monkeypatch):
    """What was read is kept before what was prefetched, and what was read first."""
    monkeypatch.setattr(module, "ACCESS_LIMIT", 4)
    recorder = Recorder(FSID, "")
    recorder.learn(BLOBS[0], Chunks(), resident=False)
    recorder.prefetched(BLOBS[0], 0, 16, 0.0)
    for chunk in (9, 8, 7, 6, 5, 4):
        recorder.read(BLOBS[0], chunk * CHUNK_BYTES, chunk * CHUNK_BYTES + 1, 10.0 - chunk)
    trace = recorder.trace()
    assert trace is not None
    assert [entry.start // CHUNK_BYTES for entry in trace.accesses] == [9, 8, 7, 6]


def test_the_largest_trace_fits_its_limit():
    """Every access with the largest numbers."""
    row = [255, (1 << 45) - 1, 1 << 45, 366 * 86_400_000, 10**6, 10**6, 1 << 45]
    longest = len(json.dumps(row, separators=(",", ":"))) + 1
    use = ["", 366 * 86_400_000, 1 << 32, 1 << 32]
    names = (len(json.dumps(use, separators=(",", ":"))) + 1) * module.FILE_LIMIT
    names += len("%00") * module.NAMES_LIMIT_BYTES
    blobs = 256 * 210
    assert longest * module.ACCESS_LIMIT + names + blobs + 4096 < module.TRACE_LIMIT_BYTES


def test_long_names_have_a_limit_together(monkeypatch):
    """Those of the files that were used first are kept."""
    monkeypatch.setattr(module, "NAMES_LIMIT_BYTES", 100)
    files = tuple(FileUse(b"/%d" % n + b"x" * 40, n, 1, 1) for n in range(4))
    assert decode(encode(Trace(FSID, "", 1, (), files))).files == files[:2]


def test_names_of_files_are_merged_and_survive_whatever_their_bytes():
    """The sooner time and the larger part; a name need not be text."""
    odd = FileUse(b"/\xff%\n\xc3\xa4", 1.0, 1, 3)
    runs = [Trace(FSID, "", 1, (), (odd,)), Trace(FSID, "", 1, (), (odd._replace(after_s=0.5),))]
    merged = merge([*runs, Trace(FSID, "", 1, (), (odd._replace(chunks_read=2),))])
    assert merged.files == (FileUse(odd.path, 0.5, 2, 3),)
    assert decode(encode(merged)) == merged
    assert b"/%FF%25%0A%C3%A4" in encode(merged)


GOOD = {
    "trace": 1,
    "fsid": FSID,
    "reference": "r",
    "runs": 1,
    "blobs": [BLOBS[0]],
    "accesses": [[0, 0, 4096, 0, 1, 0, 0]],
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": [["bin/sh", 0, 1, 1]]}, "files"),
        ({"files": [["/bin/%00", 0, 1, 1]]}, "no file's name"),
        ({"files": [["/bin/sh", 0, 2, 1]]}, "more of it than there is"),
        ({"files": [["/bin/sh", 0, 1, 1]] * 2}, "there twice"),
        ({"trace": 2}, "version 2"),
        ({"trace": "x"}, "not a trace"),
        ({"extra": 1}, "not a trace"),
        ({"fsid": "../../etc"}, "not a trace"),
        ({"reference": "a\nb"}, "not a trace"),
        ({"runs": -1}, "not a trace"),
        ({"blobs": ["a/b"]}, "not a trace"),
        ({"accesses": [[1, 0, 4096, 0, 1, 0, 0]]}, "access 0: blob 1 of 1"),
        ({"accesses": [[0, 4096, 4096, 0, 1, 0, 0]]}, "access 0"),
        ({"accesses": [[0, 0, 4096, 0, 0, 0, 0]]}, "in 0 runs"),
        ({"accesses": [[0, 0, 1 << 60, 0, 1, 0, 0]]}, "not a trace"),
        ({"accesses": [[0, 0, 4096, 1e999, 1, 0, 0]]}, "not a trace"),
        ({"accesses": [[0, 0, 4096, 0, 1, 0, 0]] * 2}, "twice"),
        ({"accesses": [[0, 0, 4096]]}, "not a trace"),
    ],
)
def test_a_hostile_trace_gets_one_clear_error(change, says):
    with pytest.raises(TraceError, match=says) as caught:
        decode(json.dumps(GOOD | change).encode())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"null"])
def test_what_is_no_trace_is_refused(data):
    with pytest.raises(TraceError):
        decode(data)


def test_a_trace_too_large_is_not_even_looked_at(monkeypatch):
    monkeypatch.setattr(module, "TRACE_LIMIT_BYTES", 10)
    with pytest.raises(TraceError, match="at most 10"):
        decode(encode(Trace(FSID, "", 1, ())))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_trace_or_an_error(data):
    try:
        decode(data)
    except TraceError:
        return


def test_expected_use_has_no_ties_by_chance():
    """The same accesses in any order make the same order."""
    entries = [access(0, 1, 5), access(1, 1, 5), access(0, 2, 5)]
    orders = {
        tuple(merge([Trace(FSID, "", 1, tuple(order))]).expected())
        for order in itertools.permutations(entries)
    }
    assert len(orders) == 1

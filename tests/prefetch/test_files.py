"""Traces in the words of people: files, and files never read before."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fscached.prefetch.files import news, uses
from fscached.prefetch.trace import Access
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.owners import files
from rafs_v6.pack import Format
from tests.rafs_v6.trees import build, directory, regular

PAGE = 4096


def content(seed, pages):
    return random.Random(seed).randbytes(pages * PAGE)


SHARED = content(0, 1)
LAYERS = (
    directory({b"libc": regular(content(1, 4)), b"twin-a": regular(SHARED)}),
    directory(
        {
            b"twin-b": regular(SHARED),
            b"mixed": regular(SHARED + content(2, 2)),
            b"secret": regular(content(3, 1)),
        }
    ),
)


@pytest.fixture(scope="module")
def image():
    """Two layers with files that have data in common."""
    return Bootstrap(build(*LAYERS, form=Format(chunk_bytes=PAGE)).image.bootstrap)


@pytest.fixture(scope="module")
def reading(image):
    """Makes accesses: reads of (path, chunk), one millisecond after the other."""
    there = {file.path: places for file, places in files(image)}

    def accesses(*reads, demands=1, prefetches=0):
        found = {}
        for moment, (path, chunk) in enumerate(reads):
            blob, start = there[path][chunk]
            key = image.blobs[blob].blob_id, start
            found.setdefault(key, Access(*key, start + PAGE, moment / 1000, demands, prefetches))
        return list(found.values())

    return accesses


def paths(found):
    return [use.file.path for use in found]


def test_files_come_in_the_order_of_their_first_use(image, reading):
    """What was read first is first, with how much of it was read."""
    found = uses(image, reading((b"/secret", 0), (b"/libc", 2), (b"/libc", 0)))
    assert paths(found) == [b"/secret", b"/libc"]
    assert [use.brief.mostly for use in found] == [True, True]
    assert found[1].brief == (b"/libc", 0.001, 2, 4)


def test_a_chunk_of_several_files_counts_for_one_that_was_read_anyhow(image, reading):
    """Only who read nothing of any of them in particular gets the first name, and its twins."""
    (mixed,) = uses(image, reading((b"/mixed", 0), (b"/mixed", 1)))
    assert (mixed.file.path, mixed.chunks_read, mixed.twins) == (b"/mixed", 2, 0)
    (twin,) = uses(image, reading((b"/twin-b", 0)))
    assert (twin.file.path, twin.twins) == (b"/mixed", 2)


def test_what_only_prefetch_asked_for_was_not_read(image, reading):
    """Prefetch is no evidence; neither are chunks of other images."""
    assert uses(image, reading((b"/libc", 0), demands=0, prefetches=1)) == []
    assert uses(image, [Access("0" * 64, 0, PAGE, 0.0)]) == []


def test_a_file_never_read_before_is_news(image, reading):
    """New chunks of known files are not, whatever their order."""
    before = reading((b"/libc", 0), (b"/mixed", 1))
    now = reading((b"/mixed", 2), (b"/secret", 0), (b"/libc", 3), (b"/libc", 0))
    assert paths(news(image, before, now)) == [b"/secret"]
    assert news(image, now, now) == []


def test_a_file_is_not_known_by_what_it_shares(image, reading):
    """To have read its twin's data is not to have read the rest of it."""
    before = reading((b"/twin-a", 0))
    assert paths(news(image, before, reading((b"/mixed", 1), (b"/mixed", 0)))) == [b"/mixed"]
    assert news(image, before, reading((b"/twin-b", 0))) == []


reads = st.lists(
    st.sampled_from([(b"/libc", n) for n in range(4)] + [(b"/mixed", n) for n in range(3)])
    | st.sampled_from([(b"/secret", 0), (b"/twin-a", 0)]),
    max_size=8,
)


@settings(deadline=None)
@given(reads, reads)
def test_any_news_were_read_now_and_not_before(image, reading, before, now):
    """News are files of this run; a run is no news to itself or to a longer one."""
    found = paths(news(image, reading(*before), reading(*now)))
    assert not {path for path, _ in before if path not in (b"/twin-a",)} & {
        path for path in found if path != b"/mixed"
    }
    assert set(found) <= {b"/libc", b"/mixed", b"/secret"} | {b"/twin-a"}
    assert news(image, reading(*before, *now), reading(*now)) == []
    for path in set(dict(now)) - set(dict(before)) - {b"/twin-a", b"/mixed"}:
        assert path in found

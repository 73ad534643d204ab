"""Another prefetch table, and everything else as it was."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafs_v6 import ImageError
from rafs_v6.bootstrap import Bootstrap
from rafs_v6.build import Image
from rafs_v6.check import check
from rafs_v6.layout import MAX_PREFETCH_NIDS
from rafs_v6.pack import Format
from rafs_v6.prefetch_table import with_prefetch
from tests.rafs_v6.oracle import extracted, mounted, told_by_directory
from tests.rafs_v6.test_build import trees
from tests.rafs_v6.trees import Built, build, directory, everything, regular, told_by_bootstrap

MANY = directory({b"%04d" % n: regular(b"%d" % n) for n in range(1200)})
"""More files than a table in the first blocks has room for."""


def nids_of(bootstrap):
    image = Bootstrap(bootstrap)
    return [inode.nid for path, inode in image.walk() if path != b"/"]


def changed(built, nids):
    """The image with another table."""
    bootstrap = with_prefetch(built.image.bootstrap, nids)
    return Built(Image(bootstrap, built.image.blobs), built.blobs)


@pytest.mark.parametrize("count", [1, 900, 1200])
def test_the_table_is_there_and_nothing_else_changed(count):
    """Blobs, names and inode numbers stay; check has no findings, wherever the table went."""
    built = build(MANY)
    nids = nids_of(built.image.bootstrap)[:count]
    image = changed(built, nids)
    assert Bootstrap(image.image.bootstrap).prefetch_nids() == tuple(nids)
    assert Bootstrap(image.image.bootstrap).blobs == built.image.blobs
    assert nids_of(image.image.bootstrap) == nids_of(built.image.bootstrap)
    assert told_by_bootstrap(image) == told_by_bootstrap(built)
    assert check(image.image.bootstrap, image.blobs) == []


def test_a_small_table_is_where_the_builder_would_have_put_it():
    """An image that is given a table later is the one that was built with it."""
    tree = directory({b"a": regular(b"a"), b"b": regular(b"b")})
    built = build(tree, form=Format(prefetch=(b"a",)))
    (nid,) = Bootstrap(built.image.bootstrap).prefetch_nids()
    assert with_prefetch(build(tree).image.bootstrap, [nid]) == built.image.bootstrap


def test_an_image_of_nydus_takes_one(nydus_bootstrap):
    """A foreign bootstrap gets a table and loses it again without a trace."""
    nids = nids_of(nydus_bootstrap)
    image = Bootstrap(with_prefetch(nydus_bootstrap, nids))
    assert list(image.prefetch_nids()) == nids
    assert check(with_prefetch(nydus_bootstrap, nids)) == []
    assert with_prefetch(with_prefetch(nydus_bootstrap, nids), []) == nydus_bootstrap


@settings(max_examples=20, deadline=None)
@given(trees, st.data())
def test_any_tables_one_after_the_other_leave_the_last(tree, data):
    """The last table is what counts: what was there before leaves nothing behind."""
    bootstrap = build(tree).image.bootstrap
    nids = st.lists(st.sampled_from([Bootstrap(bootstrap).root.nid, *nids_of(bootstrap)]))
    first, last = data.draw(nids), data.draw(nids)
    once = with_prefetch(bootstrap, last)
    assert with_prefetch(with_prefetch(bootstrap, first), last) == once
    assert Bootstrap(once).prefetch_nids() == (tuple(last) if Bootstrap(once).blobs else ())


def test_a_table_behind_everything_goes_away_again():
    """Where the first blocks have no room the file grows, and shrinks with the next table."""
    bootstrap = build(MANY).image.bootstrap
    large = with_prefetch(bootstrap, nids_of(bootstrap))
    assert len(large) > len(bootstrap)
    assert with_prefetch(large, []) == bootstrap


def test_an_image_without_data_has_no_table():
    """There is nothing to prefetch, and no room that is surely free."""
    bootstrap = build(directory({b"d": directory()})).image.bootstrap
    assert with_prefetch(bootstrap, nids_of(bootstrap)) == bootstrap


@pytest.mark.parametrize(
    ("nids", "message"),
    [
        ([1 << 31], "beyond the end"),
        ([128] * (MAX_PREFETCH_NIDS + 1), "name directories"),
        ([0], "from 1"),
    ],
)
def test_what_no_table_can_say_is_refused(nydus_bootstrap, nids, message):
    """One error that says why."""
    with pytest.raises(ImageError, match=message):
        with_prefetch(nydus_bootstrap, nids)


@pytest.mark.parametrize("count", [3, 1200])
def test_kernel_and_fsck_take_it(count, tmp_path):
    """Others read the image as before, with the table between the tables and behind everything."""
    tree = everything()
    del tree.children[b"dev"]
    tree.children[b"more"] = MANY
    built = build(tree)
    image = changed(built, nids_of(built.image.bootstrap)[:count])
    expected = told_by_bootstrap(built)
    found = told_by_directory(extracted(image, tmp_path))
    assert {path: facts.content for path, facts in found.items()} == {
        path: facts.content for path, facts in expected.items()
    }
    with mounted(image, tmp_path) as root:
        assert told_by_directory(root) == expected

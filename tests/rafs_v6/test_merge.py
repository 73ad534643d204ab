"""Layers on layers: what is added, replaced and hidden."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafs_v6 import ImageError
from rafs_v6.merge import merge
from rafs_v6.tree import Node, groups, lookup
from tests.rafs_v6.trees import directory, regular, special

WHITEOUT = special(stat.S_IFCHR, (0, 0))
OPAQUE = {b"trusted.overlay.opaque": b"y"}


def paths(tree: Node) -> set[bytes]:
    return {group.path_of(name) for group in groups(tree) for name, _ in group.entries}


def lower() -> Node:
    return directory(
        {
            b"d": directory({b"a": regular(b"1"), b"b": regular(b"2")}, uid=1),
            b"f": regular(b"3"),
        }
    )


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        (directory({b".wh.f": regular()}), {b"d", b"d/a", b"d/b"}),
        (directory({b"f": WHITEOUT}), {b"d", b"d/a", b"d/b"}),
        (directory({b"d": directory({b".wh.a": regular()})}), {b"d", b"d/b", b"f"}),
        (directory({b"d": directory({b"a": WHITEOUT})}), {b"d", b"d/b", b"f"}),
        (directory({b".wh.d": regular()}), {b"f"}),
        (directory({b"d": directory({b".wh..wh..opq": regular()})}), {b"d", b"f"}),
        (directory({b"d": directory({b"c": regular()}, xattrs=OPAQUE)}), {b"d", b"d/c", b"f"}),
        (directory({b".wh.d": regular(), b"d": directory()}), {b"d", b"f"}),
        (directory({b"d": regular()}), {b"d", b"f"}),
        (directory({b"f": directory({b"x": regular()})}), {b"d", b"d/a", b"d/b", b"f", b"f/x"}),
        (directory({b".wh..wh.plnk": directory()}), {b"d", b"d/a", b"d/b", b"f"}),
        (directory({b".wh.nothing": regular()}), {b"d", b"d/a", b"d/b", b"f"}),
    ],
    ids=[
        "oci file",
        "overlayfs file",
        "oci inside",
        "overlayfs inside",
        "oci directory",
        "oci opaque",
        "overlayfs opaque",
        "hidden and made again",
        "directory becomes file",
        "file becomes directory",
        "bookkeeping of aufs",
        "hides nothing",
    ],
)
def test_layer_hides(upper, expected):
    """Each way of hiding or replacing leaves exactly these names."""
    assert paths(merge(lower(), upper)) == expected


def test_whiteouts_need_no_layer_below():
    """Whiteouts of the lowest layer, and in directories that are new, vanish."""
    layer = directory({b".wh.x": regular(), b"new": directory({b"y": WHITEOUT}, xattrs=OPAQUE)})
    merged = merge(None, layer)
    assert paths(merged) == {b"new"}
    assert lookup(merged, b"new").xattrs == {}


def test_upper_directories_keep_their_own_facts():
    """Owner, mode, time and xattrs come from above, the root's too; contents from both."""
    upper = directory({b"d": directory(uid=2, mode=0o700)}, mtime=9, xattrs={b"user.r": b"1"})
    merged = merge(lower(), upper)
    assert (merged.mtime, merged.xattrs) == (9, {b"user.r": b"1"})
    assert lookup(merged, b"d").uid == 2
    assert lookup(merged, b"d/a") is not None


def test_hard_links_survive_but_not_their_replaced_names():
    """Replacing one name of a hard link leaves the other as it was."""
    linked = regular(b"shared")
    merged = merge(directory({b"a": linked, b"b": linked}), directory({b"a": regular(b"new")}))
    assert lookup(merged, b"b") is linked
    assert lookup(merged, b"a") is not linked


@pytest.mark.parametrize("xattr", [b"trusted.overlay.redirect", b"trusted.overlay.metacopy"])
def test_layers_whose_content_is_elsewhere_are_refused(xattr):
    """overlayfs may leave data or names in another layer: that would become wrong bytes."""
    with pytest.raises(ImageError, match=r"overlay\.re|overlay\.me"):
        merge(lower(), directory({b"d": directory(xattrs={xattr: b"/other"})}))


small = st.recursive(
    st.builds(regular),
    lambda inner: st.builds(directory, st.dictionaries(st.sampled_from([b"a", b"b"]), inner)),
    max_leaves=8,
)
layers = st.builds(directory, st.dictionaries(st.sampled_from([b"a", b"b", b"c"]), small))


@given(layers, layers)
def test_without_whiteouts_upper_wins_and_inputs_stay(below, above):
    """A name of the upper layer is there; one of the lower is unless a non-directory is in its
    way; neither tree is changed."""
    before = paths(below), paths(above)
    merged = merge(merge(None, below), above)
    assert paths(above) <= paths(merged)
    for path in paths(below) - paths(merged):
        parents = [path[:end] for end in range(len(path)) if path[end : end + 1] == b"/"]
        assert any(not lookup(above, p).is_directory for p in parents if lookup(above, p))
    assert (paths(below), paths(above)) == before

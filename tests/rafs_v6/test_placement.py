"""Every inode has its own room, where the kernel can read it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rafs_v6.layout import BLOCK_BYTES, NID_BYTES, DataLayout
from rafs_v6.placement import Inode, place
from rafs_v6.tree import Node
from tests.rafs_v6.trees import directory, regular, special, symlink

FIFO = 0o010000
leaves = st.one_of(
    st.builds(lambda n, x: (regular(b"", xattrs=x), n), st.integers(0, 900), st.just({})),
    st.builds(lambda n: (symlink(b"t" * n), 0), st.integers(1, 4095)),
    st.builds(lambda n: (regular(xattrs={b"user.x": bytes(n)}), 1), st.integers(0, 9000)),
    st.just((special(FIFO), 0)),
)


def room(inode: Inode, chunks: int) -> list[tuple[int, int]]:
    """What an inode takes of the metadata: itself with what follows it, and its whole blocks."""
    if inode.layout == DataLayout.CHUNK_BASED:
        return [(inode.offset, inode.indexes_offset + 8 * chunks)]
    inline = inode.layout == DataLayout.FLAT_INLINE
    tail = inode.size % BLOCK_BYTES if inline else 0
    whole = -(-(inode.size - tail) // BLOCK_BYTES) * BLOCK_BYTES
    rooms = [(inode.offset, inode.offset + inode.head_bytes + tail)]
    return [*rooms, (inode.data_offset, inode.data_offset + whole)] if whole else rooms


@given(st.lists(leaves, max_size=60), st.integers(0, 300))
def test_nothing_overlaps_and_tails_stay_in_one_block(found, name_bytes):
    """Rooms are disjoint, inodes start at nids, inline tails cross no block, the root is first."""
    children, chunks = {}, {}
    for number, (node, count) in enumerate(found):
        parent = children.setdefault(b"d%d" % (number % 3), directory())
        parent.children[b"%03d" % number + b"n" * min(name_bytes, 250)] = node
        chunks[node] = count
    count_of = chunks.get
    placement = place(directory(children), lambda node: count_of(node) or 0)
    assert placement.root.nid == 128
    rooms = [(0, BLOCK_BYTES)]
    for inode in placement.inodes:
        assert inode.offset % NID_BYTES == 0
        rooms += room(inode, chunks.get(inode.node, 0))
        if inode.layout == DataLayout.FLAT_INLINE:
            end = inode.offset + inode.head_bytes + inode.size % BLOCK_BYTES
            assert (end - 1) // BLOCK_BYTES == inode.offset // BLOCK_BYTES
    rooms.sort()
    for (_, end), (start, _) in pairwise(rooms):
        assert end <= start
    assert rooms[-1][1] <= placement.end


def test_gaps_are_filled():
    """A bootstrap of many small files is not larger than its parts and some slack."""
    tree = directory(
        {b"%d" % n: directory({b"f%d" % k: regular() for k in range(9)}) for n in range(50)}
    )
    placement = place(tree, lambda _: 0)
    needed = sum(
        inode.head_bytes + (inode.size if inode.entries else 0) for inode in placement.inodes
    )
    assert placement.end < needed * 1.1 + 2 * BLOCK_BYTES


def test_names_are_counted_and_hard_links_share():
    """`names` counts every name and the root; a hard-linked file is one inode with several."""
    shared: Node = regular(b"x")
    placement = place(directory({b"a": shared, b"b": shared, b"l": symlink(b"a")}), lambda _: 1)
    assert placement.names == 4
    assert [inode.nlink for inode in placement.inodes] == [2, 2, 1]
    assert [inode.number for inode in placement.inodes] == [1, 2, 3]

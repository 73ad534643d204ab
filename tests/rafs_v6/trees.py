"""Trees made of words, and what there is to know about a tree, whoever tells it."""

from __future__ import annotations

import hashlib
import io
import random
import stat
from typing import Any, NamedTuple

from rafs_v6.bootstrap import Bootstrap
from rafs_v6.build import Image, ImageBuilder
from rafs_v6.check import check, read_meta
from rafs_v6.codec import decompress_into
from rafs_v6.layout import Compressor
from rafs_v6.pack import Format
from rafs_v6.tree import Node, groups


def regular(content: bytes = b"", **facts: Any) -> Node:
    facts.setdefault("mode", 0o644)
    facts["mode"] |= stat.S_IFREG
    return Node(size=len(content), data=lambda: io.BytesIO(content), **facts)


def directory(children: dict[bytes, Node] | None = None, **facts: Any) -> Node:
    facts.setdefault("mode", 0o755)
    facts["mode"] |= stat.S_IFDIR
    return Node(children=children or {}, **facts)


def symlink(target: bytes, **facts: Any) -> Node:
    return Node(mode=stat.S_IFLNK | 0o777, target=target, **facts)


def special(kind: int, device: tuple[int, int] = (0, 0), **facts: Any) -> Node:
    return Node(mode=kind | 0o600, device=device, **facts)


class Built(NamedTuple):
    """An image and its blob files by id."""

    image: Image
    blobs: dict[str, bytes]

    def cache_file(self, blob_id: str) -> bytes:
        """What the kernel would see of a blob: every chunk uncompressed in its place."""
        entry = next(blob for blob in self.image.blobs if blob.blob_id == blob_id)
        blob, cache = memoryview(self.blobs[blob_id]), bytearray(entry.uncompressed_size)
        chunks = read_meta(entry, blob)
        for index in range(chunks.count):
            start, end = chunks.offset(index), chunks.offset(index) + chunks.size(index)
            remote = chunks.remote_offset(index)
            decompress_into(
                entry.compressor if chunks.compressed(index) else Compressor.NONE,
                blob[remote : remote + chunks.remote_size(index)],
                memoryview(cache)[start:end],
            )
        return bytes(cache)


def build(*layers: Node, form: Format | None = None) -> Built:
    """An image without findings of all layers, lowest first."""
    builder, blobs = ImageBuilder(form), {}
    for layer in layers:
        output = io.BytesIO()
        if blob := builder.add(layer, output):
            blobs[blob.blob_id] = output.getvalue()
    built = Built(builder.finish(), blobs)
    assert check(built.image.bootstrap, blobs) == []
    return built


class Facts(NamedTuple):
    """All that a tree says about one name."""

    mode: int
    uid: int
    gid: int
    mtime: tuple[int, int]
    nlink: int
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]
    content: bytes
    """Of a file the sha256, of a symlink the target."""


Told = dict[bytes, Facts]
"""Facts by path; the root's is empty."""


def told_by_tree(root: Node) -> Told:
    """The facts a tree asks for."""
    names: dict[Node, int] = {}
    for group in groups(root):
        for _, node in group.entries:
            names[node] = names.get(node, 0) + 1
    told = {b"": _facts(root, 0)}
    for group in groups(root):
        for name, node in group.entries:
            told[group.path_of(name)] = _facts(node, names[node])
    return told


def _facts(node: Node, names: int) -> Facts:
    subdirectories = sum(child.is_directory for child in node.children.values())
    content = hashlib.sha256(b"".join(node.chunks(1 << 20))).digest()
    nlink = 2 + subdirectories if node.is_directory else names if node.is_regular else 1
    return Facts(
        node.mode,
        node.uid,
        node.gid,
        (node.mtime, node.mtime_nsec),
        nlink,
        node.device,
        node.xattrs,
        content if node.is_regular else node.target,
    )


def told_by_bootstrap(built: Built) -> Told:
    """The facts an image tells our own reader."""
    image = Bootstrap(built.image.bootstrap)
    caches = [built.cache_file(blob.blob_id) for blob in image.blobs]
    told = {}
    for path, inode in image.walk():
        content = b""
        if stat.S_ISREG(inode.mode):
            data = bytearray()
            for index in image.chunks(inode):
                start = index.start_block * 4096
                size = min(image.chunk_bytes, inode.size - len(data))
                data += caches[index.blob_index][start : start + size]
            content = hashlib.sha256(data).digest()
        elif stat.S_ISLNK(inode.mode):
            content = image.read_link(inode)
        device = stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)
        told[path.strip(b"/")] = Facts(
            inode.mode,
            inode.uid,
            inode.gid,
            (inode.mtime, inode.mtime_nsec),
            inode.nlink,
            inode.rdev if device else (0, 0),
            image.xattrs(inode),
            content,
        )
    return told


def everything(seed: int = 5) -> Node:
    """A tree with one of everything that RAFS v6 can say, and of what builders get wrong."""
    rng = random.Random(seed)
    linked = regular(rng.randbytes(9000), uid=70_000, gid=80_000, mtime=1_700_000_000)
    odd = [b"!bang", b"#hash", b"+plus", b"-dash", b" space", b"\xff\xfe", b"a\nb", b"\xc3\xa4"]
    return directory(
        {
            b"bin": symlink(b"usr/bin", mtime=7, mtime_nsec=999_999_999),
            b"dev": directory(
                {
                    b"null": special(stat.S_IFCHR, (1, 3), uid=1),
                    b"sda": special(stat.S_IFBLK, (259, 70_000)),
                    b"pipe": special(stat.S_IFIFO),
                    b"socket": special(stat.S_IFSOCK, gid=2),
                }
            ),
            b"links": directory({b"one": linked, b"two": linked}),
            b"another": linked,
            b"many": directory(
                {b"%04d-%s" % (n, b"x" * (n % 40)): regular(b"%d" % n) for n in range(700)}
            ),
            b"odd": directory({name: regular(name) for name in odd} | {b"n" * 255: directory()}),
            b"empty": regular(mode=0o4755),
            b"zeros": regular(bytes(50_000)),
            b"big": regular(rng.randbytes(40_000), mtime=-1),
            b"bigger": regular(rng.randbytes(12_288) * 2 + b"end"),
            b"text": regular(b"all work and no play " * 3000),
            b"long": directory({b"%d" % n: symlink(b"t" * n) for n in (1, 4000, 4032, 4033, 4095)}),
            b"xattrs": directory(
                {
                    b"one": regular(b"1", xattrs={b"user.k": b"v"}),
                    b"some": regular(
                        b"2",
                        xattrs={
                            b"user.empty": b"",
                            b"user.\xff": b"odd",
                            b"trusted.t": b"\0\1",
                            b"security.capability": bytes.fromhex(
                                "0100000200200000000000000000000000000000"
                            ),
                        },
                    ),
                    b"large": regular(b"3", xattrs={b"user.%d" % n: b"v" * 900 for n in range(30)}),
                },
                xattrs={b"user.dir": b"d" * 100},
            ),
        },
        mode=0o1777,
        mtime=1_600_000_000,
    )

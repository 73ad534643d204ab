"""Trees become an image: a blob of data per layer, and one bootstrap for all of them.

The same layers give the same bytes, whatever machine, order of directory reads or number of
processors. The bootstrap is laid out as nydus-image does, all inodes in the extended form, so that
it is as small and its tools find nothing unusual.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from os import fsdecode
from typing import BinaryIO, NamedTuple

from rafs_v6 import ImageError
from rafs_v6.layout import (
    BLOB_ENTRY_BYTES,
    BLOCK_BYTES,
    COMPRESSOR_FLAGS,
    DEVICE_BYTES,
    DEVICES_OFFSET,
    DIGEST_FLAGS,
    EXTENDED_OFFSET,
    FILE_TYPES,
    MAX_BLOBS,
    SUPERBLOCK_OFFSET,
    BlobEntry,
    BlobFeatures,
    ChunkEntry,
    ChunkFlags,
    ChunkIndex,
    DataLayout,
    DeviceSlot,
    Dirent,
    ExtendedInode,
    ExtendedSuperblock,
    RafsFlags,
    Superblock,
    align_up,
    chunk_format,
    inode_format,
    pack_dirents,
    pack_nids,
    pack_rdev,
    xattr_icount,
)
from rafs_v6.merge import merge
from rafs_v6.pack import Chunk, Chunks, Format, Progress, pack
from rafs_v6.placement import Inode, Placement, block_names, place
from rafs_v6.tree import Node, lookup

_MAX_BLOCK = 0xFFFFFFFF
_MAPPED_ALIGNMENT = 512 << 10


class Image(NamedTuple):
    """A finished image. `blobs` are those its files use, in the order of its blob table."""

    bootstrap: bytes
    blobs: tuple[BlobEntry, ...]


class ImageBuilder:
    """Builds one image, layer by layer from the lowest.

    `tree` is the merged tree so far: what `Archive.tree` wants to know for the next layer.
    """

    def __init__(self, form: Format | None = None) -> None:
        self.tree: Node | None = None
        self._form = form or Format()
        self._chunks = Chunks()
        self._blobs: list[BlobEntry | None] = []

    @classmethod
    def resumed(
        cls, form: Format, tree: Node, chunks: Chunks, blobs: Iterable[BlobEntry]
    ) -> ImageBuilder:
        """A builder as if these blobs had been the layers so far: `chunks` are in them."""
        builder = cls(form)
        builder.tree, builder._chunks, builder._blobs = tree, chunks, list(blobs)
        return builder

    def add(
        self, layer: Node, output: BinaryIO, progress: Progress = lambda _: None
    ) -> BlobEntry | None:
        """Stack a layer on top and write the data no layer below has to `output`, as its blob.

        None, with nothing written, when there is no such data. See `rafs_v6.pack.pack`.
        """
        self.tree = merge(self.tree, layer)
        blob = pack(layer, len(self._blobs), self._chunks, self._form, output, progress)
        self._blobs.append(blob)
        return blob

    def finish(self) -> Image:
        """The image of all layers. Raises ImageError when it cannot be said in RAFS v6."""
        if self.tree is None:
            raise ImageError("an image needs at least one layer")
        placement = place(self.tree, lambda node: len(self._chunks.of[node]))
        used = {chunk.layer for node in placement.files() for chunk in self._chunks.of[node]}
        layers = [layer for layer, blob in enumerate(self._blobs) if blob and layer in used]
        if len(layers) > MAX_BLOBS:
            raise ImageError(f"{len(layers)} blobs, {MAX_BLOBS} can be: squash some layers")
        index_of = {layer: index for index, layer in enumerate(layers)}
        blobs = tuple(
            blob._replace(blob_index=index_of[layer])
            for layer, blob in enumerate(self._blobs)
            if blob and layer in index_of
        )
        files = {
            node: [_Placed(index_of[chunk.layer], chunk) for chunk in self._chunks.of[node]]
            for node in placement.files()
        }
        bootstrap = _Bootstrap(placement, files, blobs, self._form)
        return Image(bootstrap.pack(self._prefetched(placement)), blobs)

    def _prefetched(self, placement: Placement) -> list[int]:
        root = placement.root.node
        named = [(name, lookup(root, name)) for name in self._form.prefetch]
        for name, node in named:
            if node is None:
                raise ImageError(f"{fsdecode(name)}: to be prefetched, but not in the image")
        hinted = [lookup(root, name) for name in self._form.hints]
        nodes = [node for _, node in named] + [node for node in hinted if node and node.is_regular]
        nids = {inode.node: inode.nid for inode in placement.inodes}
        return [nids[node] for node in dict.fromkeys(nodes) if node]


class _Placed(NamedTuple):
    blob_index: int
    chunk: Chunk


class _Bootstrap:
    def __init__(
        self,
        placement: Placement,
        files: dict[Node, list[_Placed]],
        blobs: tuple[BlobEntry, ...],
        form: Format,
    ) -> None:
        self._placement = placement
        self._files = files
        self._blobs = blobs
        self._form = form
        self._meta = 0

    def pack(self, prefetch_nids: list[int]) -> bytes:
        blob_table = align_up(DEVICES_OFFSET + DEVICE_BYTES * len(self._blobs))
        prefetch_table = blob_table + BLOB_ENTRY_BYTES * len(self._blobs)
        prefetch = pack_nids(prefetch_nids) if self._blobs else b""
        # Without blobs the superblock is the empty block that metadata starts with.
        self._meta = align_up(prefetch_table + len(prefetch)) if self._blobs else 0
        image = bytearray(self._meta + align_up(self._placement.end))
        for inode in self._placement.inodes:
            self._write_inode(image, inode)
        chunk_table = self._chunk_table()
        extended = ExtendedSuperblock(
            flags=self._flags(),
            blob_table_offset=blob_table,
            blob_table_size=BLOB_ENTRY_BYTES * len(self._blobs),
            chunk_size=self._form.chunk_bytes,
            chunk_table_offset=len(image),
            chunk_table_size=len(chunk_table),
            prefetch_table_offset=prefetch_table if prefetch else 0,
            prefetch_table_size=len(prefetch),
        )
        image += chunk_table.ljust(align_up(len(chunk_table)), b"\0")
        _write(image, SUPERBLOCK_OFFSET, self._superblock().pack())
        _write(image, EXTENDED_OFFSET, extended.pack())
        slots = device_slots(self._blobs, len(image))
        _write(image, DEVICES_OFFSET, b"".join(slot.pack() for slot in slots))
        if self._blobs:
            _write(image, blob_table, b"".join(blob.pack() for blob in self._blobs) + prefetch)
        return bytes(image)

    def _superblock(self) -> Superblock:
        return Superblock(
            root_nid=self._placement.root.nid,
            inos=self._placement.names,
            blocks=sum(blob.uncompressed_size for blob in self._blobs) // BLOCK_BYTES,
            meta_blkaddr=self._meta // BLOCK_BYTES,
            extra_devices=len(self._blobs),
        )

    def _flags(self) -> RafsFlags:
        flags = COMPRESSOR_FLAGS[self._form.compressor] | DIGEST_FLAGS[self._form.digester]
        flags |= RafsFlags.EXPLICIT_UIDGID
        inlined = [BlobFeatures.INLINED_CHUNK_DIGEST in blob.features for blob in self._blobs]
        if inlined and all(inlined):
            flags |= RafsFlags.INLINED_CHUNK_DIGEST
        if any(inode.xattrs for inode in self._placement.inodes):
            flags |= RafsFlags.HAS_XATTR
        return flags

    def _write_inode(self, image: bytearray, inode: Inode) -> None:
        node = inode.node
        head = ExtendedInode(
            format=inode_format(inode.layout, extended=True),
            xattr_icount=xattr_icount(len(inode.xattrs)),
            mode=node.mode,
            size=inode.size,
            u=self._union(inode),
            ino=inode.number,
            uid=node.uid,
            gid=node.gid,
            mtime=node.mtime,
            mtime_nsec=node.mtime_nsec,
            nlink=inode.nlink,
        )
        at = self._meta + inode.offset
        _write(image, at, head.pack() + inode.xattrs)
        if node.is_regular:
            indexes = b"".join(
                ChunkIndex(
                    placed.blob_index,
                    placed.chunk.number,
                    placed.chunk.info.offset // BLOCK_BYTES,
                ).pack()
                for placed in self._files[node]
            )
            _write(image, self._meta + inode.indexes_offset, indexes)
            return
        data = _directory_data(inode) if node.is_directory else node.target
        tail = len(data) % BLOCK_BYTES if inode.layout == DataLayout.FLAT_INLINE else 0
        whole = len(data) - tail
        _write(image, self._meta + inode.data_offset, data[:whole])
        _write(image, at + inode.head_bytes, data[whole:])

    def _union(self, inode: Inode) -> int:
        node = inode.node
        if node.is_regular:
            return chunk_format(self._extent_bytes(node))
        if node.is_directory or node.is_symlink:
            return (self._meta + inode.data_offset) // BLOCK_BYTES
        return pack_rdev(*node.device)

    def _extent_bytes(self, node: Node) -> int:
        """What the kernel may take for the file's chunk size: all of a file whose chunks lie one
        behind the other, so that it maps and reads ahead across them."""
        chunk_bytes, placed = self._form.chunk_bytes, self._files[node]
        if len(placed) < 2:
            return chunk_bytes
        first = placed[0]
        contiguous = all(
            each.blob_index == first.blob_index
            and each.chunk.info.offset == first.chunk.info.offset + number * chunk_bytes
            for number, each in enumerate(placed)
        )
        return 1 << (node.size - 1).bit_length() if contiguous else chunk_bytes

    def _chunk_table(self) -> bytes:
        table = {
            (placed.chunk.digest, placed.blob_index): _chunk_entry(
                placed, number * self._form.chunk_bytes
            )
            for node in self._placement.files()
            for number, placed in enumerate(self._files[node])
        }
        return b"".join(entry.pack() for _, entry in sorted(table.items()))


def _write(image: bytearray, offset: int, data: bytes) -> None:
    image[offset : offset + len(data)] = data


def _directory_data(inode: Inode) -> bytes:
    blocks = [
        pack_dirents(
            Dirent(name, entry.nid, FILE_TYPES[stat.S_IFMT(entry.node.mode)])
            for name, entry in block
        )
        for block in block_names(inode.entries)
    ]
    return b"".join(block.ljust(BLOCK_BYTES, b"\0") for block in blocks[:-1]) + blocks[-1]


def _chunk_entry(placed: _Placed, file_offset: int) -> ChunkEntry:
    digest, _, number, info = placed.chunk
    return ChunkEntry(
        digest=digest,
        blob_index=placed.blob_index,
        flags=ChunkFlags.COMPRESSED if info.compressed else ChunkFlags(0),
        compressed_size=info.remote_size,
        uncompressed_size=info.size,
        compressed_offset=info.remote_offset,
        uncompressed_offset=info.offset,
        file_offset=file_offset,
        chunk_index=number,
    )


def device_slots(blobs: Iterable[BlobEntry], bootstrap_bytes: int) -> list[DeviceSlot]:
    """The slots of a bootstrap of that size: one address space for it and its blobs."""
    slots, end = [], bootstrap_bytes
    for blob in blobs:
        mapped = align_up(end, _MAPPED_ALIGNMENT)
        end = mapped + blob.uncompressed_size
        if end // BLOCK_BYTES > _MAX_BLOCK:
            raise ImageError(f"{end} bytes of data: 16 TiB can be, remove something")
        blocks = blob.uncompressed_size // BLOCK_BYTES
        slots.append(DeviceSlot(blob.blob_id, blocks, mapped // BLOCK_BYTES))
    return slots

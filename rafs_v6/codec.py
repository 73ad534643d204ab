"""Compression and digests of chunks: fill a given buffer, never more than it holds.

Every function may run in several threads at once: the C libraries release the GIL and zstd's
contexts, which may not be shared, are one per thread.

zstd is python-zstandard because its contexts can be used again, which a decompressor of the
standard library's API (backports.zstd) cannot. Filling a buffer of 1 MiB / 4 KiB on one thread
took 1.34 ms / 9 µs against 1.39 ms / 19 µs; on two threads 1565 / 937 MB/s against 1317 / 200
(libzstd 1.5.7, /usr/bin as data, 2 cores).
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import lz4.block
import zstandard
from blake3 import blake3

from rafs_v6 import ImageError
from rafs_v6.layout import Compressor, Digest, Memory

ZSTD_LEVEL = 3
"""Level of the field's builder; a chunk is one frame that says its size."""
_GZIP_WBITS = 31


class CodecError(ImageError):
    """Compressed bytes that are damaged or decode to another size than the image says."""


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.zstd_decoder = zstandard.ZstdDecompressor()
        self.zstd_encoder = zstandard.ZstdCompressor(level=ZSTD_LEVEL)


_contexts = _Contexts()


def _plain(source: Memory, size: int) -> Memory:
    return source


def _lz4_block(source: Memory, size: int) -> bytes:
    plain: bytes = lz4.block.decompress(source, uncompressed_size=size)
    return plain


def _gzip(source: Memory, size: int) -> bytes:
    decoder = zlib.decompressobj(wbits=_GZIP_WBITS)
    plain = decoder.decompress(source, max(size, 1))  # 0 would mean without limit
    # The checksum behind the last byte is only read when asked for one byte more.
    excess = decoder.decompress(decoder.unconsumed_tail, 1)
    if excess or not decoder.eof or decoder.unused_data:
        raise CodecError("the gzip member does not end where the chunk does")
    return plain


def _zstd(source: Memory, size: int) -> bytes:
    # The library trusts the size a frame claims: a bomb is found before it is allocated.
    claimed = _claimed(source)
    if claimed not in (size, zstandard.CONTENTSIZE_UNKNOWN):
        raise CodecError(f"the zstd frame says it holds {claimed} bytes")
    return _contexts.zstd_decoder.decompress(
        source, max_output_size=size, read_across_frames=False, allow_extra_data=False
    )


def _claimed(source: Memory) -> int:
    size: int = zstandard.get_frame_parameters(source).content_size
    return size


_DECODERS: Mapping[Compressor, Callable[[Memory, int], Memory]] = {
    Compressor.NONE: _plain,
    Compressor.LZ4_BLOCK: _lz4_block,
    Compressor.GZIP: _gzip,
    Compressor.ZSTD: _zstd,
}


def decompress_into(compressor: Compressor, source: Memory, target: memoryview) -> None:
    """Fill all of `target` with what `source` holds.

    Memory taken is at most another `len(target)` bytes, whatever `source` claims to hold.
    Raises CodecError, with `target` untouched, when `source` is damaged or holds another number
    of bytes.
    """
    try:
        plain = _DECODERS[compressor](source, len(target))
    except (zstandard.ZstdError, lz4.block.LZ4BlockError, zlib.error, CodecError) as error:
        raise CodecError(
            f"{len(source)} bytes of {compressor.name.lower()} data that should hold "
            f"{len(target)}: {error}"
        ) from None
    if len(plain) != len(target):
        raise CodecError(
            f"{len(source)} bytes of {compressor.name.lower()} data hold {len(plain)} bytes "
            f"instead of {len(target)}"
        )
    target[:] = plain


def decompress_together(
    compressor: Compressor, sources: list[Memory], targets: list[memoryview]
) -> bool:
    """Fill every target with what its source holds, in one call beside which other threads run: one
    call for each chunk of 16 KiB had two threads pass the interpreter's lock to and fro for half of
    their time (0.62 to 0.80 GB/s with digests; so it is 1.14). Needs as much memory again.

    False, targets untouched: a source is damaged or does not say its size, or there is no such call
    for this compressor; `decompress_into` tells which. What follows a frame is not looked at.
    """
    sizes = array("Q", map(len, targets))
    try:
        if compressor is not Compressor.ZSTD or sizes != array("Q", map(_claimed, sources)):
            return False
        plains: Any = _contexts.zstd_decoder.multi_decompress_to_buffer(
            sources, decompressed_sizes=sizes.tobytes(), threads=1
        )
    except zstandard.ZstdError:
        return False
    for index, target in enumerate(targets):
        target[:] = memoryview(plains[index])
    return True


def compress(compressor: Compressor, data: Memory) -> bytes | None:
    """`data` compressed as the field's builder does, or None when that would not be smaller."""
    match compressor:
        case Compressor.NONE:
            return None
        case Compressor.LZ4_BLOCK:
            packed: bytes = lz4.block.compress(data, store_size=False)
        case Compressor.GZIP:
            packed = zlib.compress(data, wbits=_GZIP_WBITS)
        case Compressor.ZSTD:
            packed = _contexts.zstd_encoder.compress(data)
    return packed if len(packed) < len(data) else None


def digest(algorithm: Digest, memory: Memory) -> bytes:
    """Digest of uncompressed bytes: 32 of them."""
    match algorithm:
        case Digest.BLAKE3:
            return blake3(memory).digest()
        case Digest.SHA256:
            return hashlib.sha256(memory).digest()

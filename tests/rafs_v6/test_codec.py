import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rafs_v6 import codec
from rafs_v6.layout import Compressor, Digest

PACKED = [Compressor.LZ4_BLOCK, Compressor.GZIP, Compressor.ZSTD]


def unpack(compressor: Compressor, source: bytes, size: int) -> bytes:
    target = bytearray(b"\xaa" * size)
    codec.decompress_into(compressor, source, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("compressor", Compressor)
@given(plain=st.binary(min_size=1, max_size=5000), repeat=st.integers(1, 3))
def test_bytes_come_back(compressor: Compressor, plain: bytes, repeat: int) -> None:
    """What is compressed fills its buffer again; what would not be smaller is not compressed."""
    plain *= repeat
    packed = codec.compress(compressor, plain)
    if packed is None:
        packed, compressor = plain, Compressor.NONE
    else:
        assert len(packed) < len(plain)
    assert unpack(compressor, packed, len(plain)) == plain


@pytest.mark.parametrize("compressor", PACKED)
@pytest.mark.parametrize("size", [0, 1, 9_999, 10_001, 20_000])
def test_another_size_than_promised_is_an_error(compressor: Compressor, size: int) -> None:
    """The buffer is filled exactly or not touched."""
    packed = codec.compress(compressor, b"chunk" * 2_000)
    assert packed is not None
    target = bytearray(b"\xaa" * size)
    with pytest.raises(codec.CodecError):
        codec.decompress_into(compressor, packed, memoryview(target))
    assert target == b"\xaa" * size


@pytest.mark.parametrize("compressor", Compressor)
@given(source=st.binary(max_size=60), size=st.integers(0, 100))
def test_any_bytes_decode_or_are_a_codec_error(
    compressor: Compressor, source: bytes, size: int
) -> None:
    """Garbage never raises anything else."""
    try:
        plain = unpack(compressor, source, size)
    except codec.CodecError:
        return
    assert len(plain) == size


@pytest.mark.parametrize("compressor", PACKED)
def test_truncated_or_followed_by_rubbish_is_an_error(compressor: Compressor) -> None:
    """Neither half a chunk nor more than one passes for one."""
    plain = bytes(range(256)) * 40
    packed = codec.compress(compressor, plain)
    assert packed is not None
    for damaged in (packed[:-1], packed[: len(packed) // 2], packed + b"rubbish"):
        with pytest.raises(codec.CodecError):
            unpack(compressor, damaged, len(plain))


def bombs() -> list[tuple[Compressor, bytes]]:
    zeros = bytes(64 << 20)
    stream = zstandard.ZstdCompressor().compressobj()
    unsized = stream.compress(zeros) + stream.flush()
    return [
        (Compressor.ZSTD, zstandard.ZstdCompressor().compress(zeros)),
        (Compressor.ZSTD, unsized),
        (Compressor.GZIP, zlib.compress(zeros, wbits=31)),
    ]


@pytest.mark.parametrize("bomb", range(3))
def test_a_bomb_takes_no_more_memory_than_its_buffer(bomb: int) -> None:
    """Frames that claim or hold 64 MiB where a page is expected end early."""
    compressor, packed = bombs()[bomb]
    tracemalloc.start()
    try:
        with pytest.raises(codec.CodecError):
            unpack(compressor, packed, 4096)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_zstd_frame_need_not_say_its_size() -> None:
    """Frames written by a stream are as good as those of one shot."""
    stream = zstandard.ZstdCompressor().compressobj()
    packed = stream.compress(b"chunk" * 1000) + stream.flush()
    assert unpack(Compressor.ZSTD, packed, 5000) == b"chunk" * 1000


@settings(deadline=None)
@given(plains=st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=9))
def test_frames_decode_together_as_each_alone(plains: list[bytes]) -> None:
    """Each target has what its own source holds."""
    sources = [codec.compress(Compressor.ZSTD, plain * 20) or b"" for plain in plains]
    targets = [memoryview(bytearray(20 * len(plain))) for plain in plains]
    assert codec.decompress_together(Compressor.ZSTD, sources, targets)
    assert [bytes(target) for target in targets] == [plain * 20 for plain in plains]


@pytest.mark.parametrize("fault", ["damaged", "short", "long", "unsized", "bomb", "lz4"])
def test_nothing_decodes_together_when_one_does_not(fault: str) -> None:
    """Whoever asked finds out which; no target was touched, no memory taken for a bomb."""
    compressor, size = Compressor.ZSTD, 5000
    good = codec.compress(compressor, b"chunk" * 1000)
    assert good is not None
    sources, targets = [good, good, good], [memoryview(bytearray(size)) for _ in range(3)]
    match fault:
        case "damaged":
            sources[1] = good[:-1] + b"\0"
        case "short":
            sources[1] = good[:-3]
        case "long":
            targets[1] = memoryview(bytearray(size - 1))
        case "unsized":
            stream = zstandard.ZstdCompressor().compressobj()
            sources[1] = stream.compress(b"chunk" * 1000) + stream.flush()
        case "bomb":
            sources[1] = bombs()[0][1]
        case _:
            compressor = Compressor.LZ4_BLOCK
    tracemalloc.start()
    try:
        assert not codec.decompress_together(compressor, sources, targets)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert not any(any(target) for target in targets)


@pytest.mark.parametrize("compressor", PACKED)
def test_threads_do_not_share_contexts(compressor: Compressor) -> None:
    """Four threads that start together on different chunks all get their own bytes."""
    together = threading.Barrier(4)

    def work(number: int) -> bool:
        plain = bytes([number, number + 1]) * 50_000
        together.wait()
        return all(
            unpack(compressor, codec.compress(compressor, plain) or b"", len(plain)) == plain
            for _ in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (Digest.BLAKE3, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
        (Digest.SHA256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ],
)
def test_digests_are_the_published_ones(algorithm: Digest, expected: str) -> None:
    """The digests of "abc", from memory of any kind."""
    assert codec.digest(algorithm, b"abc").hex() == expected
    assert codec.digest(algorithm, memoryview(bytearray(b"xabc"))[1:]).hex() == expected

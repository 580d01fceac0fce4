"""Compressed clusters: exactly one cluster comes back, or an error; never more memory than a cluster."""

from __future__ import annotations

import random
import threading
import zlib
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import CorruptImageError, OptionError
from blocklayer.codec.qcow2.compress import Compressor

CLUSTER = 65536
KINDS = (0, 1)


def text(seed: int, length: int = CLUSTER) -> bytes:
    """Compressible data with repeats at all distances."""
    source = random.Random(seed)
    words = [source.randbytes(source.randint(3, 30)) for _ in range(200)]
    return b"".join(source.choices(words, k=length))[:length]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [512, 4096, CLUSTER, 2 << 20])
def test_a_cluster_comes_back_whatever_follows_it(kind: int, size: int) -> None:
    """Descriptors count sectors: up to 511 bytes of something else lie behind the stream."""
    compressor = Compressor(kind, size)
    data = text(1, 256)[:100] * (size // 100) + bytes(size % 100)
    packed = compressor.compress(data)
    assert packed is not None
    for tail in (b"", b"\xff" * 511, packed):
        assert compressor.decompress(packed + tail) == data
        assert compressor.decompress(memoryview(packed + tail)) == data


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_not_worth_compressing(kind: int) -> None:
    """None means: store it as it is."""
    assert Compressor(kind, CLUSTER).compress(random.Random(2).randbytes(CLUSTER)) is None


@pytest.mark.parametrize("seed", range(5))
def test_deflate_keeps_to_a_window_of_4_kib(seed: int) -> None:
    """Inflated 64 bytes at a time, so that nothing but a 4 KiB window is there to refer to."""
    data = text(seed)
    packed = Compressor(0, CLUSTER).compress(data)
    assert packed is not None
    assert inflate_in_small_steps(packed) == data


def inflate_in_small_steps(packed: bytes) -> bytes:
    """Raw deflate with a 4 KiB window; zlib raises for a distance beyond it."""
    stream = zlib.decompressobj(-12)
    pieces = [stream.decompress(packed, 64)]
    while pieces[-1] or stream.unconsumed_tail:
        pieces.append(stream.decompress(stream.unconsumed_tail, 64))
    return b"".join(pieces)


def test_the_window_check_would_catch_a_larger_window() -> None:
    """With zlib's own 32 KiB window on data that repeat after 20 KiB."""
    stream = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed = stream.compress(random.Random(3).randbytes(20000) * 2) + stream.flush()
    with pytest.raises(zlib.error):
        inflate_in_small_steps(packed)


def test_clusters_of_other_writers_are_read() -> None:
    """Of zlib with small and large windows, zstd with high levels, with and without the size in the frame."""
    data = text(4)
    for bits in (-9, -12, -15):
        stream = zlib.compressobj(9, zlib.DEFLATED, bits)
        assert Compressor(0, CLUSTER).decompress(stream.compress(data) + stream.flush()) == data
    for level in (1, 19):
        for with_size in (True, False):
            packer = zstandard.ZstdCompressor(level=level, write_content_size=with_size)
            assert Compressor(1, CLUSTER).decompress(packer.compress(data)) == data


def test_a_bomb_yields_one_cluster_and_no_more() -> None:
    """100 MB of zeroes in the stream; QEMU, too, stops when the cluster is full."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = stream.compress(bytes(10**8)) + stream.flush()
    assert Compressor(0, CLUSTER).decompress(bomb) == bytes(CLUSTER)
    assert Compressor(1, CLUSTER).decompress(zstandard.ZstdCompressor().compress(bytes(10**8))) == bytes(CLUSTER)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_ends_early_is_corruption(kind: int) -> None:
    """Cut at every sixteenth byte; and a complete stream of less than a cluster."""
    compressor = Compressor(kind, CLUSTER)
    packed = compressor.compress(text(5))
    assert packed is not None
    for length in range(0, len(packed) - 8, 16):
        with pytest.raises(CorruptImageError):
            compressor.decompress(packed[:length])
    short = Compressor(kind, 4096).compress(bytes(4096))
    assert short is not None
    with pytest.raises(CorruptImageError):
        compressor.decompress(short)


@given(st.sampled_from(KINDS), st.binary(max_size=600), st.integers(0, 500), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_cluster_or_corruption(kind: int, noise: bytes, at: int, bit: int) -> None:
    """Fuzz: noise, and a stream with one bit flipped."""
    compressor = Compressor(kind, 4096)
    packed = bytearray(compressor.compress(text(6, 64) * 64) or b"")
    packed[at % len(packed)] ^= 1 << bit
    for data in (noise, bytes(packed)):
        with suppress(CorruptImageError):
            assert len(compressor.decompress(data)) == 4096


def test_one_compressor_serves_many_threads() -> None:
    """Contexts are kept per thread."""
    compressor = Compressor(1, CLUSTER)
    results: list[bool] = []

    def work(seed: int) -> None:
        for number in range(20):
            data = text(seed * 100 + number)
            results.append(compressor.decompress(compressor.compress(data) or b"") == data)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [True] * 80


def test_an_unknown_type_is_refused() -> None:
    """The header's parser refuses it first; this guards other callers."""
    with pytest.raises(OptionError):
        Compressor(2, CLUSTER)

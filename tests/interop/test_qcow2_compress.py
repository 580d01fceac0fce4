"""QEMU reads the clusters that we compress, and we read those that QEMU compresses."""

from __future__ import annotations

import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.compress import Compressor
from blocklayer.codec.qcow2.create import CreateOptions, plan_create
from blocklayer.codec.qcow2.entries import (
    COPIED,
    Mapping,
    decode_l1,
    dump_table,
    encode_compressed,
    load_table,
    mapping_run,
)
from blocklayer.codec.qcow2.refcounts import RefcountBlock
from tests.helpers.peers import needs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs("qemu-img")

CLUSTER = 65536
COUNT = 12


def run(*command: str | Path) -> None:
    """Run a program that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def guest_data() -> bytes:
    """Compressible clusters with repeats at many distances."""
    source = random.Random(11)
    words = [source.randbytes(source.randrange(2, 40)) for _ in range(90)]
    return b"".join(source.choices(words, k=COUNT * CLUSTER))[: COUNT * CLUSTER]


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_qemu_reads_what_we_compress(tmp_path: Path, kind: str) -> None:
    """Packed byte after byte, across cluster boundaries; qemu-img finds the image clean and equal."""
    data = guest_data()
    plan = plan_create(CreateOptions(len(data), compression_type=kind))
    header, geometry = plan.header, plan.header.geometry
    compressor = Compressor(header.compression_type, CLUSTER)
    table, at, packed, entries = plan.file_size, plan.file_size + CLUSTER, bytearray(), []
    counts = RefcountBlock(4, bytearray(CLUSTER))
    counts.fill(0, table // CLUSTER + 1, 1)
    for start in range(0, len(data), CLUSTER):
        piece = compressor.compress(data[start : start + CLUSTER])
        assert piece is not None
        entries.append(encode_compressed(geometry, at + len(packed), len(piece)))
        first, last = (at + len(packed)) // CLUSTER, (at + len(packed) + len(piece) - 1) // 512 * 512 // CLUSTER
        counts.add(first, last - first + 1, 1)
        packed += piece
    path = tmp_path / "image.qcow2"
    with path.open("wb") as file:
        file.truncate(at + -(-len(packed) // CLUSTER) * CLUSTER)
        writes = [*plan.writes(), (plan.refcount_blocks.offset, bytes(counts.data)), (at, bytes(packed))]
        writes += [(header.l1_table_offset, dump_table([table | COPIED])), (table, dump_table(entries))]
        for offset, content in writes:
            file.seek(offset)
            file.write(content)
    (tmp_path / "data.raw").write_bytes(data)
    run("qemu-img", "check", "-f", "qcow2", path)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "data.raw")


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_we_read_what_qemu_compresses(tmp_path: Path, kind: str) -> None:
    """Through header, L1, L2 and descriptor down to the bytes."""
    data = guest_data()
    (tmp_path / "data.raw").write_bytes(data)
    path = tmp_path / "image.qcow2"
    options = ["-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}"]
    run("qemu-img", "convert", *options, tmp_path / "data.raw", path)
    image = path.read_bytes()
    header = qcow2_header.parse(image[:CLUSTER], file_size=len(image))
    l1 = load_table(image[header.l1_table_offset :][: 8 * header.l1_size])
    offset = decode_l1(header.geometry, l1[0])
    l2 = load_table(image[offset : offset + CLUSTER])
    compressor = Compressor(header.compression_type, CLUSTER)
    found = bytearray()
    while len(found) < len(data):
        part = mapping_run(header.geometry, l2, len(found), len(data) - len(found))
        assert part.mapping is Mapping.COMPRESSED
        found += compressor.decompress(image[part.host_offset :][: part.compressed_length])
    assert found == data

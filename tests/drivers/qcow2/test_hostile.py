"""Images that were made to do harm: each ends in a typed error or in plain data, soon, and with little memory."""

from __future__ import annotations

import random
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import blocklayer
from blocklayer.base.errors import (
    BlockError,
    ChainError,
    CorruptImageError,
    FormatError,
    ImageError,
    LimitError,
    ReferenceRefusedError,
    UnknownFormatError,
)
from blocklayer.base.units import KIB, MIB
from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED, ZERO
from blocklayer.codec.qcow2.features import Incompatible
from tests.helpers.qcow2_disk import header_of, memory_graph, new_image, open_image, opened, qcow2
from tests.helpers.virtual_time import virtual_time

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLUSTER = 4096
SIZE = 4 * MIB
PEAK_MAX = 8 * MIB


@contextmanager
def bounded(peak_max: int = PEAK_MAX) -> Iterator[None]:
    """What happens inside never holds more memory than this."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < peak_max
    finally:
        tracemalloc.stop()


def patched(*fields: tuple[int, int, int], **options: object) -> bytearray:
    """A small image with header fields ``(offset, width, value)`` overwritten."""
    content = new_image(SIZE, cluster_size=CLUSTER, **options)
    for offset, width, value in fields:
        content[offset : offset + width] = value.to_bytes(width, "big")
    return content


HEADERS = {
    "version 1": ([(4, 4, 1)], ImageError, "version 1"),
    "version 4": ([(4, 4, 4)], FormatError, "version 4"),
    "clusters of 256 bytes": ([(20, 4, 8)], FormatError, "cluster_bits 8"),
    "clusters of 4 MiB": ([(20, 4, 22)], LimitError, "cluster_bits 22"),
    "clusters of 2^63": ([(20, 4, 63)], LimitError, "cluster_bits 63"),
    "a disk of 2^64 bytes": ([(24, 8, 2**64 - 1)], LimitError, "size"),
    "a disk that L1 cannot map": ([(24, 8, 2**50)], LimitError, "L1 table"),
    "a disk larger than its L1": ([(24, 8, 2**30)], FormatError, "L1 table has 2 entries"),
    "an L1 of 4 billion entries": ([(36, 4, 2**32 - 1)], LimitError, "4294967295 entries"),
    "an L1 beyond 2^56": ([(40, 8, 1 << 57)], FormatError, "beyond 2\\^56"),
    "an L1 beyond the file": ([(40, 8, 1 << 40)], FormatError, "beyond the file's end"),
    "an L1 off the boundary": ([(40, 8, 3 * CLUSTER + 8)], FormatError, "cluster boundary"),
    "an L1 in the header": ([(40, 8, 0)], FormatError, "overlap"),
    "an L1 in the refcount table": ([(40, 8, CLUSTER)], FormatError, "overlap"),
    "a refcount table beyond 2^56": ([(48, 8, (1 << 64) - CLUSTER)], FormatError, "beyond 2\\^56"),
    "a refcount table of 16 TiB": ([(56, 4, 2**32 - 1)], LimitError, "refcount table is larger"),
    "no refcount table": ([(56, 4, 0)], FormatError, "no refcount table"),
    "4 billion snapshots": ([(60, 4, 2**32 - 1)], LimitError, "snapshots"),
    "snapshots in the header": ([(60, 4, 1), (64, 8, 0)], FormatError, "overlap"),
    "AES": ([(32, 4, 1)], FormatError, "AES encryption"),
    "LUKS": ([(32, 4, 2)], FormatError, "LUKS encryption"),
    "refcounts of 2^7 bits": ([(96, 4, 7)], FormatError, "refcount_order 7"),
    "refcounts of 2^(2^31) bits": ([(96, 4, 2**31)], FormatError, "refcount_order"),
    "a header of 4 GiB": ([(100, 4, 2**32 - 8)], FormatError, "header length"),
    "a header of 8 bytes": ([(100, 4, 8)], FormatError, "header length"),
    "compression type 9": ([(104, 1, 9), (72, 8, 8)], FormatError, "compression type 9"),
    "a compression type without its bit": ([(104, 1, 1)], FormatError, "compression type 1"),
    "a backing name of 1 GiB": ([(8, 8, 512), (16, 4, 1 << 30)], LimitError, "name is longer than 1023"),
    "a backing name of 1024 bytes": ([(8, 8, 512), (16, 4, 1024)], LimitError, "name is longer than 1023"),
    "a backing name behind the cluster": ([(8, 8, CLUSTER), (16, 4, 16)], FormatError, "outside the header's cluster"),
    "a backing name in the header": ([(8, 8, 8), (16, 4, 16)], FormatError, "outside the header's cluster"),
    "an extension of 4 GiB": ([(112, 4, 0x12345678), (116, 4, 2**32 - 1)], FormatError, "extension"),
    "extended L2 with small clusters": ([(20, 4, 12), (72, 8, 16)], FormatError, "extended L2"),
    "every incompatible bit": ([(72, 8, 2**64 - 1)], FormatError, "feature"),
}


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("name", HEADERS)
@virtual_time
async def test_headers_that_ask_for_too_much_or_contradict_themselves(name: str, read_only: bool) -> None:
    fields, kind, text = HEADERS[name]
    content = patched(*fields)
    before = bytes(content)
    with bounded():
        async with memory_graph() as graph:
            with pytest.raises(kind, match=text):
                await open_image(graph, content, read_only=read_only)
            assert not graph.nodes
    assert content == before, "an image that is refused is not touched"


@virtual_time
async def test_every_header_cut_short_is_a_format_error() -> None:
    whole = new_image(SIZE, cluster_size=512)
    async with memory_graph() as graph:
        for length in range(112):
            with pytest.raises(FormatError):
                await open_image(graph, whole[:length])


async def whatever(content: bytearray, **options: object) -> None:
    """Open and use an image: everything that goes wrong is a ``BlockError``."""
    async with memory_graph() as graph:
        try:
            disk = await open_image(graph, content, **options)
        except BlockError:
            return
        for request in (
            lambda: disk.read(0, 64 * KIB),
            lambda: disk.write(4096, b"w" * 5000),
            lambda: disk.write_compressed(0, b"c" * CLUSTER),
            lambda: disk.write_zeroes(0, 128 * KIB),
            lambda: disk.discard(64 * KIB, 64 * KIB),
            lambda: disk.flush(),
            lambda: disk.write(100 * KIB, b"w" * 50000),
            lambda: disk.truncate(disk.size + 64 * KIB),
            lambda: disk.block_status(0, disk.size),
            lambda: disk.read(0, min(disk.size, MIB)),
        ):
            try:
                await request()
            except BlockError:
                continue
        try:
            await disk.close()
        except BlockError:
            return


@pytest.mark.parametrize("what", ["header", "tables"])
@pytest.mark.parametrize("options", [{}, {"extended_l2": True, "cluster_size": 16 * KIB}, {"compat": "0.10"}], ids=str)
def test_random_damage_never_ends_in_anything_but_a_typed_error(what: str, options: dict[str, object]) -> None:
    @virtual_time
    async def attempt(content: bytearray) -> None:
        await whatever(content)

    base = made(options)
    header = header_of(base)
    with bounded(24 * MIB):
        for seed in range(40):
            source, content = random.Random(seed), bytearray(base)
            for _ in range(source.randrange(1, 6)):
                at = (
                    source.randrange(112)
                    if what == "header"
                    else source.randrange(header.cluster_size, len(base) // 8 * 8)
                )
                content[at] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
            attempt(content)


def made(options: dict[str, object]) -> bytearray:
    """An image with data, zeroes and compressed clusters."""
    content = new_image(MIB, **{"cluster_size": CLUSTER, **options})

    @virtual_time
    async def fill() -> None:
        async with opened(content) as disk:
            cluster = int(disk.driver.unit)
            await disk.write(0, b"x" * 3 * cluster)
            await disk.write_compressed(4 * cluster, b"y" * cluster)
            await disk.write_zeroes(6 * cluster, cluster)

    fill()
    return content


# -- mappings ----------------------------------------------------------------------------------------------------------


async def with_l2(**options: object) -> tuple[bytearray, int]:
    """An image with one data cluster at guest offset 0, and where its L2 table is."""
    content = new_image(SIZE, cluster_size=CLUSTER, **options)
    async with opened(content) as disk:
        await disk.write(0, b"x" * CLUSTER)
        table = qcow2(disk).l2.cached[0].offset
    return content, table


def put(content: bytearray, offset: int, word: int) -> None:
    """Overwrite a word."""
    content[offset : offset + 8] = word.to_bytes(8, "big")


BAD_L1 = {
    "reserved bits": COPIED | 0x100 | 5 * CLUSTER,
    "high reserved bits": COPIED | 1 << 60 | 5 * CLUSTER,
    "off the boundary": COPIED | 5 * CLUSTER + 512,
    "the flag alone": COPIED,
}


@pytest.mark.parametrize("name", BAD_L1)
@virtual_time
async def test_l1_entries_that_cannot_be_true_mark_the_image_corrupt(name: str) -> None:
    content, _ = await with_l2()
    put(content, header_of(content).l1_table_offset, BAD_L1[name])
    async with opened(content) as disk:
        with pytest.raises(CorruptImageError):
            await disk.read(0, 512)
        with pytest.raises(CorruptImageError):
            await disk.write(0, b"x")
        await disk.write_zeroes(0, 0)
        assert await disk.read(SIZE - 512, 512) == bytes(512), "what is not damaged stays readable"
    assert Incompatible.CORRUPT in header_of(content).incompatible


@pytest.mark.parametrize("where", ["header", "L1", "refcount table", "refcount block"])
@virtual_time
async def test_an_l2_table_that_lies_in_other_metadata_is_never_written_to(where: str) -> None:
    content, _ = await with_l2()
    header = header_of(content)
    place = {
        "header": 0,
        "L1": header.l1_table_offset,
        "refcount table": header.refcount_table_offset,
        "refcount block": header.refcount_table_offset + CLUSTER,
    }[where]
    put(content, header.l1_table_offset, COPIED | place)
    before = bytes(content)
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        for request in (
            disk.read(0, CLUSTER),
            disk.write(0, b"x"),
            disk.write_zeroes(0, CLUSTER),
            disk.discard(0, CLUSTER),
        ):
            with pytest.raises(CorruptImageError):
                await request
        await disk.close()
    assert content[CLUSTER:] == before[CLUSTER:]
    assert Incompatible.CORRUPT in header_of(content).incompatible


@pytest.mark.parametrize("flags", [COPIED, COPIED | ZERO, 0, ZERO], ids=hex)
@pytest.mark.parametrize("where", ["header", "L1", "L2", "refcount table", "refcount block"])
@virtual_time
async def test_guest_data_that_lie_in_metadata_are_never_written_to(where: str, flags: int) -> None:
    content, table = await with_l2()
    header = header_of(content)
    place = {
        "header": 0,
        "L1": header.l1_table_offset,
        "L2": table,
        "refcount table": header.refcount_table_offset,
        "refcount block": header.refcount_table_offset + CLUSTER,
    }[where]
    put(content, table, place | flags)
    metadata = {
        "header": 0,
        "L1": header.l1_table_offset,
        "refcount table": header.refcount_table_offset,
    }
    before = bytes(content)
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        refused = 0
        for number in range(4):
            try:
                await disk.write(number * CLUSTER, b"evil" * 1024)
                await disk.flush()
            except CorruptImageError:
                refused += 1
        await disk.close()
    assert refused or (place == 0 and flags != COPIED), "an entry without a place may get one"
    for start in metadata.values():
        assert content[start + 80 : start + CLUSTER] == before[start + 80 : start + CLUSTER]
    assert (Incompatible.CORRUPT in header_of(content).incompatible) is bool(refused)


BAD_L2 = {
    "reserved bits": COPIED | 0x100 | 9 * CLUSTER,
    "high reserved bits": COPIED | 1 << 60 | 9 * CLUSTER,
    "off the boundary": COPIED | 9 * CLUSTER + 1024,
    "compressed and copied": COMPRESSED | COPIED | 9 * CLUSTER,
}


@pytest.mark.parametrize("name", BAD_L2)
@virtual_time
async def test_l2_entries_that_cannot_be_true_mark_the_image_corrupt_whatever_meets_them(name: str) -> None:
    clean, table = await with_l2()
    for request in ("read", "write", "write_zeroes", "discard", "write_compressed"):
        content = bytearray(clean)
        put(content, table, BAD_L2[name])
        arguments = {"read": (0, 512), "write": (0, b"x"), "write_compressed": (0, b"c" * CLUSTER)}
        async with opened(content) as disk:
            with pytest.raises(CorruptImageError, match="L2 entry"):
                await getattr(disk, request)(*arguments.get(request, (0, CLUSTER)))
            with pytest.raises(CorruptImageError, match="marked corrupt and refuses writes"):
                await disk.write(SIZE // 2, b"x")
        assert Incompatible.CORRUPT in header_of(content).incompatible


@virtual_time
async def test_a_reader_of_a_damaged_image_gets_the_error_and_marks_nothing() -> None:
    content, table = await with_l2()
    put(content, table, BAD_L2["reserved bits"])
    before = bytes(content)
    async with opened(content, read_only=True) as disk:
        with pytest.raises(CorruptImageError, match="L2 entry"):
            await disk.read(0, 512)
        assert await disk.read(CLUSTER, 512) == bytes(512)
    assert content == before


@pytest.mark.parametrize("place", [1 << 40, (1 << 56) - CLUSTER], ids=hex)
@virtual_time
async def test_data_far_behind_the_file_read_as_zeroes(place: int) -> None:
    content, table = await with_l2()
    put(content, table, COPIED | place)
    with bounded():
        async with opened(content, read_only=True) as disk:
            assert await disk.read(0, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("place", [0, 100, 1 << 40, (1 << 56) - 1], ids=hex)
@virtual_time
async def test_compressed_clusters_that_point_anywhere_are_errors(place: int) -> None:
    content, table = await with_l2()
    put(content, table, COMPRESSED | 7 << 58 | place)
    with bounded():
        async with opened(content) as disk:
            with pytest.raises(CorruptImageError):
                await disk.read(0, CLUSTER)
            with pytest.raises(CorruptImageError):
                await disk.write(0, b"part")
            assert await disk.read(CLUSTER, 512) == bytes(512)


@virtual_time
async def test_two_l1_entries_that_share_an_l2_table_do_not_loop_or_lose_the_file() -> None:
    content, table = await with_l2()
    put(content, header_of(content).l1_table_offset + 8, COPIED | table)
    await whatever(content)
    header_of(content)


@virtual_time
async def test_subclusters_that_contradict_their_entry_mark_the_image_corrupt() -> None:
    content = new_image(SIZE, cluster_size=16 * KIB, extended_l2=True)
    async with opened(content) as disk:
        await disk.write(0, b"x" * 16 * KIB)
        table = qcow2(disk).l2.cached[0].offset
    for entry, bitmap in ((0, 1), (None, 1 << 32 | 1), (COMPRESSED | 5 * CLUSTER, 1)):
        damaged = bytearray(content)
        if entry is not None:
            put(damaged, table, entry)
        put(damaged, table + 8, bitmap)
        async with opened(damaged) as disk:
            with pytest.raises(CorruptImageError):
                await disk.write(0, b"x")
        assert Incompatible.CORRUPT in header_of(damaged).incompatible


# -- large tables in small files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [True, False])
@virtual_time
async def test_the_largest_tables_in_a_tiny_file_cost_no_more_than_their_limits(read_only: bool) -> None:
    """An L1 of 32 MiB and a refcount table of 8 MiB, almost all of them behind the end of the file."""
    content = new_image(0, cluster_size=512)
    for offset, width, value in ((36, 4, 4 << 20), (40, 8, 64 * MIB), (48, 8, 512), (56, 4, 16384)):
        content[offset : offset + width] = value.to_bytes(width, "big")
    content.extend(bytes(64 * MIB + 512 - len(content)))
    with bounded(160 * MIB):
        async with memory_graph() as graph:
            disk = await open_image(graph, content, read_only=read_only)
            await disk.close()


@virtual_time
async def test_a_dirty_image_with_damaged_mappings_is_refused_and_not_repaired() -> None:
    content, table = await with_l2()
    put(content, table, BAD_L2["reserved bits"])
    content[79] |= Incompatible.DIRTY.value
    before = bytes(content)
    async with memory_graph() as graph:
        with pytest.raises(CorruptImageError, match="cannot repair"):
            await open_image(graph, content)
    assert content == before


# -- references ----------------------------------------------------------------------------------------------------------


def image_file(path: Path, **options: object) -> Path:
    """An image on disk."""
    path.write_bytes(new_image(SIZE, **options))
    return path


async def test_an_image_that_is_its_own_backing_file_is_a_loop(tmp_path: Path) -> None:
    path = image_file(tmp_path / "self.qcow2", backing_file="self.qcow2", backing_fmt="qcow2")
    async with blocklayer.Graph() as graph:
        with pytest.raises(ChainError, match="loop"):
            await graph.open(path)
        assert not graph.nodes


async def test_two_images_that_back_each_other_are_a_loop_also_through_links(tmp_path: Path) -> None:
    image_file(tmp_path / "a.qcow2", backing_file="link.qcow2", backing_fmt="qcow2")
    image_file(tmp_path / "b.qcow2", backing_file="a.qcow2", backing_fmt="qcow2")
    (tmp_path / "link.qcow2").symlink_to("b.qcow2")
    async with blocklayer.Graph() as graph:
        with pytest.raises(ChainError, match="loop"):
            await graph.open(tmp_path / "a.qcow2")
        assert not graph.nodes


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../../etc/passwd", "json:{}", 'json:{"driver":"file","filename":"/etc/passwd"}', "nbd://x/y"],
)
@pytest.mark.parametrize("kind", ["backing_file", "data_file"])
async def test_names_of_files_elsewhere_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    extra = {"backing_fmt": "raw"} if kind == "backing_file" else {}
    path = image_file(tmp_path / "disk.qcow2", **{kind: name}, **extra)
    async with blocklayer.Graph() as graph:
        with pytest.raises(ReferenceRefusedError) as caught:
            await graph.open(path)
        assert caught.value.reference == name
        assert not graph.nodes


async def test_a_backing_file_without_a_recorded_format_is_not_guessed(tmp_path: Path) -> None:
    path = image_file(tmp_path / "disk.qcow2", backing_file="base.raw", backing_fmt="raw")
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    content = bytearray(path.read_bytes())
    at = content.index((0xE2792ACA).to_bytes(4, "big"))
    content[at : at + 4] = (0x12345678).to_bytes(4, "big")
    path.write_bytes(content)
    async with blocklayer.Graph() as graph:
        with pytest.raises(UnknownFormatError, match="without its format"):
            await graph.open(path)
        assert not graph.nodes

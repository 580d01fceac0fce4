"""Opening a qcow2 image: what is refused, what happens before the first write, and that a reader changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import blocklayer
from blocklayer.base.errors import (
    CorruptImageError,
    FormatError,
    IOFailedError,
    OptionError,
    ReadOnlyError,
    ReferenceRefusedError,
    UnsupportedFeatureError,
)
from blocklayer.codec.qcow2.features import Autoclear, Incompatible
from tests.helpers.qcow2_disk import (
    assert_sound,
    file_of,
    header_of,
    memory_graph,
    new_image,
    open_image,
    opened,
    qcow2,
)
from tests.helpers.scripted import fail_on
from tests.helpers.virtual_time import virtual_time

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20
INCOMPATIBLE, AUTOCLEAR = 72, 88


def set_bits(content: bytearray, field: int, bits: int) -> None:
    """Set feature bits in a header."""
    word = int.from_bytes(content[field : field + 8], "big") | bits
    content[field : field + 8] = word.to_bytes(8, "big")


@virtual_time
async def test_a_reader_writes_nothing_whatever_the_header_says() -> None:
    content = new_image(SIZE)
    set_bits(content, INCOMPATIBLE, Incompatible.DIRTY.value)
    set_bits(content, AUTOCLEAR, 1 << 60)
    before = bytes(content)
    async with opened(content, read_only=True) as disk:
        assert await disk.read(0, SIZE) == bytes(SIZE)
        for request in (disk.write(0, b"x"), disk.write_zeroes(0, 512), disk.discard(0, 512), disk.truncate(0)):
            with pytest.raises(ReadOnlyError):
                await request
        await disk.flush()
        assert file_of(disk).log == []
    assert bytes(content) == before


@virtual_time
async def test_autoclear_bits_that_we_cannot_keep_true_are_cleared_before_anything_is_written() -> None:
    content = new_image(SIZE)
    set_bits(content, AUTOCLEAR, 1 << 60)
    async with opened(content):
        assert header_of(content).autoclear is Autoclear.NONE


@virtual_time
async def test_the_raw_bit_of_a_data_file_is_kept() -> None:
    content = new_image(SIZE, data_file="data", data_file_raw=True)
    async with opened(content, data_file={"driver": "memfile", "content": bytearray(SIZE)}) as disk:
        await disk.write(512, b"raw")
        assert header_of(content).autoclear is Autoclear.DATA_FILE_RAW
        assert disk.children["data-file"].node.driver._bytes[512:515] == b"raw"


@pytest.mark.parametrize("read_only", [True, False])
@virtual_time
async def test_unknown_incompatible_features_are_named(read_only: bool) -> None:
    """By the image's own feature name table if it has one, else by number."""
    content = new_image(SIZE)
    set_bits(content, INCOMPATIBLE, 1 << 40)
    async with memory_graph() as graph:
        with pytest.raises(UnsupportedFeatureError, match="40") as caught:
            await open_image(graph, content, read_only=read_only)
        assert len(caught.value.features) == 1
        assert not graph.nodes


@virtual_time
async def test_an_image_that_is_marked_corrupt_opens_for_reading_only() -> None:
    content = new_image(SIZE)
    set_bits(content, INCOMPATIBLE, Incompatible.CORRUPT.value)
    async with memory_graph() as graph:
        with pytest.raises(CorruptImageError, match="marked corrupt; check and repair it, or open it read-only"):
            await open_image(graph, content)
        disk = await open_image(graph, content, read_only=True)
        assert await disk.read(0, 512) == bytes(512)


@virtual_time
async def test_a_dirty_image_is_repaired_before_its_first_write() -> None:
    """A crash with lazy refcounts: data and mappings are there, counts are not."""
    content = new_image(SIZE, lazy_refcounts=True)
    async with memory_graph() as graph:
        disk = await open_image(graph, content)
        await disk.write(0, b"x" * 70000)
        await disk.flush()
        crashed = bytearray(content)
        await disk.close()
    assert header_of(crashed).is_dirty
    with pytest.raises(AssertionError):
        assert_sound(crashed)
    async with opened(crashed) as disk:
        assert not header_of(crashed).is_dirty
        assert_sound(crashed)
        await disk.write(200000, b"y" * 70000)
        assert await disk.read(0, 70000) == b"x" * 70000
        assert header_of(crashed).is_dirty
    assert not header_of(crashed).is_dirty
    assert_sound(crashed)


@virtual_time
async def test_the_dirty_bit_is_on_disk_before_anything_else_and_is_tried_again() -> None:
    content = new_image(SIZE, lazy_refcounts=True)
    async with opened(content) as disk:
        file_of(disk).script = fail_on("write")
        with pytest.raises(IOFailedError):
            await disk.write(0, b"x")
        file_of(disk).script = None
        file_of(disk).log.clear()
        await disk.write(0, b"x")
        (first, second), rest = file_of(disk).log[:2], file_of(disk).log[2:]
        assert first[:2] == ("write", 0)
        assert second == ("flush",)
        assert all(event[1] > 0 for event in rest)


@pytest.mark.parametrize(
    ("recorded", "option", "is_lazy"), [(True, None, True), (True, False, False), (False, True, True)]
)
@virtual_time
async def test_the_option_lazy_refcounts_goes_before_the_image(
    recorded: bool, option: bool | None, is_lazy: bool
) -> None:
    content = new_image(SIZE, lazy_refcounts=recorded)
    async with opened(content, **({} if option is None else {"lazy_refcounts": option})) as disk:
        await disk.write(0, b"x")
        assert header_of(content).is_dirty is is_lazy


@virtual_time
async def test_version_2_knows_no_lazy_refcounts() -> None:
    content = new_image(SIZE, compat="0.10")
    async with opened(content, lazy_refcounts=True) as disk:
        await disk.write(0, b"x")
        assert not qcow2(disk).lazy
    assert_sound(content)


@virtual_time
async def test_without_a_name_a_data_file_has_to_be_passed() -> None:
    content = new_image(SIZE, data_file="data")
    at = content.index((0x44415441).to_bytes(4, "big"))
    content[at : at + 4] = (0x12345678).to_bytes(4, "big")
    async with memory_graph() as graph:
        with pytest.raises(FormatError, match="does not name it; pass data_file"):
            await open_image(graph, content)
        disk = await open_image(graph, content, data_file={"driver": "memfile", "content": bytearray(SIZE)})
        await disk.write(0, b"x")
        assert await disk.read(0, 1) == b"x"


@virtual_time
async def test_the_caller_may_replace_the_backing_file_or_leave_it_out() -> None:
    content = new_image(SIZE, backing_file="/nowhere/base", backing_fmt="raw")
    base = bytearray(b"b" * SIZE)
    async with memory_graph() as graph:
        with pytest.raises(ReferenceRefusedError):
            await open_image(graph, content)
        alone = await open_image(graph, content, backing=None, read_only=True)
        assert await alone.read(0, 4) == bytes(4)
        over = await open_image(graph, content, backing={"driver": "memfile", "content": base}, read_only=True)
        assert await over.read(0, 4) == b"bbbb"
        await over.close()
        await alone.close()
        assert not graph.nodes


@virtual_time
async def test_an_unknown_option_is_refused_by_name() -> None:
    async with memory_graph() as graph:
        with pytest.raises(OptionError, match="l2_cash_size"):
            await open_image(graph, new_image(SIZE), l2_cash_size=1)
        assert not graph.nodes


async def test_errors_in_the_header_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"no image")
    async with blocklayer.Graph() as graph:
        with pytest.raises(FormatError, match="not a qcow2 image") as caught:
            await graph.open(path)
    assert caught.value.filename == str(path)


async def test_a_relative_data_file_lies_beside_the_image(tmp_path: Path) -> None:
    """QEMU looks from its working directory; an image must not depend on who opens it from where."""
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=SIZE, data_file="data.raw")
        disk = await graph.open(path)
        await disk.write(4096, b"data")
        await disk.close()
    assert (tmp_path / "data.raw").read_bytes()[4096:4100] == b"data"

"""What commands share: opening what a user names, sizes for people, options for machines."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blocklayer
from blocklayer.cli import common
from blocklayer.cli.parser import FailureError


def arguments(**given: object) -> argparse.Namespace:
    """What ``add_source_arguments`` makes of a command line."""
    parser = argparse.ArgumentParser()
    common.add_source_arguments(parser)
    common.add_cache_argument(parser, "--cache")
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (196616, "192 KiB"),
        (1023 << 10, "0.999 MiB"),
        (64 << 20, "64 MiB"),
        (1 << 40, "1 TiB"),
        (1 << 60, "1 EiB"),
        ((1 << 63) - 512, "8 EiB"),
    ],
)
def test_sizes_for_people_have_three_digits(size: int, text: str) -> None:
    """As qemu-img info prints them."""
    assert common.human_size(size) == text


@given(st.integers(0, (1 << 63) - 512))
def test_a_size_for_people_is_right_to_three_digits(size: int) -> None:
    number, unit = common.human_size(size).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].index(unit)
    assert math.isclose(float(number) * factor, size, rel_tol=0.0051)


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        ([], {}),
        (["cluster_size=4k"], {"cluster_size": "4k"}),
        (["cluster-size=4k,compat=1.1", "compat=0.10"], {"cluster_size": "4k", "compat": "0.10"}),
        (["data_file=a,,b"], {"data_file": "a,b"}),
        (["lazy_refcounts"], {"lazy_refcounts": "on"}),
    ],
)
def test_create_options_are_merged_the_last_one_wins(texts: list[str], options: dict[str, object]) -> None:
    assert common.parse_create_options(texts) == options


def test_json_is_indented_by_four_and_keeps_names_readable() -> None:
    assert common.dump_json({"name": "ä", "list": [1]}) == '{\n    "name": "ä",\n    "list": [\n        1\n    ]\n}'


def test_the_size_on_disk_is_what_is_allocated(here: Path) -> None:
    Path("sparse").touch()
    with open("sparse", "r+b") as file:
        file.truncate(1 << 20)
    assert (common.disk_size("sparse"), common.disk_size("nowhere"), common.disk_size(None)) == (0, None, None)


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
async def test_a_raw_file_ends_with_a_sector(here: Path, length: int, size: int) -> None:
    Path("a.raw").write_bytes(bytes(length))
    async with blocklayer.Graph() as graph:
        assert common.virtual_size(await graph.open("a.raw", read_only=True)) == size


@pytest.mark.parametrize(
    ("name", "given", "driver"),
    [
        ("disk.img", {}, "qcow2"),
        ("file:disk.img", {}, "qcow2"),
        ("disk.img", {"format": "raw"}, "raw"),
        ('json:{"driver": "raw", "file": {"driver": "file", "filename": "disk.img"}}', {}, "raw"),
        ('json:{"driver": "raw", "file.filename": "disk.img"}', {}, "raw"),
        ('json:{"file.filename": "disk.img"}', {}, "qcow2"),
        ('json:{"filename": "disk.img"}', {}, "file"),
        ("driver=qcow2,file.filename=disk.img", {"image_opts": True}, "qcow2"),
        ("file.filename=disk.img", {"image_opts": True}, "qcow2"),
    ],
)
async def test_ways_to_name_an_image(here: Path, name: str, given: dict[str, object], driver: str) -> None:
    format = given.pop("format", None)
    async with blocklayer.Graph() as graph:
        await graph.create("disk.img", format="qcow2", size="1M")
        node = await common.open_image(graph, name, arguments(**given), format=format)
        assert (node.driver.name, node.read_only) == (driver, True)


async def test_the_content_decides_whatever_the_name_says_unless_a_format_is_given(here: Path) -> None:
    """Where the library goes by the name's ending (decision 4)."""
    async with blocklayer.Graph() as graph:
        await graph.create("disk.raw", format="qcow2", size="1M")
        assert (await common.open_image(graph, "disk.raw", arguments())).driver.name == "qcow2"
        Path("disk.qcow2").write_bytes(bytes(512))
        guessed = await common.open_image(graph, "disk.qcow2", arguments(), read_only=False)
        assert guessed.driver.name == "raw"
        with pytest.raises(blocklayer.ReadOnlyError, match="would make it look like qcow2"):
            await guessed.write(0, Path("disk.raw").read_bytes()[:512])


async def test_options_of_an_image_exclude_a_format(here: Path) -> None:
    async with blocklayer.Graph() as graph:
        with pytest.raises(FailureError, match="--image-opts and -f exclude each other"):
            await common.open_image(graph, "driver=raw", arguments(image_opts=True), format="raw")


async def test_cache_modes_are_those_of_nodes(here: Path) -> None:
    Path("a.raw").write_bytes(bytes(4096))
    async with blocklayer.Graph() as graph:
        for mode in blocklayer.CacheMode:
            node = await common.open_image(graph, "a.raw", arguments(cache=mode.value))
            assert node.options.cache is mode
        with pytest.raises(blocklayer.OptionError, match="Invalid cache option: often; it is one of writeback, "):
            await common.open_image(graph, "a.raw", arguments(cache="often"))


async def test_a_refused_reference_says_how_it_can_be_followed(here: Path) -> None:
    inner = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "a.raw"}})
    Path("a.raw").write_bytes(bytes(512))
    async with blocklayer.Graph() as graph:
        await graph.create("disk.img", format="qcow2", size=512, backing_file=f"json:{inner}", backing_fmt="raw")
        with pytest.raises(blocklayer.ReferenceRefusedError) as raised:
            await common.open_image(graph, "disk.img", arguments())
        assert str(raised.value).endswith(
            "which was not opened: it uses the protocol 'json'; --trust follows it, if the image is one that you trust"
        )
        node = await common.open_image(graph, "disk.img", arguments(trust=True))
        assert node.backing is not None

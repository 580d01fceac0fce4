"""``blocklayer create`` takes what ``qemu-img create`` takes, says what it says, and makes the same images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.command import Outcome, assert_same_errors, blocklayer, qemu
from tests.helpers.peers import needs, qemu_check

pytestmark = needs("qemu-img", "qemu-io")

BASE = ["-b", "base.qcow2", "-F", "qcow2"]
JSON_BASE = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}'

SIZES = ["1k", "1K", "1.5M", "10b", "1B", "1000", "0x10000", "0", "1e3", "-1", "x", "9E", "8E", "1,5", ""]
QCOW2_OPTIONS = [
    "size=1M",
    "size=1.5M",
    "cluster_size=4k",
    "cluster_size=2M",
    "cluster_size=65536,compat=0.10",
    "compat=1.1",
    "compat=v2",
    "compat=v3",
    "lazy_refcounts=on",
    "refcount_bits=1",
    "refcount_bits=64,cluster_size=512",
    "extended_l2=on",
    "extended_l2=yes,cluster_size=128k",
    "compression_type=zstd",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "preallocation=off",
    "data_file=data.raw",
    "data_file=data.raw,data_file_raw=on",
    "data_file=a,,b",
    "compat=1.1,data_file=data.raw,preallocation=metadata,data_file_raw=on,lazy_refcounts=on",
    # refused
    "preallocation=sometimes",
    "compat=2.0",
    "cluster_size=3k",
    "cluster_size=4M",
    "cluster_size=256",
    "cluster_size",
    "cluster_size=big",
    "refcount_bits=3",
    "refcount_bits=128",
    "unheard-of=1",
    "lazy_refcounts=on,compat=0.10",
    "extended_l2=on,cluster_size=8k",
    "compression_type=lzma",
    "data_file_raw=on",
    "backing_fmt=qcow2",
    "",
    ",cluster_size=4k",
    "cluster_size=4k,",
]


@pytest.fixture
def twins(here: Path, all_images: Path) -> Path:
    """Two folders, one for each program, with the same base images."""
    for tool in (blocklayer, qemu):
        place = here / tool.__name__
        place.mkdir()
        shutil.copy(all_images / "base.qcow2", place)
        (place / "five.raw").write_bytes(b"hello")
    return here


def both(folder: Path, arguments: list[str]) -> tuple[Outcome, Outcome]:
    """Run both, each in its folder; they end alike and print the same."""
    outcomes = []
    for tool in (blocklayer, qemu):
        os.chdir(folder / tool.__name__)
        outcomes.append(tool("create", *arguments))
    os.chdir(folder)
    ours, theirs = outcomes
    assert ours.status == theirs.status, ours.err + theirs.err
    assert_same_errors(ours, theirs)
    if not ours.status:
        assert ours.out == theirs.out
    return ours, theirs


def assert_equal_images(folder: Path) -> None:
    """The same files, of the same length, and the same image."""
    files = [{path.name: path.stat().st_size for path in (folder / tool).iterdir()} for tool in ("blocklayer", "qemu")]
    assert files[0].keys() == files[1].keys()
    assert files[0]["new"] == files[1]["new"] or files[0]["new"] % 512 == 0
    facts = []
    for tool in ("blocklayer", "qemu"):
        os.chdir(folder / tool)
        facts.append(qemu("info", "--output=json", "new").json)
        facts[-1].pop("actual-size")
        if facts[-1].get("backing-filename") != "gone.qcow2" and facts[-1]["format"] == "qcow2":
            qemu_check("new")
    os.chdir(folder)
    assert facts[0] == facts[1]


def no_image(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "blocklayer").iterdir()) == ["base.qcow2", "five.raw"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_sizes_have_suffixes(twins: Path, format: str, size: str) -> None:
    ours, _ = both(twins, ["-f", format, "new", size])
    if ours.status:
        no_image(twins)
    else:
        assert_equal_images(twins)


@pytest.mark.parametrize("options", QCOW2_OPTIONS)
def test_options_of_qcow2(twins: Path, options: str) -> None:
    size = [] if "size=1" in options.split(",")[0][:6] else ["3M"]
    ours, _ = both(twins, ["-f", "qcow2", "-o", options, "new", *size])
    if ours.status:
        no_image(twins)
    else:
        assert_equal_images(twins)


@pytest.mark.parametrize("options", ["preallocation=off", "preallocation=falloc", "preallocation=full", "unheard-of=1"])
def test_options_of_raw(twins: Path, options: str) -> None:
    ours, _ = both(twins, ["-o", options, "new", "1M"])
    if not ours.status:
        assert_equal_images(twins)
        blocks = [(twins / tool / "new").stat().st_blocks for tool in ("blocklayer", "qemu")]
        assert blocks == ([0, 8] if options == "preallocation=off" else [2048, 2048])  # qemu-img writes one block


@pytest.mark.parametrize(
    "arguments",
    [
        ["new"],
        ["new", "1M"],
        ["new", "8M"],
        ["new", "0"],
        ["-u", "new", "1M"],
        ["-o", "extended_l2=on", "new"],
        ["-o", "cluster_size=4k", "-o", "lazy_refcounts=on", "new"],
        ["-o", "backing_file=five.raw,backing_fmt=raw", "new"],
    ],
)
def test_an_overlay_has_the_size_of_its_base_unless_one_is_given(twins: Path, arguments: list[str]) -> None:
    ours, _ = both(twins, ["-f", "qcow2", *BASE, *arguments])
    assert ours.status == 0
    assert_equal_images(twins)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "backing_file=base.qcow2,backing_fmt=qcow2", "new"],
        ["-b", "five.raw", "-F", "raw", "new"],
        ["-b", "base.qcow2", "-F", "raw", "new"],
        ["-b", JSON_BASE, "-F", "qcow2", "new"],
        ["-u", "-b", "gone.qcow2", "-F", "qcow2", "new", "1M"],
        ["-q", "-b", "base.qcow2", "-F", "qcow2", "new"],
        ["new", "-q", "1M"],
        ["new", "1M", "-q", "-o", "cluster_size=4k"],
    ],
)
def test_ways_to_name_a_base(twins: Path, arguments: list[str]) -> None:
    ours, _ = both(twins, ["-f", "qcow2", *arguments])
    assert ours.status == 0
    assert_equal_images(twins)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["new"],
        ["-f", "qcow2", "new"],
        ["-f", "unheard-of", "new", "1M"],
        ["-f", "qcow2", "new", "1M", "more"],
        ["-f", "qcow2", "-z", "new", "1M"],
        ["-f"],
        ["-f", "qcow2", "-o", "size=1M", "new", "2M"],
        ["-f", "qcow2", "no-such-folder/new", "1M"],
        ["-f", "qcow2", "-b", "base.qcow2", "new"],
        ["-f", "qcow2", "-b", "gone.qcow2", "-F", "qcow2", "new"],
        ["-f", "qcow2", "-b", "gone.qcow2", "-F", "qcow2", "new", "1M"],
        ["-f", "qcow2", "-b", "five.raw", "-F", "qcow2", "new", "1M"],
        ["-f", "qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2", "new"],
        ["-f", "qcow2", "-u", "-b", "base.qcow2", "new", "1M"],
        ["-f", "qcow2", "-b", "base.qcow2", "-F", "unheard-of", "new"],
        ["-f", "qcow2", "-F", "qcow2", "new", "1M"],
        ["-f", "qcow2", "-b", "", "-F", "qcow2", "new", "1M"],
        ["-f", "qcow2", "-b", "new", "-F", "qcow2", "new", "1M"],
        ["-f", "raw", "-b", "base.qcow2", "new"],
        ["-f", "raw", "-b", "base.qcow2", "-F", "qcow2", "new", "1M"],
        ["-f", "qcow2", "-o", "cluster_size=512", "new", "1T"],
        ["-f", "unheard-of", "-o", "help"],
    ],
)
def test_what_qemu_refuses_is_refused_and_leaves_nothing_behind(twins: Path, arguments: list[str]) -> None:
    ours, _ = both(twins, arguments)
    assert ours.status == 1
    no_image(twins)


def test_an_image_cannot_be_its_own_base(here: Path) -> None:
    """By whatever name: creating it would destroy the base."""
    qemu("create", "-f", "qcow2", "disk.qcow2", "1M")
    os.symlink("disk.qcow2", "link.qcow2")
    before = Path("disk.qcow2").read_bytes()
    for name in ("disk.qcow2", "./disk.qcow2", "link.qcow2", here / "disk.qcow2"):
        outcome = blocklayer("create", "-f", "qcow2", "-b", name, "-F", "qcow2", "disk.qcow2", "1M")
        assert outcome == (1, "", "blocklayer: disk.qcow2: it cannot be its own backing file\n")
    assert Path("disk.qcow2").read_bytes() == before


def test_a_base_without_a_format_is_looked_at_for_the_message_alone(here: Path) -> None:
    qemu("create", "-f", "qcow2", "base.img", "1M")
    outcome = blocklayer("create", "-f", "qcow2", "-b", "base.img", "new.qcow2")
    assert outcome.err == (
        "blocklayer: new.qcow2: Backing file specified without backing format (it looks like qcow2); say it with -F\n"
    )


def test_a_base_is_named_from_the_new_image_s_folder(here: Path) -> None:
    """Not from the folder that the command runs in."""
    Path("sub").mkdir()
    qemu("create", "-f", "qcow2", "sub/base.qcow2", "3M")
    outcome = blocklayer("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "sub/new.qcow2")
    assert outcome.status == 0
    assert qemu("info", "--output=json", "sub/new.qcow2").json["virtual-size"] == 3 << 20


def test_an_image_that_is_there_is_replaced(here: Path) -> None:
    Path("new").write_bytes(b"x" * 100000)
    assert blocklayer("create", "-f", "raw", "new", "4k").status == 0
    assert Path("new").read_bytes() == bytes(4096)


@pytest.mark.parametrize("arguments", [["-f", "qcow2"], ["-f", "raw"], [], ["-f", "qcow2", "-o", "cluster_size=4k"]])
@pytest.mark.parametrize("word", ["help", "?", "size=1,help"])
def test_help_lists_the_options_as_qemu_lists_them(here: Path, arguments: list[str], word: str) -> None:
    """A part of them: encryption is not supported."""
    ours, theirs = (tool("create", *arguments, "-o", word, "new") for tool in (blocklayer, qemu))
    assert ours.status == theirs.status == 0
    listed = ours.out.splitlines()[1:]
    assert [line for line in theirs.out.splitlines() if line in listed] == listed != []
    assert not list(here.iterdir())


def test_what_help_lists_can_be_given(here: Path) -> None:
    """Every name in the list is an option of the format."""
    for format in ("raw", "qcow2"):
        lines = blocklayer("create", "-f", format, "-o", "help").out.splitlines()[1:]
        for name in (line.split("=")[0].strip() for line in lines):
            wrong = blocklayer("create", "-f", format, "-o", f"{name}=\x01", "new", "1M")
            assert "unknown option" not in wrong.err
            shutil.rmtree("new", ignore_errors=True)

"""qemu-img takes the images that ``create`` lays out for clean, and its headers are read as meant."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from blocklayer.base.modes import Preallocation
from blocklayer.base.units import GIB, MIB
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.create import CreateOptions, plan_create
from blocklayer.codec.qcow2.features import Autoclear, Compatible, Incompatible
from tests.helpers.peers import needs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs("qemu-img")


def qemu_img(*arguments: str | Path) -> str:
    """Run qemu-img in the folder of its files (data files are found from there) and return what it prints."""
    command = ["qemu-img", *map(str, arguments)]
    folder = next(each.parent for each in arguments if not isinstance(each, str))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def create(path: Path, options: CreateOptions) -> None:
    """Write the image that ``options`` describe."""
    plan = plan_create(options)
    with path.open("wb") as file:
        file.truncate(plan.file_size)
        for offset, data in plan.writes():
            file.seek(offset)
            file.write(data)
    if options.data_file is not None:
        with (path.parent / options.data_file).open("wb") as file:
            file.truncate(plan.header.size)


def check(path: Path) -> dict[str, int]:
    """The result of qemu-img check, which found nothing wrong (exit status 0)."""
    result: dict[str, int] = json.loads(qemu_img("check", "--output", "json", "-f", "qcow2", path))
    assert {"leaks", "corruptions"}.isdisjoint(result)
    return result


LAYOUTS: list[dict[str, object]] = [
    {"size": 0},
    {"size": 1000},
    {"size": GIB},
    {"size": GIB, "compat": "0.10"},
    {"size": 128 * GIB, "cluster_size": 512},
    {"size": 5 * MIB, "cluster_size": 512, "preallocation": Preallocation.METADATA},
    {"size": 5 * MIB, "cluster_size": 512, "refcount_bits": 64, "preallocation": Preallocation.METADATA},
    {"size": 5 * MIB, "cluster_size": 1024, "refcount_bits": 1, "preallocation": Preallocation.METADATA},
    {"size": 3 * MIB + 512, "compat": "0.10", "preallocation": Preallocation.METADATA},
    {"size": 9 * GIB, "preallocation": Preallocation.METADATA},
    {"size": 9 * GIB, "cluster_size": 2 * MIB, "refcount_bits": 2, "preallocation": Preallocation.METADATA},
    {"size": GIB, "cluster_size": 16384, "extended_l2": True, "preallocation": Preallocation.METADATA},
    {"size": GIB, "extended_l2": True, "lazy_refcounts": True, "compression_type": "zstd"},
    {"size": GIB, "data_file": "data.raw"},
    {"size": GIB, "data_file": "data.raw", "preallocation": Preallocation.METADATA},
    {"size": GIB, "data_file": "data.raw", "data_file_raw": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_we_lay_out_is_clean_and_complete_for_qemu(tmp_path: Path, layout: dict[str, object]) -> None:
    """No leak, no corruption, the whole file counted, and the size is that of the options."""
    options = CreateOptions(**layout)  # type: ignore[arg-type]  # a table of keyword arguments
    path = tmp_path / "image.qcow2"
    create(path, options)
    result = check(path)
    assert result["image-end-offset"] == path.stat().st_size
    info: dict[str, Any] = json.loads(qemu_img("info", "--output", "json", path))
    assert info["virtual-size"] == plan_create(options).header.size
    assert info["cluster-size"] == options.cluster_size
    details = info["format-specific"]["data"]
    assert details["compat"] == options.compat
    assert details["refcount-bits"] == options.refcount_bits
    assert details.get("extended-l2", False) is options.extended_l2
    assert details.get("lazy-refcounts", False) is options.lazy_refcounts
    assert details["compression-type"] == options.compression_type
    assert details.get("data-file") == options.data_file
    if options.lays_out_tables and not options.extended_l2:
        assert result["allocated-clusters"] == result["total-clusters"]


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each["size"] == GIB], ids=str)
def test_a_new_image_reads_as_zeroes(tmp_path: Path, layout: dict[str, object]) -> None:
    """Preallocated or not, qemu-img compares it equal to a sparse file."""
    create(tmp_path / "image.qcow2", CreateOptions(**layout))  # type: ignore[arg-type]  # as above
    with (tmp_path / "zero.raw").open("wb") as file:
        file.truncate(GIB)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / "image.qcow2", tmp_path / "zero.raw")


def test_a_new_overlay_shows_its_backing_file(tmp_path: Path) -> None:
    """Also with reserved clusters (extended L2): their subclusters are not allocated."""
    (tmp_path / "base.raw").write_bytes(b"base" * (MIB // 4))
    for name, extra in {
        "plain": {},
        "reserved": {"extended_l2": True, "preallocation": Preallocation.METADATA},
    }.items():
        options = CreateOptions(MIB, backing_file="base.raw", backing_fmt="raw", **extra)  # type: ignore[arg-type]
        create(tmp_path / name, options)
        check(tmp_path / name)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / name, tmp_path / "base.raw")


QEMU_OPTIONS: list[tuple[str, dict[str, object]]] = [
    ("compat=0.10", {"version": 2, "feature_names": ()}),
    ("compat=1.1", {"version": 3, "refcount_order": 4, "incompatible": Incompatible.NONE}),
    ("cluster_size=512", {"cluster_bits": 9}),
    ("cluster_size=2M", {"cluster_bits": 21}),
    ("refcount_bits=1", {"refcount_order": 0}),
    ("refcount_bits=64", {"refcount_order": 6}),
    ("lazy_refcounts=on", {"compatible": Compatible.LAZY_REFCOUNTS}),
    ("extended_l2=on", {"incompatible": Incompatible.EXTENDED_L2}),
    ("compression_type=zstd", {"incompatible": Incompatible.COMPRESSION_TYPE, "compression_type": 1}),
    ("data_file=data.raw", {"incompatible": Incompatible.DATA_FILE, "data_file": "data.raw"}),
    (
        "data_file=data.raw,data_file_raw=on",
        {"incompatible": Incompatible.DATA_FILE, "autoclear": Autoclear.DATA_FILE_RAW, "data_file": "data.raw"},
    ),
    ("backing_file=base.raw,backing_fmt=raw", {"backing_file": "base.raw", "backing_format": "raw"}),
    ("backing_file=base.raw,backing_fmt=raw,compat=0.10", {"backing_file": "base.raw", "backing_format": "raw"}),
]


@pytest.mark.parametrize(("options", "expected"), QEMU_OPTIONS, ids=[options for options, _ in QEMU_OPTIONS])
def test_headers_that_qemu_writes_are_read_as_meant_and_written_alike(
    tmp_path: Path, options: str, expected: dict[str, object]
) -> None:
    """Each option appears in its field; writing the header again gives QEMU's bytes."""
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    options = options.replace("data_file=data.raw", f"data_file={tmp_path / 'data.raw'}")
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", options, path, "10M")
    data = path.read_bytes()
    header = qcow2_header.parse(data[: qcow2_header.bytes_needed(data[:512])], file_size=len(data))
    assert header.size == 10 * MIB
    for name, value in expected.items():
        found = getattr(header, name)
        assert found == (str(tmp_path / "data.raw") if name == "data_file" else value)
    written = qcow2_header.serialize(header)
    assert written == data[: len(written)]


def test_stored_bitmaps_and_snapshots_of_qemu_are_seen(tmp_path: Path) -> None:
    """The bitmaps extension is parsed and written back byte for byte; snapshots are counted."""
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", path, "10M")
    qemu_img("bitmap", "--add", path, "first")
    qemu_img("snapshot", "-c", "one", path)
    data = path.read_bytes()
    header = qcow2_header.parse(data[:65536], file_size=len(data))
    assert header.bitmaps is not None
    assert header.bitmaps.nb_bitmaps == 1
    assert header.nb_snapshots == 1
    written = qcow2_header.serialize(header)
    assert qcow2_header.parse(written, file_size=len(data)) == header


def test_qemu_reads_a_header_that_we_rewrote(tmp_path: Path) -> None:
    """A renamed backing file in our words is what qemu-img info shows."""
    path = tmp_path / "image.qcow2"
    create(path, CreateOptions(MIB, backing_file="old.raw", backing_fmt="raw"))
    data = path.read_bytes()
    header = qcow2_header.parse(data[:65536], file_size=len(data))
    renamed = replace(header, backing_file="a much longer name.raw")
    path.write_bytes(qcow2_header.serialize(renamed) + data[len(qcow2_header.serialize(renamed)) :])
    info = json.loads(qemu_img("info", "--output", "json", path))
    assert info["backing-filename"] == "a much longer name.raw"
    assert info["backing-filename-format"] == "raw"

"""Header extensions: a list with padding, kept byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import FormatError, LimitError
from blocklayer.codec.qcow2.extensions import (
    BitmapsExtension,
    Extension,
    ExtensionType,
    join_extensions,
    parse_bitmaps,
    serialize_bitmaps,
    split_extensions,
)


def test_an_extension_lies_in_the_header_like_this() -> None:
    """Type, length, data, padding; then the end mark."""
    data = bytes.fromhex("e2792aca 00000003 7261770000000000 00000000 00000000")
    parts = (Extension(ExtensionType.BACKING_FORMAT, b"raw"),)
    assert join_extensions(parts) == data
    assert split_extensions(data + b"what follows") == parts


@given(st.lists(st.builds(Extension, st.integers(1, 2**32 - 1), st.binary(max_size=30)), max_size=5))
def test_unknown_extensions_come_back(parts: list[Extension]) -> None:
    """Also the same type twice, as long as it is not one of ours."""
    if not {part.type for part in parts} & set(ExtensionType):
        assert split_extensions(join_extensions(parts)) == tuple(parts)


def test_the_area_may_end_without_a_mark() -> None:
    """The backing file's name, or the cluster's end, bounds it."""
    data = join_extensions([Extension(7, b"12345678")])
    assert split_extensions(data[:-8]) == split_extensions(data) == (Extension(7, b"12345678"),)
    assert split_extensions(b"") == ()


def test_an_extension_that_does_not_fit_is_refused() -> None:
    """Its length is not believed."""
    for data in (bytes.fromhex("00000007 00000009 0000000000000000"), bytes.fromhex("00000007 ffffffff")):
        with pytest.raises(FormatError):
            split_extensions(data)


@given(st.binary(max_size=200))
def test_any_area_is_a_list_or_a_format_error(area: bytes) -> None:
    """Fuzz."""
    try:
        parts = split_extensions(area)
    except FormatError:
        return
    assert sum(8 + len(part.data) for part in parts) <= len(area)


def test_the_bitmaps_extension_has_four_fields() -> None:
    """Golden bytes; the reserved field must be zero."""
    data = bytes.fromhex("00000002 00000000 0000000000000040 0000000000070000")
    bitmaps = BitmapsExtension(nb_bitmaps=2, directory_offset=0x70000, directory_size=64)
    assert serialize_bitmaps(bitmaps) == Extension(ExtensionType.BITMAPS, data)
    assert parse_bitmaps(data, cluster_size=65536) == bitmaps
    for wrong in (data[:-1], data[:4] + b"\0\0\0\1" + data[8:], b"\0\0\0\0" + data[4:], data[:-1] + b"\1"):
        with pytest.raises(FormatError):
            parse_bitmaps(wrong, cluster_size=65536)
    with pytest.raises(LimitError):
        parse_bitmaps(data[:8] + b"\x7f" + data[9:], cluster_size=65536)

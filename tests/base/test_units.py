"""Sizes as people write them, read and written; what QEMU refuses is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import OptionError
from blocklayer.base.units import EIB, GIB, KIB, MIB, PIB, SIZE_MAX, TIB, format_size, parse_size

SIZES = {
    "0": 0,
    "4096": 4096,
    "64k": 64 * KIB,
    "64K": 64 * KIB,
    "64KiB": 64 * KIB,
    "64kb": 64 * KIB,
    "512b": 512,
    "512 B": 512,
    " 1.5G ": 3 * GIB // 2,
    "0.5M": MIB // 2,
    "0.1k": 102,
    "2t": 2 * TIB,
    "3P": 3 * PIB,
    "1 EiB": EIB,
    "007": 7,
    "9223372036854775296": SIZE_MAX,
}

NO_SIZES = [
    *(
        "",
        "k",
        "-1",
        "+1",
        "1x",
        "1kk",
        "1k b",
        "1.",
        ".5k",
        "1,5k",
        "1e3",
        "0x10",
        "1_000",
        "1 2",
        "nan",
        "inf",
        "\u0663k",
    ),
    *("1.5", "1.5b", "0.5 B", "9" * 5000, "1." + "1" * 5000 + "k"),
]


@pytest.mark.parametrize(("text", "expected"), SIZES.items())
def test_a_size_is_a_number_with_or_without_a_unit_of_powers_of_1024(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", NO_SIZES, ids=lambda text: text[:10])
def test_what_is_no_size_is_refused_by_its_name(text):
    """Half a byte too: whoever writes 1.5 has forgotten the unit."""
    with pytest.raises(OptionError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is not a size; write bytes or a number with k, M, G, T, P or E"


@pytest.mark.parametrize("value", [-1, SIZE_MAX + 1, "9223372036854775297", "8E", "99999999E"])
def test_a_size_stays_within_offsets_of_63_bits(value):
    with pytest.raises(OptionError) as caught:
        parse_size(value)
    assert str(caught.value) == f"size {value!r} is outside 0 to 9223372036854775296 bytes"


@given(st.integers(0, SIZE_MAX))
def test_bytes_pass_through_as_number_and_as_text(size):
    assert (parse_size(size), parse_size(str(size))) == (size, size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1000 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023 * KIB, "1023 KiB"),
        (MIB - 1, "1024 KiB"),
        (10 * MIB, "10 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (1234 * GIB, "1.21 TiB"),
        (5 * PIB, "5 PiB"),
        (SIZE_MAX, "8 EiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_of_which_it_has_one(size, expected):
    assert format_size(size) == expected


@given(st.integers(0, 7 * EIB))
def test_what_is_shown_can_be_read_and_is_right_to_half_a_percent(size):
    assert abs(parse_size(format_size(size)) - size) <= size / 199

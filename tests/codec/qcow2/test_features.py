"""Feature bits and their names."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import UnsupportedFeatureError
from blocklayer.codec.qcow2.features import (
    STANDARD_NAMES,
    FeatureName,
    parse_names,
    refuse_unknown,
    serialize_names,
)


def test_the_name_table_has_entries_of_48_bytes() -> None:
    """Field, bit, name padded with zeroes; the standard ones in front."""
    data = serialize_names([FeatureName(1, 63, b"last")])
    assert len(data) == 48 * (len(STANDARD_NAMES) + 1)
    assert data[:11] == b"\0\0dirty bit"
    assert data[-48:] == b"\x01\x3flast".ljust(48, b"\0")


def test_only_names_that_are_not_standard_are_kept() -> None:
    """Others' words for standard bits are replaced by the standard words; a cut entry is ignored."""
    foreign = FeatureName(2, 40, b"x" * 46)
    assert parse_names(serialize_names([foreign]) + b"\0\5cut") == (foreign,)
    assert parse_names(b"\0\0grubby bit".ljust(48, b"\0")) == ()


def test_known_features_pass() -> None:
    """All five incompatible bits of the specification."""
    refuse_unknown(0b11111, ())


def test_every_unknown_feature_is_named() -> None:
    """By the image's words if they decode, by number otherwise."""
    names = [
        FeatureName(0, 5, b"five"),
        FeatureName(0, 6, b"\xff"),
        FeatureName(0, 7, b""),
        FeatureName(1, 8, b"eight"),
    ]
    with pytest.raises(UnsupportedFeatureError) as caught:
        refuse_unknown(0b1_1110_0001, names)
    expected = ("five", "\\xff", "incompatible feature bit 7", "incompatible feature bit 8")
    assert caught.value.features == expected
